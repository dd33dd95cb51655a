"""The memory tier by itself, its moves made in this process."""

from __future__ import annotations

import os
import random
import secrets
from types import SimpleNamespace

import psutil
import pytest
import trio
import xxhash

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.copying import CopyHandlers
from cachefs.cache.ledger import Ledger
from cachefs.cache.memory import MemoryTier
from cachefs.cache.residency import Residency
from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cache.storage import Storage
from cachefs.errors import WorkerDiedError
from cachefs.metrics import Metrics
from cachefs.mount.leases import boot_id
from cachefs.mount.tiers import MemoryRoom
from cachefs.source.attributes import mtime_of, pack_stat, version_of

SIZE = 10_000


class Pool:
    def __init__(self):
        self.handlers = {}
        self.dies_after = None
        """So many words of a worker."""
        self.jobs = []
        self.before = None

    async def run(self, job, *, what="", timeout=0, on_progress=None):
        await trio.lowlevel.checkpoint()
        self.jobs.append(job)
        if self.before:
            self.before(job)
        gen = self.handlers[job[0]](*job[1:])
        said = 0
        while True:
            if said == self.dies_after:
                raise WorkerDiedError("move")
            try:
                word = next(gen)
            except StopIteration as end:
                return end.value
            said += 1
            if on_progress is not None:
                on_progress(word)


class House:
    def __init__(self, tmp_path, memory=100 * SIZE, scratch=100 * SIZE, policy="hold", room=lambda: 1 << 40):
        self.tmp = tmp_path
        self.storages = []
        self.ledgers = []
        for name in ("scratch", "memory"):
            for d in ("files", "staging"):
                os.makedirs(tmp_path / name / d)
            fd = os.open(tmp_path / name, os.O_RDONLY)
            self.storages.append(Storage(fd, boot_id()))
            ledger = Ledger(fd, secrets.token_hex(6), boot_id())
            ledger.join([])
            self.ledgers.append(ledger)
        self.pool = Pool()
        self.pool.handlers = dict(CopyHandlers(None, self.storages).table())

        def nothing(*_):
            yield from ()
            return []

        self.pool.handlers.update(unused=nothing, record=nothing)
        self.residency = Residency(bytes(16), boot_id(), self.pool, recency=policy != "hold")
        self.residency.loaded.set()
        self.keeper = CapacityKeeper(
            scratch,
            policy,
            self.ledgers[0],
            self.storages[0],
            self.residency,
            ScratchReader(1, in_memory=True),
            copies=self.pool,
            index=self.pool,
            live_datasets=list,
            metrics=Metrics(),
        )
        self.tier = MemoryTier(
            tmp_path / "memory", memory, self.ledgers[1], self.storages[1], room, self.keeper, self.residency, self.pool
        )

    async def put(self, n, tier):
        p = self.tmp / f"src{n}"
        p.write_bytes(bytes([n]) * SIZE)
        version = version_of(pack_stat(os.stat(p)))
        name = self.residency.name_of(b"%d" % n, version)
        assert await tier.try_reserve(SIZE)
        fd = tier.storage.stage(name)
        os.pwrite(fd, p.read_bytes(), 0)
        os.utime(fd, ns=(mtime_of(version),) * 2)
        tier.storage.commit(name)
        os.close(fd)
        tier.settle(SIZE)
        tier.keep(name, b"%d" % n, version, xxhash.xxh3_64_digest(p.read_bytes()))
        return name, b"%d" % n, version

    async def make_hot(self):
        """Three files in memory, and one in scratch that is to move up: its name, path and version."""
        for n in range(3):
            await self.put(n, self.tier)
        name, path, version = await self.put(9, self.keeper)
        self.tier._hot[name] = path, version
        return name, path, version


def test_room_between_two_looks(tmp_path):
    room = MemoryRoom(os.open(tmp_path, os.O_RDONLY), lambda: h.ledgers[1].stored()[0])
    room._look = lambda: (
        10 * SIZE - sum(f.stat().st_size for f in (tmp_path / "memory/files").rglob("*") if f.is_file())
    )
    h = House(tmp_path, memory=1000 * SIZE, room=room)

    async def main():
        got = 0
        for n in range(100):
            try:
                await h.put(n, h.tier)
            except AssertionError:
                break
            got += 1
        assert got <= 10

    trio.run(main)


def test_the_last_tenth_of_the_machine_is_left(tmp_path, monkeypatch):
    """Nothing is taken into it; and when somebody else needs more, files move down, or are dropped."""
    total, others = 1000 * SIZE, 850 * SIZE

    def machine():
        return SimpleNamespace(total=total, available=total - others - h.ledgers[1].stored()[0])

    monkeypatch.setattr(psutil, "virtual_memory", machine)
    h = House(tmp_path, memory=900 * SIZE, scratch=30 * SIZE)
    h.tier._room = room = MemoryRoom(os.open(tmp_path, os.O_RDONLY), lambda: h.ledgers[1].stored()[0])

    async def main():
        nonlocal others
        for n in range(50):
            await h.put(n, h.tier)
        assert not await h.tier.try_reserve(SIZE), "a tenth of the memory is left"
        others += 40 * SIZE
        await trio.sleep(0.2)  # the room is looked at ten times a second
        assert room() == -40 * SIZE
        await h.tier._shrink(-room())
        assert machine().available >= 0.1 * total
        assert (h.tier.moved_down, h.tier.dropped) == (30, 10), "scratch had room for 30"

    trio.run(main)


