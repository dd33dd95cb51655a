"""The memory tier: files land in memory, move down when it is full, and go with the mount."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from cachefs.cache.ledger import Ledger
from cachefs.config import Settings
from cachefs.mount.memory import memory_path
from tests.conftest import needs_root
from tests.harness import CACHEFS, clean_environment, detach, run_cachefs, scripted, verify, wait_until
from tests.mount.observing import Watch, counters, opens, stored_files

SIZE = 50_000
READ_ALL = """
import os, random, sys
folder, seed, size = sys.argv[1:]
dice = random.Random(int(seed))
print("reading", flush=True)
while True:
    name = dice.choice(os.listdir(folder))
    data = open(os.path.join(folder, name), "rb").read()
    if data != random.Random(int(name)).randbytes(int(size)):
        open(os.path.join(folder, "..", "wrong"), "w").write(name)
"""


@pytest.fixture
def files(source):
    def make(count):
        for number in range(count):
            (source / f"{number}").write_bytes(random.Random(number).randbytes(SIZE))

    return make


@pytest.fixture
def tier(memory, mounted, source, mountpoint):
    """`tier(MEMORY FILES, SCRATCH FILES, option...)` mounts with so much room in both."""

    def make(above, below, *options, **keywords):
        # 2% of the memory are kept for trades
        sizes = ("--memory", str(int(above * SIZE / 0.979)), "--capacity", str(below * SIZE), "--memory-path", memory)
        keywords.setdefault("at", mountpoint)
        return mounted(source, *sizes, *options, **keywords)

    return make


def read(cache, *numbers):
    for number in numbers:
        assert (cache.path / f"{number}").read_bytes() == random.Random(number).randbytes(SIZE), number


def tiers(cache):
    """What status says of memory and scratch."""
    memory, scratch = counters(cache)["tiers"]
    return memory, scratch


def in_memory(cache):
    return len(stored_files(Path(tiers(cache)[0]["path"])))


def test_files_land_in_memory_and_move_down(files, tier):
    """10 fit above, 10 below: all 20 are hits from then on, wherever they are; nothing is left at the end."""
    files(20)
    cache = tier(10, 10)
    read(cache, *range(10))
    memory, scratch = tiers(cache)
    assert (memory["files"], memory["bytes"], scratch["files"]) == (10, 10 * SIZE, 0)
    assert cache.resident_data_files() == []
    read_until_full(cache, 10, 10)
    said = counters(cache)
    assert said["fetches"] == said["misses"] == 20
    place = Path(said["tiers"][0]["path"])
    assert place.stat().st_mode & 0o777 == 0o700
    before = [tier["hits"] for tier in tiers(cache)]
    for _ in range(2):
        read(cache, *range(20))
    memory, scratch = (tier["hits"] - b for tier, b in zip(tiers(cache), before, strict=True))
    assert (memory, scratch) == (20, 20)
    assert counters(cache)["fetches"] == 20
    cache.unmount()
    assert not place.exists()
    status, words = verify(cache.scratch)
    assert status == 0, words


def test_the_least_recently_used_moves_down(files, tier):
    files(14)
    cache = tier(10, 10)
    read(cache, *range(10))
    read(cache, 0, 1)
    read(cache, 10)
    wait_until(lambda: tiers(cache)[0]["moved_down"], "one moves down")
    wait_until(lambda: tiers(cache)[1]["files"] == 1 + tiers(cache)[0]["moved_down"], "it has")
    before = tiers(cache)[0]["hits"]
    read(cache, 0, 1)
    assert tiers(cache)[0]["hits"] == before + 2, "what was used is in memory still"
    read(cache, 2)
    assert tiers(cache)[0]["hits"] == before + 2, "the oldest is not"
    assert counters(cache)["fetches"] == 11


@pytest.mark.parametrize("policy", ["hold", "lru"])
def test_capacities_are_exact(policy, files, tier):
    """8 readers of three times the room: neither tier ever holds more than it may."""
    files(60)
    cache = tier(10, 10, "--policy", policy)
    place = Path(tiers(cache)[0]["path"])
    order = [random.Random(reader).sample(range(60), 60) for reader in range(8)]
    with Watch(cache.scratch) as below, Watch(place) as above, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda numbers: read(cache, *numbers), order))
    assert 0 < below.largest <= 10 * SIZE
    assert 0 < above.largest <= 10.3 * SIZE
    assert sum(opens(cache)) == 8 * 60

    def is_accounted():
        memory, scratch = tiers(cache)
        found = stored_files(place), stored_files(cache.scratch)
        return [(t["files"], t["bytes"]) for t in (memory, scratch)] == [(len(f), sum(f.values())) for f in found]

    wait_until(is_accounted, "status says what is there")
    assert bool(counters(cache)["evictions"]) == (policy == "lru")


def test_moves_disturb_no_reader(files, tier, mountpoint):
    """Files move all the time, and who reads them gets every byte; one that is open while it moves is read on."""
    files(30)
    cache = tier(5, 15, "--policy", "lru")
    with (
        scripted(READ_ALL, mountpoint, 1, SIZE, says="reading"),
        scripted(READ_ALL, mountpoint, 2, SIZE, says="reading"),
        open(mountpoint / "0", "rb", buffering=0) as held,
    ):
        wait_until(lambda: tiers(cache)[0]["moved_down"] > 100, "they move", 60)
        assert held.read(SIZE) == random.Random(0).randbytes(SIZE)
    assert not (mountpoint.parent / "wrong").exists()
    assert counters(cache)["bypasses"] == 0


def test_what_is_hot_moves_up(files, tier):
    """Under hold, with both tiers full: a file of scratch that is read again and again trades places."""
    files(70)
    cache = tier(60, 10)
    read_until_full(cache, 60, 10)
    hot = next(number for number in range(70) if is_below(cache, number))
    wait_until(lambda: read(cache, hot) or tiers(cache)[0]["moved_up"] == 1, "it moves up")
    wait_until(lambda: [t["files"] for t in tiers(cache)] == [60, 10], "another has moved down")
    before, fetches = tiers(cache)[0]["hits"], counters(cache)["fetches"]
    read(cache, hot)
    assert tiers(cache)[0]["hits"] == before + 1
    for epoch in range(4):
        read(cache, *random.Random(epoch).sample(range(70), 70))
    assert tiers(cache)[0]["moved_up"] == 1, "epochs move nothing"
    assert counters(cache)["fetches"] == fetches == 70


def read_until_full(cache, memory, scratch):
    def is_full():
        read(cache, *range(memory + scratch))  # what is opened in the middle of a move may find room in neither
        return [t["files"] for t in tiers(cache)] == [memory, scratch]

    wait_until(is_full, "both are full")


def is_below(cache, number):
    before = tiers(cache)[1]["hits"]
    read(cache, number)
    return tiers(cache)[1]["hits"] > before


def test_a_full_tmpfs(files, mounted, source, mountpoint, tmp_path_factory):
    """Somebody else fills it while it runs: files land in scratch, and no reader sees an error."""
    if os.geteuid():
        pytest.skip("mounting a tmpfs takes root")
    files(30)
    place = tmp_path_factory.mktemp("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    try:
        cache = mounted(source, "--memory", "3M", "--memory-path", place, at=mountpoint)
        cache.expect_log("fetch failed|memory tier|not moved")
        read(cache, *range(5))
        assert tiers(cache)[0]["files"] == 5
        with open(place / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(10_000))
        read(cache, *range(30))
        read(cache, *range(30))
        assert tiers(cache)[1]["files"] >= 20
        cache.unmount()
        assert os.listdir(place) == ["filler"]
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("then", ["mount", "purge", "run", "umount"])
def test_what_a_crash_leaves_is_reclaimed(then, files, tier, source, mountpoint):
    files(5)
    cache = tier(10, 10)
    read(cache, *range(5))
    place = Path(tiers(cache)[0]["path"])
    assert counters(cache)["resident_files"] == 5
    cache.kill()
    assert len(stored_files(place)) == 5
    if then == "umount":
        cache.unmount()
        assert not place.exists()
        return
    detach(cache.path)
    if then == "mount":
        again = tier(10, 10)
        assert tiers(again)[0]["files"] == 0
        read(again, *range(5))
        again.unmount()
    elif then == "purge":
        run_cachefs("purge", "--scratch", cache.scratch)
    else:
        run_cachefs("run", "--data", source, "--scratch", cache.scratch, "--", "true")
    assert not place.exists()


@pytest.mark.parametrize("by", ["another mount", "purge --memory"])
def test_what_a_killed_job_leaves_is_reclaimed(by, files, tier, tmp_path, memory):
    """Its scratch has gone with the job, as $TMPDIR does; who is alive keeps what is his."""
    files(5)
    other = tmp_path / "other"
    other.mkdir()
    job, living = tier(10, 10), tier(10, 10, at=other, scratch=tmp_path / "his")
    for cache in job, living:
        read(cache, *range(5))
    left, his = (Path(tiers(cache)[0]["path"]) for cache in (job, living))
    job.kill()
    detach(job.path)
    shutil.rmtree(job.scratch)
    assert left.exists()
    if by == "another mount":
        tier(10, 10, scratch=tmp_path / "next").unmount()
    else:
        assert run_cachefs("purge", "--memory", "--memory-path", memory).stdout.startswith("freed 1 memory tier")
    assert not left.exists()
    assert len(stored_files(his)) == 5
    read(living, *range(5))


def test_it_is_removed(files, tier):
    """By one who cleans up: files are fetched again, into scratch."""
    files(10)
    cache = tier(20, 20)
    cache.expect_log("fetch failed|memory tier|not freed|not moved|has been removed")
    read(cache, *range(5))
    shutil.rmtree(tiers(cache)[0]["path"])
    read(cache, *range(10))
    read(cache, *range(10))
    wait_until(lambda: tiers(cache)[1]["files"] >= 5, "they are fetched again")
    cache.unmount()


def test_a_copy_that_was_changed(files, tier):
    files(3)
    cache = tier(10, 10)
    read(cache, *range(3))
    cache.must_log("damaged copy dropped")
    for path in stored_files(Path(tiers(cache)[0]["path"])):
        with open(path, "r+b") as file:
            file.write(b"!")
    read(cache, *range(3))
    assert counters(cache)["fetches"] == 6
    assert tiers(cache)[0]["files"] == 3


def test_a_changed_source(files, tier, source):
    """A new version is fetched, and the old one gives its room back."""
    files(5)
    cache = tier(10, 10, "--metadata-ttl", "0")
    read(cache, *range(5))
    for number in range(5):
        (source / f"{number}").write_bytes(random.Random(number + 100).randbytes(SIZE))
    for number in range(5):
        assert (cache.path / f"{number}").read_bytes() == random.Random(number + 100).randbytes(SIZE)
    wait_until(lambda: tiers(cache)[0]["files"] == 5, "the old ones go")


def both_read(tier, tmp_path, *sizes):
    """Two mounts of a tier, which both have read the first ten files."""
    other = tmp_path / "other"
    other.mkdir()
    one, two = tier(*sizes), tier(*sizes, at=other)
    read(one, *range(10))
    read(two, *range(10))
    return one, two


def test_two_mounts_share_it(files, tier, mounted, source, mountpoint, tmp_path):
    """Each file is fetched once, and it is freed by the last."""
    files(10)
    one, two = both_read(tier, tmp_path, 20, 20)
    assert counters(one)["fetches"] + counters(two)["fetches"] == 10
    place = Path(tiers(one)[0]["path"])
    one.unmount()
    assert place.exists()
    read(two, *range(10))
    assert counters(two)["fetches"] == 0
    two.unmount()
    assert not place.exists()


@needs_root
def test_promotion_brings_files_down(files, tier, mountpoint):
    """A directory can be mounted directly from scratch alone: where there is room it is brought together there."""
    files(20)
    cache = tier(10, 30, env={"CACHEFS_NO_PROMOTE": "0"})
    os.listdir(mountpoint)
    read(cache, *range(20))
    wait_until(lambda: counters(cache)["promoted_files"] == 20, "all is promoted", 60)
    requests = counters(cache)["requests"]
    read(cache, *range(20))
    assert counters(cache)["requests"] == requests
    assert tiers(cache)[0]["files"] == 0


@pytest.mark.parametrize("how", ["SIGTERM", "umount --purge"])
def test_the_end(how, files, tier):
    files(3)
    cache = tier(10, 10)
    read(cache, *range(3))
    place = Path(tiers(cache)[0]["path"])
    if how == "SIGTERM":
        cache.processes[0].terminate()
        wait_until(lambda: not cache.is_mounted(), "it unmounts")
        wait_until(lambda: not cache.processes[0].is_running(), "it ends")
    else:
        cache.unmount("--purge")
        assert not cache.scratch.exists()
    assert not place.exists()


def test_a_run_frees_it(files, source, tmp_path):
    files(3)
    script = "cat 0 1 2 | wc -c; ls /dev/shm | grep -c cachefs-"
    done = run_cachefs(
        "run",
        "--data",
        source,
        "--memory",
        "10M",
        "--scratch",
        tmp_path / "scratch",
        "--",
        "sh",
        "-c",
        script,
        cwd=source,
    )
    assert done.stdout.split()[0] == str(3 * SIZE)
    assert int(done.stdout.split()[1]) >= 1
    assert not (tmp_path / "scratch").exists()


def test_a_run_whose_daemon_is_killed_frees_it(files, source, tmp_path):
    """Also with --keep, which is about scratch."""
    files(3)
    scratch = tmp_path / "scratch"
    place = memory_path(Settings(source, source, scratch))
    ask = f"{sys.executable} -m cachefs status --json {source}"
    take = f"{sys.executable} -c 'import json, sys; print(json.load(sys.stdin)[\"pid\"])'"
    script = f"""
