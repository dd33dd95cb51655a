"""The composition root: puts the layers of one mount together, serves it, and takes it apart again.

The order matters: the source is opened before anything is mounted over it; the fork server is forked while the
process has one thread and little memory; the lease is taken after that; what was taken is given back in the reverse
order, whatever fails.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from cachefs.cache.cache import Cache
from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.copying import CopyHandlers
from cachefs.cache.fetches import Fetches
from cachefs.cache.index import IndexHandlers
from cachefs.cache.ledger import Ledger
from cachefs.cache.prefetch import Prefetch
from cachefs.cache.residency import Residency
from cachefs.cache.scratch import Scratch
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import Storage
from cachefs.cache.tiers import Tiers
from cachefs.cache.trees import TreeHandlers, Trees
from cachefs.cache.write_watch import WriteWatch
from cachefs.config import Settings
from cachefs.errors import CachefsError, describe
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.operations import Operations
from cachefs.fs.read_through import ReadThrough
from cachefs.metrics import Metrics
from cachefs.mount.control import Send, serve_control
from cachefs.mount.fuse_session import mounted_session
from cachefs.mount.leases import boot_id
from cachefs.mount.membership import Membership
from cachefs.mount.memory import MemoryPlace, MemoryTierError, go_without
from cachefs.mount.mountinfo import MEMORY_FSTYPES, containing_mount, mount_id_of
from cachefs.mount.promotion import Promotion
from cachefs.mount.sharding import NO_SHARD, DeclaredShare, take_share
from cachefs.mount.tiers import JoinedMemory, MemoryRoom, describe_tiers
from cachefs.mount.warming import Warming
from cachefs.source.client import Source
from cachefs.source.handlers import SourceHandlers
from cachefs.source.tree import SourceTree
from cachefs.workers.fork_server import ForkServer
from cachefs.workers.pool import WorkerPool
from cachefs.workers.protocol import serve as serve_jobs

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

log = logging.getLogger(__name__)

FETCH_WORKERS = 32
KEEPER_SIGNAL = signal.SIGRTMIN + 4
"""Ends a mount of a job, which ignores the others: a batch system sends them to all processes of a job."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DEMAND_WORKERS = 8
"""Of FETCH_WORKERS, those that prefetching never takes."""
METADATA_WORKERS = 8
READ_WORKERS = 8
SCRATCH_THREADS = 8
_DIRECTORY_LIFETIME_SHARE, _LONGEST_DIRECTORY_LIFETIME = 0.1, 5.0
_LAST_WRITE_SECONDS = 10.0
STARTING_SECONDS = 1.0
"""How often whoever waits for the mount hears that the source is being listed."""
_MIN_IDLE_TASKS, _MAX_TASKS = 8, 100_000
"""pyfuse3's tasks: a request that waits for the source keeps its own, so their number must not be the limit."""

OnReady = Callable[[Sequence[str]], None]
"""Called when the mount answers, with what works but not as was asked for."""
KeepInformed = Callable[[Callable[[], Mapping[str, Any]]], Awaitable[None]]


@dataclass(frozen=True)
class Grounds:
    """What a mount stands on, made before its event loop starts."""

    settings: Settings
    scratch: Scratch
    memory: MemoryPlace | None
    storage: Storage
    trees: Trees
    watch: WriteWatch
    fork_server: ForkServer
    dataset: bytes
    warnings: Sequence[str]


