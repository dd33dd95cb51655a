"""Shards: which files of a source are whose, where each rank (or node, or disk) has its part. Pure: names and sizes in.

Nobody is asked: each divides on its own, and all come to the same.

Invariants:
- Each file of the listing is in exactly one shard. All names of one content (hard links) are in the same.
- The division follows from names, sizes, links, the number of shards and the seed: not from the order of the listing,
  the machine or Python's version. Another seed gives another one.
- Two shards differ by no more bytes than the largest file has and a 64th of a shard; and where all files are empty, by
  one file.
- A small change of the listing moves few files, where it has many: ranks that list in between agree on the rest.
- A name that is not in the listing, because it came later, is in the shard that its digest alone says: in one too.

Large files go one by one to the shard that has the fewest bytes so far (greedy list scheduling): it gets ahead of the
others by that file at the most. The largest go first, by size classes of a factor of two, within a class in the order
of their digests, which the seed stirs. Once none has more than a 64th of a shard of what is left, this is put in a row,
in the order of digests, and cut into stretches with which all shards come to one level. The greedy way for all would be
a little more even; but there each file moves all that come after it.
"""

from __future__ import annotations

import heapq
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from hashlib import blake2b
from itertools import groupby

_OTHERS, _CUT, _KEPT = 0, 1, 2
"""What a file is to a share: not in it; in it, but without room in scratch; in it and kept."""

_SMALL = 64
"""A file of less than this part of a shard is small."""


class Listing:
    """The regular files of a source, in whatever order they are found: 16 bytes a file, 32 one with several names.

    A name is known by 64 bits of digest. Two names that had the same, of a million files once in 40 million listings,
    would be in the same shard: nothing more.
    """

    def __init__(self, seed: int) -> None:
        self.salt = seed.to_bytes(16, "little")
        self.digests = array("Q")
        self.sizes = array("Q")
        self.linked = array("Q")
        self.contents = array("q")
        """Of names of a content that has several: their digests, and what is the same for all names of one content."""

    def add(self, path: bytes, size: int, content: Hashable = None) -> None:
        """A file of `size` bytes. `content` is what all names of a file with several have in common, else None."""
        digest = _digest(self.salt, path)
        self.digests.append(digest)
        self.sizes.append(size)
        if content is not None:
            self.linked.append(digest)
            self.contents.append(hash(content))


