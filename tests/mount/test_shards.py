"""Shards on real mounts: what is shown, what is kept, what it says of itself, and that each file is fetched once."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from cachefs.cache.shards import Division, Listing, Share
from tests.conftest import needs_root
from tests.harness import CACHEFS, MountedCache, clean_environment, run_cachefs, wait_until
from tests.mount.observing import counters, errno_of, opens, stored_bytes, stored_files
from tests.mount.test_promotion import PROMOTING, assert_served_without_us, promoted, read_all, wait_for

FOLDERS, FILES = 4, 8
MODES = ("keep", "view")


@pytest.fixture
def tree(source: Path) -> Path:
    """Folders of files of different sizes, an empty folder, a symbolic link to each first file."""
    numbers = random.Random(3)
    for folder in range(FOLDERS):
        (source / f"class{folder}").mkdir()
        for file in range(FILES):
            path = source / f"class{folder}" / f"{file}.bin"
            path.write_bytes(numbers.randbytes(numbers.randrange(1000, 20_000)))
        (source / f"class{folder}" / "first").symlink_to("0.bin")
    (source / "empty").mkdir()
    return source


def names(root: Path) -> set[str]:
    """The regular files below."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def folders(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()}


def size_of(root: Path, files: set[str]) -> int:
    return sum((root / name).stat().st_size for name in files)


@pytest.fixture
def divided(mounted, tmp_path):
    """`divided(source, N, mode, *options)`: the N mounts of all shards, at places of their own, in one scratch."""

    def make(source: Path, count: int, mode: str, *options: object, **keywords: object) -> list[MountedCache]:
        made = []
        for number in range(count):
            place = tmp_path / f"shard{number}"
            place.mkdir()
            shard = ("--shard", f"{number}/{count}", "--shard-mode", mode)
            made.append(mounted(source, *shard, *options, at=place, **keywords))
        return made

    return make


def test_views_are_disjoint_and_complete_and_each_file_is_fetched_once(tree, divided, slow_source):
    slow = slow_source(tree)
    caches = divided(slow.path, 3, "view")
    slow.reset()
    shown = [names(cache.path) for cache in caches]
    assert sorted(name for part in shown for name in part) == sorted(names(tree))
    assert all(folders(cache.path) == folders(tree) for cache in caches), "classes are numbered alike on all ranks"
    operations = slow.statistics().operations
    assert not operations.get("readdir"), "the listing that was divided is the one that is shown"
    sizes = [size_of(tree, part) for part in shown]
    assert max(sizes) - min(sizes) <= max(path.stat().st_size for path in tree.rglob("*.bin"))
    for _ in range(2):
        for cache, part in zip(caches, shown, strict=True):
            for name in part:
                assert (cache.path / name).read_bytes() == (tree / name).read_bytes()
    files = slow.statistics().files
    assert {name: files[name.encode()].bytes_read for name in names(tree)} == {
        name: (tree / name).stat().st_size for name in names(tree)
    }
    for cache, part, size in zip(caches, shown, sizes, strict=True):
        status = counters(cache)
        assert (status["shard_files"], status["shard_bytes"]) == (len(part), size)
        assert (status["shard_listed_files"], status["shard_listed_bytes"]) == (
            FOLDERS * FILES,
            size_of(tree, names(tree)),
        )
        assert status["shard_warnings"] == []
        assert (status["misses"], status["bypasses"]) == (len(part), 0)
    assert len({counters(cache)["shard_fingerprint"] for cache in caches}) == 1


def test_what_a_view_does_not_show_is_not_there(tree, divided):
    ours, theirs = divided(tree, 2, "view")
    hidden = sorted(names(theirs.path))
    for name in hidden:
        assert errno_of(os.stat, ours.path / name) == "ENOENT"
        assert errno_of(os.open, ours.path / name, os.O_RDONLY) == "ENOENT"
    links = {path for path in tree.rglob("first") if (ours.path / path.relative_to(tree)).is_symlink()}
    assert len(links) == FOLDERS, "links are shown as they are"
    dangling = {path for path in tree.rglob("first") if not (ours.path / path.relative_to(tree)).exists()}
    assert {str(path.with_name("0.bin").relative_to(tree)) for path in dangling} == {
        name for name in hidden if name.endswith("/0.bin")
    }


def test_a_name_is_not_there_before_its_directory_is_listed_either(tree, divided):
    """Where the listing is not believed any more."""
    ours, theirs = divided(tree, 2, "view", "--metadata-ttl", "0")
    assert sorted([*names(ours.path), *names(theirs.path)]) == sorted(names(tree))
    for name in names(tree):
        assert (ours.path / name).exists() != (theirs.path / name).exists()


