"""After a crash or a reboot scratch is reusable (semantics 6 and 11)."""

from __future__ import annotations

import os
import random
import sqlite3
import struct

import pytest

from tests.harness import detach, over_a_fuse_mount, wait_until
from tests.mount.observing import counters, errno_of, opens, stored_files

SIZE = 110_000
LARGE = 32 << 20
OTHER_BOOT = "0123456789abcdef" * 2


@pytest.fixture
def slow(source, slow_source):
    for number in range(20):
        (source / str(number)).write_bytes(content(number))
    return slow_source(source)


def content(number):
    return random.Random(number).randbytes(SIZE)


def read(cache, numbers):
    for number in numbers:
        assert (cache.path / str(number)).read_bytes() == content(number)


def crash(cache):
    cache.kill()
    assert errno_of(os.listdir, cache.path) == "ENOTCONN"
    detach(cache.path)


def assert_accounted(cache):
    """What status says is what is on disk, and nothing is half-copied."""
    said = counters(cache)
    copies = cache.resident_data_files()
    assert (said["resident_files"], said["resident_bytes"]) == (len(copies), sum(c.stat().st_size for c in copies))
    assert os.listdir(cache.scratch / "staging") == []


@pytest.mark.parametrize(
    "over", [False, pytest.param(True, marks=over_a_fuse_mount)], ids=["elsewhere", "over the source"]
)
def test_resident_files_survive_a_crash(slow, mounted, mountpoint, over):
    """Semantics 11: after SIGKILL and a new mount, what was resident is a hit, without a read of the source."""
    place = None if over else mountpoint
    first = mounted(slow.path, at=place)
    read(first, range(10))
    crash(first)
    second = mounted(slow.path, at=place)
    assert_accounted(second)
    slow.reset()
    read(second, range(10))
    assert opens(second) == (10, 0, 0)
    seen = slow.statistics().operations
    assert seen.get("read", 0) == seen.get("open", 0) == 0
    read(second, range(20))
    assert_accounted(second)
    assert counters(second)["resident_files"] == 20


def test_a_crash_in_the_middle_of_a_copy(slow, source, mounted, mountpoint, reader):
    """Semantics 6 and 11: what was half copied is gone, takes no room, and is fetched again, whole."""
    large = random.Random(8).randbytes(LARGE)
    (source / "large").write_bytes(large)
    first = mounted(slow.path, at=mountpoint)
    read(first, [0])
    slow.set(bandwidth=8 << 20)
    reader(mountpoint / "large")
    wait_until(lambda: sum(stored_files(first.scratch).values()) > SIZE + (2 << 20), "some of it is staged")
    crash(first)
    slow.set(bandwidth=None)
    assert len(first.resident_data_files()) == 1
    second = mounted(slow.path, at=mountpoint)
    assert_accounted(second)
    assert counters(second)["resident_files"] == 1
    assert (mountpoint / "large").read_bytes() == large
    wait_until(lambda: counters(second)["resident_files"] == 2, "the file is resident")
    assert_accounted(second)


def test_a_crash_of_one_mount_does_not_disturb_another(slow, mounted, tmp_path, reader, source):
    """Semantics 5, 6 and 11: another mount that waits for the copy of a mount that dies makes it itself."""
    large = random.Random(9).randbytes(LARGE)
    (source / "large").write_bytes(large)
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    first, second = (mounted(slow.path, at=place) for place in places)
    second.expect_log("scratch failed")  # what was staged is cut off when the copy begins again
    slow.set(bandwidth=8 << 20)
    reader(places[0] / "large")
    wait_until(lambda: sum(stored_files(first.scratch).values()) > (2 << 20), "some of it is staged")
    with open(places[1] / "large", "rb", buffering=0) as file:
        begin = file.read(100_000)
        crash(first)
        slow.set(bandwidth=None)
        rest = b"".join(iter(lambda: file.read(1 << 20), b""))
    assert begin + rest == large
    wait_until(lambda: counters(second)["fetches"] == 1, "the second mount fetches it")
    assert (places[1] / "large").read_bytes() == large
    second.unmount()
    third = mounted(slow.path, at=places[1])
    assert_accounted(third)


def test_after_crash_upon_crash_the_capacity_holds(slow, mounted, mountpoint):
    """Semantics 8 and 11: room is neither lost nor given twice by crashes."""
    capacity = 10 * SIZE
    for start in (0, 5, 10):
        cache = mounted(slow.path, "--capacity", str(capacity), "--policy", "lru", at=mountpoint)
        assert_accounted(cache)
        read(cache, range(start, start + 10))
        assert counters(cache)["resident_bytes"] <= capacity
        crash(cache)
    cache = mounted(slow.path, "--capacity", str(capacity), "--policy", "lru", at=mountpoint)
    assert_accounted(cache)
    assert counters(cache)["resident_bytes"] >= capacity - 2 * SIZE


