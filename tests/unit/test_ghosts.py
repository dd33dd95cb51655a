"""What `--policy auto` chooses on traces, and that what it remembers does not grow with the dataset."""

from __future__ import annotations

import hashlib
import random

import pytest

from benchmarks.workloads.policies import SETTLING_EPOCHS, make_traces, simulate
from cachefs.cache.ghosts import HOLD, LRU, MOST_NAMES, Ghosts

FILES = 1000
TRACES = make_traces(FILES, random.Random(3))


def name_of(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=24).digest()


def epochs(ghosts: Ghosts, numbers: range, count: int, dice: random.Random, size: int = 100) -> None:
    """Open all files `count` times, each time in another order."""
    for _ in range(count):
        for number in dice.sample(numbers, len(numbers)):
            ghosts.open(name_of(number), size)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", TRACES)
def test_it_is_as_good_as_the_better_of_both(name: str, share: float):
    """From the third epoch on, and from the third after a change. Chance in 1,000 opens is worth some points."""
    trace, changes = TRACES[name]
    sizes = dict.fromkeys(trace, 100)
    capacity = int(100 * FILES * share)
    hits = {policy: simulate(policy, trace, sizes, capacity, [], FILES) for policy in ("hold", "lru", "auto")}
    settled = [
        epoch for epoch in range(len(trace) // FILES) if all(not 0 <= epoch - at < SETTLING_EPOCHS for at in changes)
    ]
    rates = {
        policy: sum(sum(found[epoch * FILES : (epoch + 1) * FILES]) for epoch in settled) / len(settled) / FILES
        for policy, found in hits.items()
    }
    assert rates["auto"] >= max(rates["hold"], rates["lru"]) - 0.03, rates


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_it_holds_shuffled_epochs_and_knows_what_that_brings(share: float):
    dice = random.Random(1)
    ghosts = Ghosts(int(100 * FILES * share))
    assert (ghosts.way, ghosts.rates) == (HOLD, None)
    epochs(ghosts, range(FILES), 5, dice)
    assert ghosts.way == HOLD
    assert ghosts.rates is not None
    assert ghosts.rates.hold == pytest.approx(share, abs=0.03)
    assert ghosts.rates.recent < share - 0.1


def test_everything_fits():
    ghosts = Ghosts(200 * FILES)
    epochs(ghosts, range(FILES), 4, random.Random(2))
    assert ghosts.rates is not None
    assert ghosts.rates.hold == ghosts.rates.recent == 1.0


def test_other_files_replace_what_is_held():
    """They are all new, so that what is held brings nothing; when they are read again, they are held."""
    dice = random.Random(4)
    ghosts = Ghosts(50 * FILES)
    epochs(ghosts, range(FILES), 4, dice)
    for number in range(FILES, FILES + FILES // 2):
        ghosts.open(name_of(number), 100)
    assert ghosts.way == LRU
    epochs(ghosts, range(FILES, 2 * FILES), 3, dice)
    assert ghosts.way == HOLD


def test_what_is_read_in_bursts_is_evicted_when_it_is_over():
    ghosts = Ghosts(20 * FILES)
    for burst in range(30):
        for _ in range(3):
            for number in range(burst * 50, burst * 50 + 100):
                ghosts.open(name_of(number), 100)
    assert ghosts.way == LRU


@pytest.mark.parametrize("capacity", [0, 50])
def test_nothing_fits(capacity: int):
    ghosts = Ghosts(capacity)
    epochs(ghosts, range(FILES), 3, random.Random(5))
    assert ghosts.rates is not None
    assert max(ghosts.rates.hold, ghosts.rates.recent) < 0.001


def test_the_sample_is_bounded():
    """Of 200,000 files as of 5,000; and its forecast is right."""
    dice = random.Random(6)
    ghosts = Ghosts(100 * 100_000)
    epochs(ghosts, range(200_000), 3, dice)
    assert len(ghosts._seen) <= MOST_NAMES
    assert ghosts.share == pytest.approx(MOST_NAMES / 200_000, rel=0.2)
    assert ghosts.rates is not None
    assert ghosts.rates.hold == pytest.approx(0.5, abs=0.04)


def test_capacity_may_change():
    """Others take room, or give it back."""
    dice = random.Random(7)
    ghosts = Ghosts(80 * FILES)
    epochs(ghosts, range(FILES), 3, dice)
    ghosts.capacity = 20 * FILES
    epochs(ghosts, range(FILES), 6, dice)
    assert ghosts.rates is not None
    assert ghosts.rates.hold == pytest.approx(0.2, abs=0.05)
