"""Whether keeping what is there or evicting the least recently used would hit more: learnt from the opens themselves.

What keeping brings, the opens tell as long as it is done. What recency would bring, a cache without content (a ghost)
tells, which sees a sample of the opens, scaled down with it. What a cache would hit that kept any fixed part of what is
used now, needs neither: it is the share of opens of what was opened before, times the share of that which fits. The
sample is of names, so that either all opens of a file are in it or none (SHARDS: Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015), and of a fixed size: the more names there are, the smaller a part of them is in
it, so that neither memory nor work grows with the dataset.

While everything is read once an epoch, in whatever order, recency is never ahead of a fixed part, whenever one looks:
so it need not be known where an epoch ends.

Invariant: every name in the ghost has been seen, and no more than MOST_NAMES are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from cachefs.config import POLICIES

HOLD, LRU, AUTO = POLICIES
MOST_NAMES = 4096
"""The sample: some 2 MB. Where all files are read equally often, hit rates are right to about 1 point."""
_LOOK_OPENS = 32
"""Sampled opens between looks at what would have been better."""
_MARGIN = 0.02
_DEVIATIONS = 3.0
"""How much more another way must hit before it is taken: so much, and so much more than chance would give."""
_PATIENCE = 3
"""After so many opens for each file what is kept is compared with a fixed part. Before, the comparison would be unfair:
of what was read last, and so kept, nothing is read again in the same epoch."""
_FEWEST_SHARE, _FEW_TIMES = 1 / 8, 4
"""Where fewer names than that share of MOST_NAMES are opened again and again, so often each, no others are in use, and
all of them can be in the sample."""
_NEWNESS_OPENS = 0.05
"""For each file: over about so many opens the share of new ones is taken, of what was not opened before."""
_NEW, _UNKNOWN, _KNOWN = 0.9, 0.5, 0.1
"""Shares of new ones: from the first on other files are read than before; up to the second, rates mean something; up to
the third, all files that are in use have been seen."""
_FULL_SCALE = 1 << 32


@dataclass
class _Round:
    """As many sampled opens as there are files: how many, and of how many different names; of what was opened before;
    hits of the cache itself; of recency; and of a fixed part, each open counting what is to be expected."""

    started: float
    opens: int = 0
    names: int = 0
    again: int = 0
    hits: int = 0
    recent: int = 0
    fixed: float = 0.0


class _Ghost:
    """Names and sizes of what a cache would hold that evicts the least recently used."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.bytes = 0

    def open(self, name: bytes, size: int, limit: float) -> bool:
        """Whether it hits."""
        is_hit = name in self.sizes
        if is_hit:
            self.sizes.move_to_end(name)
        elif size <= limit:
            self.sizes[name] = size
            self.bytes += size
        while self.bytes > limit:  # it may have become smaller, too
            _, freed = self.sizes.popitem(last=False)
            self.bytes -= freed
        return is_hit

    def drop(self, name: bytes) -> None:
        self.bytes -= self.sizes.pop(name, 0)


