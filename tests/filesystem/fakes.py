"""Stand-ins for what a mount has below its file system: a source without worker processes, pools without processes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cachefs.cache.cache import Cache
from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.copying import CopyHandlers
from cachefs.cache.fetches import Fetches
from cachefs.cache.index import IndexHandlers
from cachefs.cache.ledger import Ledger
from cachefs.cache.residency import Residency
from cachefs.cache.scratch import claim_scratch, unlock_scratch
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import Storage
from cachefs.cache.tiers import Tiers
from cachefs.errors import SourceError
from cachefs.fs.filesystem import FileSystem
from cachefs.metrics import Metrics
from cachefs.source.handlers import SourceHandlers
from cachefs.source.tree import SourceTree
from cachefs.workers.protocol import Handler

BOOT = "1" * 32


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; a test's time-out ends it."""
    while not condition():  # noqa: ASYNC110 - what changes knows nothing of tests
        await trio.sleep(0.001)


async def bytes_or_errno(call: Awaitable[Any]) -> bytes | int | None:
    """What a read gives, or the errno with which it fails."""
    try:
        return bytes(await call)
    except OSError as error:
        return error.errno


class Gate:
    """Open until it is closed; who comes to a closed gate waits until it is opened."""

    def __init__(self) -> None:
        self._opened = trio.Event()
        self._opened.set()
        self.waiting = 0

    def close(self) -> None:
        self._opened = trio.Event()

    def open(self) -> None:
        self._opened.set()

    async def passed(self) -> None:
        self.waiting += 1
        try:
            await self._opened.wait()
        finally:
            self.waiting -= 1
        await trio.lowlevel.checkpoint()