cat {source}/*
ls {place}/files/*/*
kill -9 $({ask} | {take})
until cat {source}/0 > /dev/null 2>&1; do sleep 0.01; done
"""
    options = ("--data", source, "--memory", "10M", "--scratch", scratch, "--keep")
    with open(tmp_path / "said", "wb") as said:
        command = [*CACHEFS, "run", *map(str, options), "--", "sh", "-c", script]
        subprocess.run(command, cwd=tmp_path, stdout=said, check=True, timeout=60, env=clean_environment())
    assert (tmp_path / "said").read_bytes().count(b"/files/") >= 1
    assert not place.exists()
    assert scratch.exists()
    run_cachefs("purge", "--scratch", scratch)


def test_what_is_hot_and_of_another_mount_moves_up(files, tier, mounted, source, tmp_path):
    """This mount does not know its checksum."""
    files(11)
    other = tmp_path / "other"
    other.mkdir()
    cache = tier(60, 60)
    read(cache, 10)
    read(mounted(source, at=other), *range(10))
    for _ in range(5):
        read(cache, *range(10))
    wait_until(lambda: tiers(cache)[1]["files"] == 0, "all have moved up")
    assert tiers(cache)[0]["files"] == 11
    assert counters(cache)["fetches"] == 1


def test_a_large_file_that_another_mount_fetches(memory, slow_source, source, mounted, mountpoint, tmp_path):
    """Who waits for it sees it come, and nothing stays reserved."""
    data = os.urandom(30 << 20)
    (source / "big").write_bytes(data)
    slow = slow_source(source, latency=0.001, bandwidth=2e6)
    other = tmp_path / "other"
    other.mkdir()
    sizes = ("--memory", "100M", "--memory-path", memory)
    one, two = (mounted(slow.path, *sizes, at=path) for path in (mountpoint, other))
    with open(mountpoint / "big", "rb", buffering=0) as first, open(other / "big", "rb", buffering=0) as second:
        assert first.read(1000) == data[:1000]
        began = time.monotonic()
        assert second.read(1000) == data[:1000]
        assert time.monotonic() - began < 5
        wait_until(lambda: counters(one)["fetches"] == 1, "it is fetched", 60)
    assert counters(two)["fetch_errors"] == counters(two)["fetches"] == 0
    place = os.open(tiers(one)[0]["path"], os.O_RDONLY)
    ledger = Ledger(place, "", "")
    wait_until(lambda: ledger.reserved() == 0, "nothing is reserved")
    assert ledger.stored() == (len(data), 1)
    ledger.close()
    os.close(place)


@pytest.mark.parametrize("what", ["nothing", "another user's"])
def test_a_purge_without_the_tier(what, files, tier):
    """Of a scratch whose note of it is empty, or where somebody else has put something in its place."""
    files(1)
    cache = tier(10, 10)
    read(cache, 0)
    place = Path(tiers(cache)[0]["path"])
    cache.unmount()
    if what == "nothing":
        (cache.scratch / "memory").write_bytes(b"")
        run_cachefs("purge", "--scratch", cache.scratch, cwd=cache.scratch)
    elif os.geteuid():
        pytest.skip("giving away takes root")
    else:
        place.mkdir()
        os.chown(place, 12345, 12345)
        run_cachefs("purge", "--scratch", cache.scratch)
        place.rmdir()
    assert not cache.scratch.exists()


def test_warming_moves_nothing(files, tier):
    """What is fetched ahead takes free room alone: nothing moves down, and is evicted below, for it."""
    files(60)
    cache = tier(10, 30, "--policy", "lru")
    read_until_full(cache, 10, 30)
    time.sleep(2)  # what was asked for may still have something moved for it
    before = counters(cache)["evictions"], tiers(cache)[0]["moved_down"]
    for _ in range(5):
        run_cachefs("warm", cache.path, check=False)
    time.sleep(1.5)
    assert (counters(cache)["evictions"], tiers(cache)[0]["moved_down"]) == before


def test_an_old_version_does_not_move_down(files, tier, source):
    """Where the new one has found no room in memory."""
    files(30)
    cache = tier(10, 12, "--policy", "hold", "--metadata-ttl", "0")
    read(cache, *range(10))
    data = random.Random(100).randbytes(SIZE)
    (source / "0").write_bytes(data)
    assert (cache.path / "0").read_bytes() == data
    time.sleep(1.5)
    read(cache, 10)
    time.sleep(1.5)
    read(cache, *range(11, 30))
    time.sleep(1.5)
    fetches = counters(cache)["fetches"]
    assert (cache.path / "0").read_bytes() == data
    assert counters(cache)["fetches"] == fetches
    assert counters(cache)["evictions"] == 0


@needs_root
def test_promotion_beside_an_open_file(memory, files, source, mounted, mountpoint):
    """The least recently used one is open, and fills a batch alone."""
    files(20)
    (source / "big").write_bytes(os.urandom(20 << 20))
    sizes = ("--memory", "60M", "--memory-path", memory)
    cache = mounted(source, *sizes, at=mountpoint, env={"CACHEFS_NO_PROMOTE": "0"})
    os.listdir(mountpoint)
    with open(mountpoint / "big", "rb") as held:
        held.read()
        read(cache, *range(20))
        wait_until(lambda: counters(cache)["promoted_files"] == 21, "all is promoted", 30)


@pytest.mark.parametrize("target", ["disk", "scratch", "source"])
def test_a_link_to_what_is_not_in_memory(target, source, mountpoint, memory, tmp_path):
    (tmp_path / target).mkdir(exist_ok=True, mode=0o700)
    link = memory / "link"
    link.symlink_to(tmp_path / target)
    options = ("--scratch", tmp_path / "scratch", "--memory", "1M", "--memory-path", link)
    done = run_cachefs("mount", source, mountpoint, *options, check=False)
    link.unlink()
    if not done.returncode:
        run_cachefs("umount", mountpoint)
    assert done.returncode == 2
    assert os.listdir(source) == []


def test_a_place_that_was_full_once(source, mountpoint, tmp_path_factory, tmp_path):
    """A mount that was refused for that leaves nothing that keeps the next one from it."""
    if os.geteuid():
        pytest.skip("mounting a tmpfs takes root")
    place = tmp_path_factory.mktemp("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    try:
        for size in 10_000, 1:
            with open(place / f"{size}", "wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(size))
        command = ("mount", source, mountpoint, "--scratch", tmp_path / "s", "--memory", "1M", "--memory-path", place)
        assert run_cachefs(*command, check=False).returncode == 1
        for size in 10_000, 1:
            (place / f"{size}").unlink()
        run_cachefs(*command)
        run_cachefs("umount", mountpoint)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_what_a_mount_leaves_to_another_moves_down(files, tier, tmp_path):
    """What the second has opened counts as its own when the first is gone."""
    files(40)
    one, two = both_read(tier, tmp_path, 10, 40)
    one.unmount()
    read(two, *range(20, 40))
    wait_until(lambda: tiers(two)[0]["moved_down"], "they move down")


def test_what_a_mount_leaves_gives_way(files, tier, mounted, source, tmp_path):
    """What nobody who remains has opened: it cannot be moved, for its path is not known. Also of another dataset."""
    files(20)
    other, elsewhere = tmp_path / "other", tmp_path / "elsewhere"
    other.mkdir()
    shutil.copytree(source, elsewhere)
    one = tier(10, 4)
    sizes = ("--memory", str(int(10 * SIZE / 0.979)), "--capacity", str(4 * SIZE))
    two = mounted(elsewhere, *sizes, "--memory-path", Path(tiers(one)[0]["path"]).parent, at=other)
    read(two, *range(6))
    read(one, *range(4))
    two.unmount()

    def is_all_there():
        before = counters(one)["hits"]
        read(one, *range(14))
        return counters(one)["hits"] == before + 14

    wait_until(is_all_there, "it has all the room")


def test_what_was_open_while_it_moved_gives_its_room_back(files, tier, mountpoint):
    """And no worker keeps a descriptor of it."""
    files(30)
    cache = tier(10, 25)
    read(cache, *range(10))
    place = Path(tiers(cache)[0]["path"])
    with ExitStack() as stack:
        for number in range(10):
            stack.enter_context(open(mountpoint / f"{number}", "rb"))
        wait_until(lambda: read(cache, 10) or tiers(cache)[0]["moved_down"], "some are in both")
        read(cache, *range(11, 15))
        time.sleep(1.5)
        read(cache, *range(15, 20))
        time.sleep(1.5)
    read(cache, *range(20, 30))
    time.sleep(1.5)
    read(cache, *range(20, 30))

    def kept_open():
        workers = psutil.Process(cache.pid).children(recursive=True)
        links = [link for worker in workers for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        return [link for link in links if str(place / "files") in os.readlink(link) and len(link.resolve().name) == 48]

    assert not kept_open()