class Ghosts:
    """Sees opens, and says which `way`, HOLD or LRU, is best for a cache of `capacity` bytes.

    `policy` is HOLD or LRU, which is the way for ever, or AUTO, which begins with HOLD.
    """

    def __init__(self, policy: str, capacity: int, most_names: int = MOST_NAMES) -> None:
        self.capacity = capacity
        self.way = LRU if policy == LRU else HOLD
        self._is_free = policy == AUTO
        self._most_names = most_names
        self._is_settled = self._is_known = False
        self._threshold = _FULL_SCALE
        self._seen: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # size, when; what was opened last comes last
        self._seen_bytes = 0
        self._ghost = _Ghost()
        self._clock = self._turned_at = 0.0  # in opens, of which the sampled ones stand for so many each
        self._turned_bytes = 0
        self._newness = 0.0
        self._round = _Round(0.0)
        self._last: _Round | None = None

    @property
    def share(self) -> float:
        """Of all names, those in the sample (0 to 1)."""
        return self._threshold / _FULL_SCALE

    @property
    def files(self) -> int:
        """How many different ones are in use, about: those of an epoch."""
        return round(len(self._seen) / self.share)

    def expected(self, way: str) -> float | None:
        """The hit rate (0 to 1) to expect of HOLD or LRU.

        None while nothing can be said: most of what is opened is new, and hits nothing.
        """
        last = self._last
        if last is None or self._newness > _UNKNOWN > last.recent / last.opens:
            return None
        actual = last.hits / last.opens
        fixed = (1 - self._newness) * min(1.0, self.capacity * self.share / max(1, self._seen_bytes))
        if way != self.way:
            return last.recent / last.opens if way == LRU else fixed
        return max(actual, fixed) if self._is_free and way == HOLD else actual

    def open(self, name: bytes, size: int, *, is_hit: bool) -> None:
        """A file of `size` bytes was opened. Of its name the first 4 bytes are as likely to be any as any other."""
        if int.from_bytes(name[:4], "big") >= self._threshold:
            return
        limit = self.capacity * self.share
        self._clock += 1 / self.share
        before = self._seen.pop(name, None)
        self._newness += ((before is None) - self._newness) / max(_LOOK_OPENS, _NEWNESS_OPENS * len(self._seen))
        self._round.opens += 1
        self._round.names += before is None or before[1] <= self._round.started
        self._round.hits += is_hit
        self._round.recent += self._ghost.open(name, size, limit)
        if before is not None:
            self._seen_bytes -= before[0]
            self._round.again += 1
            self._round.fixed += min(1.0, limit / max(1, self._seen_bytes))
        if before is None or before[1] < self._turned_at:
            self._turned_bytes += size
        self._seen[name] = size, self._clock
        self._seen_bytes += size
        self._forget_oldest()
        if self._round.opens % _LOOK_OPENS == 0:
            self._look(limit)
        if len(self._seen) > self._most_names:
            self._thin_out()

    def _look(self, limit: float) -> None:
        was_known, self._is_known = self._is_known, self._newness <= _KNOWN
        if self._is_known and not was_known:  # how the first opens were says nothing of what is to come
            self._round = _Round(self._clock)
        now = self._round
        is_over = now.opens >= len(self._seen)
        if is_over:
            self._last = now
            self._is_settled |= now.again > now.opens / 2
        if self._is_free and self._should_turn(limit, is_over=is_over):
            self.way = LRU if self.way == HOLD else HOLD
            self._turned_at, self._turned_bytes = self._clock, 0
            self._round = _Round(self._clock)
        elif is_over:
            self._round = _Round(self._clock)
        elif now.names < _FEWEST_SHARE * self._most_names and now.opens >= _FEW_TIMES * now.names + _LOOK_OPENS:
            self._forget_all()

    def _should_turn(self, limit: float, *, is_over: bool) -> bool:
        now = self._round
        if self.way == LRU:  # not before all that it holds is of what is read now
            return self._is_known and self._turned_bytes >= limit and self._is_ahead(now.fixed, now.recent)
        if self._is_ahead(now.recent, now.hits):
            return True
        if self._is_settled and self._newness > _NEW:
            self._is_settled = False
            self._forget_before(self._clock - 2 * _NEWNESS_OPENS * len(self._seen) / self.share)
            return True
        is_old = self._clock - self._turned_at > _PATIENCE * len(self._seen) / self.share
        return is_over and self._is_known and is_old and self._is_ahead(now.fixed, now.hits)

    def _is_ahead(self, hits: float, others: float) -> bool:
        return hits - others > max(_MARGIN * self._round.opens, _DEVIATIONS * math.sqrt(hits + others))

    def _forget_oldest(self) -> None:
        """What was not opened for twice as many opens as there are files, and recency would not hold, is not in use."""
        oldest = next(iter(self._seen))
        if oldest not in self._ghost.sizes:
            self._forget_before(self._clock - (2 * len(self._seen) + _LOOK_OPENS) / self.share)

    def _forget_before(self, time: float) -> None:
        """Forget what was not opened since."""
        while self._seen and next(iter(self._seen.values()))[1] < time:
            self._forget(next(iter(self._seen)))

    def _forget(self, name: bytes) -> None:
        self._seen_bytes -= self._seen.pop(name)[0]
        self._ghost.drop(name)

    def _forget_all(self) -> None:
        """Begin with all names in the sample."""
        self._threshold = _FULL_SCALE
        self._seen.clear()
        self._seen_bytes = 0
        self._ghost = _Ghost()
        self._turned_at, self._turned_bytes = self._clock, 0
        self._newness = 0.0
        self._last = None

    def _thin_out(self) -> None:
        """Have one name in ten less in the sample."""
        self._threshold = self._threshold * 9 // 10
        for name in [name for name in self._seen if int.from_bytes(name[:4], "big") >= self._threshold]:
            self._forget(name)
