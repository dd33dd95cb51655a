"""Fetching ahead of use: files that nobody has asked for yet, as many at once as the source gains from.

Invariants:
- Demand comes first: some workers are always left to it, and when its fetches take longer, prefetching backs off: it
  has fewer fetches under way, and when they are as few as can be, less bandwidth.
- It takes free room, and never what somebody has asked for; what it has fetched gives way to what is asked for.
- A file that is on its way is joined by whoever opens it, and never fetched twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import trio

from cachefs.cache.copying import SMALL_FILE_BYTES
from cachefs.cache.fetches import Fetch, Fetches
from cachefs.cache.residency import Residency
from cachefs.cache.tiers import Tier, Tiers
from cachefs.errors import StorageError
from cachefs.source.attributes import size_of, version_of

log = logging.getLogger(__name__)

RESIDENT, FETCHED, FAILED, FULL = "resident", "fetched", "failed", "full"
"""What became of a file: it was there, it was fetched, it could not be, or there was no room for it."""

_FIRST, _FEWEST, _STEP = 6, 2, 2
_WINDOW_SECONDS = 0.25
_GREAT_GAIN, _GAIN, _LOSS = 1.15, 1.03, 0.97
_SLOWER = 3.0
"""Demand's fetches may take this many times as long as at their best before prefetching is halved."""
_LEAST_BANDWIDTH = 1024 * 1024  # bytes a second
_BATCH_SECONDS = 0.015
_BATCH_FILES = 8
"""Small files go to a worker together (design.md section 6: a file alone costs the daemon some 500 us, 8 together 60 us
each), but not so many that whoever opens the last of them waits noticeably."""
_BEST_FADES = 1.02
"""A batch. How many files make one follows from the best time of late: others' is mostly that of waiting for a turn."""
_FILE_WORTH_BYTES = 64 * 1024
"""A file more counts as much as this many bytes more, for throughput over files of different sizes."""

File = tuple[bytes, bytes]
"""(path, packed attributes)."""


class Pace:
    """How many fetches ahead are under way at once: more while throughput grows, fewer when it does not.

    Bandwidth is what they take, unless demand is slow beside the fewest: then it is halved until demand is not, and
    grows again by half until it is more than that which was too much.
    """

    def __init__(self, fetches: Fetches, most: int) -> None:
        self.limiter = trio.CapacityLimiter(_FIRST)
        self.bandwidth = math.inf
        """Bytes a second that may be begun."""
        self._too_much = math.inf
        self._begun, self._begun_at = 0, 0.0
        self._fetches = fetches
        self._most = most
        self._direction = _STEP
        self._is_searching = True
        self._done = 0.0
        self._before = 0.0
        self._window_began = time.monotonic()
        self._file_seconds = 0.0

    @property
    def batch_files(self) -> int:
        """How many small files to give to a worker at once."""
        if not self._file_seconds:
            return 1
        return max(1, min(_BATCH_FILES, int(_BATCH_SECONDS / self._file_seconds)))

    async def wait_for_bandwidth(self) -> None:
        """Return when more may be begun."""
        while (wait := self._begun_at + self._begun / self.bandwidth - time.monotonic()) > 0:
            await trio.sleep(min(wait, _WINDOW_SECONDS))
            if wait > _WINDOW_SECONDS and self._fetches.demand_slowdown <= _SLOWER:  # no fetch may end meanwhile
                self._raise_bandwidth()

    def begin(self, size: int) -> None:
        """So many bytes are begun."""
        self._begun, self._begun_at = size, time.monotonic()

    def note(self, files: int, size: int, seconds: float) -> None:
        """So many files, of `size` bytes together, came in `seconds`; adapt when a window is over."""
        each = seconds / files
        self._file_seconds = min(each, self._file_seconds * _BEST_FADES) if self._file_seconds else each
        self._done += size + files * _FILE_WORTH_BYTES
        now = time.monotonic()
        if now - self._window_began >= _WINDOW_SECONDS:
            self._adapt(self._done / (now - self._window_began))
            self._window_began, self._done = now, 0.0

    def _adapt(self, throughput: float) -> None:
        tokens = int(self.limiter.total_tokens)
        is_demand_slow = self._fetches.demand_slowdown > _SLOWER
        if is_demand_slow and tokens <= _FEWEST:
            self._too_much = min(throughput, self.bandwidth)
            self.bandwidth = max(_LEAST_BANDWIDTH, self._too_much / 2)
        elif self.bandwidth < math.inf:
            self._raise_bandwidth()
        elif is_demand_slow:
            tokens //= 2
            self._direction = _STEP
            self._is_searching = False
        elif self._is_searching and throughput >= self._before * _GREAT_GAIN:
            tokens *= 2
        else:
            self._is_searching = False
            if throughput < self._before * (_GAIN if self._direction > 0 else _LOSS):
                self._direction = -self._direction
            tokens += self._direction
        self._before = throughput
        self.limiter.total_tokens = max(_FEWEST, min(self._most, tokens))

    def _raise_bandwidth(self) -> None:
        self.bandwidth *= 1.5
        if self.bandwidth > self._too_much:
            self.bandwidth = math.inf


