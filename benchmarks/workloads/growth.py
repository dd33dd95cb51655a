"""The cost as work grows: 1,000 to 1,000,000 files, of metadata in a walk and of entries in the index.

The walk is over a local directory, so that it is the cost of who shows it that grows; rclone walks up to 100,000 files.
The index is filled as if so many files had been fetched; then a mount starts, after a clean end and after a crash.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import CONTENDERS, BenchmarkError, Running, mounted
from benchmarks.results import Circumstances, Goal, Result
from benchmarks.stage import Reader, Stage, rotated
from benchmarks.workloads.metadata import IN_A_DIRECTORY, make_tree
from cachefs.mount.leases import boot_id

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (100, 1_000)
RCLONE_SIZE = 100_000
LARGEST_ONCE = 1_000_000
"""From so many files on a repetition takes minutes, and one is enough."""
START, FIRST, SECOND, MEMORY = "until it serves", "first walk", "second walk", "memory after the walks"
INDEX_START, INDEX_LOADED, INDEX_CRASHED, INDEX_MEMORY = (
    "index: until the mount serves",
    "index: until it is in memory",
    "index: until the mount serves, after a crash",
    "index: memory",
)
MEMORY_GOAL = Goal("below", 600)


def run(stage: Stage) -> list[Result]:
    sizes = QUICK_SIZES if stage.options.is_quick else SIZES
    for files in sizes:
        repetitions = 1 if files >= LARGEST_ONCE else stage.repetitions
        _measure_walks(stage, files, repetitions)
        if stage.contenders("cachefs"):
            _measure_index(stage, files, repetitions)
    for files in sizes:
        for case in (FIRST, SECOND):
            limit = stage.records.find(case, "scratch", files=files)
            for name in ("cachefs", "rclone"):
                stage.records.compare(case, stage.records.find(case, name, files=files), limit)
    for case in (MEMORY, INDEX_MEMORY):
        found = stage.records.find(case, "cachefs", "memory", files=sizes[-1])
        stage.records.aim(found, case, MEMORY_GOAL)
    return stage.records.results()


def _measure_walks(stage: Stage, files: int, repetitions: int) -> None:
    data = make_tree(stage.new_folder(), files, IN_A_DIRECTORY)
    names = ("scratch", "cachefs", *(("rclone",) if files <= RCLONE_SIZE else ()))
    taking_part = stage.contenders(*names)
    known: Circumstances = {"files": files}
    for repetition in range(repetitions):
        for contender in rotated(taking_part, repetition):
            stage.drop_caches()
            began = time.perf_counter()
            with stage.start(contender, data, data) as running:
                if running.process is not None:
                    seconds = time.perf_counter() - began
                    stage.records.add(START, contender.name, "time", "s", seconds, known)
                for case in (FIRST, SECOND):
                    (measured,) = stage.measure(Reader("walk.py"), running, data)
                    stage.note(case, contender, measured, known)
                stage.note_memory(MEMORY, contender, running, known)
    shutil.rmtree(data)


def _measure_index(stage: Stage, files: int, repetitions: int) -> None:
    source, mountpoint, folder = stage.new_folder(), stage.new_folder(), stage.new_folder()
    scratch = folder / "scratch"
    (source / "file").write_bytes(b"x")
    with mounted(source, mountpoint, scratch, purge=False):
        pass
    fill_index(scratch, files)
    contender = CONTENDERS["cachefs"]

    def add(case: str, quantity: str, unit: str, value: float) -> None:
        stage.records.add(case, contender.name, quantity, unit, value, {"files": files})
        stage.tell(f"{case}: {files:,} files: {value:.2f} {unit}")

    for _ in range(repetitions):
        stage.drop_caches()
        began = time.perf_counter()
        with mounted(source, mountpoint, scratch, purge=False) as running:
            add(INDEX_START, "time", "s", time.perf_counter() - began)
            _wait_until(lambda: running.status()["indexed_files"] >= files, "the index is in memory")
            add(INDEX_LOADED, "time", "s", time.perf_counter() - began)
            add(INDEX_MEMORY, "memory", "MB", running.memory_bytes() / 1e6)
            _kill(running)
        stage.drop_caches()
        began = time.perf_counter()
        with mounted(source, mountpoint, scratch, purge=False):
            add(INDEX_CRASHED, "time", "s", time.perf_counter() - began)
    shutil.rmtree(folder)


def _kill(running: Running) -> None:
    assert running.process is not None
    running.process.kill()
    running.process.wait()


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def fill_index(scratch: Path, files: int) -> None:
    """Put `files` empty complete files into scratch, and into its index, as if the mount had fetched them."""
    boot = boot_id()
    index = sqlite3.connect(scratch / "index.db")
    with index:
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
