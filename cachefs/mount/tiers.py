"""The tiers of a serving mount: its part in the memory tier, how much that may take, and what `status` says of them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.memory import MemoryTier
from cachefs.cache.residency import Residency
from cachefs.cache.trees import Trees
from cachefs.config import SPARED_MEMORY_SHARE, Settings
from cachefs.errors import CachefsError
from cachefs.metrics import Metrics
from cachefs.mount.limits import find_memory_limit
from cachefs.mount.membership import Membership
from cachefs.mount.memory import MemoryPlace, free_memory, give_up_memory, memory_errors
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1


class JoinedMemory:
    """A mount's part in a memory tier, which is left, and freed by whoever is the last, when `stack` ends.

    Raises MemoryTierError where it cannot be joined.
    """

    def __init__(self, settings: Settings, place: MemoryPlace, dataset: bytes, stack: AsyncExitStack) -> None:
        self._place = place
        with memory_errors(place.scratch.path):
            try:
                self._membership = Membership(settings, place.scratch, place.storage, Trees(place.scratch.fd), dataset)
            except BaseException:
                give_up_memory(place.scratch)
                raise
        stack.callback(self._leave)
        self._membership.count_nothing()

    def tier(self, below: CapacityKeeper, residency: Residency, copies: WorkerPool) -> MemoryTier:
        """The tier itself, above `below`."""
        place, ledger = self._place, self._membership.ledger
        room = MemoryRoom(place.scratch.fd, lambda: ledger.stored()[0])
        tier = MemoryTier(place.scratch.path, place.size, ledger, place.storage, room, below, residency, copies)
        tier.is_alone = lambda: self._membership.live() == [self._membership.record]
        below.above_bytes = tier.size
        return tier

    def _leave(self) -> None:
        self._membership.leave()
        try:
            free_memory(self._place.scratch.path)
        except CachefsError as error:
            log.warning("memory tier not freed error=%r", str(error))


def describe_tiers(
    scratch: Path, keeper: CapacityKeeper, memory: MemoryTier | None, metrics: Metrics
) -> list[dict[str, Any]]:
    """What is in each tier, the fastest first, and how many hits it had; files that have moved between them."""
    stored, files = keeper.stored()
    above = [] if memory is None else [memory.status()]
    hits = metrics.hits - sum(tier["hits"] for tier in above)
    own = {"path": str(scratch), "capacity_bytes": keeper.size, "files": files, "bytes": stored, "hits": hits}
    return [*above, own]


class MemoryRoom:
    """How many bytes more the memory tier may take: called often, it looks seldom. `fd` is in its tmpfs.

    `stored` says how much is in it: what has come since the last look is taken off.
    """

    def __init__(self, fd: int, stored: Callable[[], int] = lambda: 0) -> None:
        self._fd = fd
        self._stored = stored
        self._stored_then = 0
        self._limit = find_memory_limit(psutil.virtual_memory().total)
        self._looked_at = 0.0
        self._room = 0

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            self._stored_then = self._stored()
            self._room = self._look()
        return self._room - max(0, self._stored() - self._stored_then)

    def _look(self) -> int:
        memory, status = psutil.virtual_memory(), os.fstatvfs(self._fd)
        rooms = [memory.available - SPARED_MEMORY_SHARE * memory.total, status.f_bavail * status.f_frsize]
        if self._limit is not None:
            rooms.append((1 - SPARED_MEMORY_SHARE) * self._limit.size - self._limit.used())
        return int(min(rooms))