def test_keep_shows_everything_and_fetches_its_share(tree, divided):
    caches = divided(tree, 2, "keep")
    (first, second), everything = caches, names(tree)
    assert names(first.path) == everything
    for name in sorted(everything):
        assert (first.path / name).read_bytes() == (tree / name).read_bytes()
    status = counters(first)
    kept = status["shard_files"]
    assert 0 < kept < len(everything)
    assert opens(first) == (0, kept, len(everything) - kept)
    wait_until(lambda: counters(first)["fetches"] == kept, "its share is fetched")
    assert stored_bytes(first.scratch) == status["shard_bytes"]
    for name in sorted(everything):
        assert (second.path / name).read_bytes() == (tree / name).read_bytes()
    assert opens(second) == (kept, len(everything) - kept, 0), "what the other has on this node is a hit"
    wait_until(lambda: counters(second)["fetches"] == len(everything) - kept, "the rest is fetched")
    for name in sorted(everything):
        assert (first.path / name).read_bytes() == (tree / name).read_bytes()
    assert opens(first) == (len(everything), kept, len(everything) - kept)


@pytest.mark.parametrize("mode", MODES)
def test_prefetching_is_of_the_share(tree, mounted, mountpoint, mode):
    cache = mounted(tree, "--shard", "1/3", "--shard-mode", mode, "--prefetch", "all", at=mountpoint)
    wait_until(lambda: counters(cache)["fetches"] == counters(cache)["shard_files"], "its share is fetched")
    done = run_cachefs("warm", mountpoint)
    assert f"{counters(cache)['shard_files']} files resident" in done.stdout
    status = counters(cache)
    assert (status["fetches"], status["resident_bytes"]) == (status["shard_files"], status["shard_bytes"])


def test_warm_fetches_the_share(tree, mounted, mountpoint):
    cache = mounted(tree, "--shard", "0/2", at=mountpoint)
    done = run_cachefs("warm", mountpoint)
    assert f"{counters(cache)['shard_files']} files resident" in done.stdout
    assert counters(cache)["resident_files"] == counters(cache)["shard_files"]
    assert counters(cache)["bypasses"] == 0


def test_what_comes_later_is_in_one_shard(tree, divided):
    caches = divided(tree, 3, "view", "--metadata-ttl", "0")
    before = [names(cache.path) for cache in caches]
    new = {f"class1/new{number}" for number in range(12)}
    for name in new:
        (tree / name).write_bytes(name.encode())
    added = [names(cache.path) - old for cache, old in zip(caches, before, strict=True)]
    assert sorted(name for part in added for name in part) == sorted(new)
    for cache, part in zip(caches, added, strict=True):
        for name in part:
            assert (cache.path / name).read_bytes() == name.encode()


def test_hard_links_go_together(source, divided):
    for number in range(6):
        (source / f"a{number}").write_bytes(b"%d" % number * 100)
        os.link(source / f"a{number}", source / f"b{number}")
    caches = divided(source, 3, "view")
    parts = [names(cache.path) for cache in caches]
    assert sorted(name for part in parts for name in part) == sorted(names(source))
    for cache, part in zip(caches, parts, strict=True):
        assert {name[1:] for name in part if name[0] == "a"} == {name[1:] for name in part if name[0] == "b"}
        assert counters(cache)["shard_bytes"] == 200
        for name in part:
            assert (cache.path / name).stat().st_nlink == 2
            assert (cache.path / name).read_bytes() == (source / name).read_bytes()


def test_the_seed_moves_files(tree, mounted, tmp_path):
    shown = []
    for seed in (0, 0, 1):
        place = tmp_path / f"at{len(shown)}"
        place.mkdir()
        options = ("--shard", "0/2", "--shard-mode", "view", "--shard-seed", seed)
        shown.append(names(mounted(tree, *options, at=place).path))
    assert shown[0] == shown[1] != shown[2]


