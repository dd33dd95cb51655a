"""Opening does not wait for the copy, and a file is fetched once (semantics 4, 5 and 6)."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash

from tests.harness import wait_until
from tests.mount.observing import Reader, counters, errno_of, opens, stored_files

LARGE = 48 << 20
SLOWLY = 12 << 20  # bytes a second
SMALL = 110_000

_READ_ALL = """
import hashlib, os, sys
sys.stdin.read(1)
for name in sorted(os.listdir(sys.argv[1])):
    with open(os.path.join(sys.argv[1], name), "rb") as file:
        print(name, hashlib.sha256(file.read()).hexdigest())
"""


@pytest.fixture
def large(source):
    data = random.Random(3).randbytes(LARGE)
    (source / "large").write_bytes(data)
    return data


def write_files(source, count, size=SMALL):
    for number in range(count):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(size + number))


def read_in_processes(folders):
    """One process for each folder reads everything in it, all at the same time; what each has seen."""
    command = [sys.executable, "-c", _READ_ALL]
    readers = [
        subprocess.Popen([*command, os.fspath(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for folder in folders
    ]
    for process in readers:
        process.stdin.write(b"g")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in readers]
    assert [process.returncode for process in readers] == [0] * len(readers)
    return answers


def test_open_and_first_bytes_do_not_wait_for_the_copy(source, mounted, mountpoint, slow_source, large):
    """Semantics 4: open returns while the fetch has hardly begun; the first bytes come before it is complete."""
    slow = slow_source(source, bandwidth=SLOWLY)
    cache = mounted(slow.path, at=mountpoint)
    with open(mountpoint / "large", "rb", buffering=0) as file:
        assert counters(cache)["fetches"] == 0
        assert sum(stored_files(cache.scratch).values()) < LARGE // 2
        assert file.read(4096) == large[:4096]
        assert counters(cache)["fetches"] == 0
        slow.set(bandwidth=None)
        rest = b"".join(iter(lambda: file.read(1 << 20), b""))
    assert rest == large[4096:]
    wait_until(lambda: counters(cache)["fetches"] == 1, "the fetch ends")
    assert opens(cache) == (0, 1, 0)


def test_a_read_far_beyond_the_frontier_is_served_meanwhile(source, mounted, mountpoint, slow_source, large):
    """Semantics 4: the last bytes, right after open, come from the source before the fetch is complete."""
    slow = slow_source(source, bandwidth=SLOWLY)
    cache = mounted(slow.path, at=mountpoint)
    with open(mountpoint / "large", "rb", buffering=0) as file:
        file.seek(-4096, os.SEEK_END)
        assert file.read() == large[-4096:]
        assert counters(cache)["fetches"] == 0
        slow.set(bandwidth=None)
        wait_until(lambda: counters(cache)["fetches"] == 1, "the fetch ends")
        file.seek(0)
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == large
    said = counters(cache)
    assert said["source_bytes_read"] < LARGE + (4 << 20)
    assert slow.statistics().file("large").bytes_read < LARGE + (8 << 20)


def test_a_fetch_goes_on_when_its_reader_has_gone(source, mounted, mountpoint, slow_source, large):
    """Semantics 4: who opens and closes has the file fetched all the same."""
    slow = slow_source(source, bandwidth=SLOWLY)
    cache = mounted(slow.path, at=mountpoint)
    os.close(os.open(mountpoint / "large", os.O_RDONLY))
    slow.set(bandwidth=None)
    wait_until(lambda: counters(cache)["resident_files"] == 1, "the file is resident")
    slow.reset()
    assert (mountpoint / "large").read_bytes() == large
    assert slow.statistics().file("large").reads == 0


def test_small_files_do_not_wait_behind_large_ones(source, mounted, mountpoint, slow_source):
    """Semantics 4: while many large fetches hang, a small file is fetched."""
    for number in range(12):
        with open(source / f"large {number}", "wb") as file:
            file.truncate(64 << 20)
    (source / "small").write_bytes(b"small")
    slow = slow_source(source)
    cache = mounted(slow.path, at=mountpoint)
    slow.fail("large *", "read", hang=True)
    for number in range(12):
        os.close(os.open(mountpoint / f"large {number}", os.O_RDONLY))
    assert (mountpoint / "small").read_bytes() == b"small"
    assert counters(cache)["fetches"] == 1
    slow.clear_faults()
    wait_until(lambda: counters(cache)["fetches"] == 13, "the large ones are fetched", 60)


@pytest.mark.parametrize("size", [SMALL, 1_500_000])
def test_64_threads_fetch_a_file_once(source, mounted, mountpoint, slow_source, size):
    """Semantics 5: 64 threads at once: one fetch, each byte asked of the source once, 64 opens counted."""
    data = random.Random(4).randbytes(size)
    (source / "file").write_bytes(data)
    slow = slow_source(source, latency=0.02)
    cache = mounted(slow.path, at=mountpoint)
    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(lambda _: (mountpoint / "file").read_bytes() == data, range(64)))
    said = counters(cache)
    assert slow.statistics().file("file").bytes_read == size
    assert (said["fetches"], said["source_bytes_read"], said["resident_bytes"]) == (1, size, size)
    assert (sum(opens(cache)), said["bypasses"]) == (64, 0)


def test_four_processes_fetch_each_file_once(source, mounted, mountpoint, slow_source):
    """Semantics 5: 4 processes read 40 files at once: each is fetched exactly once."""
    write_files(source, 40)
    slow = slow_source(source, latency=0.002)
    cache = mounted(slow.path, at=mountpoint)
    want = read_in_processes([source])
    assert read_in_processes([mountpoint] * 4) == want * 4
    seen = slow.statistics()
    assert {number: seen.file(str(number)).bytes_read for number in range(40)} == {n: SMALL + n for n in range(40)}
    assert (sum(opens(cache)), counters(cache)["fetches"]) == (160, 40)


@pytest.mark.parametrize("size", [SMALL, 1_500_000])
def test_two_mounts_fetch_each_file_once(source, mounted, tmp_path, slow_source, size):
    """Semantics 5: two mounts of one source with one scratch, two processes on each: each file once in all."""
    count = 30 if size == SMALL else 8
    write_files(source, count, size)
    slow = slow_source(source, latency=0.002)
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    caches = [mounted(slow.path, at=place) for place in places]
    want = read_in_processes([source])
    assert read_in_processes(places * 2) == want * 4
    seen = slow.statistics()
    assert {n: seen.file(str(n)).bytes_read for n in range(count)} == {n: size + n for n in range(count)}
    said = [counters(cache) for cache in caches]
    assert sum(each["fetches"] for each in said) == count
    assert [each["resident_files"] for each in said] == [count] * 2
    assert [sum(opens(cache)) for cache in caches] == [2 * count] * 2


def test_a_copy_is_visible_only_when_complete(source, mounted, mountpoint, slow_source, large):
    """Semantics 6: until it is complete a copy lies in staging; then in files, with its checksum in the index."""
    slow = slow_source(source, bandwidth=SLOWLY)
    cache = mounted(slow.path, at=mountpoint)
    with open(mountpoint / "large", "rb", buffering=0) as file:
        wait_until(lambda: os.listdir(cache.scratch / "staging"), "the file is staged")
        assert cache.resident_data_files() == []
        slow.set(bandwidth=None)
        assert len(file.read(100)) == 100
        wait_until(lambda: counters(cache)["resident_files"] == 1, "the fetch ends")
    assert os.listdir(cache.scratch / "staging") == []
    (copy,) = cache.resident_data_files()
    assert copy.read_bytes() == large
    cache.unmount()
    with sqlite3.connect(cache.scratch / "index.db") as index:
        rows = index.execute("SELECT path, size, checksum FROM files").fetchall()
    index.close()
    assert rows == [(b"large", LARGE, xxhash.xxh3_64_digest(large))]


def test_a_fetch_that_fails_leaves_nothing(source, mounted, mountpoint, slow_source, large):
    """Semantics 6: an error of the source in the middle leaves no copy, staged or complete, and no room taken."""
    slow = slow_source(source)
    cache = mounted(slow.path, at=mountpoint)
    slow.fail("large", "read", "EIO", after_bytes=LARGE // 2)
    with open(mountpoint / "large", "rb", buffering=0) as file:
        file.seek(LARGE // 2)
        assert errno_of(file.read, 4096) == "EIO"
    wait_until(lambda: counters(cache)["fetch_errors"] >= 1, "the fetch fails")
    assert stored_files(cache.scratch) == {}
    assert (counters(cache)["resident_files"], counters(cache)["resident_bytes"]) == (0, 0)
    slow.clear_faults()
    assert (mountpoint / "large").read_bytes() == large


@pytest.mark.parametrize("moment", ["while it is fetched", "when it is resident"])
def test_a_reader_that_is_killed_harms_nobody(source, mounted, mountpoint, slow_source, large, reader, moment):
    """Semantics 5: a killed process takes no lock with it."""
    slow = slow_source(source, bandwidth=SLOWLY if "while" in moment else None)
    cache = mounted(slow.path, at=mountpoint)
    process: Reader = reader(mountpoint / "large")
    wait_until(lambda: sum(opens(cache)) == 1, "the file is open")
    process.kill()
    slow.set(bandwidth=None)
    assert (mountpoint / "large").read_bytes() == large
    wait_until(lambda: counters(cache)["fetches"] == 1, "the fetch ends")