class InlinePool:
    """A WorkerPool whose jobs run in the event loop. `gate` is passed before each job, `step` after each message."""

    size = 4

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.handlers = dict(handlers)
        self.jobs: list[tuple[Any, ...]] = []
        self.gate = Gate()
        self.step = Gate()

    def count(self, name: str) -> int:
        return sum(job[0] == name for job in self.jobs)

    async def run(
        self,
        job: tuple[Any, ...],
        *,
        what: str = "",
        timeout: float = math.inf,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Any:
        self.jobs.append(job)
        await self.gate.passed()
        name, *arguments = job
        work = self.handlers[name](*arguments)
        try:
            while True:
                try:
                    said = next(work)
                except StopIteration as stop:
                    return stop.value
                if on_progress is not None:
                    on_progress(said)
                await self.step.passed()
        finally:
            work.close()


class FakeSource:
    """source.client.Source over a directory, without processes. `calls` counts; `errors` makes calls fail.

    `errors` maps a call's name, or (name, path), to an errno. A closed `gate` holds every call up.
    """

    timeout = math.inf

    def __init__(self, root: Path) -> None:
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self._handlers = SourceHandlers(SourceTree(self.fd, 0.0)).table()
        self.calls: Counter[str] = Counter()
        self.asked: list[tuple[Any, ...]] = []
        self.errors: dict[Any, int] = {}
        self.gate = Gate()

    async def stat(self, path: bytes) -> bytes:
        return await self._ask("stat", path)

    async def readlink(self, path: bytes) -> bytes:
        return await self._ask("readlink", path)

    async def access(self, path: bytes, mode: int) -> bool:
        return await self._ask("access", path, mode)

    async def statvfs(self) -> tuple[int, ...]:
        return await self._ask("statvfs")

    async def listing(self, path: bytes) -> list[tuple[bytes, int, int]]:
        entries: list[tuple[bytes, int, int]] = []
        await self._ask("list", path, on_progress=entries.extend)
        return entries

    async def stat_many(self, path: bytes, names: list[bytes], on_batch: Callable[[Any], None]) -> None:
        await self._ask("stat_many", path, names, on_progress=on_batch)

    async def check(self, path: bytes, version: bytes) -> None:
        await self._ask("check", path, version)

    async def read(self, path: bytes, version: bytes, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        await self._ask("read", path, version, offset, size, on_progress=parts.append)
        return b"".join(parts)

    async def _ask(self, name: str, *arguments: Any, on_progress: Callable[[Any], None] | None = None) -> Any:
        self.calls[name] += 1
        self.asked.append((name, *arguments))
        await self.gate.passed()
        path = arguments[0] if arguments else b""
        number = self.errors.get((name, path), self.errors.get(name))
        if number is not None:
            raise SourceError(number, os.strerror(number), path)
        work = self._handlers[name](*arguments)
        while True:
            try:
                said = next(work)
            except StopIteration as stop:
                return stop.value
            if on_progress is not None:
                on_progress(said)
            await trio.lowlevel.checkpoint()


@dataclass
class World:
    """One mount's layers without a kernel and without processes."""

    path: Path
    """The source directory."""
    scratch: Path
    source: FakeSource
    storage: Storage
    copies: InlinePool
    index: InlinePool
    ledger: Ledger
    residency: Residency
    keeper: CapacityKeeper
    fetches: Fetches
    cache: Cache
    metrics: Metrics
    filesystem: FileSystem
    nursery: trio.Nursery

    async def node(self, path: str) -> Any:
        """The node that the kernel would know after it has looked a path up."""
        node = self.filesystem.inodes.root
        for name in os.fsencode(path).split(b"/"):
            found = await self.filesystem.lookup(node.inode, name)
            assert found is not None, path
            node = found
        node.lookups += 1
        return node

    async def settled(self) -> None:
        """Wait until no fetch is on its way."""
        await until(lambda: not self.fetches._running)

    @property
    def counts(self) -> tuple[int, int, int]:
        """(hits, misses, bypasses)"""
        return self.metrics.hits, self.metrics.misses, self.metrics.bypasses

    @property
    def accounted(self) -> tuple[int, int]:
        """(bytes stored, bytes reserved)"""
        return self.ledger.stored()[0], self.ledger.reserved()


@asynccontextmanager
async def world(
    folder: Path, *, ttl: float = 3600.0, capacity: int = 1 << 30, policy: str = "hold"
) -> AsyncIterator[World]:
    """A mount of `folder`/source with scratch in `folder`/scratch; both are made where they are missing."""
    path = folder / "source"
    path.mkdir(exist_ok=True)
    with _scratch(folder / "scratch") as (scratch, storage):
        source = FakeSource(path)
        tree = SourceTree(source.fd, 0.0)
        copies = InlinePool(CopyHandlers(tree, [storage]).table())
        index_handlers = IndexHandlers(scratch.path / "index.db", storage)
        index = InlinePool(index_handlers.table())
        ledger = Ledger(scratch.fd, "lease", BOOT)
        ledger.join([])
        ledger.set_stored(*await index.run(("reconcile",)))
        metrics = Metrics()
        dataset = b"d" * 16
        residency = Residency(dataset, BOOT, index, recency=policy != "hold")
        try:
            async with trio.open_nursery() as nursery:
                keeper = CapacityKeeper(
                    capacity,
                    policy,
                    ledger,
                    storage,
                    residency,
                    ScratchReader(2, in_memory=False),
                    copies=copies,
                    index=index,
                    live_datasets=lambda: [dataset],
                    metrics=metrics,
                )
                tiers = Tiers([keeper])
                fetches = Fetches(nursery, copies, tiers, residency, keeper, metrics, math.inf)
                cache = Cache(source, tiers, residency, keeper, None, fetches, metrics)
                filesystem = FileSystem(source, cache, nursery, ttl)
                await residency.load(b"/source")
                yield World(
                    path,
                    scratch.path,
                    source,
                    storage,
                    copies,
                    index,
                    ledger,
                    residency,
                    keeper,
                    fetches,
                    cache,
                    metrics,
                    filesystem,
                    nursery,
                )
                filesystem.close()
                nursery.cancel_scope.cancel()
        finally:
            index_handlers.close()
            ledger.close()
            os.close(source.fd)


@contextmanager
def _scratch(path: Path) -> Any:
    scratch = claim_scratch(path)
    unlock_scratch(scratch.fd)
    storage = Storage(scratch.fd, BOOT)
    try:
        yield scratch, storage
    finally:
        for fd in storage.fds:
            os.close(fd)
        os.close(scratch.fd)
