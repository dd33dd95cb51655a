"""Where complete files may lie: an ordered list of tiers, the fastest first, scratch last.

A fetched file lands in the first tier that grants room. Where a file is, is asked in the same order; one that moves is
complete in both for a moment, so a second look finds what the first one missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import Storage


class Tier(Protocol):
    """What a fetch needs of a tier. `number` is that of its storage in the workers: SCRATCH or MEMORY."""

    number: int
    storage: Storage
    reader: ScratchReader

    async def try_reserve(self, size: int, *, ahead: bool = False) -> bool:
        """Reserve `size` bytes; False if there is no room. `ahead`: nobody has asked for the file yet."""
        ...

    def settle(self, size: int) -> None:
        """What was reserved is stored now."""

    def release(self, size: int) -> None:
        """What was reserved was not stored."""

    def doubt(self) -> None:
        """What was reserved or stored may not be what is there."""

    def suspend(self) -> None:
        """It has failed: it grants nothing for a while."""

    def keep(self, name: bytes, path: bytes, version: bytes, checksum: bytes) -> None:
        """A file is resident in it now."""

    def note_ahead(self, name: bytes, size: int) -> None:
        """It was fetched ahead of use."""


SCRATCH, MEMORY = 0, 1


class Tiers:
    """The tiers of one mount; `all` in their order."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.all = tuple(tiers)

    def __getitem__(self, number: int) -> Tier:
        return next(tier for tier in self.all if tier.number == number)

    async def try_reserve(self, size: int, *, ahead: bool = False) -> Tier | None:
        """The tier that has reserved `size` bytes; None if no one has room: serve from the source."""
        for tier in self.all:
            if await tier.try_reserve(size, ahead=ahead):
                return tier
        return None

    def has(self, name: bytes) -> bool:
        """Whether there is a complete file of this boot. Raises StorageError."""
        return any(tier.storage.has(name) for tier in self.all)
