"""Several mounts on one scratch, killed and restarted at random while all of them read and evict."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.conftest import assert_sound
from tests.harness import clean_environment, wait_until
from tests.mount.observing import Watch, counters

TIMES = 15


@pytest.mark.slow
@pytest.mark.parametrize("mounts", [2, 4])
def test_killed_and_restarted_at_random(mounts, dataset, tmp_path, mounted, readers):
    """Bytes are right, and the capacity is never exceeded, watched from outside all the time."""
    scratch, capacity = tmp_path / "scratch", int(dataset.bytes * 0.8)
    places = [tmp_path / f"mount{number}" for number in range(mounts)]
    for place in places:
        place.mkdir()
    steady = mounted(dataset.path, "--capacity", str(capacity), "--policy", "lru", at=places[0], scratch=scratch)
    steady.expect_log("scratch failed|fetch failed|no room")  # what another mount staged is cut off when that dies
    command = [sys.executable, "-m", "tests.faults.kills", dataset.path]
    with Watch(scratch) as watch:
        reading = [readers(place, number) for number, place in enumerate(places)]
        torments = [
            subprocess.Popen(
                [*command, place, scratch, str(capacity), str(TIMES)],
                env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for place in places[1:]
        ]  # fmt: skip
        for torment in torments:
            said, complaints = torment.communicate(timeout=150)
            assert torment.returncode == 0, complaints
            assert json.loads(said)["kills"] == TIMES
        seen = [one.stop() for one in reading]
    assert not seen[0]["errors"], "who is not killed serves all the time"
    assert all(one["read"] for one in seen)
    assert watch.samples > 10
    assert 0 < watch.largest <= capacity
    dataset.check(places[0])
    assert counters(steady)["evictions"], "there was no need to evict"
    steady.unmount()
    again = mounted(dataset.path, "--capacity", str(capacity), "--policy", "lru", at=places[0], scratch=scratch)
    dataset.check(places[0])  # without company it has counted afresh what the dead had reserved
    assert_sound(again)


def test_four_mounts_fetch_each_file_once(dataset, slow_source, tmp_path, mounted):
    """All of them read all of it at once, whole files in orders of their own, and the source gives each byte once.

    (A reader of parts may have one from the source, where its fetch is far behind.)
    """
    slow = slow_source(dataset.path, latency=0.002)
    places = [tmp_path / f"mount{number}" for number in range(4)]
    for place in places:
        place.mkdir()
    caches = [mounted(slow.path, at=place, scratch=tmp_path / "scratch") for place in places]
    slow.reset()
    with ThreadPoolExecutor(len(places)) as pool:
        for reading in [pool.submit(dataset.check, place, number) for number, place in enumerate(places)]:
            reading.result()
    wait_until(lambda: counters(caches[0])["resident_files"] == len(dataset.content), "all is resident", 60)
    seen = slow.statistics()
    assert {name: seen.file(name).bytes_read for name in dataset.content} == {
        name: len(data) for name, data in dataset.content.items()
    }
    for cache in caches[1:]:
        cache.unmount()
    assert_sound(caches[0])
