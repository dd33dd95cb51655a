"""What cannot be cached is served all the same, and capacity is never exceeded (semantics 8)."""

from __future__ import annotations

import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import needs_root
from tests.mount.observing import Watch, counters, opens, stored_files

SIZE = 100_000
TEN_FILES = str(10 * SIZE)


def make_files(folder, count, size=SIZE):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / str(number)).write_bytes(random.Random(f"{folder.name} {number}").randbytes(size))
    return folder


def read(cache, *numbers):
    """Read some files and compare them with what make_files wrote."""
    for number in numbers:
        want = random.Random(f"{cache.source.name} {number}").randbytes(SIZE)
        assert (cache.path / str(number)).read_bytes() == want


def kinds_of(cache, numbers):
    """Read each file: what its open was counted as."""
    kinds = []
    for number in numbers:
        before = opens(cache)
        read(cache, number)
        after = opens(cache)
        kinds += [
            kind for kind, b, a in zip(("hit", "miss", "bypass"), before, after, strict=True) for _ in range(a - b)
        ]
    return kinds


def test_hold_keeps_what_is_there(source, mounted, mountpoint):
    """Semantics 8: under hold a full scratch stays as it is; the rest is bypassed, right, and counted."""
    make_files(source, 15)
    cache = mounted(source, "--capacity", TEN_FILES, "--policy", "hold", at=mountpoint)
    assert kinds_of(cache, range(15)) == ["miss"] * 10 + ["bypass"] * 5
    assert kinds_of(cache, range(15)) == ["hit"] * 10 + ["bypass"] * 5
    said = counters(cache)
    assert (said["resident_files"], said["resident_bytes"], said["evictions"]) == (10, 10 * SIZE, 0)
    assert said["source_bytes_read"] == 15 * SIZE  # the second time, the kernel's page cache serves what is bypassed
    assert said["capacity_bytes"] == 10 * SIZE


def test_lru_evicts_the_least_recently_used(source, mounted, mountpoint):
    """Semantics 8: under lru the file that was not used for longest goes, the one that was used stays."""
    make_files(source, 12)
    cache = mounted(source, "--capacity", TEN_FILES, "--policy", "lru", at=mountpoint)
    assert kinds_of(cache, range(10)) == ["miss"] * 10
    assert kinds_of(cache, [0, 1]) == ["hit"] * 2
    assert kinds_of(cache, [10]) == ["miss"]
    assert counters(cache)["evictions"] >= 1
    assert kinds_of(cache, [0, 1, 9, 10]) == ["hit"] * 4
    assert kinds_of(cache, [2]) == ["miss"]
    assert counters(cache)["bypasses"] == 0


def epoch(cache, dice, numbers):
    """Read files in some order: the share of hits."""
    before = opens(cache)
    read(cache, *dice.sample(numbers, len(numbers)))
    hits, misses, bypasses = (after - b for after, b in zip(opens(cache), before, strict=True))
    assert hits + misses + bypasses == len(numbers)
    return hits / len(numbers)


def test_auto_holds_epochs_and_turns_to_other_files(source, mounted, mountpoint):
    """It keeps half of what is read again and again; when other files are read instead, half of those."""
    make_files(source, 400)
    dice = random.Random(8)
    first, second = range(200), range(200, 400)
    cache = mounted(source, "--capacity", str(100 * SIZE), "--policy", "auto", at=mountpoint)
    assert counters(cache)["expected_hit_rates"] is None
    shares = [epoch(cache, dice, first) for _ in range(4)]
    assert shares == [0.0, 0.5, 0.5, 0.5]
    said = counters(cache)
    assert (said["policy"], said["policy_now"], said["evictions"]) == ("auto", "hold", 0)
    assert said["expected_hit_rates"]["hold"] == pytest.approx(0.5, abs=0.06)  # by one round of 200 opens
    assert said["expected_wait_seconds"] > 0
    with Watch(cache.scratch) as watch:
        shares = [epoch(cache, dice, second) for _ in range(5)]
    assert watch.largest <= 100 * SIZE
    assert shares[0] == 0.0
    assert shares[-2:] == [pytest.approx(0.5, abs=0.03)] * 2, shares
    said = counters(cache)
    assert said["policy_now"] == "hold"
    assert said["evictions"] >= 90


