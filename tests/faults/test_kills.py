"""SIGKILL of the daemon at each step of its work, and at random times: the next mount of the same scratch serves right
bytes, counts what is there, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.conftest import needs_root
from tests.faults.armed import EVICTING, FETCHING, MOVING, PROMOTING, PURGING
from tests.faults.conftest import Dataset, assert_sound, run_armed
from tests.harness import clean_environment, lives, run_cachefs, verify, wait_until
from tests.mount.observing import counters


def die_at(point, dataset: Dataset, mountpoint, scratch, readers, options):
    """Mount with a fault point, have it read, and wait for the daemon's death; the mount is taken away."""
    done = run_armed(point, "mount", dataset.path, mountpoint, "--scratch", scratch, *options)
    assert done.returncode == 0, done.stderr
    daemon = psutil.Process(json.loads(run_cachefs("status", mountpoint, "--json").stdout)["pid"])
    everything = [daemon, *daemon.children(recursive=True)]
    reading = readers(mountpoint)
    try:
        if point == "while it leaves":
            wait_until(lambda: len(list((scratch / "files").rglob("*"))) > 40, "something is resident")
            daemon.terminate()
        wait_until(lambda: not any(map(lives, everything)), f"it dies {point}", 60)
    finally:
        seen = reading.stop()
        run_cachefs("umount", mountpoint, check=False)
    return seen


@pytest.mark.parametrize("point", FETCHING)
def test_in_a_fetch(point, dataset, mountpoint, tmp_path, mounted, readers):
    scratch = tmp_path / "scratch"
    die_at(point, dataset, mountpoint, scratch, readers, ("--no-promote", "--prefetch", "off"))
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)


@pytest.mark.parametrize("point", EVICTING)
def test_in_an_eviction(point, dataset, mountpoint, tmp_path, mounted, readers):
    scratch = tmp_path / "scratch"
    room = ("--capacity", str(int(dataset.bytes * 0.9)), "--policy", "lru")
    die_at(point, dataset, mountpoint, scratch, readers, (*room, "--no-promote", "--prefetch", "off"))
    cache = mounted(dataset.path, *room, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    assert sum(path.stat().st_size for path in cache.resident_data_files()) <= int(dataset.bytes * 0.9)
    assert_sound(cache)


@pytest.mark.parametrize("point", MOVING)
def test_in_a_move(point, dataset, mountpoint, tmp_path, mounted, memory, readers):
    """From memory to scratch: the memory tier goes with the dead mount."""
    scratch = tmp_path / "scratch"
    options = ("--memory", str(int(dataset.bytes * 0.1)), "--memory-path", memory, "--policy", "hold")
    die_at(point, dataset, mountpoint, scratch, readers, (*options, "--no-promote", "--prefetch", "off"))
    assert os.listdir(memory) == []
    cache = mounted(dataset.path, *options, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    assert_sound(cache)


@needs_root
@pytest.mark.parametrize("point", PROMOTING)
def test_in_a_promotion(point, dataset, mountpoint, tmp_path, mounted, readers):
    scratch = tmp_path / "scratch"
    die_at(point, dataset, mountpoint, scratch, readers, ("--prefetch", "all"))
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)


@pytest.mark.parametrize("point", PURGING)
def test_in_a_purge(point, dataset, mountpoint, tmp_path, mounted):
    """A purge that was killed is gone on with by the next; or a mount uses what it has left."""
    scratch = tmp_path / "scratch"
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    cache.unmount()
    assert run_armed(point, "purge", "--scratch", scratch).returncode == -9
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)
    assert run_armed(point, "purge", "--scratch", scratch).returncode == -9
    run_cachefs("purge", "--scratch", scratch)
    assert not scratch.exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("times", "has_memory"), [(200, False), (60, True)], ids=["scratch", "memory"])
def test_at_random_times(times, has_memory, dataset, mountpoint, tmp_path, mounted, memory):
    """One scratch through all of it, of which a third has no room, so that it evicts as well; looked at after each.

    And the same with a memory tier, from which it moves files down, and whose files go with it.
    """
    scratch = tmp_path / "scratch"
    capacity = str(int(dataset.bytes * 0.7))
    tier = ("--memory", str(int(dataset.bytes * 0.2)), "--memory-path", memory) if has_memory else ()
    command = [
        sys.executable,
        "-m",
        "tests.faults.kills",
        dataset.path,
        mountpoint,
        scratch,
        capacity,
        str(times),
        *tier,
    ]
    done = subprocess.run(
        [*command, "--checked"], env=clean_environment(), capture_output=True, text=True, check=False, timeout=380
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["kills"] == times
    assert not said["wrong"]
    assert said["read"] > times, "nothing was read meanwhile"
    assert said["mounts"] > times // 4
    assert said["copies"] > (times if has_memory else 5 * times)
    _, said = verify(scratch)  # it mends nothing: the next mount has to
    assert "its content is not" not in said, said
    assert "its size is not" not in said, said
    cache = mounted(dataset.path, "--capacity", capacity, "--policy", "lru", *tier, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)
    assert os.listdir(scratch / "staging") == os.listdir(memory) == []


def test_two_mounts_of_a_memory_tier(dataset, mountpoint, tmp_path, mounted, memory, readers):
    """Files move under the readers of both; one is killed again and again, and the other's see no error."""
    scratch, other = tmp_path / "scratch", tmp_path / "other"
    other.mkdir()
    dice = random.Random(3)
    sizes = ("--memory", str(int(dataset.bytes * 0.07)), "--capacity", str(int(dataset.bytes * 0.12)))
    options = (*sizes, "--memory-path", memory, "--policy", "lru", "--no-promote", "--source-timeout", "20")
    living = mounted(dataset.path, *options, at=other, scratch=scratch)
    reading = readers(other)
    for _ in range(12):
        dying = mounted(dataset.path, *options, at=mountpoint, scratch=scratch)
        its = readers(mountpoint, seed=dice.randrange(1000))
        time.sleep(dice.uniform(0.2, 1))
        dying.kill()
        its.stop()
        dying.unmount()
    seen = reading.stop()
    assert not seen["errors"]
    dataset.check(other)
    memory_tier, _ = counters(living)["tiers"]
    assert memory_tier["moved_down"] > 50
    (place,) = memory.iterdir()
    for path in (path for tier in (place, scratch) for path in (tier / "files").rglob("*")):
        with suppress(FileNotFoundError):  # it has moved
            assert path.is_dir() or path.read_bytes() in dataset.content.values(), path
    living.unmount()
    assert os.listdir(memory) == os.listdir(scratch / "staging") == []
    assert verify(scratch)[0] == 0


@needs_root
def test_the_connection_is_aborted(dataset, mountpoint, tmp_path, mounted, readers):
    """By the administrator, through /sys/fs/fuse/connections: the daemon ends in order."""
    control = tmp_path / "control"
    control.mkdir()
    cache = mounted(dataset.path, at=mountpoint, scratch=tmp_path / "scratch")
    reading = readers(mountpoint)
    wait_until(lambda: cache.count("misses") > 5, "readers are served")
    device = os.stat(mountpoint).st_dev
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        (control / str(os.minor(device)) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", control], check=True)
    wait_until(lambda: not any(map(lives, cache.processes)), "it ends")
    reading.stop()
    log = next((tmp_path / "scratch/logs").iterdir()).read_text()
    assert "Traceback" not in log
    assert not cache.is_mounted()
    again = mounted(dataset.path, at=mountpoint, scratch=tmp_path / "scratch")
    dataset.check(mountpoint)
    assert_sound(again)
