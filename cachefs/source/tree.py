"""The source directory as a worker process sees it: synchronous calls, each of which may block.

Invariants:
- Every access starts from the root descriptor and goes down one name at a time without following links, so it can
  neither leave the source nor come back through the mount that covers it, and no path is too long.
- A directory descriptor is reused for `directory_lifetime` seconds at the most: whoever remembers metadata that
  came through it must expire them that much earlier.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from cachefs.source.acl import read_acl, restricted_mode
from cachefs.source.attributes import Attributes, pack_stat

_OPEN_DIRECTORIES = 64
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # needs no permission to list the directory
_STAT_THREADS = 32
_PROBES = 8
_SLOW_STAT_SECONDS = 100e-6
"""From this mean time of a stat on, threads pay: handing the interpreter over costs some 50-100 us a call."""

Entry = tuple[bytes, int, int]
"""One name of a listing: (name, the source's inode number, file type bits or 0 where the source does not say)."""


class SourceTree:
    """Access to the source below `root_fd` (which is not closed here)."""

    def __init__(self, root_fd: int, directory_lifetime: float, *, for_others: bool = False) -> None:
        """`for_others`: modes are shown to other users, and must not grant them more than access control lists do."""
        self._root_fd = root_fd
        self._for_others = for_others
        self._lifetime = directory_lifetime
        self._directories: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._is_slow = False

    def stat(self, path: bytes) -> bytes:
        """Packed attributes of the entry itself (links are not followed). `path` is relative; b"" is the root."""
        if not path:
            return self._stat(b".", self._root_fd)
        directory, name = self._parent(path)
        return self._stat(name, directory)

    def _stat(self, name: bytes, directory: int) -> bytes:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        packed = pack_stat(status)
        if self._for_others and not stat.S_ISLNK(status.st_mode):
            acl = read_acl(b"/proc/self/fd/%d/%s" % (directory, name))
            if acl:
                return Attributes.unpack(packed)._replace(mode=restricted_mode(status.st_mode, acl)).pack()
        return packed

    def readlink(self, path: bytes) -> bytes:
        directory, name = self._parent(path)
        return os.readlink(name, dir_fd=directory)

    def access(self, path: bytes, mode: int) -> bool:
        """access(2) with the effective ids."""
        if not path:
            return os.access(b".", mode, dir_fd=self._root_fd, effective_ids=True)
        directory, name = self._parent(path)
        return os.access(name, mode, dir_fd=directory, effective_ids=True)

    def statvfs(self) -> tuple[int, ...]:
        """(block size, fragment size, blocks, free, available, inodes, free, available, longest name)."""
        status = os.fstatvfs(self._root_fd)
        return (
            status.f_bsize,
            status.f_frsize,
            status.f_blocks,
            status.f_bfree,
            status.f_bavail,
            status.f_files,
            status.f_ffree,
            status.f_favail,
            status.f_namemax,
        )

    def open(self, path: bytes) -> int:
        """A descriptor of the regular file `path`. Raises OSError; ELOOP and EINVAL for what is not regular."""
        directory, name = self._parent(path)
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=directory)

    def entries(self, path: bytes, batch: int) -> Iterator[list[Entry]]:
        """The names of a directory without "." and "..", in batches."""
        found: list[Entry] = []
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory(path))
        try:
            with closing(os.scandir(fd)) as scan:
                for entry in scan:
                    found.append((os.fsencode(entry.name), entry.inode(), _type_of(entry)))
                    if len(found) >= batch:
                        yield found
                        found = []
        finally:
            os.close(fd)
        if found:
            yield found

    def stat_many(self, path: bytes, names: list[bytes], batch: int) -> Iterator[list[tuple[bytes, bytes | int]]]:
        """(name, packed attributes or errno) of each name in the directory `path`, in order, in batches.

        Where the first stats show a slow source, up to 32 are under way at once.
        """
        directory = self._directory(path)

        def stat_one(name: bytes) -> tuple[bytes, bytes | int]:
            try:
                return name, self._stat(name, directory)
            except OSError as error:
                return name, error.errno or errno.EIO

        found: list[tuple[bytes, bytes | int]] = []
        if not self._is_slow:
            start = time.monotonic()
            found = [stat_one(name) for name in names[:_PROBES]]
            self._is_slow = time.monotonic() - start > _SLOW_STAT_SECONDS * len(found)
        rest = names[len(found) :]
        with ThreadPoolExecutor(_STAT_THREADS) as threads:  # starts a thread only when there is work for it
            for result in threads.map(stat_one, rest) if self._is_slow else map(stat_one, rest):
                found.append(result)
                if len(found) >= batch:
                    yield found
                    found = []
        if found:
            yield found

    def _parent(self, path: bytes) -> tuple[int, bytes]:
        directory, _, name = path.rpartition(b"/")
        return self._directory(directory), name

    def _directory(self, path: bytes) -> int:
        """A descriptor of the directory `path`, fresh or remembered; as old as the oldest that led to it."""
        fd, opened_at = self._root_fd, time.monotonic()
        missing: list[bytes] = []
        prefix = path
        while prefix:
            known = self._directories.get(prefix)
            if known is not None:
                if opened_at - known[1] < self._lifetime:
                    self._directories.move_to_end(prefix)
                    fd, opened_at = known
                    break
                del self._directories[prefix]
                os.close(known[0])
            prefix, _, name = prefix.rpartition(b"/")
            missing.append(name)
        for name in reversed(missing):
            fd = os.open(name, _PASS, dir_fd=fd)
            prefix = prefix + b"/" + name if prefix else name
            self._directories[prefix] = fd, opened_at
            if len(self._directories) > _OPEN_DIRECTORIES:
                _, (oldest, _) = self._directories.popitem(last=False)
                os.close(oldest)
        return fd


def _type_of(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0
