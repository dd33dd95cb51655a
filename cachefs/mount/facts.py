"""The facts of an examination: what was seen of a machine, a source and a scratch directory, and what follows from it.

`cachefs.mount.examination` collects them, `cachefs.mount.findings` and `cachefs.mount.diagnosis` judge them. Sizes are
in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachefs.config import RESERVED_SHARE, Capacity
from cachefs.errors import CachefsError
from cachefs.mount.forecast import Dataset, Pace
from cachefs.mount.limits import Limits
from cachefs.mount.measurement import Reading, ScratchSpeed, Survey
from cachefs.mount.mountinfo import MEMORY_FSTYPES, NETWORK_FSTYPES, Mount

NETWORK, MEMORY, LOCAL = "network", "memory", "local"


@dataclass(frozen=True)
class Machine:
    """What the machine lets this user do: None, or what forbids it. `helper` is fusermount3."""

    is_root: bool
    fuse: CachefsError | None
    helper: CachefsError | None
    namespaces: CachefsError | None
    limits: Limits


@dataclass(frozen=True)
class Extent:
    """How much lies in the source, as far as it is known; `of_files` and `of_bytes` are "", "about" or "at least"."""

    dataset: Dataset
    of_files: str = ""
    of_bytes: str = ""

    @property
    def is_least(self) -> bool:
        """Whether there may be any amount more."""
        return self.of_files == "at least"


@dataclass(frozen=True)
class Source:
    """`one` reader and `several` at the same time; None and empty for what could not be measured.

    `silence` says what it did not answer to. `mounting` is what keeps `cachefs mount` from mounting over it.
    """

    path: Path
    mount: Mount | None
    silence: str | None = None
    mounting: CachefsError | None = None
    survey: Survey | None = None
    one: Reading | None = None
    several: tuple[Reading, ...] = ()

    @property
    def kind(self) -> str:
        return _kind(self.mount)

    @property
    def extent(self) -> Extent | None:
        survey = self.survey
        if survey is None:
            return None
        if survey.total is not None:
            return Extent(Dataset(survey.files, survey.total))
        files = survey.files if survey.estimate is None else survey.estimate
        dataset = Dataset(files, round(files * survey.mean_size))
        if survey.estimate is None:
            return Extent(dataset, "at least", "at least")
        return Extent(dataset, "" if survey.is_listed else "about", "about")

    @property
    def pace(self) -> Pace | None:
        """Of the several readers together; None if they have read nothing."""
        readings = [reading for reading in self.several if reading.size and reading.seconds]
        if not readings:
            return None
        is_whole = all(reading.is_whole for reading in readings)
        return Pace(
            sum(reading.size / reading.seconds for reading in readings),
            sum(reading.files / reading.seconds for reading in readings) if is_whole else None,
        )


@dataclass(frozen=True)
class Scratch:
    """A scratch directory or a place for one; `problem` is what keeps it from being one.

    `available` and `total` are of its file system; `stored` is what copies of ours take of it already.
    """

    path: Path
    mount: Mount | None
    problem: CachefsError | None = None
    available: int = 0
    total: int = 0
    stored: int = 0
    speed: ScratchSpeed | None = None

    @property
    def kind(self) -> str:
        return _kind(self.mount)

    def room(self, capacity: Capacity) -> int:
        """What a mount could hold in it: the capacity, within what has to stay free."""
        limit = capacity.size
        if limit is None:
            limit = int((capacity.share or 0.0) * (self.available + self.stored))
        return max(0, min(limit, int(self.available + self.stored - RESERVED_SHARE * self.total)))


@dataclass(frozen=True)
class Examination:
    """`other_places` are what else could be scratch, one a file system."""

    machine: Machine
    scratch: Scratch
    source: Source | None = None
    other_places: tuple[Scratch, ...] = ()


def _kind(mount: Mount | None) -> str:
    if mount is not None and mount.fstype in NETWORK_FSTYPES:
        return NETWORK
    return MEMORY if mount is not None and mount.fstype in MEMORY_FSTYPES else LOCAL
