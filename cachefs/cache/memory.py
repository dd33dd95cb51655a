"""The memory tier: files on tmpfs, above scratch; what was least recently used moves down when it gets full.

Invariants:
- It holds its capacity exactly, as scratch does: by a ledger of its own, in which room is reserved first. It grants
  none that the machine or the job's control group would need.
- A file that moves is complete where it goes before it is removed where it was; who has it open reads on. The lock of
  its name in scratch's staging is held meanwhile, as for a fetch, so no two mounts move or fetch it at once.
- What it holds is in no index: it goes with the last mount. A file that has moved down is one of scratch's.
- A reader waits for no move: a file that finds no room here at once lands in scratch.

When files move:
- down, the least recently used first, when there was no room, until there is some again, or none below;
- away, what mounts have left that are gone, and this one has not opened, when it is alone and nothing could move down;
- down, all of them, when nothing has been fetched for a while and the mount promotes: a directory can be mounted
  directly only from one place, and what is mounted directly costs nothing, while the page cache keeps it in memory;
- up, what was used in scratch four times since the least recently used file here was: not even one of them in epochs
  of a job, where trading places brings nothing. Opens close together are one use (LRU-K's correlated reference period;
  O'Neil et al., SIGMOD 1993): of a header and then of all, say, or by ranks at roughly the same position of an epoch.
  Close is an eighth of the opens since the least recently used file here was. For trades a small part of the capacity
  is kept free, so that they work when everything is full.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.copying import MOVED, MoveResult
from cachefs.cache.ledger import Ledger
from cachefs.cache.residency import Residency
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import GONE, IN_USE, KEY_BYTES, Storage
from cachefs.cache.tiers import MEMORY, SCRATCH, Tier
from cachefs.errors import ChangedCopyError, StorageError, describe
from cachefs.source.attributes import mtime_of, size_of
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

_TRADING_SHARE, _TRADING_BYTES = 0.02, 64 * 1024 * 1024
_FREE_SHARE, _FREE_BYTES = 0.05, 256 * 1024 * 1024
"""So much is made free when there was no room."""
_BATCH_FILES, _BATCH_BYTES = 8, 16 * 1024 * 1024
_TICK_SECONDS = 1.0
_QUIET_SECONDS = 2.0
_SUSPEND_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 10.0
_USES = 4
_CORRELATED_SHARE = 1 / 8
_FOLLOWED = 4096
"""Files of scratch whose uses are remembered."""


@dataclass
class _Kept:
    """A file that this mount has put here. `used` is the number of the open that was its last."""

    name: bytes
    path: bytes
    version: bytes
    checksum: bytes
    used: int

    @property
    def size(self) -> int:
        return size_of(self.version)


class MemoryTier(Tier):
    """The memory tier of one mount, of `size` bytes at `path`. `room` says how many bytes more it may take now."""

    number = MEMORY

    def __init__(
        self,
        path: Path,
        size: int,
        ledger: Ledger,
        storage: Storage,
        room: Callable[[], int],
        below: CapacityKeeper,
        residency: Residency,
        copies: WorkerPool,
    ) -> None:
        super().__init__(storage, ScratchReader(1, in_memory=True), ledger)
        self.path = path
        self.size = size
        self.promotes: Callable[[], bool] = lambda: False
        """Whether the mount promotes what is completely in scratch."""
        self.is_alone: Callable[[], bool] = lambda: False
        """Whether no other mount is in this tier."""
        self.hits = self.moved_down = self.moved_up = self.dropped = 0
        """Files."""
        self._granted = size - int(min(size * _TRADING_SHARE, _TRADING_BYTES))
        self._room = room
        self._below = below
        self._residency = residency
        self._copies = copies
        self._files: OrderedDict[bytes, _Kept] = OrderedDict()  # by the key of the path, the least recently used first
        self._superseded: list[bytes] = []
        self._opens = 0
        self._uses: OrderedDict[bytes, list[int]] = OrderedDict()
        self._hot: dict[bytes, tuple[bytes, bytes]] = {}
        self._doubles: set[bytes] = set()
        self._wanted = 0
        self._nothing_left_until = -math.inf
        self._asked_at = 0.0
        self._woken = trio.Event()

    # What fetches need

    async def try_reserve(self, size: int, *, ahead: bool = False, is_extra: bool = False) -> bool:
        """At once, or not at all."""
        self._asked_at = trio.current_time()
        if size > self._granted or self.is_suspended:
            return False
        if self._ledger.reserve(size, self._granted, self._room()):
            return True
        if not ahead:  # what nobody has asked for has nothing moved for it: scratch might evict for that
            self._wanted = max(self._wanted, size)
            self._woken.set()
        return False

    def keep(self, name: bytes, path: bytes, version: bytes, checksum: bytes) -> None:
        before = self._files.pop(name[:KEY_BYTES], None)
        if before is not None and before.name != name:
            self._superseded.append(before.name)
        self._files[name[:KEY_BYTES]] = _Kept(name, path, version, checksum, self._opens)

    def supersede(self, name: bytes) -> None:
        """The source has `name` now: a copy of another version goes. In scratch it would pass for the latest."""
        kept = self._files.get(name[:KEY_BYTES])
        if kept is not None and kept.name != name:
            del self._files[name[:KEY_BYTES]]
            self._superseded.append(kept.name)

    def note_ahead(self, name: bytes, size: int) -> None:
        """It gives way by moving down."""

    # What opens need

    def count_open(self) -> None:
        """A file is opened, wherever it is: time goes on."""
        self._opens += 1

    def knows(self, name: bytes) -> bool:
        """Whether this mount has put a file here, or opened it here: no call to the kernel."""
        kept = self._files.get(name[:KEY_BYTES])
        return kept is not None and kept.name == name

    def open(self, name: bytes, path: bytes, version: bytes) -> int | None:
        """A descriptor of a file that is here, or None. It counts as used."""
        kept = self._files.get(name[:KEY_BYTES])
        try:
            fd = self.storage.open_unchanged(name, size_of(version), mtime_of(version))
        except ChangedCopyError as error:
            log.warning("damaged copy dropped path=%r copy=%s", path, error.filename)
            self._drop(name, size_of(version))
            return None
        except StorageError as error:
            log.warning("memory tier failed path=%r copy=%s error=%r", path, name.hex(), error.strerror)
            return None
        if fd is None:
            if kept is not None and kept.name == name:  # another mount has moved it
                del self._files[name[:KEY_BYTES]]
        elif kept is not None and kept.name == name:
            kept.used = self._opens
            self._files.move_to_end(name[:KEY_BYTES])
        else:  # another mount has put it here, which may leave before us
            self.keep(name, path, version, b"")
        self.hits += fd is not None
        return fd

    def note_scratch_hit(self, name: bytes, path: bytes, version: bytes) -> None:
        """A file of scratch was opened."""
        if not self._files:
            return
        oldest = next(iter(self._files.values())).used
        age = max(self._opens - oldest, len(self._files))  # what was fetched ahead may have come all at once
        apart = age * _CORRELATED_SHARE
        uses: list[int] = []
        for use in self._uses.pop(name, ()):  # those of when everything here was younger may be one use by now
            if not uses or use - uses[-1] >= apart / 2:
                uses.append(use)
        if not uses or self._opens - uses[-1] >= apart:
            uses.append(self._opens)
        self._uses[name] = uses = uses[-_USES:]
        if len(self._uses) > _FOLLOWED:
            self._uses.popitem(last=False)
        if len(uses) == _USES and uses[0] > oldest:
            self._hot[name] = path, version
            self._woken.set()

    def status(self) -> dict[str, Any]:
        stored, files = self.stored()
        return {
            "path": str(self.path),
            "capacity_bytes": self.size,
            "files": files,
            "bytes": stored,
            "hits": self.hits,
            "moved_down": self.moved_down,
            "moved_up": self.moved_up,
            "dropped": self.dropped,
        }

    # Moves

    async def run(self) -> None:
        """Move files for ever, one batch at a time."""
        await self._residency.loaded.wait()
        while True:
            with trio.move_on_after(_TICK_SECONDS):
                await self._woken.wait()
            self._woken = trio.Event()
            try:
                self._remove_superseded()
                await self._shrink(-self._room())
                await self._make_room()
                await self._trade()
                await self._hand_down()
            except OSError as error:
                log.warning("files not moved error=%r", describe(error))
                await trio.sleep(_SUSPEND_SECONDS)

    def _remove_superseded(self) -> None:
        names, self._superseded = self._superseded, []
        for name in names:
            freed = self.storage.remove(name)
            if freed == IN_USE:
                self._superseded.append(name)
            elif freed != GONE:
                self.lose(freed)

    async def _shrink(self, size: int) -> None:
        """Give back what the machine or the job needs more. What finds no room below is dropped.

        What is open stays: it keeps its memory as long, whatever becomes of its name.
        """
        tries = len(self._files)
        while tries > 0 and self._files and size > 0:
            batch = self._oldest(size)
            tries -= len(batch)
            gone = await self._move_down(batch) or [kept for kept in batch if self._drop_unused(kept)]
            size -= sum(kept.size for kept in gone)

    async def _make_room(self) -> None:
        if not self._wanted:
            return
        wanted = self._wanted + int(min(self.size * _FREE_SHARE, _FREE_BYTES))
        self._wanted = 0
        while (missing := wanted - self._granted + self._taken()) > 0:
            if not (self._files and await self._move_down(self._oldest(missing))):
                await self._remove_left(missing)
                return

    async def _remove_left(self, size: int) -> None:
        """Remove what mounts have left that are gone: nobody who is here knows where that would go."""
        now = trio.current_time()
        if self.stored()[1] <= len(self._files) or now < self._nothing_left_until or not self.is_alone():
            return
        found = await trio.to_thread.run_sync(lambda: [name for name, _, _ in self.storage.scan()])
        for name in found:
            if size <= 0:
                return
            if name[:KEY_BYTES] not in self._files and (freed := self.storage.remove(name)) >= 0:
                size -= freed
                self.lose(freed)
        self._nothing_left_until = now + _LOOK_AGAIN_SECONDS

    async def _trade(self) -> None:
        hot, self._hot = self._hot, {}
        for name, (path, version) in hot.items():
            known = self._residency.get(name)
            if known is None or not self._ledger.reserve(known.size, self.size, self._room()):
                continue
            note = partial(self._note_moved_up, name, path, version, known.checksum)
            await self._move([(name, version, known.checksum)], [note], to=self)
        if self._doubles:
            names = [*self._doubles]
            answers = await self._copies.run(("remove", [(name, self.storage.boot) for name in names]), what="move")
            for name, freed in zip(names, answers, strict=True):
                self._note_gone_below(name, freed, is_double=True)
        excess = self._taken() - self._granted
        if excess > 0:
            await self._move_down(self._oldest(excess))

    def _note_moved_up(self, name: bytes, path: bytes, version: bytes, checksum: bytes, how: str, freed: int) -> None:
        if how == MOVED:
            self.keep(name, path, version, checksum)
            self.moved_up += 1
            self._uses.pop(name, None)
        self._note_gone_below(name, freed, is_double=how == MOVED)

    def _note_gone_below(self, name: bytes, freed: int, *, is_double: bool) -> None:
        """What the removal in scratch of a file that has moved up came to: where it is in use it is in both still."""
        self._doubles.discard(name)
        if freed == IN_USE:
            if is_double:
                self._doubles.add(name)
            return
        self._residency.discard(name)
        if freed != GONE:
            self._below.lose(freed)

    async def _hand_down(self) -> None:
        """Bring everything to scratch, from where it can be promoted."""
        tries = len(self._files)  # what is open stays, and becomes the most recently used
        while tries > 0 and self._files and self.promotes() and trio.current_time() > self._asked_at + _QUIET_SECONDS:
            batch = self._oldest(_BATCH_BYTES)
            tries -= len(batch)
            before = self.moved_down
            if not await self._move_down(batch) and self.moved_down == before:
                self._asked_at = math.inf  # there is no room: until something is fetched again

    def _taken(self) -> int:
        return self.stored()[0] + self._ledger.reserved()

    def _oldest(self, size: int) -> list[_Kept]:
        """The least recently used, up to `size` bytes of them or a little more; one batch."""
        chosen: list[_Kept] = []
        size = min(size, _BATCH_BYTES)
        for kept in self._files.values():
            chosen.append(kept)
            size -= kept.size
            if size <= 0 or len(chosen) == _BATCH_FILES:
                break
        return chosen

    async def _move_down(self, files: Sequence[_Kept]) -> list[_Kept]:
        """Move files to scratch, as far as there is room. Those that have gone from here."""
        batch: list[_Kept] = []
        for kept in files:
            if not await self._below.try_reserve(kept.size):
                break
            batch.append(kept)
        gone: list[_Kept] = []
        jobs = [(kept.name, kept.version, kept.checksum) for kept in batch]
        await self._move(jobs, [partial(self._note_moved_down, kept, gone) for kept in batch], to=self._below)
        return gone

    def _note_moved_down(self, kept: _Kept, gone: list[_Kept], how: str, freed: int) -> None:
        key = kept.name[:KEY_BYTES]
        if how == MOVED:
            self._below.keep(kept.name, kept.path, kept.version, kept.checksum)
            self.moved_down += 1
        is_known = self._files.get(key) is kept
        if freed == IN_USE:
            if is_known:
                self._files.move_to_end(key)
            return
        gone.append(kept)
        self._doubles.discard(kept.name)  # scratch has the only one now
        if is_known:
            del self._files[key]
        if freed != GONE:  # else another mount has moved it, and taken it off the count
            self.lose(freed)

    async def _move(
        self, files: list[tuple[bytes, bytes, bytes]], notes: Sequence[Callable[[str, int], None]], *, to: Tier
    ) -> None:
        """Move files, each (name, version, checksum), for which `to` has reserved room.

        Each has its note called with how it went as it goes: a worker that dies has moved those before.
        """
        if not files:
            return
        way = (MEMORY, SCRATCH) if to.number == SCRATCH else (SCRATCH, MEMORY)
        said = 0

        def settle(result: MoveResult) -> None:
            nonlocal said
            how, freed = result
            size, note = size_of(files[said][1]), notes[said]
            said += 1
            if how == MOVED:
                to.settle(size)
            else:
                to.release(size)
            note(how, freed)

        try:
            await self._copies.run(("move", files, *way), what="move", on_progress=settle)
        finally:
            for name, version, _ in files[said:]:
                to.give_back(name, size_of(version), self._below.storage)

    def _drop_unused(self, kept: _Kept) -> bool:
        """Remove a file that is not open. Whether it has gone; else it becomes the most recently used."""
        key = kept.name[:KEY_BYTES]
        is_known = self._files.get(key) is kept
        freed = self.storage.remove(kept.name)
        if freed == IN_USE:
            if is_known:
                self._files.move_to_end(key)
            return False
        if is_known:
            del self._files[key]
        self._doubles.discard(kept.name)
        if freed != GONE:
            log.info("dropped for want of memory path=%r", kept.path)
            self.lose(freed)
            self.dropped += 1
        return True

    def _drop(self, name: bytes, size: int) -> None:
        kept = self._files.get(name[:KEY_BYTES])
        if kept is not None and kept.name == name:
            del self._files[name[:KEY_BYTES]]
        self._doubles.discard(name)
        if self.storage.drop(name, self.storage.boot):
            self.lose(size)
