"""What the machine and the job's control group allow a process: memory, open files, processors.

Control groups are read in both versions; a limit anywhere between the process's own group and the root counts.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from cachefs.mount.mountinfo import Mount, read_mounts

_V1_FILE, _V2_FILE = "memory.limit_in_bytes", "memory.max"
_USAGE = {
    _V1_FILE: ("memory.usage_in_bytes", "total_inactive_file"),
    _V2_FILE: ("memory.current", "inactive_file"),
}
"""How much counts against a limit, and what of the group's memory.stat can be taken back."""


@dataclass(frozen=True)
class MemoryLimit:
    """The tightest memory limit of the control groups of this process: `size` in bytes, and the file that says so."""

    size: int
    file: Path

    def used(self) -> int:
        """Bytes that count against it and that the kernel cannot take back: all but the page cache that is not in use.

        0 where that cannot be read.
        """
        used, inactive = _USAGE[self.file.name]
        usage = _read(self.file.with_name(used)) or "0"
        statistics = dict(line.split() for line in (_read(self.file.with_name("memory.stat")) or "").splitlines())
        return int(usage) - int(statistics.get(inactive, 0))


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes. `open_files` is (soft, hard), None where there is no limit."""

    memory_total: int
    memory_available: int
    memory_limit: MemoryLimit | None
    open_files: tuple[int | None, int | None]
    processors: int
    processors_of_machine: int

    @property
    def most_memory(self) -> int:
        """What this process may have at all."""
        return self.memory_total if self.memory_limit is None else self.memory_limit.size


def read_limits() -> Limits:
    memory = psutil.virtual_memory()
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return Limits(
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=find_memory_limit(memory.total),
        open_files=(soft, hard),
        processors=len(os.sched_getaffinity(0)),
        processors_of_machine=os.cpu_count() or 1,
    )


def find_memory_limit(total: int) -> MemoryLimit | None:
    """The limit that binds this process, if one is below the `total` bytes of the machine."""
    try:
        groups = Path("/proc/self/cgroup").read_bytes()
    except OSError:  # a kernel without control groups
        return None
    return tightest_limit(limit_files(groups, read_mounts()), _read, total)


def limit_files(groups: bytes, mounts: Iterable[Mount]) -> list[Path]:
    """The files that may limit this process's memory. `groups` is what /proc/self/cgroup holds.

    A container sees its own group at the root of the hierarchy while /proc/self/cgroup may name it by the host's
    path, so each ancestor is a candidate, whether it is there or not.
    """
    files: list[Path] = []
    mounted = list(mounts)
    for line in groups.splitlines():
        _, controllers, path = line.split(b":", 2)
        if not controllers:
            fstype, name, option = "cgroup2", _V2_FILE, None
        elif b"memory" in controllers.split(b","):
            fstype, name, option = "cgroup", _V1_FILE, "memory"
        else:
            continue
        group = PurePosixPath(os.fsdecode(path))
        for mount in mounted:
            if mount.fstype == fstype and (option is None or option in mount.options):
                ancestors = [group, *group.parents]
                files += [mount.path / ancestor.relative_to("/") / name for ancestor in ancestors]
    return files


def tightest_limit(files: Iterable[Path], read: Callable[[Path], str | None], total: int) -> MemoryLimit | None:
    """The smallest number in `files` below `total`: version 1 writes no limit as a huge number, version 2 as "max"."""
    found: MemoryLimit | None = None
    for file in files:
        text = (read(file) or "").strip()
        if text.isdigit() and int(text) < (found.size if found else total):
            found = MemoryLimit(int(text), file)
    return found


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
