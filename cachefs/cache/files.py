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

from cachefs.cache.fetches import Fetch
from cachefs.cache.read_ahead import ReadAhead
from cachefs.cache.tiers import Tier
from cachefs.errors import SourceChangedError, SourceError, StorageError
from cachefs.metrics import Metrics
from cachefs.source.attributes import size_of

log = logging.getLogger(__name__)

_NEAR_BYTES = 2 * 1024 * 1024
_NEAR_SECONDS = 0.05
"""A read that starts less than this beyond the frontier waits for it; one further on goes to the source."""

Buffer = bytes | bytearray | memoryview


class OpenFile:
    """One version of one file while somebody has it open; shared by all its handles.

    It is served from a complete copy (`fd`), from a fetch on its way (`fetch`), or by the source (neither). `tier` is
    that of the copy, or of the fetch.
    """

    def __init__(
        self,
        name: bytes,
        path: bytes,
        version: bytes,
        *,
        tier: Tier,
        source_read: Callable[[bytes, bytes, int, int], Awaitable[bytes]],
        metrics: Metrics,
        fd: int | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self.path = path
        self.size = size_of(version)
        self.name = name
        self._version = version
        self.tier = tier
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
        self.tier = fetch.tier  # another mount may have had it in another one
        self.is_stale |= isinstance(fetch.error, SourceChangedError)
        if fetch.error is not None:
            self._retire()
        elif self._fd is None:
            self._fd = self._open_copy(staged=False)
        else:
            self.tier.storage.share(self._fd)

    def _open_copy(self, *, staged: bool) -> int | None:
        """The staged copy, which may have become the complete one by now; None if scratch failed or evicted it."""
        try:
            fd = self.tier.storage.open_staged(self.name) if staged else None
            return self.tier.storage.open(self.name) if fd is None else fd
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
            data = await self.tier.reader.read(fd, offset, size)
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