@pytest.mark.parametrize("damage", ["removed", "damaged", "empty"])
def test_a_lost_index_costs_no_wrong_byte(slow, mounted, mountpoint, damage):
    """Semantics 11: what the index says is checked against what is there, and the other way round."""
    first = mounted(slow.path, at=mountpoint)
    read(first, range(5))
    crash(first)
    index = first.scratch / "index.db"
    for name in ("index.db-wal", "index.db-shm"):
        (first.scratch / name).unlink(missing_ok=True)
    if damage == "removed":
        index.unlink()
    else:
        index.write_bytes(b"no database" * 1000 if damage == "damaged" else b"")
    second = mounted(slow.path, at=mountpoint)
    assert_accounted(second)
    read(second, range(10))
    assert counters(second)["bypasses"] == 0
    assert_accounted(second)


@pytest.mark.parametrize("damage", ["shortened", "lengthened", "removed"])
def test_a_copy_of_the_wrong_size_is_not_believed(slow, mounted, mountpoint, damage):
    """Semantics 11: after a crash, a copy that is not as long as the index says is fetched again."""
    first = mounted(slow.path, at=mountpoint)
    read(first, range(5))
    first.unmount()
    first = mounted(slow.path, at=mountpoint)  # the index has them all now
    crash(first)
    victim = first.resident_data_files()[0]
    if damage == "removed":
        victim.unlink()
    else:
        os.truncate(victim, SIZE // 2 if damage == "shortened" else SIZE + 1)
    second = mounted(slow.path, at=mountpoint)
    assert_accounted(second)
    read(second, range(5))
    assert opens(second) == (4, 1, 0)
    assert_accounted(second)


def reboot(scratch):
    """Make what is in scratch look as if it were written before the machine's last boot; the directory's new path."""
    (boot,) = os.listdir(scratch / "files")
    (scratch / "files" / boot).rename(scratch / "files" / OTHER_BOOT)
    index = sqlite3.connect(scratch / "index.db")
    with index:
        index.execute("UPDATE files SET boot = ?", (OTHER_BOOT,))
    index.close()
    with open(scratch / "ledger", "r+b") as ledger:  # who ended cleanly did so in another boot
        ledger.seek(struct.calcsize("<8sqq"))
        ledger.write(OTHER_BOOT.encode())
    return scratch / "files" / OTHER_BOOT


def test_after_a_reboot_copies_are_checked_before_they_are_believed(slow, mounted, mountpoint):
    """Semantics 11: a whole copy is served without the source, one with flipped bits is fetched again."""
    first = mounted(slow.path, at=mountpoint)
    read(first, range(6))
    first.unmount()
    folder = reboot(first.scratch)
    damaged = {number: path for path in folder.rglob("*") if path.is_file() for number in [number_of(path)]}
    with open(damaged[3], "r+b") as file:
        file.seek(SIZE // 2)
        flipped = file.read(1)[0] ^ 0x55
        file.seek(SIZE // 2)
        file.write(bytes([flipped]))
    second = mounted(slow.path, at=mountpoint)
    second.expect_log("damaged copy dropped path=b'3'")
    assert counters(second)["resident_files"] == 6
    slow.reset()
    read(second, range(6))
    seen = slow.statistics()
    assert {number: seen.file(str(number)).bytes_read for number in range(6)} == {**dict.fromkeys(range(6), 0), 3: SIZE}
    assert counters(second)["fetches"] == 1
    assert_accounted(second)
    assert os.listdir(folder) == [] or not any(path.is_file() for path in folder.rglob("*"))
    read(second, range(6))
    assert opens(second)[0] >= 6
    second.unmount()
    third = mounted(slow.path, at=mountpoint)
    read(third, range(6))
    assert opens(third) == (6, 0, 0)


def number_of(path):
    data = path.read_bytes()
    return next(number for number in range(20) if content(number) == data)


def test_after_a_reboot_unknown_copies_are_dropped(slow, mounted, mountpoint):
    """Semantics 11: a copy from before the boot without a checksum cannot be checked, so it goes."""
    first = mounted(slow.path, at=mountpoint)
    read(first, range(3))
    first.unmount()
    reboot(first.scratch)
    with sqlite3.connect(first.scratch / "index.db") as index:
        index.execute("DELETE FROM files")
    index.close()
    second = mounted(slow.path, at=mountpoint)
    assert_accounted(second)
    assert counters(second)["resident_files"] == 0
    read(second, range(3))
    assert counters(second)["fetches"] == 3


def test_after_a_reboot_what_is_never_read_still_counts(slow, mounted, mountpoint):
    """Semantics 8 and 11: copies of an earlier boot take room until they are read, evicted or superseded."""
    options = ("--capacity", str(10 * SIZE), "--policy", "lru")
    first = mounted(slow.path, *options, at=mountpoint)
    read(first, range(10))
    first.unmount()
    reboot(first.scratch)
    second = mounted(slow.path, *options, at=mountpoint)
    read(second, range(10, 20))
    assert sum(stored_files(second.scratch).values()) <= 10 * SIZE
    assert opens(second) == (0, 10, 0)
    assert_accounted(second)