def open_source(settings: Settings) -> int:
    """A descriptor of the source's root, through which alone it is reached. Raises CachefsError."""
    try:
        return os.open(settings.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CachefsError(f"source {settings.source} cannot be opened: {describe(error)}") from None


def lay_grounds(
    settings: Settings, source_fd: int, scratch: Scratch, memory: MemoryPlace | None, warnings: Sequence[str]
) -> Grounds:
    """Fork the fork server, which takes the source over. The process must have one thread."""
    storage, trees, watch = Storage(scratch.fd, boot_id()), Trees(scratch.fd), WriteWatch()
    storages = [storage] if memory is None else [storage, memory.storage]
    room = (lambda: 1) if memory is None else MemoryRoom(memory.storage.fds[0])
    lifetime = _directory_lifetime(settings)
    index_path = scratch.path / "index.db"

    def work(sock: Any) -> None:
        tree = SourceTree(source_fd, lifetime, for_others=settings.allow_other)
        serve_jobs(
            sock,
            {
                **SourceHandlers(tree).table(),
                **CopyHandlers(tree, storages, room).table(),
                **TreeHandlers(tree, storage, trees, mount_id_of, watch).table(),
                **IndexHandlers(index_path, storage).table(),
            },
        )

    of_storages = [fd for one in storages for fd in one.fds]
    fork_server = ForkServer.start(work, keep_fds=[source_fd, trees.fd, watch.fd, *of_storages])
    os.close(source_fd)  # the workers have it; the event loop never touches the source itself
    dataset = hashlib.blake2b(os.fsencode(settings.source), digest_size=16).digest()
    return Grounds(settings, scratch, memory, storage, trees, watch, fork_server, dataset, warnings)


def serve(
    grounds: Grounds,
    on_ready: OnReady,
    on_starting: Callable[[], None],
    keep_informed: KeepInformed | None = None,
) -> None:
    """Mount and serve until unmounted or told to end; `on_ready` is called when the mount answers.

    Until then, where it takes long, `on_starting` is called again and again; from then on `keep_informed` runs, with a
    function that gives the report of `status`. Raises CachefsError if it cannot be mounted.
    """
    try:
        trio.run(_serve, grounds, on_ready, on_starting, keep_informed)
    except BaseExceptionGroup as group:
        expected: BaseException | None = group.subgroup(CachefsError)
        while isinstance(expected, BaseExceptionGroup):
            expected = expected.exceptions[0]
        if expected is None:
            raise
        raise expected from None
    finally:
        grounds.fork_server.close()


async def _serve(
    grounds: Grounds,
    on_ready: OnReady,
    on_starting: Callable[[], None],
    keep_informed: KeepInformed | None,
) -> None:
    settings = grounds.settings
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        pools = await stack.enter_async_context(_pools(grounds.fork_server))
        membership = Membership(settings, grounds.scratch, grounds.storage, grounds.trees, grounds.dataset)
        stack.callback(membership.leave)
        ledger = membership.ledger
        joined, warned = None, [*grounds.warnings]
        if grounds.memory is not None:
            try:
                joined = JoinedMemory(settings, grounds.memory, grounds.dataset, stack)
            except MemoryTierError as error:
                warned.append(go_without(settings, error))
        capacity = _capacity_bytes(settings, grounds.storage, ledger)
        residency = Residency(grounds.dataset, grounds.storage.boot, pools["index"], recency=settings.policy != "hold")
        stack.push_async_callback(_write_last, residency, membership)
        # leaving the nursery ends every fetch; then the index is written, and the membership and the pools go
        nursery = await stack.enter_async_context(_cancelled_nursery())
        keeper = CapacityKeeper(
            capacity,
            settings.policy,
            ledger,
            grounds.storage,
            residency,
            ScratchReader(SCRATCH_THREADS, in_memory=_is_in_memory(settings.scratch)),
            copies=pools["fetch"],
            index=pools["index"],
            live_datasets=membership.live_datasets,
            metrics=metrics,
        )
        source = Source(pools["metadata"], pools["read"], settings.source_timeout or math.inf)
        memory = None if joined is None else joined.tier(keeper, residency, pools["fetch"])
        tiers = Tiers([keeper] if memory is None else [memory, keeper])
        fetches = Fetches(nursery, pools["fetch"], tiers, residency, keeper, metrics, source.timeout)
        cache = Cache(source, tiers, residency, keeper, memory, fetches, metrics)
        filesystem = FileSystem(source, cache, nursery, settings.metadata_ttl - _directory_lifetime(settings))
        prefetch = Prefetch(tiers, residency, fetches, FETCH_WORKERS - DEMAND_WORKERS)
        read_through = ReadThrough(filesystem, prefetch, nursery)
        # before anything that takes long: until scratch is counted no other mount can join
        source_name = os.fsencode(settings.source)
        nursery.start_soon(_look_after_index, membership, residency, keeper, source_name, pools["index"])
        # from before mounting until after unmounting, a signal must not end the process: the mount would stay, dead
        ending = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        signals = stack.enter_context(trio.open_signal_receiver(KEEPER_SIGNAL, *ending))
        declared = None
        if settings.sharding is not None:
            async with _starting(signals, on_starting):
                share = await take_share(settings.sharding, keeper, filesystem, cache, prefetch, read_through)
            declared = DeclaredShare(settings, settings.sharding, share, keeper.room(), membership)
            keeper.find_spare = declared.find_spare
            nursery.start_soon(declared.declare)
        if settings.prefetch == "auto":
            filesystem.on_miss = read_through.note_miss
        elif settings.prefetch == "all":
            read_through.fetch_everything()
        promotion = Promotion(
            settings,
            filesystem,
            residency,
            grounds.storage,
            grounds.trees,
            grounds.watch,
            keeper,
            pools["fetch"],
            membership.record.id,
            source.timeout,
        )
        stack.push_async_callback(promotion.leave)
        if memory is not None:
            memory.promotes = lambda: promotion.reason_against is None
            nursery.start_soon(memory.run)

        def status(_: Mapping[str, Any]) -> dict[str, Any]:
            parts = describe_tiers(grounds.scratch.path, keeper, memory, metrics)
            return {
                "source": str(settings.source),
                "mountpoint": str(settings.mountpoint),
                "scratch": str(settings.scratch),
                "policy": settings.policy,
                **keeper.status(),
                "capacity_bytes": capacity,
                "resident_files": sum(tier["files"] for tier in parts),
                "resident_bytes": sum(tier["bytes"] for tier in parts),
                "indexed_files": len(residency),
                "hits": metrics.hits,
                "hit_bytes": metrics.hit_bytes,
                "misses": metrics.misses,
                "bypasses": metrics.bypasses,
                "evictions": metrics.evictions,
                "fetches": metrics.fetches,
                "prefetches": metrics.prefetches,
                "fetch_errors": metrics.fetch_errors,
                "source_bytes_read": metrics.source_bytes_read,
                "requests": metrics.requests,
                "bytes_served": metrics.bytes_served,
                "wait_seconds": round(metrics.wait_seconds, 3),
                **promotion.status(),
                "tiers": parts,
                **(NO_SHARD if declared is None else declared.status()),
                "uptime_seconds": round(metrics.uptime_seconds, 3),
                "pid": os.getpid(),
                "known_entries": len(filesystem.inodes),
                "log": str(settings.scratch / "logs" / f"{os.getpid()}.log"),
            }

        async def flush(_: Mapping[str, Any], send: Send) -> None:
            """For whoever compares the index with what is there."""
            await residency.flush()
            await send({"flushed": True})

        streams = {"warm": Warming(read_through).answer, "flush": flush}
        await nursery.start(serve_control, grounds.scratch, membership.record.id, {"status": status}, streams)
        stack.callback(filesystem.close)
        async with (
            mounted_session(Operations(filesystem, metrics), settings, membership.record.id) as session,
            _cancelled_nursery() as session_nursery,
        ):

            def ready() -> None:
                on_ready([*warned, *([] if declared is None else declared.warnings())])
                if keep_informed is not None:
                    session_nursery.start_soon(keep_informed, lambda: status({}))

            # requests that wait for a hung source would keep pyfuse3's loop from ending: cancelling ends them
            end = session_nursery.cancel_scope.cancel
            session_nursery.start_soon(_end_on_signal, signals, end)
            session_nursery.start_soon(_end_with_fork_server, grounds.fork_server, end)
            session_nursery.start_soon(session.end_when_unmounted, end)
            session_nursery.start_soon(session.announce, ready)
            session_nursery.start_soon(promotion.run, membership.abandoned_trees)
            await _answer_requests()


async def _answer_requests() -> None:
    """Return when the mount is gone. ECONNABORTED says so too, where the kernel ended the connection within a read."""
    try:
        await pyfuse3.main(min_tasks=_MIN_IDLE_TASKS, max_tasks=_MAX_TASKS)
    except BaseExceptionGroup as group:
        _, others = group.split(ConnectionAbortedError)
        if others is not None:
            raise others from None
        log.info("the kernel has ended the connection")


@asynccontextmanager
async def _pools(fork_server: ForkServer) -> AsyncIterator[dict[str, WorkerPool]]:
    sizes = {"fetch": FETCH_WORKERS, "metadata": METADATA_WORKERS, "read": READ_WORKERS, "index": 1}
    pools = {name: WorkerPool(fork_server, name, size) for name, size in sizes.items()}
    try:
        for pool in pools.values():
            pool.start_one()
        yield pools
    finally:
        with trio.CancelScope(shield=True):
            for pool in pools.values():
                await pool.aclose()


@asynccontextmanager
async def _cancelled_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks end with its block."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


def _directory_lifetime(settings: Settings) -> float:
    """Seconds for which a worker uses a directory's descriptor again: metadata that come through it expire earlier."""
    return min(settings.metadata_ttl * _DIRECTORY_LIFETIME_SHARE, _LONGEST_DIRECTORY_LIFETIME)


def _capacity_bytes(settings: Settings, storage: Storage, ledger: Ledger) -> int:
    if settings.capacity.size is not None:
        return settings.capacity.size
    available, _ = storage.space()
    stored, _ = ledger.stored()
    return int((settings.capacity.share or 0.0) * (available + stored))


def _is_in_memory(scratch: Path) -> bool:
    mount = containing_mount(scratch)
    return mount is not None and mount.fstype in MEMORY_FSTYPES


async def _look_after_index(
    membership: Membership, residency: Residency, keeper: CapacityKeeper, source: bytes, index: WorkerPool
) -> None:
    """Count what scratch holds if need be, read the index, and write it behind for ever. The mount serves meanwhile."""
    try:
        await membership.count(index)
    except OSError as error:
        log.error("scratch cannot be counted, nothing will be stored error=%r", describe(error))
        keeper.suspend(math.inf)
    try:
        await residency.load(source)
    except OSError as error:
        log.warning("index not read error=%r", describe(error))
    await residency.write_behind()


async def _write_last(residency: Residency, membership: Membership) -> None:
    with trio.move_on_after(_LAST_WRITE_SECONDS):
        await residency.flush()
    if residency.has_lost:
        membership.doubt()


def name_of_signal(number: int) -> str:
    """SIGTERM and so on; those that have no name of their own by their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@asynccontextmanager
async def _starting(signals: AsyncIterator[int], on_starting: Callable[[], None]) -> AsyncIterator[None]:
    """Says every STARTING_SECONDS that its block goes on. Raises CachefsError in it at a signal."""

    async def wait() -> None:
        raise CachefsError(f"{name_of_signal(await anext(signals))} came before the mount was there")

    async def keep_saying() -> None:
        while True:
            await trio.sleep(STARTING_SECONDS)
            on_starting()

    async with _cancelled_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(keep_saying)
        yield


async def _end_on_signal(signals: AsyncIterator[int], end: Callable[[], None]) -> None:
    async for number in signals:
        log.info("ending signal=%s", name_of_signal(number))
        end()


async def _end_with_fork_server(fork_server: ForkServer, end: Callable[[], None]) -> None:
    """Without workers nothing new can be served: better no mount than one that answers with errors."""
    pidfd = os.pidfd_open(fork_server.pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
        log.error("the fork server has died, unmounting")
        end()
    finally:
        os.close(pidfd)
