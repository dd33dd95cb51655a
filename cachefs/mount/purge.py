"""Purge: removes what we stored, and only that.

Invariants:
- Only a directory that carries our mark, is the caller's own and has no live lease is touched.
- It works relative to descriptors, follows no link and crosses no mount; names at its top that we did not make stay.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cachefs.cache.scratch import (
    DIRECTORIES,
    FILES,
    MARK,
    MEMORY,
    Scratch,
    is_still_at,
    open_scratch,
    scratch_lock,
    undisturbed,
)
from cachefs.cache.trees import fell
from cachefs.errors import CachefsError, describe
from cachefs.mount.leases import live_leases
from cachefs.mount.mountinfo import mount_id_of, read_mounts


class ScratchInUseError(CachefsError):
    """A live mount uses the scratch."""


@dataclass(frozen=True)
class Purged:
    """What a purge removed: complete and staged files and their bytes; and the names that stay, which are not ours."""

    files: int
    bytes: int
    kept: tuple[str, ...]


def purge(path: Path) -> Purged:
    """Remove everything of ours from the scratch directory `path`, and the directory itself if we made it.

    Raises CachefsError.
    """
    scratch = open_scratch(path)
    try:
        here = mount_id_of(scratch.fd)
        with scratch_lock(scratch.fd):
            if not is_still_at(scratch.fd, path):  # somebody else purged it while we waited
                return Purged(0, 0, ())
            try:
                live = live_leases(scratch)
            except FileNotFoundError:  # an earlier purge got that far
                live = []
            if live:
                mounts = ", ".join(record.mountpoint for record in live)
                raise ScratchInUseError(f"scratch {path} is in use by {mounts}", "unmount first, with cachefs umount")
            _purge_memory(scratch)
            with suppress(FileNotFoundError):  # first: a count that is missing is made afresh, if we get no further
                os.unlink("ledger", dir_fd=scratch.fd)
            _fell_trees(scratch, path, here)
            files, size = 0, 0
            for name in DIRECTORIES:
                removed = _remove_tree(scratch.fd, name, here)
                if name in ("files", "staging"):
                    files, size = files + removed[0], size + removed[1]
            with undisturbed():
                for name in sorted(FILES, key=lambda name: name == MARK):  # the mark last: until then it can be resumed
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=scratch.fd)
                kept = tuple(sorted(os.listdir(scratch.fd)))
                if scratch.made and not kept:
                    os.rmdir(path)
    except OSError as error:
        raise CachefsError(
            f"purge of {path} stopped at {error.filename or path}: {describe(error)}",
            "remove the cause and purge again",
        ) from None
    finally:
        os.close(scratch.fd)
    return Purged(files, size, kept)


def free_memory_of(path: Path) -> None:
    """Purge the memory tier of the scratch `path`, which mounts that have died may have left. Raises CachefsError."""
    scratch = open_scratch(path)
    try:
        with scratch_lock(scratch.fd):
            if not live_leases(scratch):
                _purge_memory(scratch)
    except OSError as error:
        raise CachefsError(f"the memory tier of scratch {path} cannot be freed: {describe(error)}") from None
    finally:
        os.close(scratch.fd)


def _purge_memory(scratch: Scratch) -> None:
    """Remove the memory tier, too: what mounts that have died left of it."""
    try:
        fd = os.open(MEMORY, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=scratch.fd)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        path = Path(os.fsdecode(file.read()))
    if path.is_absolute() and is_ours(path):  # it is empty where who wrote it was killed, or the disk was full
        purge(path)


def is_ours(path: Path) -> bool:
    """Whether a directory of this user with our mark is there: who else may write to a tmpfs may use any name in it."""
    try:
        return os.lstat(path).st_uid == os.geteuid() and os.path.lexists(path / MARK)
    except OSError:
        return False


def _fell_trees(scratch: Scratch, path: Path, here: int) -> None:
    """Remove the trees of mounts that have ended. Raises ScratchInUseError if one is mounted still."""
    try:
        trees = scratch.open_directory("trees")
    except FileNotFoundError:
        return
    try:
        if mount_id_of(trees) != here:
            raise CachefsError("the purge stopped: trees in scratch is a mount", "unmount it and purge again")
        names = os.listdir(trees)
        promoted = [mount.path for mount in read_mounts() if mount.tree in names]
        if promoted:  # its daemon has died
            raise ScratchInUseError(
                f"scratch {path} is in use: a part of it shows at {promoted[0]}", "unmount first, with cachefs umount"
            )
        for name in names:
            for _ in fell(trees, name, mount_id_of):
                pass
    finally:
        os.close(trees)


def _remove_tree(parent: int, name: str, mount: int) -> tuple[int, int]:
    """Remove the directory `name` in `parent`: the files and bytes that were in it."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return 0, 0
    files = size = 0
    try:
        if mount_id_of(fd) != mount:
            raise CachefsError(f"the purge stopped: {name} in scratch is a mount", "unmount it and purge again")
        for entry in os.listdir(fd):
            status = os.stat(entry, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                below = _remove_tree(fd, entry, mount)
                files, size = files + below[0], size + below[1]
            else:
                os.unlink(entry, dir_fd=fd)
                files, size = files + 1, size + status.st_size
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
    return files, size