class Division:
    """A listing in `count` shards. `bytes` and `files` are those of each shard; a content counts once, each name does.

    `fingerprint` is the same for two of them where names, sizes, seed, number of shards and what is in each are.
    """

    def __init__(self, listing: Listing, count: int) -> None:
        self.count = count
        self.salt = listing.salt
        self.digests = array("Q")
        self.sizes = array("Q")
        for at in sorted(range(len(listing.digests)), key=listing.digests.__getitem__):
            if not self.digests or self.digests[-1] != listing.digests[at]:
                self.digests.append(listing.digests[at])
                self.sizes.append(listing.sizes[at])
            else:  # told twice, as what is renamed while it is listed may be
                self.sizes[-1] = max(self.sizes[-1], listing.sizes[at])
        self.leads = self._lead_of_each_name(listing)
        self.owners = array("H", bytes(2 * len(self.digests)))
        self.bytes = [0] * count
        self.files = [0] * count
        self._deal()
        self.fingerprint = self._sum_up()

    def units(self) -> Iterable[int]:
        """The positions of what goes to a shard on its own: all but the further names of a content."""
        return (at for at, lead in enumerate(self.leads) if lead == at)

    def owner(self, path: bytes) -> int:
        """The number of the shard that a file is in."""
        at, digest = self.find(path)
        return digest % self.count if at is None else self.owners[at]

    def find(self, path: bytes) -> tuple[int | None, int]:
        """(The position of a name, None where it is not in the listing; its digest)."""
        digest, digests = _digest(self.salt, path), self.digests
        at = bisect_left(digests, digest)
        return at if at < len(digests) and digests[at] == digest else None, digest

    def _lead_of_each_name(self, listing: Listing) -> Sequence[int]:
        """Of each position that of the first name of the same content, with which it goes."""
        if not listing.linked:
            return range(len(self.digests))
        leads = array("I", range(len(self.digests)))
        together = sorted(range(len(listing.linked)), key=listing.contents.__getitem__)
        for _, names in groupby(together, listing.contents.__getitem__):
            positions = [bisect_left(self.digests, listing.linked[name]) for name in names]
            first = min(positions)
            for at in positions:
                leads[at] = first
        return leads

    def _deal(self) -> None:
        places = sorted(range(self.count), key=lambda number: blake2b(b"%d" % number, salt=self.salt).digest())
        heap = [(0, place) for place in range(self.count)]
        sizes = self.sizes
        by_size = sorted(self.units(), key=lambda at: sizes[at].bit_length())  # stable: by digest within a class
        rest = sum(sizes[at] for at in by_size)
        while rest and (1 << sizes[by_size[-1]].bit_length()) * _SMALL * self.count > rest:
            at = by_size.pop()
            size, place = heap[0]
            self._give(at, places[place])
            heapq.heapreplace(heap, (size + sizes[at], place))
            rest -= sizes[at]
        self._level(sorted(at for at in by_size if sizes[at]), places, sizes.__getitem__, self.bytes)
        # by bytes, whoever has the fewest would get all empty ones
        self._level([at for at in by_size if not sizes[at]], places, lambda _: 1, self.files)
        for at, lead in enumerate(self.leads):
            if at != lead:
                self.owners[at] = self.owners[lead]
                self.files[self.owners[lead]] += 1

    def _give(self, at: int, number: int) -> None:
        self.owners[at] = number
        self.bytes[number] += self.sizes[at]
        self.files[number] += 1

    def _level(self, row: list[int], places: list[int], weigh: Callable[[int], int], loads: list[int]) -> None:
        """Give each shard a stretch of the files in a row, by weight, such that those that get any come to one load.

        A file belongs to the stretch that its middle is in.
        """
        total = sum(map(weigh, row))
        fewest = sorted(loads)
        taking, have = self.count, sum(loads)
        while taking > 1 and fewest[taking - 1] * taking >= total + have:  # it has the level already
            taking -= 1
            have -= fewest[taking]
        # all in units of 1/taking, in which the level is a whole number
        stretches = [max(0, total + have - taking * loads[number]) for number in places]
        place, end, before = 0, stretches[0], 0
        for at in row:
            while (2 * before + weigh(at)) * taking >= 2 * end:
                place += 1
                end += stretches[place]
            before += weigh(at)
            self._give(at, places[place])

    def _sum_up(self) -> str:
        summed = blake2b(b"%d" % self.count, digest_size=8, salt=self.salt)
        for column in self.digests, self.sizes, self.owners:
            if sys.byteorder == "big":
                column = array(column.typecode, column)
                column.byteswap()
            summed.update(column.tobytes())
        return summed.hexdigest()


class Share:
    """What one mount has of a division: its shard `number`, and with `grow` more than that, or with `cut` less.

    Without either it keeps all of its shard. `bytes` and `files` count what is kept.
    """

    def __init__(self, division: Division, number: int) -> None:
        self.division = division
        self.number = number
        self.bytes = division.bytes[number]
        self.files = division.files[number]
        self._marks = bytearray(_KEPT if owner == number else _OTHERS for owner in division.owners)

    def grow(self, room: int) -> None:
        """Take in files of other shards, up to `room` bytes: of the next one first, so that all grow evenly."""
        division, number, count = self.division, self.number, self.division.count
        others = [at for at in division.units() if division.owners[at] != number]
        for at in sorted(others, key=lambda at: (division.owners[at] - number) % count):
            if self.bytes + division.sizes[at] <= room:
                self.bytes += division.sizes[at]
                self._marks[at] = _KEPT
        self._mark_names()

    def cut(self, room: int) -> None:
        """Keep `room` bytes at the most. What is cut off is in the share still, and read from the source."""
        sizes = self.division.sizes
        self.bytes = 0
        for at in self.division.units():
            if self._marks[at] == _KEPT:
                if self.bytes + sizes[at] <= room:
                    self.bytes += sizes[at]
                else:
                    self._marks[at] = _CUT
        self._mark_names()

    def has(self, path: bytes) -> bool:
        """Whether a file is in the share. Some 2 us."""
        return self._mark(path) != _OTHERS

    def keeps(self, path: bytes) -> bool:
        """Whether a file is in the share and is kept in scratch. Some 2 us."""
        return self._mark(path) == _KEPT

    def is_extra(self, path: bytes) -> bool:
        """Whether a file is of another shard."""
        return self.division.owner(path) != self.number

    def _mark(self, path: bytes) -> int:
        at, digest = self.division.find(path)
        if at is not None:
            return self._marks[at]
        return _KEPT if digest % self.division.count == self.number else _OTHERS

    def _mark_names(self) -> None:
        for at, lead in enumerate(self.division.leads):
            self._marks[at] = self._marks[lead]
        self.files = self._marks.count(_KEPT)


def _digest(salt: bytes, path: bytes) -> int:
    return int.from_bytes(blake2b(path, digest_size=8, salt=salt).digest(), "little")
