"""Where complete files may lie: an ordered list of tiers, the fastest first, scratch last.

A fetched file lands in the first tier that grants room. Where a file is, is asked in the same order. One that moves up
in between is missed in both; then its fetch finds it, which looks again under the lock of its name.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import trio

from cachefs.cache.ledger import Ledger
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import Storage
from cachefs.errors import StorageError, describe

log = logging.getLogger(__name__)

SCRATCH, MEMORY = 0, 1
"""The numbers of the tiers' storages in the workers."""
_SUSPEND_SECONDS = 10.0


class Tier(ABC):
    """A place for complete files, whose room a ledger counts."""

    number: int

    def __init__(self, storage: Storage, reader: ScratchReader, ledger: Ledger) -> None:
        self.storage = storage
        self.reader = reader
        self._ledger = ledger
        self._suspended_until = -math.inf

    @abstractmethod
    async def try_reserve(self, size: int, *, ahead: bool = False, is_extra: bool = False) -> bool:
        """Reserve `size` bytes; False if there is no room.

        `ahead`: nobody has asked for the file yet; `is_extra`: it is beside the mount's shard.
        """

    @abstractmethod
    def keep(self, name: bytes, path: bytes, version: bytes, checksum: bytes) -> None:
        """A file is resident in it now."""

    @abstractmethod
    def note_ahead(self, name: bytes, size: int) -> None:
        """It was fetched ahead of use."""

    def stored(self) -> tuple[int, int]:
        """(bytes, files) that are complete in it."""
        return self._ledger.stored()

    def settle(self, size: int) -> None:
        """What was reserved is stored now."""
        self._ledger.settle(size)

    def release(self, size: int) -> None:
        """What was reserved was not stored."""
        self._ledger.release(size)

    def lose(self, size: int) -> None:
        """A stored file is gone."""
        self._ledger.remove(size)

    def doubt(self) -> None:
        """What was reserved or stored may not be what is there."""
        self._ledger.doubt()

    def give_back(self, name: bytes, size: int, scratch: Storage) -> None:
        """A file for which `size` bytes are reserved does not come, or its worker's last word was lost.

        Drop what is staged here and in `scratch`, where the name's lock is, and the reservation if nothing came of it.
        """
        try:
            is_dropped = all([storage.discard_staged(name) for storage in {self.storage, scratch}])
        except StorageError as error:
            log.warning("staged copy not removed copy=%s error=%r", name.hex(), describe(error))
            is_dropped = False
        if self.storage.has(name):  # it is complete
            self.settle(size)
            self.doubt()
        elif is_dropped:
            self.release(size)
        else:  # it takes room still
            self.doubt()

    def suspend(self, seconds: float = _SUSPEND_SECONDS) -> None:
        """It has failed: grant nothing for a while, so that files are not read twice in vain."""
        self._suspended_until = trio.current_time() + seconds

    @property
    def is_suspended(self) -> bool:
        return trio.current_time() < self._suspended_until


class Tiers:
    """The tiers of one mount; `all` in their order."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.all = tuple(tiers)

    def __getitem__(self, number: int) -> Tier:
        return next(tier for tier in self.all if tier.number == number)

    async def try_reserve(self, size: int, *, ahead: bool = False, is_extra: bool = False) -> Tier | None:
        """The tier that has reserved `size` bytes; None if no one has room: serve from the source."""
        for tier in self.all:
            if await tier.try_reserve(size, ahead=ahead, is_extra=is_extra):
                return tier
        return None

    def has(self, name: bytes) -> bool:
        """Whether there is a complete file of this boot. Raises StorageError."""
        return any(tier.storage.has(name) for tier in self.all)