def test_double_lost(tmp_path):
    """What was open in scratch when it moved up is in both; it stays in one when it moves down."""
    h = House(tmp_path)

    async def main():
        name, _, _ = await h.make_hot()
        fd = h.storages[0].open(name)  # a reader has it open in scratch
        await h.tier._trade()
        assert h.tier.moved_up == 1
        for kept in list(h.tier._files.values()):
            await h.tier._move_down([kept])
        os.close(fd)
        await h.tier._trade()
        assert h.storages[0].has(name) or h.storages[1].has(name)

    trio.run(main)


def test_hot_of_unknown_checksum(tmp_path):
    """Another mount has fetched it: it is no worse for that."""
    h = House(tmp_path)

    async def main():
        name, path, version = await h.make_hot()
        h.residency.add(name, path, version, b"")
        await h.tier._trade()
        assert h.storages[0].has(name) or h.storages[1].has(name)

    trio.run(main)


def test_what_was_open_while_it_moved_goes_later(tmp_path):
    """It is in both tiers then, until it is closed; no descriptor of it stays open."""
    h = House(tmp_path)

    async def main():
        name, _, _ = await h.put(1, h.tier)
        fd = h.storages[1].open(name)
        await h.tier._move_down(h.tier._oldest(SIZE))
        assert h.storages[0].has(name)
        assert h.storages[1].has(name)
        before = len(os.listdir("/proc/self/fd"))
        await h.tier._move_down(h.tier._oldest(SIZE))  # open still
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(fd)
        await h.tier._move_down(h.tier._oldest(SIZE))
        assert not h.storages[1].has(name)
        assert h.tier.stored() == (0, 0)
        assert h.keeper.stored() == (SIZE, 1)

    trio.run(main)


class Epochs:
    """A job: 30 of 100 files are in memory, the others in scratch."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.dice = random.Random(7)
        self.files = []

    async def fill(self) -> None:
        for n in range(100):
            self.files.append(await self.house.put(n, self.house.tier if n < 30 else self.house.keeper))

    async def open(self, n: int) -> None:
        house, file = self.house, self.files[n]
        house.tier.count_open()
        fd = house.tier.open(*file)
        if fd is None:
            fd = house.storages[0].open(file[0])
            house.tier.note_scratch_hit(*file)
        os.close(fd)
        await house.tier._trade()

    async def run(self, ranks: int, times: int) -> None:
        """Each rank opens each file so many times in a row, and is up to 5 files ahead of another."""
        order = self.dice.sample(range(100), 100)
        opens = [(at + self.dice.uniform(0, 5), n) for _ in range(ranks) for at, n in enumerate(order)]
        for _, n in sorted(opens):
            for _ in range(times):
                await self.open(n)


@pytest.mark.parametrize(("ranks", "times"), [(1, 1), (1, 2), (1, 3), (1, 8), (2, 1), (4, 1), (2, 2)])
def test_epochs_trade_nothing(ranks, times, tmp_path):
    """Opens close together are one use: of the header and of all, say, or by several ranks."""
    h = House(tmp_path, memory=31 * SIZE)

    async def main():
        epochs = Epochs(h)
        await epochs.fill()
        await epochs.run(ranks, times)
        before = h.tier.moved_up
        for _ in range(5):
            await epochs.run(ranks, times)
        assert h.tier.moved_up == before

    trio.run(main)


def test_what_is_opened_again_and_again_moves_up(tmp_path):
    """In epochs, too, that open each file twice."""
    h = House(tmp_path, memory=31 * SIZE)

    async def main():
        epochs = Epochs(h)
        await epochs.fill()
        for _ in range(3):
            for at, n in enumerate(epochs.dice.sample(range(100), 100)):
                await epochs.open(n)
                await epochs.open(n)
                if at % 25 == 24:  # every 50th open
                    await epochs.open(99)
        assert h.tier.moved_up == 1
        assert h.storages[1].has(epochs.files[99][0])

    trio.run(main)


@pytest.mark.parametrize("room", ["none below", "below"])
def test_what_is_open_is_not_dropped(room, tmp_path):
    """It would give nothing back: what memory is needed otherwise comes from what is not open."""
    h = House(tmp_path, scratch=0 if room == "none below" else 100 * SIZE)

    async def main():
        files = [await h.put(n, h.tier) for n in range(12)]
        fds = [h.storages[1].open(files[n][0]) for n in range(9)]
        await h.tier._shrink(2 * SIZE)
        there = [n for n in range(12) if h.storages[1].has(files[n][0])]
        assert there == [*range(9), 11]
        assert h.tier.stored() == (10 * SIZE, 10)
        assert len(h.tier._files) == 10
        await h.tier._shrink(100 * SIZE)
        assert h.tier.stored() == (9 * SIZE, 9)
        for fd in fds:
            os.close(fd)
        await h.tier._shrink(100 * SIZE)
        assert h.tier.stored() == (0, 0)
        assert h.tier.dropped == (12 if room == "none below" else 0)

    trio.run(main)


def test_a_worker_dies_between_two_moves(tmp_path):
    """What it has moved is counted where it is, and the rest where it was."""
    h = House(tmp_path)

    async def main():
        files = [await h.put(n, h.tier) for n in range(6)]
        h.pool.dies_after = 4
        with pytest.raises(WorkerDiedError):
            await h.tier._move_down(h.tier._oldest(6 * SIZE))
        assert h.tier.stored() == (2 * SIZE, 2)
        assert h.keeper.stored() == (4 * SIZE, 4)
        assert [ledger.reserved() for ledger in h.ledgers] == [0, 0]
        assert [kept.name for kept in h.tier._files.values()] == [file[0] for file in files[4:]]
        assert all(h.residency.get(file[0]) for file in files[:4])
        h.pool.dies_after = None
        assert len(await h.tier._move_down(h.tier._oldest(6 * SIZE))) == 2
        assert h.tier.stored() == (0, 0)

    trio.run(main)
