"""Whether keeping what is there or evicting the least recently used would hit more: learnt from the opens themselves.

Two caches without content (ghosts) see a sample of the opens, each scaled down with the sample: one keeps what it has,
one evicts the least recently used. What a cache would hit that kept any fixed part of what is used now needs no ghost:
it is the share of opens of what was opened before, times the share of that which fits. The sample is of names, so that
either all opens of a file are in it or none (SHARDS: Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST
2015), and of a fixed size: the more names there are, the smaller a part of them is in it, so that neither memory nor
work grows with the dataset.

While everything is read once an epoch, in whatever order, recency is never ahead of a fixed part, whenever one looks:
so it need not be known where an epoch ends.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

HOLD, LRU = "hold", "lru"
MOST_NAMES = 4096
"""The sample: some 1 MB, and a hit rate is right to about 1 point."""
_LOOK_OPENS = 32
"""Sampled opens between looks at what would have been better."""
_MARGIN = 0.02
_DEVIATIONS = 3.0
"""How much more another way must hit before it is taken: so much, and so much more than chance would give."""
_PATIENCE = 3
"""Times as many opens as there are files, after which what is kept is judged by a fixed part: none of it is read again
in the epoch in which it was chosen."""
_NEW_SHARE, _NEW_OPENS = 0.9, 0.1
"""Where so much of what is opened was not opened before, over some so many opens for each file, all is new; where so
much of it was, all is known."""
_UNKNOWN_SHARE = 0.5
_FULL_SCALE = 1 << 32


@dataclass(frozen=True)
class HitRates:
    """Shares (0 to 1) of the opens that hit what is kept, would hit what was used last, and would hit a fixed part."""

    kept: float
    recent: float
    fixed: float

    @property
    def hold(self) -> float:
        """What to expect of keeping files, be it these or others."""
        return max(self.kept, self.fixed)

    def of(self, way: str) -> float:
        """What to expect of HOLD or LRU."""
        return self.recent if way == LRU else self.hold


class _Ghost:
    """Names and sizes of what a cache would hold, the least recently opened first, and its hits in this round."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.bytes = 0
        self.hits = 0

    def open(self, name: bytes, size: int, limit: float, *, is_evicting: bool) -> None:
        if name in self.sizes:
            self.hits += 1
            self.sizes.move_to_end(name)
        elif size <= limit and (is_evicting or self.bytes + size <= limit):
            self.sizes[name] = size
            self.bytes += size
        while self.bytes > limit:  # the limit may have become smaller, too
            _, freed = self.sizes.popitem(last=False)
            self.bytes -= freed

    def drop(self, name: bytes) -> None:
        self.bytes -= self.sizes.pop(name, 0)


