"""One 2 GB file on a source with 200 MB/s and 2 ms an operation: read from end to end, and its last 4 KiB at once."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.stage import Result, drop_caches, mounted, timed_python
from cachefs.demo.slow_source import SlowSource

LATENCY, BANDWIDTH = 0.002, 200e6
_MIB = 1 << 20

READ_THROUGH = """
import sys, time
started = time.perf_counter()
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
print(time.perf_counter() - started)
"""

READ_TAIL = """
import os, sys, time
started = time.perf_counter()
fd = os.open(sys.argv[1], os.O_RDONLY)
data = os.pread(fd, 4096, os.fstat(fd).st_size - 4096)
print(time.perf_counter() - started)
assert len(data) == 4096
"""


def run(folder: Path, repetitions: int, *, quick: bool) -> list[Result]:
    size = (64 if quick else 2000) * _MIB
    backing = folder / "remote"
    backing.mkdir()
    with open(backing / "large", "wb") as file:
        for _ in range(size // (8 * _MIB)):
            file.write(os.urandom(8 * _MIB))
    mountpoint = folder / "dataset"
    mountpoint.mkdir()
    large = mountpoint / "large"
    through, tail, again, cpu, memory, seconds = [], [], [], [], [], []
    with SlowSource(backing, mountpoint, latency=LATENCY, bandwidth=BANDWIDTH) as source:
        for _ in range(repetitions):
            drop_caches()
            direct_tail = timed_python(READ_TAIL, large)
            drop_caches()
            with mounted(mountpoint, folder / "scratch"):
                tail.append(timed_python(READ_TAIL, large) / direct_tail)
            drop_caches()
            direct = timed_python(READ_THROUGH, large)
            drop_caches()
            with mounted(mountpoint, folder / "scratch") as cache:
                source.reset()
                before = cache.cpu_seconds()
                first = timed_python(READ_THROUGH, large)
                cpu.append(cache.cpu_seconds() - before)
                memory.append(cache.resident_bytes() / _MIB)
                # the kernel reads a page of the source twice now and then, when its read-ahead is congested
                assert size <= source.statistics().bytes_read < 1.001 * size
                drop_caches()
                again.append(direct / timed_python(READ_THROUGH, large))
            through.append(first / direct)
            seconds.append(direct)
    return [
        Result("direct: seconds", seconds, "s"),
        Result("first read through the mount / direct", through, "x", "at most 1.05"),
        Result("last 4 KiB right after open / direct", tail, "x", "at most 3"),
        Result("direct / second read, page cache dropped before", again, "x"),
        Result("daemon CPU of the first read", cpu, "s"),
        Result("daemon memory", memory, "MiB"),
    ]
