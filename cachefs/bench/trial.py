"""A sample of the user's files, read with several numbers of workers: directly, then through a mount of its own.

Invariants:

- Direct readings and first epochs each read a part of the sample of their own, of like sizes, so that none warms
  another; where there are too few files for that, `Sample.is_shared` says so.
- Each number of workers is read with twice, in rising and in falling order, where there are files enough: what a server
  or a disk does in the course of time then favours none, and the two rates tell how far they can be trusted.
- Later epochs read what is resident, with the page cache of scratch dropped: it comes from scratch's disk. They begin
  when promotion has come to rest, or all numbers of workers would not read the same; `Trial.served` says what it was.
- Whatever happens, no mount, process or file of it is left: scratch is new, and lies in a folder that goes with it.
  What the kernel does not let go (a process that waits for a source that hangs) is told by `left`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachefs.bench.reader import Found
from cachefs.bench.session import Session, adopt_orphans, remaining, what_to_do
from cachefs.config import RESERVED_SHARE
from cachefs.errors import CachefsError, describe

DIRECT, FIRST, LATER = "direct", "first epoch", "later epochs"
WAYS = (DIRECT, FIRST, LATER)
LARGEST_FILE = 64 << 20
"""Larger files are left out: reading one takes longer than all of a measurement may."""
_LARGEST_SAMPLE = 4 << 30
_ROOM_SHARE = 0.25
_FEWEST_FILES = 8
"""In a part of the sample, for each worker. If there are fewer, all parts are the same files."""
_LARGE_SHARE = 0.5
"""More than this of the bytes in files that are too large: the others do not stand for the dataset."""
_FIND_SECONDS, _ANSWER_SECONDS, _LOOK_AT_FILE_SECONDS = 3.0, 60.0, 0.02
PROMOTED_ALONE_BYTES = 8 << 20
"""Files of this size are promoted also where their directory is not."""
_PROMOTION_SECONDS, _REST_SECONDS, _LOOK_SECONDS = 20.0, 7.0, 0.5
"""What promotion may take at most, after what time without a change no more comes, and how often to look."""
_DETACH_SECONDS = 10.0
_MOST_PASSES = 3


@dataclass(frozen=True)
class Plan:
    """What to try. `place` is where a folder for scratch and, with `is_beside`, for the mountpoint can be made: the
    mount is then not over the source. `stop` is a descriptor that can be read when the trial is to end."""

    source: Path
    place: Path
    workers: tuple[int, ...]
    seconds: float
    files: int
    seed: int
    is_beside: bool
    stop: int


@dataclass(frozen=True)
class Sample:
    """What is read. `is_shared`: each reading has read the same files, because there are few."""

    found: Found
    parts: tuple[tuple[str, ...], ...]
    bytes: int
    is_shared: bool
    decodes: bool

    @property
    def files(self) -> int:
        return len(self.found.files)


@dataclass(frozen=True)
class Served:
    """Of the `files` of later epochs, how many came from scratch directly, `before` the first and `after` the last."""

    files: int
    before: int
    after: int


@dataclass(frozen=True)
class Measurement:
    """One reading, or several together, each with one of `rates`, in files/s. `cached` files were in the page cache all
    the same; `failed` could not be read, for `reason`."""

    way: str
    workers: int
    seconds: float
    files: int
    bytes: int
    failed: int = 0
    reason: str = ""
    cached: int = 0
    decoded: int = 0
    rates: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.files / self.seconds if self.seconds else 0.0

    @property
    def lowest(self) -> float:
        return min(self.rates, default=self.rate)

    @property
    def highest(self) -> float:
        return max(self.rates, default=self.rate)

    def plus(self, other: Measurement) -> Measurement:
        """Both together, as one that took longer."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("files", "bytes", "failed", "cached")}
        return replace(
            self, seconds=self.seconds + other.seconds, decoded=self.decoded + other.decoded,
            reason=self.reason or other.reason, rates=self.rates + other.rates, **sums,
        )  # fmt: skip


