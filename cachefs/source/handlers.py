"""The jobs that a worker process does on the source. Each is a generator: see workers.protocol.

Errors of the source become SourceError, so that whoever asked can tell them from errors of scratch.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cachefs.errors import SourceChangedError, SourceError
from cachefs.source.attributes import Attributes, is_same_content, pack_stat, version_of
from cachefs.source.tree import SourceTree
from cachefs.workers.protocol import PACKET_BYTES, Handler

_OPEN_FILES = 16
_ENTRIES_A_MESSAGE = 256  # of at most 255 + some 30 bytes each: below a packet
_ATTRIBUTES_A_MESSAGE = 256


@contextmanager
def source_errors(path: bytes) -> Iterator[None]:
    """Turn an OSError of a call on the source into a SourceError that names `path`."""
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(error.errno or errno.EIO, error.strerror or str(error), path) from error


_NOT_THE_FILE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO, errno.EMLINK)
)
"""What opening or reading a path says that was a regular file and is gone, or a directory, link, pipe or socket now."""


@contextmanager
def file_errors(path: bytes) -> Iterator[None]:
    """As source_errors, for a path that was a regular file: that it is none any more is SourceChangedError."""
    try:
        with source_errors(path):
            yield
    except SourceError as error:
        if error.errno in _NOT_THE_FILE:
            raise SourceChangedError(path) from error
        raise


def open_version(tree: SourceTree, path: bytes, version: bytes) -> tuple[int, bytes]:
    """(descriptor, packed attributes) of the regular file `path`. Raises SourceChangedError for another version."""
    fd = tree.open(path)
    try:
        packed = pack_stat(os.fstat(fd))
        if version_of(packed) != version or not stat.S_ISREG(Attributes.unpack(packed).mode):
            raise SourceChangedError(path)
    except BaseException:
        os.close(fd)
        raise
    return fd, packed


def read_exactly(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes, or fewer where the file ends."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    got = len(data)
    while got < size and (data := os.pread(fd, size - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)


class SourceHandlers:
    """The handlers of one worker process; files that are read in parts stay open, the last 16 of them."""

    def __init__(self, tree: SourceTree) -> None:
        self.tree = tree
        self._files: OrderedDict[tuple[bytes, bytes], tuple[int, bytes | None]] = OrderedDict()

    def table(self) -> Mapping[str, Handler]:
        return {
            "stat": self._stat,
            "readlink": self._single(self.tree.readlink),
            "access": self._single(self.tree.access),
            "statvfs": self._statvfs,
            "list": self._list,
            "stat_many": self._stat_many,
            "check": self._check,
            "read": self._read,
        }

    def _stat(self, path: bytes) -> Generator[Any, None, bytes]:
        yield from ()
        with source_errors(path):
            return self.tree.stat(path)

    def _single(self, call: Callable[..., Any]) -> Handler:
        def handler(path: bytes, *arguments: Any) -> Generator[Any, None, Any]:
            yield from ()
            with source_errors(path):
                return call(path, *arguments)

        return handler

    def _statvfs(self) -> Generator[Any, None, Any]:
        yield from ()
        with source_errors(b""):
            return self.tree.statvfs()

    def _list(self, path: bytes) -> Generator[Any, None, None]:
        with source_errors(path):
            yield from self.tree.entries(path, _ENTRIES_A_MESSAGE)

    def _stat_many(self, path: bytes, names: list[bytes]) -> Generator[Any, None, None]:
        with source_errors(path):
            yield from self.tree.stat_many(path, names, _ATTRIBUTES_A_MESSAGE)

    def _check(self, path: bytes, version: bytes) -> Generator[Any, None, None]:
        yield from ()
        with file_errors(path):
            self._verify(self._open(path, version), path, version)

    def _read(self, path: bytes, version: bytes, offset: int, size: int) -> Generator[Any, None, None]:
        """Yield the bytes from `offset`, in packets; never bytes of another version."""
        with file_errors(path):
            fd = self._open(path, version)
            data = read_exactly(fd, offset, size)
            self._verify(fd, path, version)
        view = memoryview(data)
        for start in range(0, len(data), PACKET_BYTES):
            yield bytes(view[start : start + PACKET_BYTES])

    def _open(self, path: bytes, version: bytes) -> int:
        """A descriptor of what is, or was when it was last verified, of this version."""
        known = self._files.get((path, version))
        if known is not None:
            self._files.move_to_end((path, version))
            return known[0]
        fd = self.tree.open(path)
        self._files[path, version] = fd, None
        if len(self._files) > _OPEN_FILES:
            _, (oldest, _) = self._files.popitem(last=False)
            os.close(oldest)
        return fd

    def _verify(self, fd: int, path: bytes, version: bytes) -> None:
        """Raise SourceChangedError unless all that was read so far is of `version`. One question to the source."""
        now = pack_stat(os.fstat(fd))
        _, before = self._files[path, version]
        if not (version_of(now) == version if before is None else is_same_content(before, now)):
            del self._files[path, version]
            os.close(fd)
            raise SourceChangedError(path)
        self._files[path, version] = fd, now if before is None else before
