"""Reading what scratch holds without holding up the event loop."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import trio

_EXPECTED_BYTES = 256 * 1024
"""Up to this size a file that is opened is expected to be read whole, at once."""


class ScratchReader:
    """Reads files of scratch: from the page cache at once, from the disk in a thread.

    Trying the page cache first costs some 10 us; a thread costs 170-340 us (design.md section 6). The threads have a
    limit of their own, so that a slow disk never holds up anything else. Where scratch is `in_memory` (tmpfs, which
    does not know RWF_NOWAIT) every read is one of the page cache.
    """

    def __init__(self, threads: int, *, in_memory: bool) -> None:
        self._limiter = trio.CapacityLimiter(threads)
        self._flags: int | None = 0 if in_memory else os.RWF_NOWAIT

    def expect(self, fd: int, size: int) -> None:
        """Have the disk bring a small file while the kernel, which was told of the open, prepares its first read.

        Mostly the page cache has it then, and no thread is needed: with a cold page cache, files of 110 KB take 218 us
        each instead of 297, of 4 KB 182 instead of 260 (benchmarks/results/requests.json, "not asked at open").
        """
        if self._flags and size <= _EXPECTED_BYTES:
            with suppress(OSError):  # it is advice: a file system may not know it
                os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)

    async def read(self, fd: int, offset: int, size: int) -> memoryview:
        """Up to `size` bytes; fewer only at the end of the file. Raises OSError."""
        view = memoryview(bytearray(size))
        got = 0
        if self._flags is not None:
            try:
                got = os.preadv(fd, [view], offset, self._flags)
                if got == size:
                    return view
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._flags = None
        more = await trio.to_thread.run_sync(_read_rest, fd, view, got, offset, limiter=self._limiter)
        return view[: got + more]


def _read_rest(fd: int, view: memoryview, got: int, offset: int) -> int:
    start = got
    while got < len(view) and (more := os.preadv(fd, [view[got:]], offset + got)):
        got += more
    return got - start
