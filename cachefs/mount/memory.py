"""The place of the memory tier: a scratch directory of its own on tmpfs, one for each scratch, for all its mounts.

Invariants:
- It is made and purged with the means of any scratch: 0700, marked, locked, with leases. Its path is written down in
  scratch, so that a purge of that finds it.
- Nothing in it outlives the mounts: the last one purges it; what mounts that have died left, the next one of this user
  with a memory tier, or whoever purges scratch.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from cachefs.cache.ledger import Ledger
from cachefs.cache.memory import MemoryTier
from cachefs.cache.scratch import Scratch, claim_scratch
from cachefs.cache.storage import Storage
from cachefs.cache.trees import Trees
from cachefs.config import SPARED_MEMORY_SHARE, Capacity, Settings, format_size
from cachefs.errors import CachefsError, UsageError
from cachefs.metrics import Metrics
from cachefs.mount.limits import find_memory_limit
from cachefs.mount.membership import Membership
from cachefs.mount.mountinfo import MEMORY_FSTYPES, containing_mount
from cachefs.mount.purge import ScratchInUseError, purge

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_CHOOSE = "choose a smaller --memory"


def memory_path(settings: Settings) -> Path:
    """Where the memory tier of a scratch lies."""
    digest = hashlib.blake2b(os.fsencode(settings.scratch), digest_size=6).hexdigest()
    return settings.memory_path / f"cachefs-{os.geteuid()}-{digest}"


def memory_size(memory: Capacity) -> int:
    """Bytes; a share is of the memory that this process may have."""
    if memory.size is not None:
        return memory.size
    return int((memory.share or 0.0) * _most())


def _most() -> int:
    total = int(psutil.virtual_memory().total)
    limit = find_memory_limit(total)
    return total if limit is None else limit.size


def check_memory(settings: Settings) -> None:
    """Raise CachefsError for a memory tier that cannot be."""
    if settings.memory is None:
        return
    place, size = settings.memory_path, memory_size(settings.memory)
    tier = memory_path(settings)
    for one, other in ((settings.scratch, tier), (tier, settings.scratch)):
        if one == other or one in other.parents:
            raise UsageError(
                f"scratch {settings.scratch} and the memory tier {tier} are one directory, or one is inside the other",
                "choose another with --scratch",
            )
    for name, path in ("source", settings.source), ("mountpoint", settings.mountpoint):
        if path == place or path in place.parents:
            raise UsageError(f"the memory tier {place} is inside the {name} {path}", "choose another --memory-path")
    try:
        status = os.statvfs(place)
    except OSError as error:
        raise UsageError(
            f"--memory-path {place} cannot be used: {error.strerror}", "name a directory on tmpfs"
        ) from None
    mount = containing_mount(place)
    if mount is None or mount.fstype not in MEMORY_FSTYPES:
        raise UsageError(
            f"--memory-path {place} is not in memory ({mount.fstype if mount else 'unknown'})",
            "name a directory on tmpfs, such as /dev/shm",
        )
    if size > (most := _most()):
        raise UsageError(f"--memory {format_size(size)} is more than this job may have ({format_size(most)})", _CHOOSE)
    if size > (total := status.f_blocks * status.f_frsize):
        raise UsageError(
            f"--memory {format_size(size)} is more than the tmpfs at {place} holds ({format_size(total)})",
            f"{_CHOOSE}, or mount a larger tmpfs and name it with --memory-path",
        )


def claim_memory(settings: Settings, scratch: Scratch) -> Scratch | None:
    """The claimed directory of the memory tier, None without one. Raises CachefsError."""
    if settings.memory is None:
        return None
    path = memory_path(settings)
    free_memory(path)
    free_orphans(settings.memory_path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open("memory", flags, 0o600, dir_fd=scratch.fd), "wb") as file:
        file.write(os.fsencode(path))
    return claim_scratch(path)


def free_memory(path: Path) -> None:
    """Purge the memory tier at `path`, unless a mount uses it. Raises CachefsError."""
    if os.path.lexists(path):
        with suppress(ScratchInUseError):
            purge(path)


def join_memory(settings: Settings, place: Scratch, storage: Storage, dataset: bytes, stack: AsyncExitStack) -> Ledger:
    """The ledger of a claimed memory tier, which is left, and freed by whoever is the last, when `stack` ends."""
    membership = Membership(settings, place, storage, Trees(place.fd), dataset)

    def leave() -> None:
        membership.leave()
        try:
            free_memory(place.path)
        except CachefsError as error:
            log.warning("memory tier not freed error=%r", str(error))

    stack.callback(leave)
    membership.count_nothing()
    return membership.ledger


def describe_tiers(
    scratch: Scratch,
    capacity: int,
    ledger: Ledger,
    metrics: Metrics,
    memory: Scratch | None,
    tier: MemoryTier | None,
) -> list[dict[str, Any]]:
    """What is in each tier, the fastest first, and how many hits it had; files that have moved between them.

    `capacity` (bytes) and `ledger` are those of `scratch`.
    """
    stored, files = ledger.stored()
    hits = metrics.hits - (tier.hits if tier is not None else 0)
    counts = {"capacity_bytes": capacity, "files": files, "bytes": stored, "hits": hits}
    found: list[dict[str, Any]] = [{"path": str(scratch.path), **counts}]
    if memory is not None and tier is not None:
        found.insert(0, {"path": str(memory.path), **tier.status()})
    return found


def free_orphans(place: Path) -> int:
    """Purge all memory tiers of this user in `place` that no mount uses: of jobs that were killed, scratch and all.

    How many there were. Never raises: what is not ours, or in use, stays.
    """
    freed = 0
    for path in place.glob(f"cachefs-{os.geteuid()}-*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:  # who is about to join it holds its lock: do not wait for that
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        finally:
            os.close(fd)
        with suppress(CachefsError):
            purge(path)
            freed += 1
    return freed


class MemoryRoom:
    """How many bytes more the memory tier may take: called often, it looks seldom. `fd` is in its tmpfs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._limit = find_memory_limit(psutil.virtual_memory().total)
        self._looked_at = 0.0
        self._room = 0

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            self._room = self._look()
        return self._room

    def _look(self) -> int:
        memory, status = psutil.virtual_memory(), os.fstatvfs(self._fd)
        rooms = [memory.available - SPARED_MEMORY_SHARE * memory.total, status.f_bavail * status.f_frsize]
        if self._limit is not None:
            rooms.append((1 - SPARED_MEMORY_SHARE) * self._limit.size - self._limit.used())
        return int(min(rooms))
