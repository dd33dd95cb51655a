"""What follows from the measurements: how many workers, and whether a cache brings anything. Only arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cachefs.bench.trial import DIRECT, LATER, Measurement
from cachefs.config import WORTH_IT

CLOSE = 0.9
"""So much of the best rate is as good as the best: more workers take memory and processors from the training."""


@dataclass(frozen=True)
class Recommendation:
    """`workers` is num_workers for what is recommended: with a cache or, if it `is_worth_it` not, without.

    `direct_workers` is what reading directly would want; the rates are in files/s, the best of each way.
    """

    workers: int
    direct_workers: int
    direct_rate: float
    later_rate: float
    is_direct_rising: bool
    """Reading directly was still gaining from more workers where the trial ended: its best may be better."""
    is_later_rising: bool
    """So was reading through the mount."""
    is_same: bool = False
    """The two readings of the best of one way differ by more than those of both ways do."""
    is_least: bool = False
    """Nothing was decoded, so `workers` is what reading alone wants; a loader that does something may want more."""
    also_close: tuple[int, ...] = ()
    """Fewer workers, which may be as good: their readings overlap with those of the best."""

    @property
    def speed_up(self) -> float:
        return self.later_rate / self.direct_rate if self.direct_rate else 1.0

    @property
    def is_worth_it(self) -> bool:
        return self.speed_up >= WORTH_IT and not self.is_same


def recommend(measurements: Iterable[Measurement]) -> Recommendation:
    """From rates of `direct` and `later epochs`. ValueError without any of one."""
    made_of: dict[str, dict[int, Measurement]] = {DIRECT: {}, LATER: {}}
    for each in measurements:
        if each.way in made_of:
            made_of[each.way][each.workers] = each
    direct, later = ({k: each.rate for k, each in made_of[way].items()} for way in (DIRECT, LATER))
    best_direct, best_later = max(direct.values()), max(later.values())
    is_same = _overlap(*(max(made_of[way].values(), key=lambda each: each.rate) for way in (DIRECT, LATER)))
    direct_workers, workers = fewest_close(direct), fewest_close(later)
    is_rising = len(direct) > 1 and direct_workers == max(direct)
    is_later_rising = len(later) > 1 and workers == max(later)
    made = Recommendation(workers, direct_workers, best_direct, best_later, is_rising, is_later_rising, is_same)
    way = LATER if made.is_worth_it else DIRECT
    workers = workers if made.is_worth_it else direct_workers
    is_least = not any(each.decoded for of in made_of.values() for each in of.values())
    return replace(made, workers=workers, is_least=is_least, also_close=_also_close(made_of[way], workers))


def _also_close(measured: Mapping[int, Measurement], workers: int) -> tuple[int, ...]:
    best = max((each for number, each in measured.items() if number >= min(1, workers)), key=lambda each: each.rate)
    return tuple(k for k, each in sorted(measured.items()) if 0 < k < workers and _overlap(each, best))


def _overlap(one: Measurement, other: Measurement) -> bool:
    """Whether the difference is within the spread of their readings."""
    return one.lowest <= other.highest and other.lowest <= one.highest


def fewest_close(rates: Mapping[int, float]) -> int:
    """The smallest number of workers whose rate is close to the best.

    0 only if nothing else was tried: it loads between the steps of the training, all others meanwhile.
    """
    beside = {workers: rate for workers, rate in rates.items() if workers} or dict(rates)
    best = max(beside.values())
    return min(workers for workers, rate in beside.items() if rate >= CLOSE * best)
