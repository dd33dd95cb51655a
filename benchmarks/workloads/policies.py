"""Hit rates of the policies on traces, in steps of an epoch: hold, lru, auto, a victim at random, and with the future.

The caches are models: names and sizes, no mount. `auto` is the code of the mounts (`cachefs/cache/ghosts.py`). A hit
counts an open. `future` knows what comes, and keeps what is opened again soonest (Belady): the optimum, were all files
of one size. A forecast before there is one counts as 0.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.results import Goal, Result
from benchmarks.stage import Stage
from cachefs.cache.ghosts import AUTO, LRU, Ghosts

FILES, QUICK_FILES = 20_000, 1_000
FILE_SIZES = (20_000, 110_000, 110_000, 300_000)
SHARES = (0.5, 0.2, 0.8)
EPOCHS = 8
SETTLING_EPOCHS = 2
"""At the beginning, and after a change, before the goal counts."""
POLICIES = ("hold", "lru", "auto", "random", "future")
GOAL = Goal("at least", -0.02)
BETTER = "worst of all traces and capacities: hit rate less that of the better of hold and lru"
FORECAST = "forecast less outcome of an epoch, either way: mean of all traces and capacities"
WORST_FORECAST = "forecast less outcome of an epoch, either way: mean of the worst trace and capacity"

Trace = list[int]


def run(stage: Stage) -> list[Result]:
    files = QUICK_FILES if stage.options.is_quick else FILES
    for repetition in range(stage.repetitions):
        dice = random.Random(repetition)
        less: dict[tuple[str, float], float] = {}
        off: list[float] = []
        for name, (trace, changes) in make_traces(files, dice).items():
            sizes = {file: dice.choice(FILE_SIZES) for file in dict.fromkeys(trace)}
            for share in SHARES:
                rates, forecast_off = _measure(stage, name, trace, changes, sizes, share, files)
                less[name, share] = rates["auto"] - max(rates["hold"], rates["lru"])
                off.append(forecast_off)
        for case, value in ((BETTER, min(less.values())), (FORECAST, sum(off) / len(off)), (WORST_FORECAST, max(off))):
            stage.records.add(case, "auto", "difference", "of opens", value, {"files": float(files)})
    stage.records.aim(stage.records.find(BETTER, "auto", "difference"), BETTER, GOAL)
    return stage.records.results()


def make_traces(files: int, dice: random.Random) -> dict[str, tuple[Trace, list[int]]]:
    """By name: which file is opened, one after the other; and the epochs at whose beginning something changes."""

    def shuffled(epochs: int, first: int = 0, count: int = files) -> Iterator[int]:
        for _ in range(epochs):
            order = list(range(first, first + count))
            dice.shuffle(order)
            yield from order

    def sequential(epochs: int, first: int = 0) -> Iterator[int]:
        for _ in range(epochs):
            yield from range(first, first + files)

    def zipf(opens: int, first: int = 0) -> Iterator[int]:
        weights = list(itertools.accumulate(1 / rank for rank in range(1, files + 1)))
        order = list(range(first, first + files))
        dice.shuffle(order)
        for _ in range(opens):
            yield order[bisect.bisect(weights, dice.random() * weights[-1])]

    def interleaved(*jobs: Iterable[int]) -> Iterator[int]:
        running = [iter(job) for job in jobs]
        while running:
            job = dice.choice(running)
            try:
                yield next(job)
            except StopIteration:
                running.remove(job)

    half = EPOCHS // 2
    return {
        "shuffled epochs": ([*shuffled(EPOCHS)], [0]),
        "sequential epochs": ([*sequential(EPOCHS)], [0]),
        "Zipf": ([*zipf(EPOCHS * files)], [0]),
        "two jobs, the same files": ([*interleaved(shuffled(EPOCHS), shuffled(EPOCHS))], [0]),
        "two jobs, other files": (
            [*interleaved(shuffled(EPOCHS, 0, files // 2), shuffled(EPOCHS, files, files // 2))],
            [0],
        ),
        "shuffled, then other files": ([*shuffled(half), *shuffled(EPOCHS, files)], [0, half]),
        "shuffled, then others in order": ([*shuffled(half), *sequential(EPOCHS, files)], [0, half]),
        "shuffled, then Zipf": ([*shuffled(half), *zipf(EPOCHS * files, files)], [0, half]),
        "Zipf, then shuffled": ([*zipf(half * files), *shuffled(EPOCHS)], [0, half]),
    }


def _measure(
    stage: Stage, name: str, trace: Trace, changes: Sequence[int], sizes: dict[int, int], share: float, files: int
) -> tuple[dict[str, float], float]:
    """The mean hit rates of the settled epochs, by policy, and how far off the forecasts were on average."""
    capacity = int(sum(sizes.values()) * files // len(sizes) * share)
    rates, off = {}, 0.0
    for policy in POLICIES:
        hits, forecasts = simulate(policy, trace, sizes, capacity, files)
        outcomes = settled_rates(hits, changes, files)
        rates[policy] = sum(outcomes.values()) / len(outcomes)
        stage.records.add(
            name, policy, "hit rate", "of opens", rates[policy], {"capacity_share": share, "files": float(files)}
        )
        if policy == "auto":
            off = sum(abs(forecasts[epoch] - rate) for epoch, rate in outcomes.items()) / len(outcomes)
    said = ", ".join(f"{policy} {rate:.3f}" for policy, rate in rates.items())
    stage.tell(f"{name}, capacity {share:.0%}: {said}; forecast off by {off:.3f}")
    return rates, off


def settled_rates(hits: Sequence[bool], changes: Sequence[int], files: int) -> dict[int, float]:
    """The hit rates of the epochs that count, by their number."""
    return {
        epoch: sum(hits[epoch * files : (epoch + 1) * files]) / files
        for epoch in range(len(hits) // files)
        if all(not 0 <= epoch - at < SETTLING_EPOCHS for at in changes)
    }


def simulate(
    policy: str, trace: Trace, sizes: dict[int, int], capacity: int, files: int
) -> tuple[list[bool], list[float]]:
    """(Of each open whether it hits; what `auto` expected at the beginning of each epoch, for others nothing)"""
    forecasts: list[float] = []
    if policy == "future":
        return _simulate_future(trace, sizes, capacity), forecasts
    ghosts = Ghosts(AUTO, capacity) if policy == "auto" else None
    names = {file: hashlib.blake2b(b"%d" % file, digest_size=24).digest() for file in sizes}
    held: OrderedDict[int, int] = OrderedDict()
    order: list[int] = []
    dice = random.Random(1)
    taken = 0
    hits = []
    for number, file in enumerate(trace):
        if ghosts is not None:
            if number % files == 0:
                forecasts.append(ghosts.expected(ghosts.way) or 0.0)
            ghosts.open(names[file], sizes[file], is_hit=file in held)
        hits.append(file in held)
        if hits[-1]:
            held.move_to_end(file)
            continue
        evicts = policy in ("lru", "random") or (ghosts is not None and ghosts.way == LRU)
        while evicts and taken + sizes[file] > capacity and held:
            if policy == "random":
                at = dice.randrange(len(order))
                order[at], order[-1] = order[-1], order[at]
                taken -= held.pop(order.pop())
            else:
                taken -= held.popitem(last=False)[1]
        if taken + sizes[file] <= capacity:
            held[file] = sizes[file]
            order.append(file)
            taken += sizes[file]
    return hits, forecasts


def _simulate_future(trace: Trace, sizes: dict[int, int], capacity: int) -> list[bool]:
    """Keep what is opened again soonest."""
    never = len(trace)
    again, last = [never] * len(trace), {}
    for number in range(len(trace) - 1, -1, -1):
        again[number] = last.get(trace[number], never)
        last[trace[number]] = number
    held: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    taken = 0
    hits = []
    for number, file in enumerate(trace):
        hits.append(file in held)
        if not hits[-1]:
            victims = []
            while taken + sizes[file] > capacity and latest:
                at, victim = heapq.heappop(latest)
                if held.get(victim) != -at:
                    continue  # opened again since
                if -at <= again[number]:
                    heapq.heappush(latest, (at, victim))
                    break
                victims.append((at, victim))
                taken -= sizes[victim]
            if taken + sizes[file] > capacity:  # it would go first: they stay
                for at, victim in victims:
                    heapq.heappush(latest, (at, victim))
                    taken += sizes[victim]
                continue
            for _, victim in victims:
                del held[victim]
            taken += sizes[file]
        held[file] = again[number]
        heapq.heappush(latest, (-again[number], file))
    return hits
