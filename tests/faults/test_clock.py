"""Times that nobody expects: of files, and of the clock."""

from __future__ import annotations

import os
import time

import pytest

from tests.faults.conftest import assert_sound
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