class Ghosts:
    """Sees opens, and says which `way` is best for a cache of `capacity` bytes: HOLD at first, while it is empty."""

    def __init__(self, capacity: int, most_names: int = MOST_NAMES) -> None:
        self.capacity = capacity
        self.way = HOLD
        self._most_names = most_names
        self._threshold = _FULL_SCALE
        self._seen: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # size, when; what was opened last comes last
        self._seen_bytes = 0
        self._kept, self._recent = _Ghost(), _Ghost()
        self._clock = self._turned_at = 0.0  # in opens, of which the sampled ones stand for so many each
        self._turned_bytes = 0
        self._last_round: tuple[float, float] | None = None  # shares of hits of what is kept, and was used last
        self._opens = self._again = 0  # of this round; those of what had been opened before
        self._fixed = self._newness = 0.0
        self._is_settled = False

    @property
    def share(self) -> float:
        """Of all names, those in the sample (0 to 1)."""
        return self._threshold / _FULL_SCALE

    @property
    def files(self) -> int:
        """How many different ones are in use, about: those of an epoch."""
        return round(len(self._seen) / self.share)

    @property
    def rates(self) -> HitRates | None:
        """Of the last round, of as many opens as there are files; None while most of what is opened is new."""
        if self._last_round is None or self._newness > _UNKNOWN_SHARE:
            return None
        fits = min(1.0, self.capacity * self.share / max(1, self._seen_bytes))
        return HitRates(*self._last_round, (1 - self._newness) * fits)

    def open(self, name: bytes, size: int) -> None:
        """A file of `size` bytes was opened. Of its name the first 4 bytes are as likely to be any as any other."""
        if int.from_bytes(name[:4], "big") >= self._threshold:
            return
        self._clock += 1 / self.share
        self._opens += 1
        limit = self.capacity * self.share
        before = self._seen.pop(name, None)
        self._newness += ((before is None) - self._newness) / max(_LOOK_OPENS, _NEW_OPENS / 2 * len(self._seen))
        if before is not None:
            self._seen_bytes -= before[0]
            self._again += 1
            self._fixed += min(1.0, limit / max(1, self._seen_bytes))
        if before is None or before[1] < self._turned_at:
            self._turned_bytes += size
        self._seen[name] = size, self._clock
        self._seen_bytes += size
        self._kept.open(name, size, limit, is_evicting=False)
        self._recent.open(name, size, limit, is_evicting=True)
        self._forget_old()
        if len(self._seen) > self._most_names:
            self._shrink()
        if self._opens % _LOOK_OPENS == 0:
            self._look(limit)

    def _look(self, limit: float) -> None:
        kept, recent, fixed = self._kept.hits, self._recent.hits, self._fixed
        is_over = self._opens >= len(self._seen)
        if is_over:
            self._last_round = kept / self._opens, recent / self._opens
            self._is_settled |= self._again > self._opens / 2
        is_old = self._clock - self._turned_at > _PATIENCE * len(self._seen) / self.share
        is_known = self._newness <= 1 - _NEW_SHARE
        if self.way == LRU:
            if is_known and self._turned_bytes >= limit and self._is_ahead(fixed, recent):
                self._turn(HOLD)
                self._kept.sizes, self._kept.bytes = self._recent.sizes.copy(), self._recent.bytes
            elif is_over:
                self._begin_round()
        elif self._is_ahead(recent, kept) or (is_over and is_known and is_old and self._is_ahead(fixed, kept)):
            self._turn(LRU)
        elif self._is_settled and self._newness > _NEW_SHARE:
            while next(iter(self._seen.values()))[1] <= self._clock - _NEW_OPENS * len(self._seen) / self.share:
                self._forget(next(iter(self._seen)))
            self._is_settled = False
            self._turn(LRU)
        elif is_over:
            self._begin_round()

    def _is_ahead(self, hits: float, others: float) -> bool:
        return hits - others > max(_MARGIN * self._opens, _DEVIATIONS * math.sqrt(hits + others))

    def _turn(self, way: str) -> None:
        self.way = way
        self._turned_at, self._turned_bytes = self._clock, 0
        self._begin_round()

    def _begin_round(self) -> None:
        self._kept.hits = self._recent.hits = self._opens = self._again = 0
        self._fixed = 0.0

    def _forget_old(self) -> None:
        """What was not opened for twice as many opens as there are files is not used any more."""
        oldest = next(iter(self._seen))
        if self._clock - self._seen[oldest][1] > (2 * len(self._seen) + _LOOK_OPENS) / self.share:
            self._forget(oldest)

    def _forget(self, name: bytes) -> None:
        self._seen_bytes -= self._seen.pop(name)[0]

    def _shrink(self) -> None:
        """Have one name in ten less in the sample."""
        self._threshold = self._threshold * 9 // 10
        for name in [name for name in self._seen if int.from_bytes(name[:4], "big") >= self._threshold]:
            self._forget(name)
        for ghost in (self._kept, self._recent):
            for name in [name for name in ghost.sizes if int.from_bytes(name[:4], "big") >= self._threshold]:
                ghost.drop(name)
