"""ls -l of 5,000 files on a source with 2 ms an operation."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.stage import Result, drop_caches, mounted
from cachefs.demo.slow_source import SlowSource

LATENCY = 0.002


def run(folder: Path, repetitions: int, *, quick: bool) -> list[Result]:
    files = 500 if quick else 5000
    directory = folder / "remote" / "directory"
    directory.mkdir(parents=True)
    for number in range(files):
        (directory / f"{number:06}.jpg").touch()
    mountpoint = folder / "dataset"
    mountpoint.mkdir()
    seconds, first, second = [], [], []
    with SlowSource(folder / "remote", mountpoint, latency=LATENCY):
        for _ in range(repetitions):
            drop_caches()
            direct = _list(mountpoint / "directory", files)
            with mounted(mountpoint, folder / "scratch"):
                first.append(_list(mountpoint / "directory", files) / direct)
                second.append(_list(mountpoint / "directory", files) / direct)
            seconds.append(direct)
    return [
        Result("direct: seconds", seconds, "s"),
        Result("first ls -l through the mount / direct", first, "x", "at most 0.2"),
        Result("second ls -l through the mount / direct", second, "x"),
    ]


def _list(directory: Path, files: int) -> float:
    started = time.perf_counter()
    listed = subprocess.run(["ls", "-l", directory], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == files + 1
    return time.perf_counter() - started
