"""Room in scratch: reservations, and evictions to make them possible.

Invariants:
- Nothing is written that was not reserved before; see the ledger for what a reservation guarantees.
- What goes first: copies of superseded versions; then files of datasets that no live mount uses; then, for a file of
  the mount's shard, what is in no live mount's; then what was fetched ahead and not opened yet; then, under `lru`, and
  under `auto` while that is better, this dataset's least recently used. Files of other live datasets, and files that
  are open, stay. For a file that is fetched ahead only the first three go.
- The file system keeps RESERVED_SHARE of its space free, whatever the capacity says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import trio

from cachefs.cache.ghosts import HOLD, LRU, Ghosts
from cachefs.cache.ledger import Ledger
from cachefs.cache.residency import Residency
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import GONE, IN_USE, Storage
from cachefs.cache.tiers import SCRATCH, Tier
from cachefs.config import RESERVED_SHARE
from cachefs.metrics import Metrics
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

_BATCH_SHARE = 0.01
_BATCH_BYTES = 64 * 1024 * 1024
"""Evicting makes room for up to this much more (or 1% of the capacity), so that not every fetch has to evict."""
_BATCH_FILES = 200
_ASK_AGAIN_SECONDS = 10.0
_ROWS_A_SECOND = 20_000
"""Of the index, that are looked at, at the most, while it is asked again and again for one that may go."""

FindSpare = Callable[[], Callable[[bytes], bool] | None]
"""Gives what says of a path whether no live mount is to keep it; None while that is not known."""
Row = tuple[bytes, str, int, int]
"""(name, boot, size, last use), the latter to ask for those after it."""


class CapacityKeeper(Tier):
    """Grants room in scratch, the last of the tiers, to one mount, up to `size` bytes for all mounts together."""

    number = SCRATCH

    def __init__(
        self,
        size: int,
        policy: str,
        ledger: Ledger,
        storage: Storage,
        residency: Residency,
        reader: ScratchReader,
        *,
        copies: WorkerPool,
        index: WorkerPool,
        live_datasets: Callable[[], Collection[bytes]],
        metrics: Metrics,
    ) -> None:
        super().__init__(storage, reader, ledger)
        self.size = size
        self._ghosts = Ghosts(policy, size)
        self._residency = residency
        self._copies = copies
        self._index = index
        self._live_datasets = live_datasets
        self._metrics = metrics
        self.promoted_bytes = 0
        """What cannot be evicted because it is promoted; its opens are not seen either."""
        self.above_bytes = 0
        """What tiers above hold beside it."""
        self._evicting = trio.Lock()
        self._nothing_unused_until = self._nothing_spare_until = -math.inf
        self._spare_after, self._spare_looked = -1, 0
        self.find_spare: FindSpare = lambda: None

    def note_open(self, name: bytes, size: int, *, is_hit: bool) -> None:
        """A file was opened, wherever its bytes come from."""
        self._ghosts.open(name, size, is_hit=is_hit)

    def status(self) -> dict[str, Any]:
        """What the policy does now, and what to expect of an epoch, None while that is not known.

        The hit rates (0 to 1) of both ways; and the seconds that opens and reads will wait for the source, added up, if
        each miss and bypass costs as much as so far.
        """
        self._aim_ghosts()
        ghosts = self._ghosts
        rates = {way: round(rate, 3) for way in (HOLD, LRU) if (rate := ghosts.expected(way)) is not None}
        waits = self._metrics.misses + self._metrics.bypasses
        seconds = None
        if rates and waits:
            seconds = round(ghosts.files * (1 - rates[ghosts.way]) * self._metrics.wait_seconds / waits, 3)
        return {"policy_now": ghosts.way, "expected_hit_rates": rates or None, "expected_wait_seconds": seconds}

    def _aim_ghosts(self) -> None:
        """Others' files, promoted ones, and what else fills the file system leave the less to choose from."""
        others = max(0, self.stored()[0] - self._residency.bytes)
        self._ghosts.capacity = max(0, self.room() - others - self.promoted_bytes)

    def room(self) -> int:
        """Bytes that can be held, with what is held, and with the tiers above. The disk may have less to give."""
        available, total = self.storage.space()
        most = self.stored()[0] + max(0, int(available - RESERVED_SHARE * total))
        return min(self.size, most) + self.above_bytes

    async def held_by_others(self) -> int:
        """Bytes of the other datasets that live mounts use: they stay. Raises OSError."""
        others = [dataset for dataset in self._live_datasets() if dataset != self._residency.dataset]
        return await self._index.run(("bytes_of", others), what="index") if others else 0

    async def reserve(self, size: int, *, ahead: bool = False, is_extra: bool = False) -> bool:
        """Reserve `size` bytes, evicting if that helps. False if there is no room: serve from the source.

        `ahead`: nobody has asked for the file yet; `is_extra`: it is beside the mount's shard.
        """
        if size > self.size or self.is_suspended:
            return False
        if self._try(size):
            return True
        self._aim_ghosts()
        async with self._evicting:
            while not self._try(size):
                extra = min(int(self.size * _BATCH_SHARE), _BATCH_BYTES)
                if not await self._evict(size + extra, ahead, is_extra):
                    return False
        return True

    async def try_reserve(self, size: int, *, ahead: bool = False, is_extra: bool = False) -> bool:
        """The same, and False where evicting failed."""
        try:
            return await self.reserve(size, ahead=ahead, is_extra=is_extra)
        except OSError as error:
            log.warning("no room could be made error=%r", error.strerror)
            return False

    def keep(self, name: bytes, path: bytes, version: bytes, checksum: bytes) -> None:
        self._residency.add(name, path, version, checksum)

    def note_ahead(self, name: bytes, size: int) -> None:
        self._residency.note_ahead(name, size)

    def _try(self, size: int) -> bool:
        available, total = self.storage.space()
        return self._ledger.reserve(size, self.size, available - RESERVED_SHARE * total)

    async def _evict(self, size: int, ahead: bool, is_extra: bool) -> bool:
        """Evict up to `size` bytes, or whatever can be. False if nothing could be."""
        superseded = self._residency.take_superseded()
        if superseded:
            freed, kept = await self._remove(superseded)
            self._residency.put_back_superseded(kept)
            if freed:
                return True
        try:
            if await self._evict_unused(size):
                return True
            if not is_extra and await self._evict_spare(size):
                return True
        except OSError as error:
            log.warning("unused files not evicted error=%r", error.strerror)
        if ahead:
            return False
        if (await self._remove(self._residency.take_unopened(size)))[0]:
            return True
        if self._ghosts.way == LRU:
            return await self._evict_oldest(size)
        return False

    async def _evict_unused(self, size: int) -> bool:
        """Evict files of datasets that no live mount uses."""
        if trio.current_time() < self._nothing_unused_until:
            return False

        async def find(after: int) -> list[Row]:
            rows: list[Row] = await self._index.run(("unused", list(self._live_datasets()), after), what="index")
            return rows

        freed, after = await self._evict_found(size, find, -1)
        if after is None:
            # asking the index at every open of a full cache would cost more than it could give
            self._nothing_unused_until = trio.current_time() + _ASK_AGAIN_SECONDS
        return freed > 0

    async def _evict_spare(self, size: int) -> bool:
        """Evict files of this dataset that no live mount is to keep: of earlier shards, or taken in beside the own."""
        if trio.current_time() < self._nothing_spare_until:
            return False
        is_spare = self.find_spare()
        if is_spare is None:
            return False

        async def find(after: int) -> list[Row]:
            while rows := await self._index.run(("oldest", self._residency.dataset, after), what="index"):
                self._spare_looked += len(rows)
                spare = [(name, boot, length, used) for name, boot, length, used, path in rows if is_spare(path)]
                if spare:
                    return spare
                after = rows[-1][3]
            return []

        freed, after = await self._evict_found(size, find, self._spare_after)
        if after is None:  # each file is looked at once in a round
            pause = max(_ASK_AGAIN_SECONDS, self._spare_looked / _ROWS_A_SECOND)
            self._nothing_spare_until = trio.current_time() + pause
            after, self._spare_looked = -1, 0
        self._spare_after = after
        return freed > 0

    async def _evict_found(
        self, size: int, find: Callable[[int], Awaitable[Sequence[Row]]], after: int
    ) -> tuple[int, int | None]:
        """Evict up to `size` bytes of what `find` has after a last use: (bytes freed, where to go on; None: done)."""
        freed = 0
        while freed < size:
            rows = await find(after)
            if not rows:
                return freed, None
            chosen: list[tuple[bytes, str, int]] = []
            wanted = size - freed
            for name, boot, length, used in rows:
                if wanted <= 0 or len(chosen) == _BATCH_FILES:
                    break
                chosen.append((name, boot, length))
                wanted -= length
                after = used
            got, _ = await self._remove(chosen)
            freed += got
        return freed, after

    async def _evict_oldest(self, size: int) -> bool:
        """Evict this dataset's least recently used files."""
        looked_at = 0
        while looked_at < len(self._residency):
            chosen: list[tuple[bytes, str, int]] = []
            wanted = size
            for file in self._residency.oldest():
                if wanted <= 0 or len(chosen) == _BATCH_FILES:
                    break
                chosen.append((file.name, file.boot, file.size))
                wanted -= file.size
            freed, kept = await self._remove(chosen)
            for name, _, _ in kept:
                self._residency.touch(name)  # open: not the oldest any more
            if freed:
                return True
            looked_at += len(chosen)
        return False

    async def _remove(self, files: list[tuple[bytes, str, int]]) -> tuple[int, list[tuple[bytes, str, int]]]:
        """Remove `files`, each (name, boot, size): the bytes freed, and the files that are open and stay."""
        if not files:
            return 0, []
        job = ("remove", [(name, boot) for name, boot, _ in files])
        freed, kept = 0, []
        answers = None
        try:
            answers = await self._copies.run(job, what="evict")
        finally:
            if answers is None:
                self._ledger.doubt()
        for file, answer in zip(files, answers, strict=True):
            if answer == IN_USE:
                kept.append(file)
                continue
            self._residency.discard(file[0])
            if answer != GONE:
                freed += answer
                self._ledger.remove(min(answer, file[2]))  # a size of the index may be wrong, and a file cut short
                if answer != file[2]:
                    self._ledger.doubt()
                self._metrics.evictions += 1
        log.debug("evicted files=%d bytes=%d in_use=%d", len(files) - len(kept), freed, len(kept))
        return freed, kept
