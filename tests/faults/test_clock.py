"""Times that nobody expects: of files, and of the clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import assert_sound
from tests.harness import clean_environment, run_cachefs, verify
from tests.mount.observing import counters, opens

DAY = 86_400
TIMES = {
    "zero": 0,
    "before 1970": -3 * DAY,
    "long ago": -(2**31) + 1,
    "next year": time.time() + 365 * DAY,
    "2200": 7.2e9,
}


@pytest.mark.parametrize("when", TIMES.values(), ids=TIMES)
def test_times_of_files(when, source, mounted, mountpoint):
    """A file of that time is fetched once, and a hit from then on, also in the next mount."""
    for name in "one", "two":
        (source / name).write_bytes(name.encode() * 40_000)
        os.utime(source / name, ns=(int(when) * 10**9 + 123_456_789,) * 2)
    for fetches in 2, 0:
        cache = mounted(source, at=mountpoint)
        for _ in range(3):
            for name in "one", "two":
                assert (mountpoint / name).read_bytes() == name.encode() * 40_000
                assert (mountpoint / name).stat().st_mtime_ns == (source / name).stat().st_mtime_ns
        assert opens(cache)[2] == 0
        assert counters(cache)["fetches"] == fetches
        assert_sound(cache)


@pytest.mark.parametrize("days", [-400, 400])
def test_the_clock_is_set(days, dataset, mountpoint, tmp_path, mounted):
    """Far back or forward, while it is mounted with a cache that evicts, and back again in the next mount."""
    clock, scratch = tmp_path / "clock", tmp_path / "scratch"
    room = ("--capacity", str(int(dataset.bytes * 0.8)), "--policy", "lru")
    clock.write_text("0")
    command = [sys.executable, "-m", "tests.faults.clocked", clock, "mount", dataset.path, mountpoint]
    options = ["--scratch", scratch, "--no-promote", "--prefetch", "off", *room]
    subprocess.run([*map(str, [*command, *options])], env=clean_environment(), check=True)
    dataset.check(mountpoint)
    clock.write_text(str(days * DAY))
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    run_cachefs("umount", mountpoint)
    status, said = verify(scratch)
    assert status == 0, said
    cache = mounted(dataset.path, *room, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    assert counters(cache)["evictions"]
    assert_sound(cache)
