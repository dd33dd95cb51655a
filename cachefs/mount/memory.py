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
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cachefs.cache.scratch import MEMORY, Scratch, claim_scratch, unlock_scratch
from cachefs.cache.storage import Storage
from cachefs.config import Capacity, Settings, format_size
from cachefs.errors import CachefsError, UsageError, describe
from cachefs.mount.leases import boot_id
from cachefs.mount.limits import read_limits
from cachefs.mount.mountinfo import MEMORY_FSTYPES, containing_mount
from cachefs.mount.purge import ScratchInUseError, is_ours, purge

WITHOUT = "there is no memory tier"
"""What is said where it goes without one, after the reason."""
_CHOOSE = "choose a smaller --memory"


class MemoryTierError(CachefsError):
    """A memory tier cannot be."""


def memory_path(settings: Settings) -> Path:
    """Where the memory tier of a scratch lies."""
    digest = hashlib.blake2b(os.fsencode(settings.scratch), digest_size=6).hexdigest()
    return settings.memory_path / f"cachefs-{os.geteuid()}-{digest}"


def memory_size(memory: Capacity) -> int:
    """Bytes; a share is of the memory that this process may have."""
    if memory.size is not None:
        return memory.size
    return int((memory.share or 0.0) * read_limits().most_memory)


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
    if size > (most := read_limits().most_memory):
        raise UsageError(f"--memory {format_size(size)} is more than this job may have ({format_size(most)})", _CHOOSE)
    if size > (total := status.f_blocks * status.f_frsize):
        raise UsageError(
            f"--memory {format_size(size)} is more than the tmpfs at {place} holds ({format_size(total)})",
            f"{_CHOOSE}, or mount a larger tmpfs and name it with --memory-path",
        )


@dataclass(frozen=True)
class MemoryPlace:
    """The claimed directory of a memory tier, of `size` bytes."""

    scratch: Scratch
    storage: Storage
    size: int


def claim_memory(settings: Settings, scratch: Scratch) -> MemoryPlace | None:
    """The place of the memory tier, None without one. Raises MemoryTierError."""
    if settings.memory is None:
        return None
    path = memory_path(settings)
    with memory_errors(path):
        free_memory(path)
        free_orphans(settings.memory_path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(MEMORY, flags, 0o600, dir_fd=scratch.fd), "wb") as file:
            file.write(os.fsencode(path))
        place = claim_scratch(path)
        try:
            return MemoryPlace(place, Storage(place.fd, boot_id()), memory_size(settings.memory))
        except OSError:
            give_up_memory(place)
            raise


def go_without(settings: Settings, error: MemoryTierError) -> str:
    """What to warn of where a mount goes without its memory tier; raises `error` where it may not."""
    if not settings.is_memory_optional:
        raise error
    return f"{error}; {WITHOUT}"


@contextmanager
def memory_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the tier at `path` into a MemoryTierError: it is not scratch that fails."""
    try:
        yield
    except CachefsError as error:
        reason = str(error.args[0])
    except OSError as error:
        reason = f"{path} cannot be used: {describe(error)}"
    else:
        return
    raise MemoryTierError(f"memory tier: {reason}", "choose another with --memory-path")


def give_up_memory(place: Scratch) -> None:
    """Remove a tier that was claimed, where no mount came of it and no other uses it."""
    unlock_scratch(place.fd)
    with suppress(CachefsError):
        free_memory(place.path)


def free_memory(path: Path) -> None:
    """Purge the memory tier at `path`, unless a mount uses it. Raises CachefsError."""
    if is_ours(path):  # what is not is said when it is claimed
        with suppress(ScratchInUseError):
            purge(path)


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
