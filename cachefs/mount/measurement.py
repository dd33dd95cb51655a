"""What a source and a scratch directory are like: how much lies there, how fast they answer. Done within seconds.

The functions here are handlers of worker processes (see cachefs.workers.protocol): they yield to show that they are
alive, and whoever runs them, `cachefs.mount.examination`, kills a worker that is silent. Their answers are the fields
of the dataclasses here, because that is what goes over a worker's socket.

Invariants:
- Nothing is written to the source. What is written to scratch has no name: it is gone with the worker, however that
  ends.
- Every measurement ends by itself after the seconds that it is given, and some operation's time.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cachefs.cache.scratch import MARK, open_scratch
from cachefs.config import Settings
from cachefs.errors import CachefsError, describe
from cachefs.mount.checks import check_paths
from cachefs.workers.protocol import Handler

T = TypeVar("T")
Job = Generator[None, None, T]

SILENCE_SECONDS = 5.0
"""A worker, and so what it looks at, that says nothing for so long does not answer."""
_BEAT_SECONDS = 0.5
_SEED = 0
_SIZED_FILES = 20_000
_SAMPLE_FILES, _SAMPLE_BYTES = 512, 64 * 1024
"""The paths that a survey hands on for reading: so many, and so long together, that they fit into one message."""
_FIRST_READ, _READ = 128 * 1024, 1024 * 1024
_LONGEST_READ = 32 * 1024 * 1024
"""Of a larger file so much is read, at a place chosen at random."""
_SCRATCH_BYTES, _BLOCK = 64 * 1024 * 1024, 8 * 1024 * 1024
_PAGE, _PAGES = 4096, 64
_BLOCKS_NEEDED = 2
_FEWEST_DIRECTORIES = 10
"""From fewer listed directories no total is concluded."""
_COUNT_SECONDS = 2.0
_CHOOSE = "choose another with --scratch"


def handlers() -> dict[str, Handler]:
    return {
        "look": look,
        "check mounting": check_mounting,
        "survey": survey,
        "read": read_files,
        "look at scratch": look_at_scratch,
        "try scratch": try_scratch,
    }


@dataclass(frozen=True)
class SourceLook:
    """The source at a glance. `path` is its real one; `is_readable` says whether this user may list and enter it."""

    path: str
    is_directory: bool
    is_readable: bool


@dataclass(frozen=True)
class Survey:
    """How much lies in the source. Sizes are in bytes.

    `files` were counted; `is_listed` says that those are all. If not, the `estimate` is what the listed directories let
    expect, None if they were too few. The `mean_size` is that of `sized` files; `total` is known if those were all.
    """

    files: int
    is_listed: bool
    estimate: int | None
    unreadable_directories: int
    mean_size: float
    sized: int
    total: int | None
    sample: list[bytes]
    """Absolute paths for reading, in random order."""


@dataclass(frozen=True)
class Reading:
    """How one process read a sample of files. Times are in seconds, sizes in bytes.

    `latencies` are the times from open to the first bytes. `is_whole` says that every file was read to its end.
    """

    latencies: list[float]
    size: int
    seconds: float
    is_whole: bool
    failed: int
    reason: str

    @property
    def files(self) -> int:
        return len(self.latencies)


@dataclass(frozen=True)
class ScratchLook:
    """A scratch directory, or a place for one. Sizes are in bytes.

    `problem` is what keeps it from being one: the message and the hint of a CachefsError. `available` and `total` are
    the file system's; `stored` is what complete files of ours hold already.
    """

    path: str
    problem: tuple[str, str | None] | None
    available: int
    total: int
    stored: int


@dataclass(frozen=True)
class ScratchSpeed:
    """Past the page cache: bytes/s written (and synchronised) and read, seconds for a page at a random place."""

    write: float
    read: float
    latency: float


def look(path: str) -> Job[tuple[Any, ...]]:
    """A SourceLook at the absolute `path`. Raises OSError."""
    real = os.path.realpath(path)
    is_directory = stat.S_ISDIR(os.stat(real).st_mode)
    yield
    is_readable = os.access(real, os.R_OK | os.X_OK, effective_ids=True)
    if is_directory:
        try:
            os.close(os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))  # a dead mount may still have a mode
        except PermissionError:
            is_readable = False
    return astuple(SourceLook(real, is_directory, is_readable))


def check_mounting(source: str, scratch: str) -> Job[tuple[str, str | None] | None]:
    """The message and the hint of what keeps `cachefs mount` from mounting over `source`, or None."""
    yield
    try:
        check_paths(Settings(Path(source), Path(source), Path(scratch)))
    except CachefsError as error:
        return error.args[0], error.hint
    return None


class _Beat:
    """Says when it is time to yield, and when time is over."""

    def __init__(self, seconds: float) -> None:
        self._next = time.monotonic()
        self._end = self._next + seconds

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _BEAT_SECONDS
        return True

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end


def survey(root: str, seconds: float) -> Job[tuple[Any, ...]]:
    """A Survey: count files for `seconds` at the most, then ask a sample of them for their sizes for as long."""
    draw = random.Random(_SEED)
    pending = [os.fsencode(root)]
    chosen: list[bytes] = []
    files = listed = unreadable = 0
    beat = _Beat(seconds)
    is_whole = True
    while pending and not beat.is_over:
        # at random: what was listed stands for what was not, whichever directories the source lists slowly
        last = draw.randrange(len(pending))
        pending[last], pending[-1] = pending[-1], pending[last]
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files += 1
                        _keep_sample(chosen, entry.path, files, draw)
                    if beat.is_due():
                        yield
                        if beat.is_over:
                            is_whole = False
                            break
        except OSError:
            unreadable += 1
        listed += 1
    is_whole = is_whole and not pending
    estimate: int | None = files
    if not is_whole:
        estimate = files * (listed + len(pending)) // listed if listed >= _FEWEST_DIRECTORIES else None
    draw.shuffle(chosen)
    sized, size = yield from _ask_sizes(chosen, _Beat(seconds))
    total = size if is_whole and sized == files else None
    mean = size / sized if sized else 0.0
    return astuple(Survey(files, is_whole, estimate, unreadable, mean, sized, total, _handed_on(chosen)))


def _keep_sample(chosen: list[bytes], path: bytes, number: int, draw: random.Random) -> None:
    """Reservoir sampling: each of the `number` files so far is in `chosen` with the same probability."""
    if len(chosen) < _SIZED_FILES:
        chosen.append(path)
    elif (place := draw.randrange(number)) < _SIZED_FILES:
        chosen[place] = path


def _ask_sizes(paths: list[bytes], beat: _Beat) -> Job[tuple[int, int]]:
    """(Files asked, their bytes)."""
    sized = size = 0
    for path in paths:
        if beat.is_over:
            break
        with contextlib.suppress(OSError):  # removed since
            size += os.lstat(path).st_size
            sized += 1
        if beat.is_due():
            yield
    return sized, size


def _handed_on(paths: list[bytes]) -> list[bytes]:
    taken, length = [], 0
    for path in paths[:_SAMPLE_FILES]:
        length += len(path)
        if length > _SAMPLE_BYTES:
            break
        taken.append(path)
    return taken


def read_files(paths: list[bytes], seconds: float, seed: int) -> Job[tuple[Any, ...]]:
    """A Reading of `paths`, one after the other, for `seconds` at the most.

    What the page cache has of a file is dropped before it is read. `seed` decides which part of a large file is read.
    """
    draw = random.Random(seed)
    first: list[float] = []
    size = failed = 0
    reason = ""
    is_whole = True
    beat = _Beat(seconds)
    start = time.perf_counter()
    for path in paths:
        if beat.is_over:
            break
        try:
            for part in _read_file(path, draw, beat, first):
                size += part
                if beat.is_due():
                    yield
        except OSError as error:
            failed += 1
            reason = describe(error)
        except _CutShortError:
            is_whole = False
    return astuple(Reading(first, size, time.perf_counter() - start, is_whole, failed, reason))


class _CutShortError(Exception):
    """A file was not read to its end."""


def _read_file(path: bytes, draw: random.Random, beat: _Beat, first: list[float]) -> Iterator[int]:
    """Read a file, or a part of a large one; yields the sizes of the pieces. Raises OSError and _CutShortError."""
    start = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        length = os.fstat(fd).st_size
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        is_large = length > _LONGEST_READ
        position = draw.randrange((length - _LONGEST_READ) // _READ + 1) * _READ if is_large else 0
        end = position + _LONGEST_READ if is_large else length
        piece = len(os.pread(fd, _FIRST_READ, position))
        first.append(time.perf_counter() - start)
        yield piece
        while piece and position + piece < end:
            if beat.is_over:
                raise _CutShortError
            position += piece
            piece = len(os.pread(fd, min(_READ, end - position), position))
            yield piece
        if is_large:
            raise _CutShortError
    finally:
        os.close(fd)


def look_at_scratch(path: str) -> Job[tuple[Any, ...]]:
    """A ScratchLook at `path`, which need not exist yet. Changes nothing."""
    yield
    directory = Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    problem = _scratch_problem(directory)
    said = None if problem is None else (str(problem.args[0]), problem.hint)
    try:
        status = os.statvfs(directory if directory.is_dir() else directory.parent)
    except OSError as error:
        said = said or (f"scratch {path} cannot be reached: {describe(error)}", _CHOOSE)
        return astuple(ScratchLook(os.fspath(directory), said, 0, 0, 0))
    stored = yield from _stored(directory / "files", _Beat(_COUNT_SECONDS))
    available, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return astuple(ScratchLook(os.fspath(directory), said, available, total, stored))


def _scratch_problem(path: Path) -> CachefsError | None:
    """What claiming `path` would raise, without claiming it."""
    try:
        status = path.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if is_private and os.access(path, os.R_OK | os.W_OK | os.X_OK):
            names = os.listdir(path)
            if not names:
                return None
            if MARK not in names:
                return CachefsError(f"scratch {path} holds files that are not of cachefs", _CHOOSE)
        os.close(open_scratch(path).fd)
    except CachefsError as error:
        return error
    except FileNotFoundError:
        if not path.parent.is_dir():
            return CachefsError(
                f"scratch {path} cannot be made: {path.parent} does not exist", f"make that first, or {_CHOOSE}"
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return CachefsError(f"scratch {path} cannot be made: {path.parent} is not writable", _CHOOSE)
    except OSError as error:
        return CachefsError(f"scratch {path} is not usable: {describe(error)}", _CHOOSE)
    return None


def _stored(files: Path, beat: _Beat) -> Job[int]:
    """Bytes of the complete files in scratch, as many as can be counted in time."""
    total = 0
    pending = [os.fspath(files)]
    while pending and not beat.is_over:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
                if beat.is_due():
                    yield
    return total


def try_scratch(path: str, available: int, seconds: float) -> Job[tuple[Any, ...] | None]:
    """A ScratchSpeed, of a file without a name in (or beside) `path`; None if there is too little room to measure.

    The file takes 5% of the `available` bytes at most; writing and reading end after `seconds` each. Raises OSError.
    """
    size = min(_SCRATCH_BYTES, available // 20)
    block = min(_BLOCK, size // _BLOCKS_NEEDED) // _PAGE * _PAGE
    if not block:
        return None
    content = os.urandom(block)  # a file system that compresses gets no gift
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        fd = file.fileno()
        written, beat, start = 0, _Beat(seconds), time.perf_counter()
        while written + block <= size and not (written and beat.is_over):
            written += os.pwrite(fd, content, written)
            os.fdatasync(fd)
            yield
        write_rate = written / (time.perf_counter() - start)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        done, beat, start = 0, _Beat(seconds), time.perf_counter()
        while done < written and not (done and beat.is_over):
            done += len(os.pread(fd, _READ, done))
            if beat.is_due():
                yield
        read_rate = done / (time.perf_counter() - start)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        latencies: list[float] = []
        beat, draw = _Beat(seconds), random.Random(_SEED)
        while len(latencies) < _PAGES and not (latencies and beat.is_over):
            place = draw.randrange(written // _PAGE) * _PAGE
            start = time.perf_counter()
            os.pread(fd, _PAGE, place)
            latencies.append(time.perf_counter() - start)
            if beat.is_due():
                yield
    return astuple(ScratchSpeed(write_rate, read_rate, statistics.median(latencies)))
