"""Fetches on their way: one for a file at most, in this process by a table, across processes by the staged file's lock.

Invariants:
- A fetch runs to its end whoever waits for it or stops waiting; only the end of the mount cancels it.
- When a fetch ends its reservation is settled or released, exactly once.
- Fetches of large files may take half of the workers at the most, so that small files always find one.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence

import trio

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.copying import COPIED, DROPPED, SMALL_FILE_BYTES, FetchResult
from cachefs.cache.residency import Residency, Resident
from cachefs.cache.tiers import SCRATCH, Tier, Tiers
from cachefs.errors import SourceError, StorageError, describe
from cachefs.metrics import Metrics
from cachefs.source.attributes import size_of
from cachefs.workers.pool import WorkerPool, rebuild_error

log = logging.getLogger(__name__)

LARGE_FILE_BYTES = 32 * 1024 * 1024
_BEST_FADES = 1.001  # a fetch: a source that has become slower for good is not held against prefetching for ever
_DEMAND_SECONDS = 2.0  # from its last fetch on, demand counts as over


_OF_ONE_FILE = (errno.EBUSY, errno.EFBIG)
"""Errors of scratch that say nothing of other files."""


class Fetch:
    """One file's way into scratch. `frontier` counts the bytes that are there; `error` says why it failed."""

    def __init__(self, name: bytes, path: bytes, version: bytes, tier: Tier, *, is_ahead: bool = False) -> None:
        self.tier = tier
        """Where it goes."""
        self.name = name
        self.path = path
        self.version = version
        self.size = size_of(version)
        self.is_ahead = is_ahead
        """Whether nobody has asked for the file yet."""
        self.started = time.monotonic()
        self.frontier = 0
        self.is_waiting_for_its_turn = False
        self.is_open = False
        self.is_over = False
        self.error: OSError | None = None
        self._watchers = trio.lowlevel.ParkingLot()
        self._followers: list[Callable[[], None]] = []

    def follow(self, call: Callable[[], None]) -> None:
        """Have `call` called, without an await in between, when the fetch is over; at once if it is."""
        self.is_ahead = False
        if self.is_over:
            call()
        else:
            self._followers.append(call)

    def unfollow(self, call: Callable[[], None]) -> None:
        self._followers.remove(call)

    async def progress(self) -> None:
        """Wait until something changes."""
        await self._watchers.park()

    def advance(self, frontier: int) -> None:
        self.is_open = True
        self.frontier = max(frontier, self.frontier)
        self._watchers.unpark_all()

    def finish(self, error: OSError | None) -> None:
        self.is_over = True
        self.error = error
        if error is None:
            self.frontier = self.size
        followers, self._followers = self._followers, []
        for call in followers:
            call()
        self._watchers.unpark_all()

    @property
    def rate(self) -> float:
        """Bytes a second so far."""
        return self.frontier / max(time.monotonic() - self.started, 1e-3)


