"""Trees in scratch: directories of the source built again, of hard links to the complete files, so that they can be
mounted over the mount (promotion). Worker processes build and remove them.

    trees/LEASE/PATH     the directory PATH of the source, as the mount with that lease shows it

Invariants:
- A file in a tree is one in storage under another name. Storage removes none that has a second name, and the link is
  made while its lock is held, so what a tree shows is never evicted.
- A directory gets its mode and times last. One that has them is complete, and is not changed any more.
- What is removed is emptied from the top, one directory at a time: no depth and no mode is in the way.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

from cachefs.cache.storage import Storage
from cachefs.cache.write_watch import WriteWatch
from cachefs.errors import SourceChangedError, SourceError, StorageError
from cachefs.source.attributes import Attributes, version_of
from cachefs.source.tree import SourceTree
from cachefs.workers.protocol import Handler

ENTRIES_A_JOB = 250
ENTRY_BYTES_A_JOB = 64 * 1024
"""What `plant` is given at once at the most: entries, and bytes of their names and attributes."""
_ENTRIES_A_LOOK = 5000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

MISSING, REFUSED = "missing", "refused"
"""Why an entry is not in a tree: storage has no copy (any more); or it cannot be made to look as the source's."""

Entry = tuple[bytes, bytes, bytes]
"""(name, name in storage or b"" for what needs no copy, packed attributes)."""


class Trees:
    """The folder of all trees of one scratch."""

    def __init__(self, scratch_fd: int) -> None:
        self.fd = os.open("trees", _DIRECTORY, dir_fd=scratch_fd)

    def open(self, lease: str, path: bytes) -> int:
        """A descriptor of a directory in a tree. Raises OSError."""
        return self._descend(lease, path, is_making=False)

    def make(self, lease: str, path: bytes) -> int:
        """The same, made where it is missing, and all above it."""
        return self._descend(lease, path, is_making=True)

    def names(self) -> list[str]:
        """The leases that have a tree, and what is left of others."""
        return os.listdir(self.fd)

    def _descend(self, lease: str, path: bytes, *, is_making: bool) -> int:
        fd = self.fd
        for name in (os.fsencode(lease), *(path.split(b"/") if path else ())):
            try:
                if is_making:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                if fd != self.fd:
                    os.close(fd)
            fd = below
        return fd


def fell(top: int, name: str, mount_of: Callable[[int], int]) -> Iterator[str]:
    """Remove the tree `name` in the directory `top`, whatever its depth and modes; yield now and then where it is.

    `mount_of` tells the mount that a descriptor is in: no other is entered (EXDEV).
    """
    here = mount_of(top)
    waiting = [name]
    while waiting:
        name = waiting.pop()
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=top)
        except FileNotFoundError:
            continue
        except NotADirectoryError:  # a link is none either
            os.unlink(name, dir_fd=top)
            continue
        try:
            if mount_of(fd) != here:
                raise OSError(errno.EXDEV, "is a mount", name)
            os.fchmod(fd, 0o700)
            while entries := _some_names(fd):
                yield name
                for entry in entries:
                    try:
                        os.unlink(entry, dir_fd=fd)
                    except IsADirectoryError:
                        os.chmod(entry, 0o700, dir_fd=fd)
                        try:
                            os.rmdir(entry, dir_fd=fd)
                        except OSError as error:
                            if error.errno != errno.ENOTEMPTY:
                                raise
                            # to the top, under a name of its own: no depth has to be remembered, nor a path
                            waiting.append(secrets.token_hex(8))
                            os.rename(entry, waiting[-1], src_dir_fd=fd, dst_dir_fd=top)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)


def _some_names(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in islice(entries, _ENTRIES_A_LOOK)]