class Trial:
    """Use it as a context, which finds the sample and cleans up; `measurements` reads it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._made: Path | None = None
        self.served = Served(0, 0, 0)

    def __enter__(self) -> Trial:
        adopt_orphans()
        with ExitStack() as stack:
            self._folder = self._made = _new_folder(self._plan.place)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._direct = stack.enter_context(Session([], self._plan.stop))
            self.sample = self._find_sample()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stack.__exit__(*reason)

    def left(self) -> str:
        """What could not be ended or removed after all, in words."""
        pids = [str(process.pid) for process in remaining()]
        said = []
        if pids:
            who = f"process {pids[0]}" if len(pids) == 1 else f"processes {', '.join(pids)}"
            said = [f"{who} cannot be ended before {self._plan.source} answers"]
        if self._made is not None and os.path.lexists(self._made):
            said.append(f"{self._made} is left")
        return ", and ".join(said)

    def measurements(self) -> Iterator[Measurement]:
        """As they are made. Raises CachefsError, and StoppedError."""
        measuring = self._measure()
        self._stack.callback(measuring.close)  # who stops in the middle does not, and its folder is to go after it
        return measuring

    def _measure(self) -> Generator[Measurement, None, None]:
        counts, parts = self._plan.workers, self.sample.parts
        direct, source = self._direct, self._plan.source
        if self.sample.is_shared:
            for workers in _there_and_back(counts):
                yield self._read_passes(direct, source, DIRECT, workers, parts[0])
        else:
            for workers, part, seconds in self._turns(parts[: len(counts)]):
                yield self._read(direct, source, DIRECT, workers, part, seconds)
        with self._mounted() as mounted:
            root = self._mountpoint
            self._find(mounted, root)  # a loader lists first, and directly it has been listed too
            (unpromoted,) = mounted.ask("devices", _ANSWER_SECONDS, root=os.fspath(root), paths=[""])
            resident: list[str] = []
            firsts = (
                [(counts[-1], parts[0], self._plan.seconds)]
                if self.sample.is_shared
                else self._turns(parts[len(counts) :])
            )
            for workers, part, seconds in firsts:
                measured = self._read(mounted, root, FIRST, workers, part, seconds)
                resident += part[: measured.files + measured.failed]
                yield measured
            if self.sample.found.is_all and self._read_all(mounted, root):
                resident = [path for path, _ in self.sample.found.files]

            def promoted() -> int:
                seen = mounted.ask("devices", _ANSWER_SECONDS, root=os.fspath(root), paths=resident)
                return sum(device != unpromoted for device in seen)

            if self._may_be_promoted(resident):
                _come_to_rest(promoted, len(resident))
            before = promoted()
            for workers in _there_and_back(counts):
                yield self._read_passes(mounted, root, LATER, workers, resident)
            self.served = Served(len(resident), before, promoted())

    @contextmanager
    def _mounted(self) -> Iterator[Session]:
        session = Session(self._run(), self._plan.stop)
        try:
            with session:
                yield session
        finally:
            if session.was_killed and self._plan.is_beside:  # else it goes with its namespace
                _detach(self._mountpoint)

    @property
    def _mountpoint(self) -> Path:
        return self._folder / "mount" if self._plan.is_beside else self._plan.source

    def _run(self) -> list[str]:
        """What a user would type before the command; nothing is fetched that is not in the sample."""
        data = os.fspath(self._plan.source)
        if self._plan.is_beside:
            self._mountpoint.mkdir()
            data = f"{data}:{self._mountpoint}"
        scratch = os.fspath(self._folder / "scratch")
        options = ["--strict", "--data", data, "--scratch", scratch, "--prefetch", "off", "--"]
        return [sys.executable, "-m", "cachefs", "--config", os.devnull, "run", *options]

    def _find_sample(self) -> Sample:
        plan = self._plan
        found = self._find(self._direct, plan.source)
        if not found.files:
            raise _nothing_to_read(plan.source, found)
        if found.too_large_bytes > _LARGE_SHARE * (found.too_large_bytes + sum(size for _, size in found.files)):
            raise CachefsError(
                f"most bytes of {plan.source} are in files larger than {LARGEST_FILE >> 20} MiB, which are too long to "
                f"read several of: what the others take says little",
                f"cachefs doctor {plan.source} measures large files",
            )
        room = min(_LARGEST_SAMPLE, int(_available(self._folder) * _ROOM_SHARE))
        files = _within(found.files, room)
        if not files:
            raise CachefsError(f"there is no room in {plan.place}", "choose another with --scratch")
        is_whole = found.is_all and len(files) == len(found.files)
        parts = share_out(files, 2 * len(plan.workers), plan.seed)
        is_shared = min(map(len, parts)) < _FEWEST_FILES * max(1, *plan.workers)
        if is_shared:
            parts = [[path for path, _ in files]] * len(plan.workers)
        return Sample(
            replace(found, files=files, is_all=is_whole),
            tuple(map(tuple, parts)),
            sum(size for _, size in files),
            is_shared,
            bool(self._direct.ask("can decode", _ANSWER_SECONDS)),
        )

    def _find(self, session: Session, root: Path) -> Found:
        plan = self._plan
        limits = {"seconds": _FIND_SECONDS, "most": plan.files, "largest": LARGEST_FILE, "seed": plan.seed}
        timeout = _ANSWER_SECONDS + plan.files * _LOOK_AT_FILE_SECONDS
        return Found(**session.ask("find", timeout, root=os.fspath(root), **limits))

    def _turns(self, parts: Sequence[Sequence[str]]) -> list[tuple[int, Sequence[str], float]]:
        """(Workers, files, seconds) of each reading in turn: two halves of each part, if these are not too small."""
        counts, seconds = self._plan.workers, self._plan.seconds
        if min(map(len, parts)) < 2 * _FEWEST_FILES * max(1, *counts):
            return [(workers, part, seconds) for workers, part in zip(counts, parts, strict=True)]
        turns = [(workers, part[::2], seconds / 2) for workers, part in zip(counts, parts, strict=True)]
        back = [(workers, part[1::2], seconds / 2) for workers, part in zip(counts, parts, strict=True)]
        return turns + back[::-1]

    def _read(
        self, session: Session, root: Path, way: str, workers: int, paths: Sequence[str], seconds: float
    ) -> Measurement:
        """Raises CachefsError if nothing at all could be read."""
        said = session.ask(
            "read", seconds + _ANSWER_SECONDS, root=os.fspath(root), paths=paths, workers=workers, seconds=seconds,
            decode=self.sample.decodes,
        )  # fmt: skip
        if not said["files"]:
            reason = said["reason"]
            hint = what_to_do(reason) if reason else "give it more --seconds"
            raise CachefsError(f"no file of {self._plan.source} can be read: {reason or 'none in time'}", hint)
        measured = Measurement(way, workers, **said)
        return replace(measured, rates=(measured.rate,))

    def _read_passes(self, session: Session, root: Path, way: str, workers: int, paths: Sequence[str]) -> Measurement:
        """Some passes, until they took half as long together as a measurement may: one of few files is over soon. They
        count as one reading."""
        measured: Measurement | None = None
        seconds = self._plan.seconds / 2
        for _ in range(_MOST_PASSES):
            drop_page_cache(self._folder / "scratch" / "files")
            one = self._read(session, root, way, workers, paths, seconds)
            measured = one if measured is None else measured.plus(one)
            if measured.seconds >= seconds:
                break
        assert measured is not None
        return replace(measured, rates=(measured.rate,))

    def _read_all(self, session: Session, root: Path) -> bool:
        """Read also what has not been read yet. False if there is too little time for that."""
        everything = [path for path, _ in self.sample.found.files]
        said = session.ask(
            "read", self._plan.seconds + _ANSWER_SECONDS, root=os.fspath(root), paths=everything,
            workers=max(self._plan.workers), seconds=self._plan.seconds, decode=False,
        )  # fmt: skip
        return bool(said["files"] == len(everything))

    def _may_be_promoted(self, resident: Sequence[str]) -> bool:
        """Whether some of it may be: all files of a directory are there, or a large one; and we may mount."""
        found, there = self.sample.found, set(resident)
        missing = {os.path.dirname(path) for path, _ in found.files if path not in there}
        is_large = any(size >= PROMOTED_ALONE_BYTES and path in there for path, size in found.files)
        return not self._plan.is_beside and (is_large or not missing.issuperset(found.whole))


def _detach(mountpoint: Path) -> None:
    command = [sys.executable, "-m", "cachefs", "umount", "--lazy", os.fspath(mountpoint)]
    null = subprocess.DEVNULL
    with suppress(subprocess.TimeoutExpired):
        subprocess.Popen(command, stdin=null, stdout=null, stderr=null).wait(_DETACH_SECONDS)


def _come_to_rest(promoted: Callable[[], int], files: int) -> None:
    """Wait until all of the files are promoted, or no more of them have been for some time."""
    began = changed = time.monotonic()
    number = promoted()
    while number < files and time.monotonic() < min(began + _PROMOTION_SECONDS, changed + _REST_SECONDS):
        time.sleep(_LOOK_SECONDS)
        if (now := promoted()) != number:
            number, changed = now, time.monotonic()


def together(readings: Iterable[Measurement]) -> list[Measurement]:
    """All of the same way and number of workers as one, in the order of these."""
    made: dict[tuple[int, int], Measurement] = {}
    for each in readings:
        key = WAYS.index(each.way), each.workers
        made[key] = made[key].plus(each) if key in made else each
    return [made[key] for key in sorted(made)]


def _there_and_back(counts: Sequence[int]) -> Sequence[int]:
    return [*counts, *reversed(counts)]


def share_out(files: Sequence[tuple[str, int]], parts: int, seed: int) -> list[list[str]]:
    """Deal the files out to `parts` lists of like numbers and sizes, each in random order."""
    draw = random.Random(seed)
    by_size = sorted(files, key=lambda file: file[1])
    shares: list[list[str]] = [[] for _ in range(parts)]
    for start in range(0, len(by_size), parts):
        group = by_size[start : start + parts]
        for share, (path, _) in zip(draw.sample(shares, len(group)), group, strict=True):
            share.append(path)
    for share in shares:
        draw.shuffle(share)
    return shares


def drop_page_cache(folder: Path) -> None:
    """Of the files below `folder`; what was written to them is written out first."""
    for path in folder.rglob("*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # evicted or renamed since
            continue
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass
        finally:
            os.close(fd)


def _new_folder(place: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=place))
    except OSError as error:
        raise CachefsError(
            f"no folder for the trial can be made in {place}: {describe(error)}", "choose another with --scratch"
        ) from None


def _within(files: Sequence[tuple[str, int]], room: int) -> list[tuple[str, int]]:
    """As many from the beginning as have room."""
    kept, taken = [], 0
    for path, size in files:
        taken += size
        if taken > room:
            break
        kept.append((path, size))
    return kept


def _available(folder: Path) -> int:
    """What a mount may store there: some of the file system stays free in any case."""
    status = os.statvfs(folder)
    return max(0, int(status.f_frsize * (status.f_bavail - RESERVED_SHARE * status.f_blocks)))


def _nothing_to_read(source: Path, found: Found) -> CachefsError:
    if found.too_large:
        return CachefsError(
            f"every file of {source} is larger than {LARGEST_FILE >> 20} MiB, which is too long to read several of",
            f"cachefs doctor {source} measures large files",
        )
    if found.empty:
        return CachefsError(f"all files of {source} are empty", "name a directory with data")
    if found.links:
        return CachefsError(
            f"there are only symbolic links in {source}, and a cache keeps what they lead to where that lies",
            "name the directory they lead to",
        )
    if found.unreadable_directories:
        return CachefsError(f"directories of {source} cannot be listed, and nothing else is in it", "check permissions")
    return CachefsError(f"there is no file in {source}", "check that its file system is mounted on this machine")
