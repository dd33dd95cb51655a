"""Fetching ahead of use: what is fetched, what it costs the source, and that demand comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cachefs, wait_until
from tests.mount.observing import counters

SIZE = 20_000
DIRECTORIES, FILES = 4, 12
ALL = DIRECTORIES * FILES


@pytest.fixture
def tree(source: Path) -> Path:
    for directory in range(DIRECTORIES):
        (source / f"d{directory}").mkdir()
        for file in range(FILES):
            (source / f"d{directory}" / f"f{file}").write_bytes(f"{directory} {file} ".encode() * (SIZE // 4))
    return source


def size_of(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def read(root: Path, directory: int, files: range) -> None:
    for file in files:
        (root / f"d{directory}" / f"f{file}").read_bytes()


def test_a_directory_that_is_read_through_is_fetched_whole(tree, mounted, mountpoint):
    cache = mounted(tree, "--prefetch", "auto", at=mountpoint)
    read(mountpoint, 1, range(4))
    wait_until(lambda: counters(cache)["resident_files"] == FILES, "the rest of the directory has come")
    status = counters(cache)
    assert (status["prefetches"], status["misses"], status["hits"]) == (FILES - 4, 4, 0)
    read(mountpoint, 1, range(FILES))
    assert counters(cache)["misses"] == 4


def test_a_tree_that_is_read_through_is_fetched_whole(tree, mounted, mountpoint):
    cache = mounted(tree, "--prefetch", "auto", at=mountpoint)
    for directory in range(3):
        read(mountpoint, directory, range(3))
    wait_until(lambda: counters(cache)["resident_files"] == ALL, "the rest of the tree has come")


@pytest.mark.parametrize("files", [range(1), range(3)], ids=["one", "three"])
def test_a_few_files_are_no_reason(tree, mounted, mountpoint, files):
    cache = mounted(tree, "--prefetch", "auto", at=mountpoint)
    read(mountpoint, 0, files)
    read(mountpoint, 1, files)
    wait_until(lambda: counters(cache)["resident_files"] == 2 * len(files), "what was read is resident")
    assert counters(cache)["prefetches"] == 0


def test_off_fetches_nothing_ahead(tree, mounted, mountpoint):
    cache = mounted(tree, "--prefetch", "off", at=mountpoint)
    for directory in range(DIRECTORIES):
        read(mountpoint, directory, range(FILES - 1))
    wait_until(lambda: counters(cache)["resident_files"] == ALL - DIRECTORIES, "what was read is resident")
    assert counters(cache)["prefetches"] == 0


def test_all_fetches_everything_from_the_start(tree, mounted, mountpoint, slow_source):
    slow = slow_source(tree, latency=0.001)
    cache = mounted(slow.path, "--prefetch", "all", at=mountpoint)
    wait_until(lambda: counters(cache)["resident_files"] == ALL, "everything has come")
    assert slow.statistics().bytes_read == size_of(tree)
    for directory in range(DIRECTORIES):
        read(mountpoint, directory, range(FILES))
    status = counters(cache)
    assert (status["prefetches"], status["hits"], status["misses"]) == (ALL, ALL, 0)
    assert slow.statistics().bytes_read == size_of(tree)


def test_readers_and_prefetching_together_read_each_file_once(tree, mounted, mountpoint, slow_source, reader):
    slow = slow_source(tree, latency=0.005)
    cache = mounted(slow.path, "--prefetch", "auto", at=mountpoint)
    readers = [reader(mountpoint / f"d{d}" / f"f{f}") for d in range(DIRECTORIES) for f in range(0, FILES, 3)]
    for one in readers:
        assert isinstance(one.result(), int)
    wait_until(lambda: counters(cache)["resident_files"] == ALL, "everything has come")
    assert slow.statistics().bytes_read == size_of(tree)
    assert counters(cache)["fetches"] == ALL


def test_what_cannot_be_fetched_is_passed_over(tree, mounted, mountpoint, slow_source):
    slow = slow_source(tree)
    slow.fail("d1/f5", "open", "EIO")
    slow.fail("d2", "readdir", "EACCES")
    cache = mounted(slow.path, "--prefetch", "all", at=mountpoint)
    wait_until(lambda: counters(cache)["resident_files"] == ALL - FILES - 1, "the rest has come")
    assert counters(cache)["fetch_errors"] == 1
    slow.clear_faults()
    read(mountpoint, 1, range(5, 6))
    read(mountpoint, 2, range(1))


def test_demand_does_not_wait_for_a_source_that_hangs_for_what_is_fetched_ahead(
    tree, mounted, mountpoint, slow_source, reader
):
    for file in range(60):
        (tree / "d0" / f"more{file}").write_bytes(b"x" * SIZE)
    slow = slow_source(tree)
    slow.fail("d0/*", "open", hang=True)
    cache = mounted(slow.path, "--prefetch", "all", at=mountpoint)
    wait_until(lambda: slow.statistics().operations.get("open", 0) >= 2, "prefetching hangs")
    reading = reader(mountpoint / "d3" / "f3")
    assert reading.result() == len((tree / "d3" / "f3").read_bytes())
    slow.clear_faults()
    cache.expect_log("fetch failed|believed longer")


class TestCapacity:
    """Prefetching takes free room alone, and gives way to what is asked for."""

    def test_it_stops_when_scratch_is_full(self, tree, mounted, mountpoint):
        capacity = size_of(tree) // 2
        cache = mounted(tree, "--prefetch", "all", "--capacity", capacity, at=mountpoint)
        wait_until(lambda: counters(cache)["resident_bytes"] > capacity - 2 * SIZE, "scratch is full")
        read(mountpoint, 3, range(FILES))
        status = counters(cache)
        assert status["bypasses"] == 0, "what nobody has opened makes room for what is asked for"
        assert status["resident_bytes"] <= capacity
        read(mountpoint, 3, range(FILES))
        assert counters(cache)["hits"] >= FILES

    @pytest.mark.parametrize("policy", ["hold", "lru"])
    def test_it_evicts_nothing_that_was_opened(self, tree, mounted, mountpoint, policy):
        capacity = sum(path.stat().st_size for path in (tree / "d0").iterdir()) + SIZE // 2
        cache = mounted(tree, "--prefetch", "off", "--policy", policy, "--capacity", capacity, at=mountpoint)
        read(mountpoint, 0, range(FILES))
        wait_until(lambda: counters(cache)["resident_files"] == FILES, "the directory is resident")
        done = run_cachefs("warm", mountpoint, check=False)
        assert done.returncode == 1
        assert "scratch is full" in done.stderr
        status = counters(cache)
        assert (status["evictions"], status["resident_files"]) == (0, FILES)
        read(mountpoint, 0, range(FILES))
        assert counters(cache)["hits"] == FILES
