"""Tells that somebody writes to copies which a mount shows directly (promotion): the kernel would show what he wrote.

inotify(7) tells of each write and each truncation by any process of this machine, whatever is done to times afterwards,
and not of writes through a mapping. A copy in a tree has two names, in two directories; a write is told to who watches
the one through which the file was opened, so both are watched. Our own writes end before a copy gets there.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress

_IN_MODIFY = 2
_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, bytes of the name that follows
_BUFFER_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class WriteWatch:
    """A set of directories. Its descriptor `fd` is readable when there is something to take, and is shared by processes
    that are forked; -1 where the kernel grants none, and then nothing is watched."""

    def __init__(self) -> None:
        self.fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, directory: int) -> None:
        """Watch the files in a directory, a descriptor of it. Beyond the kernel's limit it is not watched."""
        if self.fd >= 0:
            _libc.inotify_add_watch(self.fd, b"/proc/self/fd/%d" % directory, _IN_MODIFY)

    def take(self) -> bytes | None:
        """The name of a file that was written to since the last time, None if none was. Does not wait."""
        with suppress(BlockingIOError):
            events, at = os.read(self.fd, _BUFFER_BYTES), 0
            while at < len(events):
                _, mask, _, length = _EVENT.unpack_from(events, at)
                at += _EVENT.size + length
                if mask & _IN_MODIFY:
                    return events[at - length : at].rstrip(b"\0")
        return None