class TestRoom:
    def refused(self, source: Path, mountpoint: Path, scratch: Path, *options: object) -> str:
        done = run_cachefs("mount", source, mountpoint, "--scratch", scratch, *options, check=False)
        assert done.returncode == 1
        assert not scratch.exists()
        return done.stderr

    @pytest.mark.parametrize("mode", MODES)
    def test_a_shard_that_cannot_fit_is_an_error_before_anything_is_fetched(
        self, tree, slow_source, mountpoint, tmp_path, mode
    ):
        slow = slow_source(tree)
        options = ("--shard", "0/2", "--shard-mode", mode, "--prefetch", "all", "--capacity", "50K")
        said = self.refused(slow.path, mountpoint, tmp_path / "scratch", *options)
        assert re.search(r"shard 0/2 has \S+ KiB in \d+ files, and scratch has room for 50.0 KiB: .*--shard-cut", said)
        assert not slow.statistics().bytes_read

    def test_it_is_cut_where_that_is_asked_for(self, tree, mounted, mountpoint):
        options = ("--shard", "0/2", "--shard-mode", "view", "--shard-cut", "--capacity", "50K", "--prefetch", "all")
        cache = mounted(tree, *options, at=mountpoint)
        cache.must_log("of the shard are cut off, because scratch has no room")
        assert re.fullmatch(r"cachefs: warning: \S+ KiB of the shard are cut off, .*\n", cache.started.stderr)
        status = counters(cache)
        wait_until(lambda: counters(cache)["fetches"] == status["shard_files"], "what is left of it is fetched")
        assert 30_000 < status["shard_bytes"] <= 50 << 10
        assert "cut off" in str(status["shard_warnings"])
        shown = names(mountpoint)
        assert len(shown) > status["shard_files"], "it shows all of its shard"
        for name in shown:
            assert (mountpoint / name).read_bytes() == (tree / name).read_bytes()
        assert opens(cache) == (status["shard_files"], 0, len(shown) - status["shard_files"])
        assert counters(cache)["resident_bytes"] == status["shard_bytes"]

    @pytest.mark.parametrize("mode", MODES)
    def test_it_grows_where_that_is_asked_for(self, tree, mounted, mountpoint, mode):
        total = size_of(tree, names(tree))
        room = total * 3 // 4
        options = ("--shard", "1/2", "--shard-mode", mode, "--shard-fill", "--capacity", room, "--prefetch", "all")
        cache = mounted(tree, *options, at=mountpoint)
        status = counters(cache)
        assert total // 2 + 10_000 < status["shard_bytes"] <= room
        assert len(names(mountpoint)) == (status["shard_files"] if mode == "view" else FOLDERS * FILES)
        wait_until(lambda: counters(cache)["resident_bytes"] == status["shard_bytes"], "all of it is fetched")

    def test_shards_that_do_not_fit_together_are_warned_of(self, tree, divided):
        room = size_of(tree, names(tree)) * 3 // 4
        first, second = divided(tree, 2, "keep", "--capacity", room)
        second.must_log("shards of the mounts of this scratch take")
        first.expect_log("shards of the mounts of this scratch take")
        for cache in (first, second):
            wait_until(lambda cache=cache: "together" in str(counters(cache)["shard_warnings"]), "both say so")

    def test_shards_of_two_sources_that_do_not_fit_together_are_warned_of(self, tree, mounted, tmp_path):
        caches = []
        room = size_of(tree, names(tree)) * 3 // 4
        for number, source in enumerate((tree, copy_of(tree, tmp_path / "other"))):
            (place := tmp_path / f"at{number}").mkdir()
            caches.append(mounted(source, "--shard", "0/2", "--capacity", room, at=place))
        first, second = caches
        second.must_log("shards of the mounts of this scratch take")
        first.expect_log("shards of the mounts of this scratch take")
        wait_until(lambda: "together" in str(counters(first)["shard_warnings"]), "the first says so too")

    def test_what_another_live_dataset_holds_is_no_room(self, tree, mounted, mountpoint, tmp_path):
        total = size_of(tree, names(tree))
        (tmp_path / "at").mkdir()
        options = ("--capacity", total * 4 // 3, "--prefetch", "all")
        other = mounted(copy_of(tree, tmp_path / "other"), *options, at=tmp_path / "at")
        wait_until(lambda: counters(other)["indexed_files"] == FOLDERS * FILES, "all of it is fetched")
        wait_until(lambda: len(rows_of(other.scratch)) == FOLDERS * FILES, "and recorded")
        shard = ("--shard", "0/2", "--capacity", total * 4 // 3)
        done = run_cachefs("mount", tree, mountpoint, "--scratch", other.scratch, *shard, check=False)
        assert done.returncode == 1
        assert re.search(r"shard 0/2 has \S+ KiB in \d+ files, and scratch has room for \S+ KiB", done.stderr)

    @pytest.mark.parametrize("prefetch", ["all", "off"])
    def test_earlier_shards_give_way(self, tree, mounted, mountpoint, prefetch):
        """A scratch that is kept from job to job: what no live mount's shard has is the first to go."""
        capacity = size_of(tree, names(tree)) * 3 // 10
        for number in range(4):
            options = ("--shard", f"{number}/4", "--shard-mode", "view", "--capacity", capacity, "--prefetch", prefetch)
            cache = mounted(tree, *options, at=mountpoint)
            read_all(mountpoint)
            files = counters(cache)["shard_files"]
            wait_until(lambda cache=cache, files=files: counters(cache)["fetches"] == files, "all of it is fetched")
            read_all(mountpoint)
            assert opens(cache)[2] == 0, "nothing is read through"
            cache.unmount()

    def test_what_a_shard_has_grown_by_gives_way_to_others(self, tree, mounted, tmp_path):
        options = ("--shard-fill", "--capacity", size_of(tree, names(tree)) * 6 // 10)
        places = [tmp_path / "first", tmp_path / "second"]
        for place in places:
            place.mkdir()
        first = mounted(tree, *options, "--shard", "2/4", "--prefetch", "all", at=places[0])
        files = counters(first)["shard_files"]
        wait_until(lambda: len(rows_of(first.scratch)) == files, "all that it has grown to is fetched")
        second = mounted(tree, *options, "--shard", "0/4", "--prefetch", "off", at=places[1])
        own = Share(division_of(tree, 4), 0)
        for name in names(tree):
            if own.has(os.fsencode(name)):
                (places[1] / name).read_bytes()
        assert opens(second)[1], "something had to be fetched"
        assert not opens(second)[2], "and nothing is read through"


def copy_of(tree: Path, place: Path) -> Path:
    shutil.copytree(tree, place, symlinks=True)
    return place


def rows_of(scratch: Path) -> list[object]:
    with closing(sqlite3.connect(f"file:{scratch}/index.db?mode=ro", uri=True)) as index:
        return index.execute("SELECT name FROM files").fetchall()


def division_of(tree: Path, count: int) -> Division:
    listing = Listing(0)
    for name in names(tree):
        listing.add(os.fsencode(name), (tree / name).stat().st_size)
    return Division(listing, count)


class TestListing:
    @pytest.mark.parametrize("by", ["rank", "disk"])
    def test_one_that_changes_between_ranks_is_said(self, tree, mounted, tmp_path, by):
        """Also where each disk has a scratch of its own."""
        caches = []
        for number in range(2):
            place = tmp_path / f"shard{number}"
            place.mkdir()
            scratch = tmp_path / (f"scratch{number}" if by == "disk" else "scratch")
            options = ("--shard", f"{number}/2", "--shard-by", by)
            caches.append(mounted(tree, *options, at=place, scratch=scratch))
            (tree / "class0" / "0.bin").write_bytes(b"changed" * 3)
        first, second = caches
        first.expect_log("the source was listed otherwise")
        second.must_log("the source was listed otherwise by the mount of shard 0/2")
        assert "warning: the source was listed otherwise by the mount of shard 0/2" in second.started.stderr
        wait_until(lambda: counters(first)["shard_warnings"], "the first says so too")
        ours, theirs = counters(first), counters(second)
        assert ours["shard_fingerprint"] != theirs["shard_fingerprint"]
        assert theirs["shard_fingerprint"] in ours["shard_warnings"][0]
        shown = run_cachefs("status", second.path).stdout
        assert "the source was listed otherwise" in shown
        assert theirs["shard_fingerprint"] in shown

    def test_other_seeds_and_sources_are_nobodys_business(self, tree, mounted, tmp_path):
        for number, options in enumerate([("--shard", "0/2"), ("--shard", "0/2", "--shard-seed", "1"), ()]):
            place = tmp_path / f"at{number}"
            place.mkdir()
            cache = mounted(tree, *options, at=place)
            (tree / f"new{number}").write_bytes(b"new")
            assert counters(cache)["shard_warnings"] == []
        assert counters(cache)["shard"] is None
        assert "fingerprint" not in run_cachefs("status", cache.path).stdout

    def test_one_that_fails_is_an_error(self, tree, slow_source, mountpoint, tmp_path):
        """Who divides less than the others comes to another division."""
        slow = slow_source(tree)
        slow.fail("class2", "readdir")
        done = run_cachefs(
            *("mount", slow.path, mountpoint, "--scratch", tmp_path / "scratch", "--shard", "0/2"), check=False
        )
        assert done.returncode == 1
        assert "cannot be divided into shards, because it could not be listed: Input/output error" in done.stderr
        assert not (tmp_path / "scratch").exists()

    def test_a_part_is_not_taken_for_everything(self, tree, mounted, mountpoint, tmp_path):
        mounted(tree, "--shard", "0/2", "--shard-mode", "view", at=mountpoint)
        (tmp_path / "at").mkdir()
        options = ("--scratch", tmp_path / "scratch2", "--shard", "1/2")
        done = run_cachefs("mount", mountpoint, tmp_path / "at", *options, check=False)
        assert done.returncode == 1
        assert (
            f"the source is in the mount at {mountpoint}, which shows shard 0/2 by rank seed 0 view alone"
            in done.stderr
        )

    @pytest.mark.parametrize("path", ["class2", "class2/3.bin"])
    def test_one_in_which_an_entry_fails_is_an_error(self, tree, slow_source, mountpoint, tmp_path, path):
        slow = slow_source(tree)
        slow.fail(path, "lookup")
        options = ("--scratch", tmp_path / "scratch", "--shard", "0/2")
        done = run_cachefs("mount", slow.path, mountpoint, *options, check=False)
        assert done.returncode == 1
        assert "cannot be divided into shards, because it could not be listed: Input/output error" in done.stderr

    def test_directories_that_nobody_may_look_into_are_passed_over(self, tree, slow_source, mounted, mountpoint):
        slow = slow_source(tree)
        slow.fail("class2", "readdir", errno="EACCES")
        cache = mounted(slow.path, "--shard", "0/1", at=mountpoint)
        assert counters(cache)["shard_listed_files"] == (FOLDERS - 1) * FILES

    def test_one_that_takes_long_holds_nobody_up_and_can_be_interrupted(
        self, tree, slow_source, mounted, mountpoint, tmp_path
    ):
        """Other mounts join the scratch meanwhile; nothing is left."""
        slow = slow_source(tree)
        slow.fail("class2", "readdir", hang=True)
        scratch = tmp_path / "scratch"
        options = ("--scratch", scratch, "--shard", "0/2", "--foreground")
        line = [*CACHEFS, *map(str, ("mount", slow.path, mountpoint, *options))]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=clean_environment())
        wait_until(lambda: slow.statistics().operations.get("readdir", 0) > 1, "it lists")
        other = mounted(tree, "--shard", "0/2", scratch=scratch)
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "SIGTERM came before the mount was there" in said
        other.unmount("--purge")
        assert not scratch.exists()


@needs_root
class TestPromotion:
    def test_what_is_promoted_shows_the_share_alone(self, tree, divided):
        ours, theirs = divided(tree, 2, "view", env=PROMOTING)
        shown = names(ours.path)
        read_all(ours.path)
        wait_for(ours, ".")
        assert names(ours.path) == shown
        assert folders(ours.path) == folders(tree)
        assert_served_without_us(ours, ours.path)
        for name in shown:
            assert (ours.path / name).read_bytes() == (tree / name).read_bytes()
        for name in names(theirs.path):
            assert errno_of(os.stat, ours.path / name) == "ENOENT"

    def test_a_part_that_is_promoted_is_not_taken_for_everything(self, tree, mounted, mountpoint, tmp_path):
        cache = mounted(tree, "--shard", "0/2", "--shard-mode", "view", at=mountpoint, env=PROMOTING)
        read_all(mountpoint)
        wait_for(cache, ".")
        (tmp_path / "at").mkdir()
        for source in mountpoint, mountpoint / "class1":
            options = ("--scratch", tmp_path / "scratch2", "--shard", "1/2")
            done = run_cachefs("mount", source, tmp_path / "at", *options, check=False)
            assert done.returncode == 1
            assert f"the source is in the mount at {mountpoint}, which shows shard 0/2 " in done.stderr

    def test_a_directory_that_others_keep_files_of_is_not_promoted(self, tree, mounted, mountpoint):
        for path in (tree / "class0").glob("[1-7].bin"):
            path.unlink()
        cache = mounted(tree, "--shard", "0/2", at=mountpoint, env=PROMOTING)
        read_all(mountpoint)
        wait_until(lambda: counters(cache)["fetches"] == counters(cache)["shard_files"], "its share is fetched")
        kept = {path.stat().st_size for path in map(Path, stored_files(cache.scratch))}
        if (tree / "class0" / "0.bin").stat().st_size in kept:
            wait_until(lambda: "class0" in promoted(cache), "what is complete is promoted")
        wait_until(lambda: "empty" in promoted(cache), "what is complete is promoted")
        assert not {"class1", "class2", "class3", "."} & {*promoted(cache)}