class Fetches:
    """The fetches of one mount. Each runs as a task of `nursery`, its copying in a worker of `pool`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        pool: WorkerPool,
        tiers: Tiers,
        residency: Residency,
        capacity: CapacityKeeper,
        metrics: Metrics,
        source_timeout: float,
    ) -> None:
        self._nursery = nursery
        self._pool = pool
        self._tiers = tiers
        self._residency = residency
        self._capacity = capacity
        self._metrics = metrics
        self._timeout = source_timeout
        self._running: dict[bytes, Fetch] = {}
        self._demand_seconds = self._least_demand_seconds = 0.0
        self._demand_at = -_DEMAND_SECONDS
        self._large = trio.CapacityLimiter(max(1, pool.size // 2))

    def get(self, name: bytes) -> Fetch | None:
        return self._running.get(name)

    @property
    def demand_slowdown(self) -> float:
        """How many times as long as at best the fetches of small files take now that somebody waits for; else 1."""
        if not self._least_demand_seconds or time.monotonic() - self._demand_at > _DEMAND_SECONDS:
            return 1.0
        return self._demand_seconds / self._least_demand_seconds

    def start(
        self, name: bytes, path: bytes, version: bytes, tier: Tier, earlier: Resident | None, *, ahead: bool = False
    ) -> Fetch:
        """Begin a fetch into `tier`; `ahead` if nobody has asked for it.

        The caller has reserved its size there, unless an `earlier` copy, counted as stored, has its place, of another
        boot or changed: it is taken over if it proves whole, and makes room for a new copy if not.
        """
        fetch = self._running[name] = Fetch(name, path, version, tier, is_ahead=ahead)
        self._nursery.start_soon(self._run, fetch, earlier)
        return fetch

    def start_together(self, files: Sequence[tuple[bytes, bytes, bytes, Tier]]) -> list[Fetch]:
        """Begin fetches of small files, each (name, path, version, tier that has reserved its size), in one worker.

        That costs this process a fraction of what as many jobs do. The files come one after another.
        """
        fetches = [Fetch(*file, is_ahead=True) for file in files]
        self._running.update({fetch.name: fetch for fetch in fetches})
        self._nursery.start_soon(self._run_together, fetches)
        return fetches

    async def _run_together(self, fetches: list[Fetch]) -> None:
        def on_progress(said: tuple[int, FetchResult | None, tuple[str, int, str, bytes] | None]) -> None:
            number, result, failure = said
            if result is not None:
                self._succeed(fetches[number], result)
            elif failure is not None:
                self._fail(fetches[number], rebuild_error(*failure))
                self._give_back(fetches[number])
            del self._running[fetches[number].name]

        job = ("fetch_many", [(fetch.name, fetch.path, fetch.version, fetch.tier.number) for fetch in fetches])
        error: OSError = StorageError(0, "the fetch was given up")
        try:
            await self._pool.run(
                job, what=f"fetch {fetches[0].path!r} and more", timeout=self._timeout, on_progress=on_progress
            )
        except OSError as failure:
            error = failure
        finally:
            for fetch in fetches:
                if not fetch.is_over:
                    del self._running[fetch.name]
                    self._fail(fetch, error)
                    self._give_back(fetch)

    async def _run(self, fetch: Fetch, earlier: Resident | None) -> None:
        try:
            if fetch.size >= LARGE_FILE_BYTES:
                fetch.is_waiting_for_its_turn = self._large.available_tokens <= 0
                async with self._large:
                    fetch.is_waiting_for_its_turn = False
                    await self._copy(fetch, earlier)
            else:
                await self._copy(fetch, earlier)
        finally:
            del self._running[fetch.name]
            if not fetch.is_over:  # cancelled, or a bug of ours: whoever waits goes to the source
                fetch.finish(StorageError(0, "the fetch was given up"))

    async def _copy(self, fetch: Fetch, earlier: Resident | None) -> None:
        is_reserved = earlier is None
        try:
            if earlier is not None and not await self._revive(fetch, earlier):
                if not await self._capacity.reserve(fetch.size):
                    raise StorageError(errno.EBUSY, "no room for another copy", fetch.path)
                is_reserved, earlier = True, None
            if earlier is None:
                result = await self._run_job(fetch, "", b"")
                is_reserved = False
                self._succeed(fetch, result)
                self._note_demand(fetch)
            else:
                fetch.finish(None)
        except OSError as error:
            self._fail(fetch, error)
        finally:
            if is_reserved:
                self._give_back(fetch)

    def _succeed(self, fetch: Fetch, result: FetchResult) -> None:
        how, checksum, copied = result
        if how == COPIED:
            self._metrics.source_bytes_read += copied
            self._metrics.fetches += 1
            fetch.tier.settle(fetch.size)
        else:
            fetch.tier.release(fetch.size)
            fetch.tier = self._tiers[copied]
        fetch.tier.keep(fetch.name, fetch.path, fetch.version, checksum)
        if fetch.is_ahead:
            self._metrics.prefetches += how == COPIED
            fetch.tier.note_ahead(fetch.name, fetch.size)
        fetch.finish(None)

    def _note_demand(self, fetch: Fetch) -> None:
        if fetch.size <= SMALL_FILE_BYTES and not fetch.is_ahead:
            self._demand_at = time.monotonic()
            seconds = self._demand_at - fetch.started
            self._demand_seconds = 0.8 * (self._demand_seconds or seconds) + 0.2 * seconds
            least = self._least_demand_seconds * _BEST_FADES or self._demand_seconds
            self._least_demand_seconds = min(least, self._demand_seconds)

    def _fail(self, fetch: Fetch, error: OSError) -> None:
        self._metrics.fetch_errors += 1
        self._metrics.source_bytes_read += fetch.frontier
        if isinstance(error, StorageError) and error.errno not in _OF_ONE_FILE:
            fetch.tier.suspend()
        level = logging.INFO if isinstance(error, SourceError) else logging.WARNING
        log.log(level, "fetch failed path=%r error=%r", fetch.path, describe(error))
        fetch.finish(error)

    async def _revive(self, fetch: Fetch, earlier: Resident) -> bool:
        """Take over an earlier copy if it proves whole."""
        how, checksum, dropped = await self._run_job(fetch, earlier.boot, earlier.checksum)
        if how == DROPPED:
            self._residency.discard(fetch.name)
            if dropped:  # else another mount has evicted it
                log.warning("damaged copy dropped path=%r copy=%s", fetch.path, fetch.name.hex())
                self._capacity.lose(min(fetch.size, earlier.size))
            return False
        self._residency.add(fetch.name, fetch.path, fetch.version, checksum)
        return True

    async def _run_job(self, fetch: Fetch, earlier_boot: str, earlier_checksum: bytes) -> FetchResult:
        job = ("fetch", fetch.name, fetch.path, fetch.version, earlier_boot, earlier_checksum, fetch.tier.number)
        result: FetchResult = await self._pool.run(
            job, what=f"fetch {fetch.path!r}", timeout=self._timeout, on_progress=fetch.advance
        )
        return result

    def _give_back(self, fetch: Fetch) -> None:
        if isinstance(fetch.error, StorageError) and fetch.error.errno == errno.EBUSY:
            fetch.tier.release(fetch.size)  # what is staged is another mount's, which has reserved room for it
            return
        fetch.tier.give_back(fetch.name, fetch.size, self._tiers[SCRATCH].storage)