class TreeHandlers:
    """The jobs of one worker process. Trees are made from `source` and `storage`; `watch` tells of writes to them."""

    def __init__(
        self,
        source: SourceTree,
        storage: Storage,
        trees: Trees,
        mount_of: Callable[[int], int],
        watch: WriteWatch,
    ) -> None:
        self._watch = watch
        self._source = source
        self._storage = storage
        self._trees = trees
        self._mount_of = mount_of
        self._is_root = os.geteuid() == 0

    def table(self) -> Mapping[str, Handler]:
        return {"sprout": self._sprout, "plant": self._plant, "finish": self._finish, "fell": self._fell}

    def _sprout(self, lease: str, path: bytes, only: bytes = b"") -> Generator[None, None, None]:
        """Begin the directory `path`: make it, or take away what an attempt that came to nothing has left in it.

        `only`: take away this name alone.
        """
        yield from ()
        fd = self._trees.make(lease, path)
        try:
            os.fchmod(fd, 0o700)
            with os.scandir(fd) as entries:
                left = [os.fsencode(entry.name) for entry in entries if not entry.is_dir(follow_symlinks=False)]
            for name in left:
                if only in (b"", name):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _plant(
        self, lease: str, path: bytes, entries: Sequence[Entry]
    ) -> Generator[None, None, list[tuple[bytes, str]]]:
        """Put files and symbolic links into the directory `path`; (name, why) of each that could not be."""
        yield from ()
        failed: list[tuple[bytes, str]] = []
        fd = self._trees.make(lease, path)
        try:
            self._watch.add(fd)
            for name, stored, packed in entries:
                attributes = Attributes.unpack(packed)
                if stat.S_ISLNK(attributes.mode):
                    problem = self._plant_link(fd, path + b"/" + name if path else name, name, packed, attributes)
                else:
                    problem = self._plant_file(fd, name, stored, attributes)
                if problem:
                    failed.append((name, problem))
        finally:
            os.close(fd)
        return failed

    def _plant_file(self, directory: int, name: bytes, stored: bytes, attributes: Attributes) -> str:
        if stored:
            try:
                size, mtime_ns = attributes.size, attributes.mtime_ns
                fd = self._storage.link(stored, directory, name, size, mtime_ns, self._watch.add)
            except StorageError as error:
                if error.errno == errno.EMLINK:
                    return REFUSED
                raise
            if fd is None:
                return MISSING
        else:
            flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            return "" if self._dress(fd, attributes) else REFUSED
        finally:
            os.close(fd)

    def _plant_link(self, directory: int, path: bytes, name: bytes, packed: bytes, attributes: Attributes) -> str:
        try:
            target = self._source.readlink(path)
            if version_of(self._source.stat(path)) != version_of(packed):
                raise SourceChangedError(path)
        except OSError as error:
            raise SourceError(error.errno or errno.EIO, error.strerror or str(error), path) from error
        os.symlink(target, name, dir_fd=directory)
        if self._is_root:
            try:
                os.chown(name, attributes.uid, attributes.gid, dir_fd=directory, follow_symlinks=False)
            except OSError:
                return REFUSED
        times = attributes.atime_ns, attributes.mtime_ns
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        made = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return "" if (made.st_mode, made.st_mtime_ns) == (attributes.mode, attributes.mtime_ns) else REFUSED

    def _finish(self, lease: str, path: bytes, entries: int, packed: bytes) -> Generator[None, None, bool]:
        """Give the directory `path` its mode and times. False if it cannot have them, or has not `entries` entries."""
        yield from ()
        fd = self._trees.open(lease, path)
        try:
            with os.scandir(fd) as found:
                if sum(1 for _ in found) != entries:
                    return False
            return self._dress(fd, Attributes.unpack(packed))
        finally:
            os.close(fd)

    def _dress(self, fd: int, attributes: Attributes) -> bool:
        """Give an open file or directory the source's owner, if we may, mode and times. Whether it has taken them."""
        try:
            if self._is_root:
                os.fchown(fd, attributes.uid, attributes.gid)
            os.fchmod(fd, stat.S_IMODE(attributes.mode))
            os.utime(fd, ns=(attributes.atime_ns, attributes.mtime_ns))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EINVAL, errno.EDQUOT):
                return False
            raise
        now = os.fstat(fd)
        return (now.st_mode, now.st_mtime_ns) == (attributes.mode, attributes.mtime_ns) and (
            not self._is_root or (now.st_uid, now.st_gid) == (attributes.uid, attributes.gid)
        )

    def _fell(self, names: Sequence[str]) -> Generator[str, None, None]:
        """Remove whole trees."""
        for name in names:
            yield from fell(self._trees.fd, name, self._mount_of)
