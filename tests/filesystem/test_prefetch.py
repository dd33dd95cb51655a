"""Fetching ahead without a kernel: files that wait go to a worker together, and one that hangs holds up no other."""

from __future__ import annotations

import math
import os

import pytest
import trio

import cachefs.cache.fetches as fetches_module
import cachefs.cache.prefetch as prefetch_module
from cachefs.cache.fetches import Fetch
from cachefs.cache.prefetch import FETCHED, FULL, RESIDENT, Pace, Prefetch
from cachefs.cache.tiers import Tiers
from tests.filesystem.fakes import World, until
from tests.filesystem.test_metadata import in_world

MOST = 4


async def fetch_all(made: World, prefetch: Prefetch, names: list[str]) -> dict[bytes, str]:
    """What became of each file."""
    outcomes: dict[bytes, str] = {}
    sending, receiving = trio.open_memory_channel(1000)
    for name in names:
        node = await made.node(name)
        sending.send_nowait((node.path, node.attributes))
    sending.close()
    await prefetch.fetch_all(receiving, lambda path, size, outcome: outcomes.update({path: outcome}))
    return outcomes


def make_prefetch(made: World) -> Prefetch:
    return Prefetch(Tiers([made.keeper]), made.residency, made.fetches, MOST)


def make_files(made: World, count: int, size: int = 100) -> list[str]:
    names = [f"file{number:03}" for number in range(count)]
    for name in names:
        (made.path / name).write_bytes(os.urandom(size))
    return names


def test_small_files_that_wait_go_together(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch_module, "_BATCH_SECONDS", 3600.0)  # however slow this machine is just now

    async def do(made):
        names = make_files(made, 100)
        outcomes = await fetch_all(made, make_prefetch(made), names)
        assert set(outcomes.values()) == {FETCHED}
        assert len(outcomes) == 100
        batches = [len(job[1]) for job in made.copies.jobs if job[0] == "fetch_many"]
        assert sum(batches) == 100
        assert max(batches) == 8
        assert len(batches) <= 100 / 8 + MOST  # the first of each worker goes alone: how long one takes is not known
        assert made.accounted == (100 * 100, 0)

    in_world(tmp_path, do)


def test_what_is_there_is_not_fetched_again(tmp_path):
    async def do(made):
        names, prefetch = make_files(made, 20), make_prefetch(made)
        await fetch_all(made, prefetch, names[:10])
        outcomes = await fetch_all(made, prefetch, names)
        assert sorted(outcomes.values()) == sorted([RESIDENT] * 10 + [FETCHED] * 10)
        assert made.metrics.fetches == made.metrics.prefetches == 20

    in_world(tmp_path, do)


def test_it_ends_where_there_is_no_room(tmp_path):
    async def do(made):
        outcomes = await fetch_all(made, make_prefetch(made), make_files(made, 100))
        assert FULL in outcomes.values()
        await made.settled()  # what is on its way then goes on
        assert made.accounted == (1000, 0)
        assert made.metrics.fetches == 10

    in_world(tmp_path, do, capacity=1000)


def test_two_that_fetch_the_same_fetch_each_file_once(tmp_path):
    async def do(made):
        names, prefetch = make_files(made, 50), make_prefetch(made)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch_all, made, prefetch, names)
            nursery.start_soon(fetch_all, made, prefetch, names[::-1])
        assert made.metrics.fetches == 50
        assert made.accounted == (50 * 100, 0)

    in_world(tmp_path, do)


def test_one_that_waits_for_names_holds_up_no_other(tmp_path):
    """Whoever waits for the next file of a hung listing keeps no turn."""

    async def do(made):
        names, prefetch = make_files(made, 30), make_prefetch(made)
        sending, receiving = trio.open_memory_channel(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefetch.fetch_all, receiving)
            await until(lambda: receiving.statistics().tasks_waiting_receive)
            outcomes = await fetch_all(made, prefetch, names)
            assert set(outcomes.values()) == {FETCHED}
            sending.close()

    in_world(tmp_path, do)


class Demand:
    """How demand fares, as `Pace` asks."""

    demand_slowdown = 1.0


def test_bandwidth_gives_way_to_demand_when_concurrency_cannot_and_comes_back(monkeypatch):
    """1 MB in each window of 0.25 s."""
    now = 0.0
    monkeypatch.setattr(prefetch_module.time, "monotonic", lambda: now)
    demand = Demand()
    pace = Pace(demand, 12)

    def go_on(windows: int) -> None:
        nonlocal now
        for _ in range(windows):
            now += 0.25
            pace.note(1, 1_000_000, 0.1)

    demand.demand_slowdown = 4.0
    go_on(1)
    assert (pace.limiter.total_tokens, pace.bandwidth) == (3, math.inf)
    go_on(1)
    assert (pace.limiter.total_tokens, pace.bandwidth) == (2, math.inf)
    go_on(1)
    assert pace.bandwidth == pytest.approx(2_100_000, rel=0.05)
    go_on(3)
    assert pace.bandwidth == 1024 * 1024
    assert pace.limiter.total_tokens == 2
    demand.demand_slowdown = 1.0
    go_on(10)
    assert pace.bandwidth == math.inf


def test_no_more_is_begun_than_the_bandwidth_allows():
    """After 1 GB of a bandwidth of 1 MB/s nothing begins while demand is slow, and soon when it is over."""

    async def do() -> None:
        demand = Demand()
        pace = Pace(demand, 12)
        await pace.wait_for_bandwidth()
        pace.begin(1_000_000_000)
        await pace.wait_for_bandwidth()
        pace.bandwidth = 1e6
        demand.demand_slowdown = 4.0
        with trio.move_on_after(0.3) as waiting:
            await pace.wait_for_bandwidth()
        assert waiting.cancelled_caught
        demand.demand_slowdown = 1.0
        pace._too_much = 1.2e6
        await pace.wait_for_bandwidth()
        assert pace.bandwidth == math.inf

    trio.run(do)


def test_demand_that_is_over_slows_nothing(tmp_path, monkeypatch):
    async def do(made):
        fetches = made.fetches
        for seconds in (0.01, 1.0, 1.0):
            fetch = Fetch(b"name", b"path", bytes(64), made.keeper)
            fetch.started -= seconds
            fetches._note_demand(fetch)
        assert fetches.demand_slowdown > 3
        later = fetches_module.time.monotonic() + 3
        monkeypatch.setattr(fetches_module.time, "monotonic", lambda: later)
        assert fetches.demand_slowdown == 1.0
        monkeypatch.undo()

    in_world(tmp_path, do)