def test_auto_evicts_what_is_over(source, mounted, mountpoint):
    """Files that are read several times and never again make room for the next ones."""
    make_files(source, 300)
    cache = mounted(source, "--capacity", str(60 * SIZE), "--policy", "auto", at=mountpoint)
    for start in range(0, 260, 20):
        for _ in range(3):
            read(cache, *range(start, start + 40))
    said = counters(cache)
    assert said["policy_now"] == "lru"
    assert said["hits"] / (said["hits"] + said["misses"] + said["bypasses"]) > 0.7
    assert said["expected_hit_rates"]["lru"] > 0.6


def test_lru_remembers_use_from_mount_to_mount(source, mounted, mountpoint):
    """Semantics 8 and 11: the order of use is in the index."""
    make_files(source, 11)
    options = ("--capacity", TEN_FILES, "--policy", "lru")
    cache = mounted(source, *options, at=mountpoint)
    read(cache, *range(10), 0)
    cache.unmount()
    cache = mounted(source, *options, at=mountpoint)
    assert kinds_of(cache, [10, 0]) == ["miss", "hit"]
    assert kinds_of(cache, [1]) == ["miss"]


def test_an_open_file_is_not_evicted(source, mounted, mountpoint):
    """Semantics 8: what somebody reads stays, and is a hit, however old it is."""
    make_files(source, 30)
    cache = mounted(source, "--capacity", TEN_FILES, "--policy", "lru", at=mountpoint)
    read(cache, 0)
    with open(mountpoint / "0", "rb", buffering=0):
        read(cache, *range(1, 30))
        assert kinds_of(cache, [0]) == ["hit"]
    assert counters(cache)["resident_bytes"] <= 10 * SIZE


def test_a_file_larger_than_the_capacity_is_a_bypass(source, mounted, mountpoint):
    """Semantics 8: it evicts nothing, under no policy, and reads right in parts and in whole."""
    make_files(source, 3)
    large = random.Random(7).randbytes(11 * SIZE)
    (source / "large").write_bytes(large)
    cache = mounted(source, "--capacity", TEN_FILES, "--policy", "lru", at=mountpoint)
    read(cache, 0, 1, 2)
    assert (mountpoint / "large").read_bytes() == large
    said = counters(cache)
    assert (said["bypasses"], said["evictions"], said["resident_files"]) == (1, 0, 3)


def test_an_empty_file_counts_as_a_file(source, mounted, mountpoint):
    """Semantics 8: counters are exact for empty files too, also when they are evicted."""
    make_files(source, 12)
    for name in ("empty", "nothing"):
        (source / name).touch()
    cache = mounted(source, "--capacity", TEN_FILES, "--policy", "lru", at=mountpoint)
    for name in ("empty", "nothing"):
        assert (mountpoint / name).read_bytes() == b""
    assert counters(cache)["resident_files"] == len(cache.resident_data_files()) == 2
    read(cache, *range(12))
    assert counters(cache)["resident_files"] == len(cache.resident_data_files())


@pytest.mark.parametrize("policy", ["hold", "lru"])
def test_capacity_is_never_exceeded(source, mounted, mountpoint, policy):
    """Semantics 8: 8 readers of three times the capacity: at no moment is there more in scratch than allowed."""
    make_files(source, 60)
    cache = mounted(source, "--capacity", "2M", "--policy", policy, at=mountpoint)
    order = [random.Random(reader).sample(range(60), 60) for reader in range(8)]
    with Watch(cache.scratch) as watch, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda numbers: read(cache, *numbers), order))
    assert watch.samples
    assert 0 < watch.largest <= 2 << 20
    said = counters(cache)
    assert sum(opens(cache)) == 8 * 60
    assert said["resident_bytes"] == sum(stored_files(cache.scratch).values()) <= 2 << 20
    assert said["resident_files"] == len(cache.resident_data_files())
    assert bool(said["evictions"]) == (policy == "lru")


def test_several_mounts_together_never_exceed_the_capacity(mounted, tmp_path):
    """Semantics 8: three datasets, one scratch, 2 readers each at once: together they stay within the capacity."""
    caches = []
    for name in ("one", "two", "three"):
        place = tmp_path / f"mount {name}"
        place.mkdir()
        dataset = make_files(tmp_path / name, 30)
        caches.append(mounted(dataset, "--capacity", "2M", "--policy", "lru", at=place))
    work = [(cache, random.Random(n).sample(range(30), 30)) for cache in caches for n in range(2)]
    with Watch(caches[0].scratch) as watch, ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda job: read(job[0], *job[1]), work))
    assert watch.samples
    assert 0 < watch.largest <= 2 << 20
    assert [sum(opens(cache)) for cache in caches] == [60] * 3
    assert counters(caches[0])["resident_bytes"] == sum(stored_files(caches[0].scratch).values())


