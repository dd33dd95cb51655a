"""What one fetch costs, step by step, and what other ways to copy cost: files of 110 KB and of 4 KB, in one process.

Source and scratch are directories of one disk, and the source lies in the page cache, so that our own cost is seen.
Each step is the call that a worker makes (`cachefs/cache/copying.py`), timed alone.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from benchmarks.contenders import BenchmarkError, cachefs, mounted
from benchmarks.results import Circumstances, Result
from benchmarks.stage import Stage, rotated
from cachefs.cache.copying import CopyHandlers
from cachefs.cache.storage import NAME_BYTES, Storage
from cachefs.cache.tiers import SCRATCH
from cachefs.source.attributes import mtime_of, pack_stat, version_of
from cachefs.source.handlers import read_exactly
from cachefs.source.tree import SourceTree

SIZES = {110_000: 5000, 4096: 10_000}
BATCH = 8
COPYING, STEPS, WHOLE = "a file copied", "steps of a fetch", "a file fetched by cachefs warm"
LIFETIME = 60.0  # of a worker's directory descriptors

File = tuple[bytes, bytes, bytes]
"""(name in scratch, path, version)."""


def run(stage: Stage) -> list[Result]:
    for size, count in SIZES.items():
        data = _make(stage, size, stage.size(count, 50))
        known: Circumstances = {"file_bytes": size}
        for repetition in range(stage.repetitions):
            for name, copy in rotated(list(WAYS.items()), repetition):
                with _scratch(stage) as (folder, storage), _tree(data) as tree:
                    files = _files(tree)
                    os.sync()
                    start = time.perf_counter()
                    copy(tree, storage, folder, files)
                    seconds = time.perf_counter() - start
                    _check(data, files, folder, storage, is_ours=name == OURS)
                stage.records.add(COPYING, name, "time", "µs/file", seconds / len(files) * 1e6, known)
                stage.tell(f"{COPYING}: {name}, {size} bytes: {seconds / len(files) * 1e6:.1f} µs")
            with _scratch(stage) as (folder, storage), _tree(data) as tree:
                files = _files(tree)
                for step, seconds in _time_steps(tree, storage, files).items():
                    stage.records.add(STEPS, step, "time", "µs/file", seconds / len(files) * 1e6, known)
            if stage.contenders("cachefs"):
                _measure_mount(stage, data, len(files), known)
        for name in WAYS:
            if name != OURS:
                other = stage.records.find(COPYING, name, file_bytes=size)
                stage.records.compare(COPYING, stage.records.find(COPYING, OURS, file_bytes=size), other)
    return stage.records.results()


def _make(stage: Stage, size: int, count: int) -> Path:
    data = stage.new_folder()
    content = random.Random(0)
    for number in range(count):
        folder = data / f"{number % 20:02}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:06}").write_bytes(content.randbytes(size))
    return data


@contextmanager
def _scratch(stage: Stage) -> Iterator[tuple[Path, Storage]]:
    folder = stage.new_folder()
    for name in ("files", "staging", "plain"):
        (folder / name).mkdir()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    storage = Storage(fd, "0" * 32)
    try:
        yield folder, storage
    finally:
        for each in (fd, *storage.fds):
            os.close(each)
        shutil.rmtree(folder)


@contextmanager
def _tree(data: Path) -> Iterator[SourceTree]:
    fd = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield SourceTree(fd, LIFETIME)
    finally:
        os.close(fd)


def _files(tree: SourceTree) -> list[File]:
    paths = sorted(
        directory + b"/" + name
        for entries in tree.entries(b"", 256)
        for directory, *_ in entries
        for below in tree.entries(directory, 256)
        for name, *_ in below
    )
    return [
        (number.to_bytes(4, "little") * (NAME_BYTES // 4), path, version_of(tree.stat(path)))
        for number, path in enumerate(paths)
    ]


def _fetch_all(tree: SourceTree, storage: Storage, _: Path, files: list[File]) -> None:
    fetch_many = CopyHandlers(tree, [storage]).table()["fetch_many"]
    for start in range(0, len(files), BATCH):
        for number, _result, error in fetch_many([(*file, SCRATCH) for file in files[start : start + BATCH]]):
            if error is not None:
                raise BenchmarkError(f"{files[start + number][1]!r}: {error}")


def _each(
    copy: Callable[[int, int], None],
) -> Callable[[SourceTree, Storage, Path, list[File]], None]:
    """`copy(source, target)` between descriptors, for each file; the target has its own name at once."""

    def copy_all(tree: SourceTree, _: Storage, folder: Path, files: list[File]) -> None:
        target_folder = os.open(folder / "plain", os.O_RDONLY | os.O_DIRECTORY)
        for name, path, _version in files:
            source = tree.open(path)
            target = os.open(name.hex(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=target_folder)
            copy(source, target)
            os.close(target)
            os.close(source)
        os.close(target_folder)

    return copy_all


def _copy_in_kernel(source: int, target: int) -> None:
    while os.copy_file_range(source, target, 1 << 30):
        pass


def _copy_in_kernel_and_sum(source: int, target: int) -> None:
    _copy_in_kernel(source, target)
    xxhash.xxh3_64_digest(read_exactly(target, 0, os.fstat(target).st_size))


def _send(source: int, target: int) -> None:
    while os.sendfile(target, source, None, 1 << 30):
        pass


def _read_and_write(source: int, target: int) -> None:
    os.pwrite(target, read_exactly(source, 0, os.fstat(source).st_size), 0)


def _read_sum_and_write(source: int, target: int) -> None:
    data = read_exactly(source, 0, os.fstat(source).st_size)
    os.pwrite(target, data, 0)
    xxhash.xxh3_64_digest(data)


OURS = "fetch"
WAYS: dict[str, Callable[[SourceTree, Storage, Path, list[File]], None]] = {
    OURS: _fetch_all,
    "read, write": _each(_read_and_write),
    "read, checksum, write": _each(_read_sum_and_write),
    "copy_file_range": _each(_copy_in_kernel),
    "copy_file_range, checksum": _each(_copy_in_kernel_and_sum),
    "sendfile": _each(_send),
}


def _check(data: Path, files: Iterable[File], folder: Path, storage: Storage, *, is_ours: bool) -> None:
    """BenchmarkError unless every copy is what lies in the source."""
    for name, path, _ in files:
        fd = storage.open(name) if is_ours else os.open(folder / "plain" / name.hex(), os.O_RDONLY)
        if fd is None:
            raise BenchmarkError(f"{path!r} is not there")
        original = (data / os.fsdecode(path)).read_bytes()
        copied = read_exactly(fd, 0, len(original) + 1)
        os.close(fd)
        if copied != original:
            raise BenchmarkError(f"the copy of {path!r} has other bytes")


def _time_steps(tree: SourceTree, storage: Storage, files: list[File]) -> dict[str, float]:
    """Seconds that each step of all fetches took."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter

    def note(step: str, since: float) -> float:
        now = clock()
        seconds[step] = seconds.get(step, 0.0) + now - since
        return clock()

    for name, path, version in files:
        at = clock()
        staged = storage.stage(name)
        at = note("stage: create, lock", at)
        storage.has(name)
        at = note("look whether it is there", at)
        source = tree.open(path)
        at = note("open the source", at)
        data = read_exactly(source, 0, os.stat(source).st_size)
        at = note("read", at)
        is_same = version_of(pack_stat(os.fstat(source))) == version
        at = note("ask the version", at)
        os.close(source)
        at = note("close the source", at)
        assert staged is not None  # nobody else is here
        os.pwrite(staged, data, 0)
        at = note("write", at)
        xxhash.xxh3_64_digest(data)
        at = note("checksum", at)
        os.utime(staged, ns=(mtime_of(version),) * 2)
        at = note("give it the time of the source", at)
        storage.commit(name)
        at = note("rename", at)
        os.close(staged)
        note("close", at)
        if not is_same:
            raise BenchmarkError(f"{path!r} changed")
    return seconds


def _measure_mount(stage: Stage, data: Path, files: int, known: Circumstances) -> None:
    """The whole way: a job to a worker, its answer, the record in the index."""
    folder = stage.new_folder()
    with mounted(data, folder / "mount", folder / "scratch", "--prefetch=off", "--no-promote") as running:
        before = running.cpu()
        start = time.perf_counter()
        cachefs("warm", running.path)
        seconds = time.perf_counter() - start
        after = running.cpu()
        if running.status()["fetches"] != files:
            raise BenchmarkError(f"{running.status()['fetches']} of {files} files were fetched")
    for quantity, value in (
        ("time", seconds),
        ("daemon CPU", after.daemon - before.daemon),
        ("worker CPU", after.workers - before.workers),
    ):
        stage.records.add(WHOLE, "cachefs", quantity, "µs/file", value / files * 1e6, known)
