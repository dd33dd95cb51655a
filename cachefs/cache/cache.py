"""Hit, miss or bypass: decides what serves a file that is opened.

Invariants:
- Each successful open is counted once, as one of the three.
- Between deciding that a file is neither resident nor on its way, and starting its fetch, nothing is awaited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.fetches import Fetch, Fetches
from cachefs.cache.files import OpenFile
from cachefs.cache.memory import MemoryTier
from cachefs.cache.residency import Residency, Resident
from cachefs.cache.tiers import Tier, Tiers
from cachefs.errors import ChangedCopyError, SourceError, StorageError
from cachefs.metrics import Metrics
from cachefs.source.attributes import mtime_of, size_of, version_of
from cachefs.source.client import Source

log = logging.getLogger(__name__)

_OPEN_PATIENCE = 0.1
"""Seconds for which an open waits for the source's first word, so that errors and changes of the source come from
open(2), where programs expect them, and not from read(2). The copy itself it does not wait for."""

_INDEX_PATIENCE = 1.0
"""Seconds for which an open of a file that is not resident waits until the index is read, or scratch counted after a
crash. Then the source serves: a million files can take longer than anybody should wait."""


class Cache:
    """The cache of one mount: opens files of the source through scratch."""

    def __init__(
        self,
        source: Source,
        tiers: Tiers,
        residency: Residency,
        capacity: CapacityKeeper,
        memory: MemoryTier | None,
        fetches: Fetches,
        metrics: Metrics,
    ) -> None:
        """`capacity` and `memory` are those of `tiers`, the last and the first of them."""
        self._source = source
        self._tiers = tiers
        self._storage = capacity.storage
        self._residency = residency
        self._capacity = capacity
        self._memory = memory
        self._fetches = fetches
        self._metrics = metrics
        self.keeps: Callable[[bytes], bool] | None = None
        """Which files, by path, may be fetched; None for all. Another is a hit where another mount has fetched it."""
        self.is_extra: Callable[[bytes], bool] = lambda _: False
        """Which of them are beside the mount's shard, and give way to what is in it."""

    async def open(self, path: bytes, attributes: bytes) -> OpenFile:
        """Open the regular file `path` in the version of its packed `attributes`.

        Raises SourceError; SourceChangedError if the source has another version by now.
        """
        version = version_of(attributes)
        name = self._residency.name_of(path, version)
        fd, tier, is_changed = self._open_resident(name, path, version)
        if fd is not None:
            self._metrics.hits += 1
            self._metrics.hit_bytes += size_of(version)
            tier.reader.expect(fd, size_of(version))
            return self._file(name, path, version, tier, fd=fd)
        with self._metrics.waiting():
            return await self._open_missing(name, path, version, is_changed=is_changed)

    def _open_resident(self, name: bytes, path: bytes, version: bytes) -> tuple[int | None, Tier, bool]:
        """(A descriptor of a copy, or None; its tier; whether scratch has one that is not as it was left).

        It is looked for first where it is known to be: a look into memory for each file of scratch would cost opens
        some percent.
        """
        memory = self._memory
        is_below = memory is not None and not memory.knows(name) and self._residency.get(name) is not None
        if memory is not None:
            memory.count_open()
            if not is_below and (fd := memory.open(name, path, version)) is not None:
                return fd, memory, False
        is_changed = False
        try:
            fd = self._open_in_scratch(name, path, version)
        except ChangedCopyError as error:
            log.warning("changed copy checked path=%r copy=%s", path, error.filename)
            fd, is_changed = None, True
        if fd is None and memory is not None and is_below:  # another mount may have moved it up
            fd = memory.open(name, path, version)
            return fd, self._capacity if fd is None else memory, is_changed
        return fd, self._capacity, is_changed

    async def _open_missing(self, name: bytes, path: bytes, version: bytes, *, is_changed: bool) -> OpenFile:
        """Open a file that is not resident: fetch it, join its fetch, or have the source serve it.

        `is_changed`: there is a copy, and it is not as it was left.
        """
        fetch = self._fetches.get(name)
        if fetch is None and self._keeps(path):
            with trio.move_on_after(_INDEX_PATIENCE):
                await self._residency.loaded.wait()
            if self._residency.loaded.is_set():
                fetch = await self._start_fetch(name, path, version, is_changed=is_changed)
        if fetch is not None:
            with trio.move_on_after(_OPEN_PATIENCE):
                while not (fetch.is_open or fetch.is_over):
                    await fetch.progress()
            if isinstance(fetch.error, SourceError):
                raise fetch.error
            if fetch.error is None:
                self._metrics.misses += 1
                return self._file(name, path, version, fetch.tier, fetch=fetch)
        await self._source.check(path, version)
        self._metrics.bypasses += 1
        return self._file(name, path, version, self._capacity)

    def count_open(self, file: OpenFile) -> None:
        """Count one more open of a file that is open already."""
        kind = file.kind
        self._note_open(file.path, file.name, file.size, is_hit=kind == "hit")
        if kind == "hit":
            self._metrics.hits += 1
            self._metrics.hit_bytes += file.size
            if self._memory is not None and file.tier is self._memory:
                self._memory.hits += 1
        elif kind == "miss":
            self._metrics.misses += 1
        else:
            self._metrics.bypasses += 1

    def _keeps(self, path: bytes) -> bool:
        return self.keeps is None or self.keeps(path)

    def _note_open(self, path: bytes, name: bytes, size: int, *, is_hit: bool) -> None:
        """What is never kept says nothing of what a policy would hit."""
        if self._keeps(path):
            self._capacity.note_open(name, size, is_hit=is_hit)

    def _open_in_scratch(self, name: bytes, path: bytes, version: bytes) -> int | None:
        known = self._residency.get(name)
        try:
            fd = self._storage.open_unchanged(name, size_of(version), mtime_of(version))
        except ChangedCopyError:
            raise
        except StorageError as error:
            log.warning("scratch failed path=%r copy=%s error=%r", path, name.hex(), error.strerror)
            return None
        if fd is not None:
            if known is None or known.boot != self._storage.boot:  # another mount fetched it
                self._residency.add(name, path, version, b"")
            self._residency.touch(name)
            if self._memory is not None:
                self._memory.note_scratch_hit(name, path, version)
        elif known is not None and known.boot == self._storage.boot:  # another mount evicted it
            self._residency.discard(name)
        return fd

    async def _start_fetch(self, name: bytes, path: bytes, version: bytes, *, is_changed: bool) -> Fetch | None:
        """The fetch of a file that is not resident, a new one or somebody else's; None if there is no room."""
        self._residency.supersede(name)
        if self._memory is not None:
            self._memory.supersede(name)
        earlier = self._changed(name, version) if is_changed else self._earlier(name)
        tier: Tier | None = self._capacity
        if earlier is None:
            tier = await self._tiers.try_reserve(size_of(version), is_extra=self.is_extra(path))
        if tier is None:
            return None
        fetch = self._fetches.get(name)
        if fetch is None:
            return self._fetches.start(name, path, version, tier, earlier)
        if earlier is None:
            tier.release(size_of(version))
        return fetch

    def _earlier(self, name: bytes) -> Resident | None:
        """A copy from before the machine's last boot, which a fetch checks before it is believed."""
        known = self._residency.get(name)
        return known if known is not None and known.boot != self._storage.boot else None

    def _changed(self, name: bytes, version: bytes) -> Resident:
        """A copy of this boot that has changed, to be checked as one of an earlier boot is."""
        known = self._residency.get(name) or Resident(name, size_of(version), b"", "")
        return known._replace(boot=self._storage.boot)

    def _file(
        self, name: bytes, path: bytes, version: bytes, tier: Tier, fd: int | None = None, fetch: Fetch | None = None
    ) -> OpenFile:
        self._note_open(path, name, size_of(version), is_hit=fd is not None)
        return OpenFile(
            name,
            path,
            version,
            tier=tier,
            source_read=self._source.read,
            metrics=self._metrics,
            fd=fd,
            fetch=fetch,
        )
