"""The source as the event loop sees it: every call is a job in a worker process, bounded in number and in time.

A source that hangs costs one worker for each call, for the time-out at the most; it never costs a thread, and it
never holds up anything that does not need the source. A worker that dies (the kernel's out-of-memory killer takes
what it likes) costs nobody an error: all of this is reading, so its job is done once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from cachefs.errors import WorkerDiedError
from cachefs.source.tree import Entry
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

NAMES_A_JOB = 400
"""Names whose attributes one job asks for: as many as surely fit into its message."""


class Source:
    """Calls on the source; `path` is relative to its root, b"" the root itself. All raise SourceError.

    Metadata and direct reads have a pool each: a file that is read past the cache does not delay a lookup.
    """

    def __init__(self, metadata: WorkerPool, reads: WorkerPool, timeout: float) -> None:
        self._metadata = metadata
        self._reads = reads
        self.timeout = timeout

    async def stat(self, path: bytes) -> bytes:
        """Packed attributes of the entry itself."""
        packed: bytes = await self._ask("stat", path)
        return packed

    async def readlink(self, path: bytes) -> bytes:
        target: bytes = await self._ask("readlink", path)
        return target

    async def access(self, path: bytes, mode: int) -> bool:
        permitted: bool = await self._ask("access", path, mode)
        return permitted

    async def statvfs(self) -> tuple[int, ...]:
        """The fields of statvfs(2), as SourceTree.statvfs orders them."""
        fields: tuple[int, ...] = await self._run(self._metadata, ("statvfs",), "statvfs")
        return fields

    async def listing(self, path: bytes) -> list[Entry]:
        """All names of a directory with their inode numbers and types; no attributes."""
        entries: list[Entry] = []
        await self._run(self._metadata, ("list", path), f"list {path!r}", entries.extend, entries.clear)
        return entries

    async def stat_many(
        self, path: bytes, names: list[bytes], on_batch: Callable[[list[tuple[bytes, bytes | int]]], None]
    ) -> None:
        """Ask for the attributes of up to NAMES_A_JOB `names` in the directory `path`, many at once.

        `on_batch` gets pairs of a name and its packed attributes, or the errno of its stat; the same ones again, should
        a worker die.
        """
        await self._run(self._metadata, ("stat_many", path, names), f"stat_many {path!r}", on_batch)

    async def check(self, path: bytes, version: bytes) -> None:
        """Raise what opening the file would raise, or SourceChangedError."""
        await self._run(self._reads, ("check", path, version), f"open {path!r}")

    async def read(self, path: bytes, version: bytes, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end of the file. Raises SourceChangedError."""
        parts: list[bytes] = []
        job = ("read", path, version, offset, size)
        await self._run(self._reads, job, f"read {path!r}", parts.append, parts.clear)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _ask(self, name: str, path: bytes, *arguments: Any) -> Any:
        return await self._run(self._metadata, (name, path, *arguments), f"{name} {path!r}")

    async def _run(
        self,
        pool: WorkerPool,
        job: tuple[Any, ...],
        what: str,
        on_progress: Callable[[Any], None] | None = None,
        start_again: Callable[[], None] | None = None,
    ) -> Any:
        try:
            return await pool.run(job, what=what, timeout=self.timeout, on_progress=on_progress)
        except WorkerDiedError:
            log.warning("a worker was killed, its job is done once more job=%r", what)
            if start_again is not None:
                start_again()
            return await pool.run(job, what=what, timeout=self.timeout, on_progress=on_progress)