class Prefetch:
    """Fetches files ahead, `most` at once at the most."""

    def __init__(self, tiers: Tiers, residency: Residency, fetches: Fetches, most: int) -> None:
        self._tiers = tiers
        self._residency = residency
        self._fetches = fetches
        self._pace = Pace(fetches, most)
        self._most = most
        self.is_extra: Callable[[bytes], bool] = lambda _: False
        """Which files are beside the mount's shard: that there is no room for one of them ends nothing."""

    async def fetch_all(
        self, files: trio.MemoryReceiveChannel[File], on_done: Callable[[bytes, int, str], None] | None = None
    ) -> None:
        """Fetch what comes out of `files` until it ends; returns at once where scratch is full.

        `on_done` is called with the path, the size and what became of each file.
        """
        await self._residency.loaded.wait()
        gathering = trio.Lock()  # one after another: else each would take a file and wait with it for its turn
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                while True:
                    async with gathering:
                        try:
                            first = await files.receive()
                        except trio.EndOfChannel:
                            return
                        await self._pace.limiter.acquire()
                        await self._pace.wait_for_bandwidth()
                        batch = [first, *self._more(files)]
                        self._pace.begin(sum(size_of(attributes) for _, attributes in batch))
                    try:
                        outcomes = await self._fetch(batch)
                    finally:
                        self._pace.limiter.release()
                    if on_done is not None:
                        for (path, attributes), outcome in zip(batch, outcomes, strict=True):
                            on_done(path, size_of(attributes), outcome)
                    if any(
                        outcome == FULL and not self.is_extra(path)
                        for (path, _), outcome in zip(batch, outcomes, strict=True)
                    ):
                        nursery.cancel_scope.cancel()

            for _ in range(self._most):
                nursery.start_soon(work)

    def _more(self, files: trio.MemoryReceiveChannel[File]) -> list[File]:
        """What else is there already, to go together."""
        more: list[File] = []
        while len(more) + 1 < self._pace.batch_files:
            try:
                more.append(files.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        return more

    async def _fetch(self, batch: Sequence[File]) -> list[str]:
        began = time.monotonic()
        outcomes = [RESIDENT] * len(batch)
        small: list[tuple[bytes, bytes, bytes, Tier]] = []
        waiting: list[tuple[int, Fetch]] = []
        numbers: list[int] = []
        for number, (path, attributes) in enumerate(batch):
            version = version_of(attributes)
            name = self._residency.name_of(path, version)
            if self._is_resident(name):
                continue
            size = size_of(version)
            fetch = self._fetches.get(name)
            if fetch is None:
                is_extra = self.is_extra(path)
                tier = await self._tiers.try_reserve(size, ahead=True, is_extra=is_extra)
                if tier is None and is_extra:
                    outcomes[number] = FULL
                    continue
                if tier is None:
                    outcomes[number:] = [FULL] * (len(batch) - number)
                    break
                fetch = self._fetches.get(name)
                if fetch is not None or self._is_resident(name):
                    tier.release(size)  # somebody came while we reserved
                elif size <= SMALL_FILE_BYTES:
                    small.append((name, path, version, tier))
                    numbers.append(number)
                else:
                    fetch = self._fetches.start(name, path, version, tier, None, ahead=True)
            if fetch is not None:
                waiting.append((number, fetch))
        if small:
            waiting += zip(numbers, self._fetches.start_together(small), strict=True)
        for number, fetch in waiting:
            while not fetch.is_over:
                await fetch.progress()
            outcomes[number] = FAILED if fetch.error is not None else FETCHED
        fetched = [number for number, outcome in enumerate(outcomes) if outcome == FETCHED]
        if fetched:
            self._pace.note(len(fetched), sum(size_of(batch[n][1]) for n in fetched), time.monotonic() - began)
        return outcomes

    def _is_resident(self, name: bytes) -> bool:
        """Whether there is a copy; one from before the machine's last boot too: it is checked when it is opened."""
        if self._residency.get(name) is not None:
            return True
        try:
            return self._tiers.has(name)
        except StorageError:
            return False
