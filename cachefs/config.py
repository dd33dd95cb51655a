"""Frozen settings of one mount, and how their values are written ("300G", "80%").

Where a value comes from (command line, environment, file: in this order) is the command line's business;
here is what it means.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cachefs.errors import UsageError

POLICIES = ("hold", "lru", "auto")
PREFETCH_MODES = ("auto", "all", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")
SHARD_UNITS = ("rank", "node", "disk")
SHARD_MODES = ("keep", "view")
AUTO_SHARD = "auto"
MOST_SHARDS = 1 << 16
RESERVED_SHARE = 0.05
"""Share of scratch's file system that stays free whatever the capacity says."""
WORTH_IT = 1.2
"""A later epoch that is faster by less than this, against one read directly, is no reason for a cache."""
SPARED_MEMORY_SHARE = 0.1
"""Of the machine's memory, and of what the job's control group may have, the memory tier leaves so much alone."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])i?)?B?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_SHARD = re.compile(r"([0-9]{1,18})\s*/\s*([0-9]{1,18})")


def parse_size(text: str) -> int:
    """Bytes for "300G", "1.5 GiB", "4096". Units are powers of 1024. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", "write a number with K, M, G or T, such as 300G")
    try:
        whole, _, part = match[1].partition(".")
        scale: int = 10 ** len(part)
        size = int(whole + part) * _UNITS[(match[2] or "").upper()] // scale
    except ValueError:  # thousands of digits
        size = 1 << 63
    if size >= 1 << 63:
        raise UsageError("the size is larger than any file system", "write a number such as 300G")
    return size


def parse_seconds(text: str) -> float:
    """Seconds for "3600" or "0.5". Raises UsageError for anything but a finite number from 0 up."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UsageError(f"{text!r} is not a number of seconds", "write a number from 0 up, such as 3600")
    return seconds


@dataclass(frozen=True)
class Capacity:
    """How much scratch may hold: `size` bytes, or a `share` (0 to 1) of the space that is free at mount."""

    size: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Capacity:
        """Capacity for "300G" or "80%". Raises UsageError."""
        match = _PERCENT.fullmatch(text.strip())
        if match is None:
            try:
                return cls(size=parse_size(text))
            except UsageError:
                raise UsageError(
                    f"{text!r} is not a capacity", "write a size such as 300G or a share such as 80%"
                ) from None
        share = float(match[1]) / 100
        if share > 1:
            raise UsageError(f"{text!r} is more than all of it", "write a share from 0% to 100%")
        return cls(share=share)


DEFAULT_CAPACITY = Capacity(share=0.8)
DEFAULT_MEMORY_PATH = Path("/dev/shm")


@dataclass(frozen=True)
class Sharding:
    """Which part of the source a mount is for: shard `number`, from 0, of `count` that `seed` divides it into.

    `by` says what has a shard each; `mode` whether it keeps nothing else ("keep") or shows nothing else ("view").
    With `fill` it takes in more of other shards while there is room; with `cut` less of its own where there is not.
    """

    number: int
    count: int
    by: str = "rank"
    mode: str = "keep"
    seed: int = 0
    fill: bool = False
    cut: bool = False

    @property
    def division(self) -> str:
        """What mounts that divide a source alike have in common."""
        return f"{self.count} seed {self.seed}"

    def __str__(self) -> str:
        """What mounts that show and keep the same have in common."""
        extra = "".join(f" {name}" for name, is_on in (("fill", self.fill), ("cut", self.cut)) if is_on)
        return f"{self.number}/{self.count} by {self.by} seed {self.seed} {self.mode}{extra}"


def parse_shard(text: str) -> tuple[int, int] | str:
    """(R, N) for "R/N", AUTO_SHARD for "auto". Raises UsageError for anything but one shard of those there are."""
    if text.strip().lower() == AUTO_SHARD:
        return AUTO_SHARD
    match = _SHARD.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a shard", "write R/N, such as 0/4 for the first of four, or auto")
    number, count = int(match[1]), int(match[2])
    if not 1 <= count <= MOST_SHARDS:
        raise UsageError(
            f"there cannot be {count} shards, as {text!r} says", f"write R/N with N from 1 to {MOST_SHARDS}"
        )
    if number >= count:
        raise UsageError(f"there is no shard {text!r}", f"R counts from 0: the last of {count} is {count - 1}/{count}")
    return number, count


@dataclass(frozen=True)
class Settings:
    """Everything that one mount is told. Times are in seconds."""

    source: Path
    mountpoint: Path
    scratch: Path
    capacity: Capacity = field(default=DEFAULT_CAPACITY)
    memory: Capacity | None = None
    """Of the memory tier; a share is of the memory that the job may have."""
    memory_path: Path = DEFAULT_MEMORY_PATH
    is_memory_optional: bool = False
    """Where there can be no memory tier, it goes without."""
    policy: str = "auto"
    prefetch: str = "auto"
    metadata_ttl: float = 3600.0
    source_timeout: float = 120.0
    allow_other: bool = False
    no_promote: bool = False
    log_level: str = "info"
    sharding: Sharding | None = None
    is_private: bool = False
    """It is mounted in namespaces that only the processes of one job are in."""


def default_scratch() -> Path:
    """The job's own directory inside a Grid Engine or Slurm job, else one for each user in the temporary directory."""
    job = os.environ.get("JOB_ID") or os.environ.get("SLURM_JOB_ID")
    job_directory = os.environ.get("TMPDIR")
    if job and job_directory and not _is_shared(job_directory):
        return Path(job_directory) / "cachefs"
    return Path(tempfile.gettempdir()) / f"cachefs-{os.getuid()}"


def _is_shared(directory: str) -> bool:
    """Whether it is somebody else's, as /tmp is: Slurm makes no TMPDIR of its own unless it is configured to."""
    try:
        return os.stat(directory).st_uid != os.geteuid()
    except OSError:
        return False  # the mount will say what is wrong with it


def format_size(size: float) -> str:
    """`size` bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
