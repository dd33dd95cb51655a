"""The division into shards: disjoint, complete, balanced, the same for everybody; how a share grows and is cut."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.shards import Division, Listing, Share
from tests.unit.profile import FEW, FIXED

File = tuple[bytes, int]

NAMES = st.binary(min_size=1, max_size=12)
SIZES = st.one_of(st.integers(0, 3), st.integers(0, 1 << 20), st.integers(0, 1 << 50))
LISTINGS = st.dictionaries(NAMES, SIZES, max_size=60).map(lambda files: list(files.items()))
COUNTS = st.one_of(st.integers(1, 8), st.integers(60, 100))
SEEDS = st.integers(0, (1 << 63) - 1)


def divide(files: Sequence[File], count: int, seed: int = 0, links: Sequence[Sequence[bytes]] = ()) -> Division:
    """`links` are groups of names of one content."""
    content = {name: number for number, names in enumerate(links) for name in names}
    listing = Listing(seed)
    for path, size in files:
        listing.add(path, size, content.get(path))
    return Division(listing, count)


def shards(division: Division, files: Sequence[File]) -> list[set[bytes]]:
    """The names in each shard, as the mounts see it."""
    shares = [Share(division, number) for number in range(division.count)]
    return [{path for path, _ in files if share.has(path)} for share in shares]


def many(number: int, seed: int = 1) -> list[File]:
    numbers = random.Random(seed)
    return [(b"n%03d/%06d" % (at % 97, at), int(numbers.lognormvariate(11, 1))) for at in range(number)]


@FIXED
@given(LISTINGS, COUNTS, SEEDS)
def test_disjoint_and_complete(files, count, seed):
    names = [path for path, _ in files]
    parts = shards(divide(files, count, seed), files)
    assert sorted(path for part in parts for path in part) == sorted(names)


@FIXED
@given(LISTINGS, COUNTS, SEEDS)
def test_balanced(files, count, seed):
    """By no more than the largest file and a 64th of a shard; what is counted is what there is."""
    division = divide(files, count, seed)
    parts = shards(division, files)
    size = dict(files)
    assert division.bytes == [sum(size[path] for path in part) for part in parts]
    assert division.files == [len(part) for part in parts]
    assert_balanced(division, size.values())


@FEW
@given(st.lists(st.integers(1, 50), min_size=600, max_size=1000), st.integers(1, 3), SEEDS)
def test_balanced_where_files_are_many(sizes, count, seed):
    files = [(b"%d" % at, size) for at, size in enumerate(sizes)]
    assert_balanced(divide(files, count, seed), sizes)


def assert_balanced(division: Division, sizes: Iterable[int]) -> None:
    spread = max(division.bytes) - min(division.bytes)
    assert spread <= max(sizes, default=0) + sum(division.bytes) / (64 * division.count)


@FIXED
@given(LISTINGS, COUNTS, SEEDS, st.randoms(use_true_random=False))
def test_stable_under_another_order_of_listing(files, count, seed, order):
    other = list(files)
    order.shuffle(other)
    one, two = divide(files, count, seed), divide(other, count, seed)
    assert shards(one, files) == shards(two, files)
    assert one.fingerprint == two.fingerprint


@FEW
@given(SEEDS, SEEDS, st.integers(2, 8))
def test_moved_by_the_seed(one, two, count):
    files = many(200)
    is_same = shards(divide(files, count, one), files) == shards(divide(files, count, two), files)
    assert is_same == (one == two)


@FEW
@given(SEEDS, SEEDS)
def test_moved_by_the_seed_however_different_the_sizes(one, two):
    """Files of which each is larger than all smaller ones together."""
    files = [(b"%d" % at, 3**at) for at in range(30)]
    is_same = shards(divide(files, 7, one), files) == shards(divide(files, 7, two), files)
    assert is_same == (one == two)


@FIXED
@given(st.dictionaries(NAMES, SIZES, max_size=5), st.integers(6, 50), SEEDS)
def test_more_shards_than_files(files, count, seed):
    listed = list(files.items())
    division = divide(listed, count, seed)
    assert sorted(division.files) == [0] * (count - len(listed)) + [1] * len(listed)


@FIXED
@given(LISTINGS, st.integers(2, 8), SEEDS)
def test_one_huge_file_has_a_shard_of_its_own(files, count, seed):
    """The others share the rest as if it were not there."""
    rest = [(path, size) for path, size in files if size and path != b"huge"]
    division = divide([*rest, (b"huge", 1 << 60)], count, seed)
    parts = shards(division, [*rest, (b"huge", 1 << 60)])
    assert {b"huge"} in parts
    others = [size for size in division.bytes if size < 1 << 60]
    bound = max((size for _, size in rest), default=0) + sum(others) / 64
    assert max(others) - min(others) <= bound


@FEW
@given(st.integers(0, 50), st.integers(1, 9), SEEDS)
def test_empty_files_are_dealt_evenly(number, count, seed):
    """Whoever has the fewest bytes would get all of them."""
    files = [(b"%d" % at, 0) for at in range(number)]
    division = divide([*files, (b"large", 5)], count, seed)
    assert division.files[division.bytes.index(5)] <= number // count + 2
    division = divide(files, count, seed)
    assert max(division.files) - min(division.files) <= 1


def test_no_files():
    division = divide([], 3)
    assert (division.bytes, division.files) == ([0, 0, 0], [0, 0, 0])


@FIXED
@given(LISTINGS, COUNTS, SEEDS, st.data())
def test_names_of_one_content_go_together_and_count_once(files, count, seed, data):
    names = [path for path, _ in files]
    linked = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=2, max_size=5)) if len(names) > 1 else []
    files = [(path, 1000 if path in linked else size) for path, size in files]
    division = divide(files, count, seed, links=[linked])
    parts = shards(division, files)
    assert sorted(path for part in parts for path in part) == sorted(names)
    assert not linked or any(part.issuperset(linked) for part in parts)
    assert sum(division.bytes) == sum(size for _, size in files) - 1000 * max(0, len(linked) - 1)
    assert_balanced(division, [size for _, size in files])
    assert division.files == [len(part) for part in parts]


@FIXED
@given(LISTINGS, COUNTS, SEEDS, NAMES)
def test_a_name_that_comes_later_is_in_one_shard(files, count, seed, name):
    files = [(path, size) for path, size in files if path != name]
    division = divide(files, count, seed)
    having = [number for number in range(count) if Share(division, number).has(name)]
    assert len(having) == 1
    assert having == [n for n in range(count) if Share(divide([], count, seed), n).has(name)], "whatever was listed"


def test_what_is_told_twice_counts_once():
    assert divide([(b"a", 3), (b"a", 3), (b"b", 2)], 2).bytes in ([3, 2], [2, 3])


def test_the_spread_is_small_where_files_are_many():
    files = many(10_000)
    division = divide(files, 8)
    assert max(division.bytes) - min(division.bytes) <= 0.01 * division.bytes[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [2, 8])
def test_a_small_change_moves_few_files(seed, count):
    """Ranks that list before it and after it agree on all others but a few at the ends of stretches."""
    files = many(20_000)
    before = divide(files, count, seed)
    for others in ([*files, (b"new", 200_000)], [(files[0][0], files[0][1] + 1), *files[1:]], files[1:]):
        after = divide(others, count, seed)
        owner = dict(zip(after.digests, after.owners, strict=True))
        moved = sum(owner.get(d, o) != o for d, o in zip(before.digests, before.owners, strict=True))
        assert moved <= 5 * count


class TestFingerprint:
    FILES = ((b"a", 10), (b"b", 20), (b"c/d", 30))

    def test_is_of_the_whole_division(self):
        ours = divide(self.FILES, 2, 5).fingerprint
        assert ours == divide(self.FILES[::-1], 2, 5).fingerprint
        others = [
            divide(self.FILES, 3, 5),
            divide(self.FILES, 2, 6),
            divide(self.FILES[:2], 2, 5),
            divide((*self.FILES, (b"e", 0)), 2, 5),
            divide((*self.FILES[:2], (b"c/d", 31)), 2, 5),
            divide((*self.FILES[:2], (b"c/e", 30)), 2, 5),
            divide(((b"a", 20), (b"b", 10), (b"c/d", 30)), 2, 5),
        ]
        assert len({ours, *(other.fingerprint for other in others)}) == len(others) + 1

    def test_is_the_same_on_every_machine(self):
        """This very value: another would have ranks of two versions of cachefs divide otherwise."""
        files = [(b"class%d/%d.jpg" % (at % 7, at), at * at % 1000) for at in range(500)]
        assert divide(files, 4, 42).fingerprint == "ebe552f12fe2efcf"

    def test_is_the_same_in_another_process_with_other_hashes(self):
        script = (
            "from cachefs.cache.shards import Division, Listing\n"
            "listing = Listing(9)\n"
            "for at in range(300): listing.add(b'%d' % at, at % 50, at % 9 if at % 9 < 2 else None)\n"
            "print(Division(listing, 5).fingerprint)"
        )
        said = {
            subprocess.run(
                [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
            ).stdout
            for seed in ("1", "2")
        }
        assert len(said) == 1


class TestShareThatGrowsOrIsCut:
    def kept(self, share: Share, files: Sequence[File]) -> set[bytes]:
        return {path for path, _ in files if share.keeps(path)}

    @FIXED
    @given(LISTINGS, COUNTS, SEEDS, st.integers(0, 1 << 22))
    def test_cut(self, files, count, seed, room):
        """Never more than there is room for; what is cut off is in the share all the same."""
        share = Share(divide(files, count, seed), 0)
        whole = self.kept(share, files)
        share.cut(room)
        kept = self.kept(share, files)
        assert kept <= whole == {path for path, _ in files if share.has(path)}
        assert share.bytes == sum(size for path, size in files if path in kept) <= room
        assert share.files == len(kept)
        assert all(size > room - share.bytes for path, size in files if path in whole - kept), "no room for one more"

    @FIXED
    @given(LISTINGS, COUNTS, SEEDS, st.integers(0, 1 << 22))
    def test_grow(self, files, count, seed, more):
        share = Share(divide(files, count, seed), 0)
        own, room = self.kept(share, files), share.bytes + more
        share.grow(room)
        kept = self.kept(share, files)
        assert own <= kept == {path for path, _ in files if share.has(path)}
        assert share.bytes == sum(size for path, size in files if path in kept) <= room
        assert share.files == len(kept)
        assert all(size > room - share.bytes for path, size in files if path not in kept), "no room for one more"

    def test_with_room_for_two_shards_each_file_is_kept_twice(self):
        """All grow evenly: each takes in the shard of the next."""
        files = [(b"%d" % at, 10) for at in range(40)]
        division = divide(files, 4)
        shares = [Share(division, number) for number in range(4)]
        for share in shares:
            share.grow(200)
        assert {sum(share.keeps(path) for share in shares) for path, _ in files} == {2}

    def test_with_room_for_all_everything_is_kept(self):
        files = many(100)
        share = Share(divide(files, 5), 3)
        share.grow(1 << 60)
        assert share.files == 100

    @pytest.mark.parametrize("room", [0, 9, 10, 15, 100])
    def test_names_of_one_content_are_kept_together(self, room):
        files = [(b"a", 10), (b"b", 10), (b"c", 10), (b"d", 5)]
        division = divide(files, 2, links=[(b"a", b"b", b"c")])
        for number in range(2):
            for change in (Share.cut, Share.grow):
                share = Share(division, number)
                change(share, room)
                assert len({share.keeps(name) for name in (b"a", b"b", b"c")}) == 1
                if change is Share.cut:
                    assert share.bytes <= room


def test_digests_are_of_the_seed_and_the_path():
    """Not of this process: what comes later is where other ranks say it is."""
    digest = int.from_bytes(blake2b(b"new", digest_size=8, salt=(7).to_bytes(16, "little")).digest(), "little")
    assert Share(divide([], 5, 7), digest % 5).has(b"new")
