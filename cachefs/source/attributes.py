"""What is known of one source entry, and which part of it makes a version.

Attributes travel and rest in a packed form (116 bytes), because a mount may remember a million of them; the version
is its beginning, so that comparing versions is comparing bytes.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<qqqQQqqqIIIIQ")
VERSION_BYTES = 24
"""Length of a version: size, mtime_ns, ctime_ns. ctime tells apart what a set-back mtime would hide."""


class Attributes(NamedTuple):
    """The fields of `os.stat_result` that the mount shows; times in nanoseconds, size in bytes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    atime_ns: int
    blocks: int
    block_size: int
    mode: int
    links: int
    uid: int
    gid: int
    special_device: int

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, packed: bytes) -> Attributes:
        return cls(*_LAYOUT.unpack(packed))


def pack_stat(status: os.stat_result) -> bytes:
    """The packed form of what os.stat said."""
    return _LAYOUT.pack(
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
        status.st_atime_ns,
        status.st_blocks,
        status.st_blksize,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
    )


def version_of(packed: bytes) -> bytes:
    """The version (VERSION_BYTES long) of packed attributes."""
    return packed[:VERSION_BYTES]


def size_of(version: bytes) -> int:
    """The file size in bytes that a version (or packed attributes) carries."""
    return int.from_bytes(version[:8], "little", signed=True)


def mtime_of(version: bytes) -> int:
    """The time of the last change, in ns since the epoch, that a version (or packed attributes) carries."""
    return int.from_bytes(version[8:16], "little", signed=True)


def is_same_content(before: bytes, now: bytes) -> bool:
    """Whether an open file still has the content that it had: packed attributes `before` and `now` of one descriptor.

    A ctime that moved together with the number of links is a link made or removed (a file replaced by rename
    under an open descriptor, for instance), not a write.
    """
    if before[:VERSION_BYTES] == now[:VERSION_BYTES]:
        return True
    old, new = Attributes.unpack(before), Attributes.unpack(now)
    return old.size == new.size and old.mtime_ns == new.mtime_ns and old.links != new.links
