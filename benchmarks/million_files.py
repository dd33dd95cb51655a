"""Start-up and memory with an index of 1,000,000 files, after a clean end and after a crash."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path

from benchmarks.stage import Mounted, Result, drop_caches, remounted
from cachefs.mount.leases import boot_id


def run(folder: Path, repetitions: int, *, quick: bool) -> list[Result]:
    files = 10_000 if quick else 1_000_000
    source, scratch = folder / "source", folder / "scratch"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    with remounted(source, scratch):
        pass
    _fill(scratch, files)
    start, loaded, memory, crashed = [], [], [], []
    for _ in range(repetitions):
        drop_caches()
        began = time.perf_counter()
        with remounted(source, scratch, crash=True) as cache:
            start.append(time.perf_counter() - began)
            _wait_until_loaded(cache, files)
            loaded.append(time.perf_counter() - began)
            memory.append(cache.resident_bytes() / 2**20)
        drop_caches()
        began = time.perf_counter()
        with remounted(source, scratch):
            crashed.append(time.perf_counter() - began)
    return [
        Result("until the mount serves, after a clean end", start, "s", "a few seconds"),
        Result("until the index is in memory", loaded, "s"),
        Result("until the mount serves, after a crash", crashed, "s", "a few seconds"),
        Result("daemon memory", memory, "MiB", "below 600"),
    ]


def _wait_until_loaded(cache: Mounted, files: int) -> None:
    while cache.status()["indexed_files"] < files:
        time.sleep(0.05)


def _fill(scratch: Path, files: int) -> None:
    """Put `files` empty complete files into scratch, and into its index, as if the mount had fetched them."""
    boot = boot_id()
    with sqlite3.connect(scratch / "index.db") as index:
        (dataset,) = index.execute("SELECT id FROM datasets").fetchone()
        rows = []
        for number in range(files):
            path = b"class_%03d/image_%07d.jpg" % (number % 1000, number)
            name = hashlib.blake2b(path, digest_size=24).digest()
            rows.append((name, dataset, 0, bytes(8), boot, path, number))
        index.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    index.close()
    folder = scratch / "files" / boot
    for prefix in range(256):
        (folder / f"{prefix:02x}").mkdir(exist_ok=True)
    for name, *_ in rows:
        text = name.hex()
        os.close(os.open(folder / text[:2] / text, os.O_CREAT | os.O_WRONLY, 0o600))
