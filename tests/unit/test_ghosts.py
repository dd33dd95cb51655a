"""What `--policy auto` chooses on traces, and that what it remembers does not grow with the dataset."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict

import pytest

from benchmarks.workloads.policies import make_traces, settled_rates, simulate
from cachefs.cache.ghosts import AUTO, HOLD, LRU, MOST_NAMES, Ghosts

FILES = 1000
TRACES = make_traces(FILES, random.Random(3))


def name_of(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=24).digest()


class Cache:
    """A model of a cache that does as its ghosts say. `held` is what it holds: number and size."""

    def __init__(self, capacity: int, policy: str = AUTO, **keywords: int) -> None:
        self.ghosts = Ghosts(policy, capacity, **keywords)
        self.held: OrderedDict[int, int] = OrderedDict()
        self.hits = 0

    def open(self, number: int, size: int = 100) -> None:
        is_hit = number in self.held
        self.hits += is_hit
        self.ghosts.open(name_of(number), size, is_hit=is_hit)
        if is_hit:
            self.held.move_to_end(number)
            return
        capacity = self.ghosts.capacity
        while self.ghosts.way == LRU and self.held and sum(self.held.values()) + size > capacity:
            self.held.popitem(last=False)
        if len(self.held) * size + size <= capacity:
            self.held[number] = size

    def epochs(self, numbers: range, count: int, dice: random.Random) -> list[float]:
        """Open all files `count` times, each time in another order: the hit rates."""
        rates = []
        for _ in range(count):
            before = self.hits
            for number in dice.sample(numbers, len(numbers)):
                self.open(number)
            rates.append((self.hits - before) / len(numbers))
        return rates


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", TRACES)
def test_it_is_as_good_as_the_better_of_both(name: str, share: float):
    """From the third epoch on, and from the third after a change. Chance in 1,000 opens is worth some points."""
    trace, changes = TRACES[name]
    sizes = dict.fromkeys(trace, 100)
    capacity = int(100 * FILES * share)
    rates = {}
    for policy in ("hold", "lru", "auto"):
        hits, _ = simulate(policy, trace, sizes, capacity, FILES)
        settled = settled_rates(hits, changes, FILES)
        rates[policy] = sum(settled.values()) / len(settled)
    assert rates["auto"] >= max(rates["hold"], rates["lru"]) - 0.03, rates


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_it_holds_shuffled_epochs_and_knows_what_that_brings(share: float):
    cache = Cache(int(100 * FILES * share))
    ghosts = cache.ghosts
    assert (ghosts.way, ghosts.expected(HOLD)) == (HOLD, None)
    rates = cache.epochs(range(FILES), 5, random.Random(1))
    assert rates[1:] == [share] * 4
    assert ghosts.way == HOLD
    assert ghosts.expected(HOLD) == pytest.approx(share, abs=0.03)
    assert ghosts.expected(LRU) < share - 0.1


def test_everything_fits():
    cache = Cache(200 * FILES)
    cache.epochs(range(FILES), 4, random.Random(2))
    assert cache.ghosts.expected(HOLD) == cache.ghosts.expected(LRU) == 1.0


def test_other_files_replace_what_is_held():
    """They are all new, so that what is held brings nothing; when they are read again, they are held."""
    dice = random.Random(4)
    cache = Cache(50 * FILES)
    cache.epochs(range(FILES), 4, dice)
    for number in range(FILES, FILES + FILES // 2):
        cache.open(number)
    assert cache.ghosts.way == LRU
    rates = cache.epochs(range(FILES, 2 * FILES), 4, dice)
    assert cache.ghosts.way == HOLD
    assert rates[-1] == 0.5


def test_what_was_held_before_the_mount_and_is_not_read():
    """Scratch is full of what an earlier job read: the opens tell that it brings nothing."""
    cache = Cache(50 * FILES)
    cache.held = OrderedDict.fromkeys(range(FILES, FILES + FILES // 2), 100)
    rates = cache.epochs(range(FILES), 6, random.Random(9))
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.5, abs=0.02)


def test_what_is_read_in_bursts_is_evicted_when_it_is_over():
    cache = Cache(20 * FILES)
    for burst in range(30):
        for _ in range(3):
            for number in range(burst * 50, burst * 50 + 100):
                cache.open(number)
    assert cache.ghosts.way == LRU


@pytest.mark.parametrize("policy", [HOLD, LRU])
def test_a_policy_that_is_fixed(policy: str):
    """It stays, and what is expected of it is what it does."""
    dice = random.Random(10)
    cache = Cache(50 * FILES, policy)
    cache.epochs(range(FILES), 3, dice)
    rates = cache.epochs(range(FILES, 2 * FILES), 4, dice)
    assert cache.ghosts.way == policy
    assert cache.ghosts.expected(policy) == pytest.approx(rates[-1], abs=0.03)


@pytest.mark.parametrize("capacity", [0, 50])
def test_nothing_fits(capacity: int):
    cache = Cache(capacity)
    cache.epochs(range(FILES), 3, random.Random(5))
    assert cache.hits == 0
    assert cache.ghosts.expected(HOLD) < 0.001
    assert cache.ghosts.expected(LRU) == 0.0


def test_empty_files():
    """They take no room, and no more memory than others."""
    ghosts = Ghosts(AUTO, 0)
    for number in range(3 * MOST_NAMES):
        ghosts.open(name_of(number), 0, is_hit=True)
    assert len(ghosts._ghost.sizes) <= len(ghosts._seen) <= MOST_NAMES


@pytest.mark.parametrize("files", [3000, 50_000])
def test_the_sample_is_bounded(files: int):
    """Whatever is opened, in epochs or once and never again; and forecasts are right."""
    dice = random.Random(6)
    ghosts = Ghosts(AUTO, 100 * files // 2, most_names=1000)
    for _ in range(3):
        for number in dice.sample(range(files), files):
            ghosts.open(name_of(number), 100, is_hit=number % 2 == 0)
    assert len(ghosts._ghost.sizes) <= len(ghosts._seen) <= 1000
    assert ghosts.files == pytest.approx(files, rel=0.1)
    assert ghosts.expected(HOLD) == pytest.approx(0.5, abs=0.06)
    for number in range(files, 3 * files):
        ghosts.open(name_of(number), 100, is_hit=False)
    assert len(ghosts._ghost.sizes) <= len(ghosts._seen) <= 1000


def test_few_files_after_many():
    """All of them are in the sample again, some time later."""
    dice = random.Random(11)
    ghosts = Ghosts(AUTO, 10_000, most_names=500)
    for number in range(50_000):
        ghosts.open(name_of(number), 100, is_hit=False)
    assert ghosts.share < 0.02
    for _ in range(150):
        for number in dice.sample(range(100_000, 100_200), 200):
            ghosts.open(name_of(number), 100, is_hit=number % 2 == 0)
    assert ghosts.share == 1.0
    assert ghosts.files == 200
    assert ghosts.expected(HOLD) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shift", range(0, 700, 53))
def test_a_change_at_any_time(shift: int):
    """With so small a sample that it is thinned out all the time: no open fails."""
    dice = random.Random(shift)
    cache = Cache(40 * 500, most_names=200)
    cache.epochs(range(500), 3, dice)
    for number in range(shift):
        cache.open(number % 500)
    cache.epochs(range(500, 1000), 3, dice)
    cache.epochs(range(1000, 1010), 5, dice)
    assert len(cache.ghosts._seen) <= 200


def test_capacity_may_change():
    """Others take room, or give it back."""
    dice = random.Random(7)
    cache = Cache(80 * FILES)
    cache.epochs(range(FILES), 3, dice)
    cache.ghosts.capacity = 20 * FILES
    while len(cache.held) > FILES // 5:
        cache.held.popitem()
    cache.epochs(range(FILES), 3, dice)
    assert cache.ghosts.expected(HOLD) == pytest.approx(0.2, abs=0.03)
