"""Open files: what answers the reads of one version of one file, for all handles that are open on it.

Invariants:
- Every byte given is of the version with which the file was opened, or the read fails (ESTALE).
- A file that scratch cannot serve (any more) is served by the source; a reader never sees an error of scratch.
- A file never gets shorter or longer while it is open: its size is part of its version.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from cachefs.cache.fetches import Fetch
from cachefs.cache.read_ahead import ReadAhead
from cachefs.cache.storage import Storage
from cachefs.errors import SourceChangedError, SourceError, StorageError
from cachefs.metrics import Metrics
from cachefs.source.attributes import size_of

log = logging.getLogger(__name__)

_NEAR_BYTES = 2 * 1024 * 1024
_NEAR_SECONDS = 0.05
"""A read that starts less than this beyond the frontier waits for it; one further on goes to the source."""

_EXPECTED_BYTES = 256 * 1024
"""Up to this size a file that is opened is expected to be read whole, at once."""

Buffer = bytes | bytearray | memoryview


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

        Mostly the page cache has it then, and no thread is needed: with a cold page cache, files of 110 KB take 319 us
        each instead of 398, of 4 KB 204 instead of 326 (benchmarks/results/requests.json, "not asked at open").
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


class OpenFile:
    """One version of one file while somebody has it open; shared by all its handles.

    It is served from a complete copy (`fd`), from a fetch on its way (`fetch`), or by the source (neither).
    """

    def __init__(
        self,
        name: bytes,
        path: bytes,
        version: bytes,
        *,
        storage: Storage,
        scratch_reader: ScratchReader,
        source_read: Callable[[bytes, bytes, int, int], Awaitable[bytes]],
        metrics: Metrics,
        fd: int | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self.path = path
        self.size = size_of(version)
        self.name = name
        self._version = version
        self._storage = storage
        self._scratch_reader = scratch_reader
        self._source_read = source_read
        self._metrics = metrics
        self._fd = fd
        self._fetch = fetch
        self._reads = 0
        self._retired: list[int] = []
        self._read_ahead: ReadAhead | None = None
        self.is_stale = False
        """Whether the source was seen to have another version: then a new open must not share this file."""
        self.was_missing = fetch is not None
        """Whether its first open had to have it fetched."""
        if fetch is not None:
            fetch.follow(self._end_fetch)

    async def read(self, offset: int, size: int) -> Buffer:
        """The bytes from `offset`, `size` of them or up to the end. Raises SourceError."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        data = await self._read(offset, size)
        self._metrics.bytes_served += len(data)
        return data

    @property
    def kind(self) -> str:
        """What serves it now: "hit", "miss" or "bypass"."""
        if self._fetch is not None:
            return "miss"
        return "bypass" if self._fd is None else "hit"

    def close(self) -> None:
        if self._fetch is not None:
            self._fetch.unfollow(self._end_fetch)
            self._fetch = None
        self._retire()

    async def _read(self, offset: int, size: int) -> Buffer:
        fetch = self._fetch
        if fetch is not None:
            with self._metrics.waiting():
                has_come = await self._has_come(fetch, offset, offset + size)
            if not has_come:
                return await self._read_source(offset, size)
        if self._fd is not None:
            data = await self._read_scratch(self._fd, offset, size)
            if data is not None:
                return data
        return await self._read_source(offset, size)

    async def _has_come(self, fetch: Fetch, start: int, end: int) -> bool:
        """Wait until the fetch has passed `end`. False if the source should serve: it is far ahead, or scratch failed.

        Raises SourceError where the fetch failed for it.
        """
        while fetch.frontier < end and not fetch.is_over:
            if fetch.is_waiting_for_its_turn or start > fetch.frontier + max(_NEAR_BYTES, fetch.rate * _NEAR_SECONDS):
                return False
            await fetch.progress()
        if isinstance(fetch.error, SourceError) and fetch.frontier < end:
            raise fetch.error
        if not fetch.is_over and self._fd is None:
            self._fd = self._open_copy(staged=True)
        return self._fd is not None

    def _end_fetch(self) -> None:
        """The fetch is over: from now on the copy serves, which is held on to, or the source where there is none."""
        fetch, self._fetch = self._fetch, None
        assert fetch is not None  # it calls this once
        self.is_stale |= isinstance(fetch.error, SourceChangedError)
        if fetch.error is not None:
            self._retire()
        elif self._fd is None:
            self._fd = self._open_copy(staged=False)
        else:
            self._storage.share(self._fd)

    def _open_copy(self, *, staged: bool) -> int | None:
        """The staged copy, which may have become the complete one by now; None if scratch failed or evicted it."""
        try:
            fd = self._storage.open_staged(self.name) if staged else None
            return self._storage.open(self.name) if fd is None else fd
        except StorageError as error:
            log.warning("scratch failed path=%r error=%r", self.path, error.strerror)
            return None

    def _retire(self) -> None:
        """Close the descriptor as soon as no thread reads from it: its number may be another file's right after."""
        if self._fd is not None:
            self._retired.append(self._fd)
            self._fd = None
        self._close_retired()

    def _close_retired(self) -> None:
        if not self._reads:
            for fd in self._retired:
                os.close(fd)
            self._retired.clear()

    async def _read_scratch(self, fd: int, offset: int, size: int) -> Buffer | None:
        """The bytes, or None where scratch has failed."""
        self._reads += 1
        try:
            data = await self._scratch_reader.read(fd, offset, size)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if len(data) == size:
                return data
            reason = f"{len(data)} bytes at {offset} instead of {size}"
        finally:
            self._reads -= 1
            self._close_retired()
        log.warning("scratch failed path=%r copy=%s error=%r", self.path, self.name.hex(), reason)
        return None

    async def _read_source(self, offset: int, size: int) -> Buffer:
        if self._read_ahead is None:
            self._read_ahead = ReadAhead(self._count_source_read, self.size)
        with self._metrics.waiting():
            return await self._read_ahead.read(offset, size)

    async def _count_source_read(self, offset: int, size: int) -> bytes:
        try:
            data = await self._source_read(self.path, self._version, offset, size)
        except SourceChangedError:
            self.is_stale = True
            raise
        self._metrics.source_bytes_read += len(data)
        if len(data) != size:
            raise SourceError(errno.EIO, f"the source gave {len(data)} bytes instead of {size}", self.path)
        return data