@pytest.mark.parametrize("policy", ["hold", "lru"])
def test_files_of_a_dataset_without_a_mount_go_first(mounted, tmp_path, mountpoint, policy):
    """Semantics 8: another dataset makes room by evicting what no live mount uses, also under hold."""
    past, present = make_files(tmp_path / "past", 10), make_files(tmp_path / "present", 5)
    first = mounted(past, "--capacity", TEN_FILES, at=mountpoint)
    read(first, *range(10))
    first.unmount()
    second = mounted(present, "--capacity", TEN_FILES, "--policy", policy, at=mountpoint)
    assert kinds_of(second, range(5)) == ["miss"] * 5
    assert kinds_of(second, range(5)) == ["hit"] * 5
    assert counters(second)["evictions"] >= 5
    assert counters(second)["resident_bytes"] <= 10 * SIZE


@pytest.mark.parametrize("policy", ["hold", "lru"])
def test_files_of_another_live_mount_stay(mounted, tmp_path, mountpoint, policy):
    """Semantics 8: what another live mount has fetched is leased to it: the newcomer is served from its source."""
    other = tmp_path / "other mount"
    other.mkdir()
    first = mounted(make_files(tmp_path / "one", 10), "--capacity", TEN_FILES, at=mountpoint)
    read(first, *range(10))
    second = mounted(make_files(tmp_path / "two", 3), "--capacity", TEN_FILES, "--policy", policy, at=other)
    assert kinds_of(second, range(3)) == ["bypass"] * 3
    assert kinds_of(first, range(10)) == ["hit"] * 10


def test_superseded_copies_go_first(source, mounted, mountpoint):
    """Semantics 8: under hold, a copy of a version that is no more makes room for the new one."""
    make_files(source, 10)
    cache = mounted(source, "--capacity", TEN_FILES, "--metadata-ttl", "0", at=mountpoint)
    read(cache, *range(10))
    os.utime(source / "3", ns=(1, 1))
    assert kinds_of(cache, [3, 3]) == ["miss", "hit"]
    assert kinds_of(cache, range(10)) == ["hit"] * 10
    assert counters(cache)["resident_files"] == 10


def test_an_empty_file_is_counted_once_however_often_it_is_evicted(mounted, tmp_path, mountpoint):
    """Semantics 8: the index still names what was evicted just now, and 0 bytes freed may be a file that was there."""
    other = tmp_path / "other"
    other.mkdir()
    earlier = make_files(tmp_path / "earlier", 10)
    for number in range(20):
        (earlier / f"empty {number}").write_bytes(b"")
    first = mounted(earlier, "--capacity", TEN_FILES, at=other)
    for path in earlier.iterdir():
        (other / path.name).read_bytes()
    first.unmount()
    cache = mounted(make_files(tmp_path / "one", 30), "--capacity", TEN_FILES, "--policy", "lru", at=mountpoint)
    for number in range(30):
        read(cache, number)
    said = counters(cache)
    assert said["resident_files"] == len(cache.resident_data_files())
    assert said["resident_bytes"] == sum(stored_files(cache.scratch).values())


@needs_root
def test_a_full_disk_is_a_bypass(source, mounted, mountpoint, tmp_path):
    """Semantics 8: whatever the capacity says, 5% of the disk stay free, and a full disk costs the reader nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", disk], check=True)
    cache = None
    try:
        make_files(source, 60)
        cache = mounted(source, "--capacity", "4M", at=mountpoint, scratch=disk / "scratch")
        kinds = kinds_of(cache, range(60))
        assert kinds.index("bypass") >= 25
        assert "miss" not in kinds[kinds.index("bypass") + 1 :]
        free = os.statvfs(disk)
        assert free.f_bavail * free.f_frsize >= 0.05 * (4 << 20)
        cache.expect_log("index not written .*disk is full")  # if it is just then that it would be
        (disk / "others").write_bytes(bytes(free.f_bavail * free.f_frsize))
        read(cache, *range(60))
        (disk / "others").unlink()
    finally:
        if cache is not None:
            cache.end()
        subprocess.run(["umount", "-l", disk], check=True)
