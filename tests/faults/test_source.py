"""A source that fails, hangs, comes back and changes under readers: what is resident is served, nothing is mixed up."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.faults.conftest import Dataset, assert_sound
from tests.harness import wait_until
from tests.mount.observing import counters, errno_of


@pytest.fixture
def slow(dataset: Dataset, slow_source):
    return slow_source(dataset.path, latency=0.0005)


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EACCES"])
def test_one_file_fails(code, dataset, slow, mounted, mountpoint, readers):
    """Its readers get that error, all others every byte, and it is served when the source is well again."""
    cache = mounted(slow.path, at=mountpoint)
    slow.fail("middle", "open", errno=code)
    reading = readers(mountpoint)
    wait_until(lambda: counters(cache)["resident_files"] == len(dataset.content) - 1, "all others are resident")
    assert errno_of((mountpoint / "middle").read_bytes) == code
    slow.clear_faults()
    assert (mountpoint / "middle").read_bytes() == dataset.content["middle"]
    assert set(reading.stop()["errors"]) <= {code}
    assert_sound(cache)


def test_a_hundred_times_slower(dataset, slow, mounted, mountpoint, readers):
    cache = mounted(slow.path, at=mountpoint)
    slow.set(latency=0.05)
    reading = readers(mountpoint)
    wait_until(lambda: counters(cache)["resident_files"] > 10, "it goes on", 60)
    assert not reading.stop()["errors"]
    slow.set(latency=0)
    dataset.check(mountpoint)
    assert_sound(cache)


def test_one_file_hangs(dataset, slow, mounted, mountpoint, readers):
    """Its readers get EIO after --source-timeout; everybody else goes on."""
    cache = mounted(slow.path, "--source-timeout", "1", at=mountpoint)
    slow.fail("large", "open", hang=True)
    reading = [readers(mountpoint, seed) for seed in range(3)]
    wait_until(lambda: counters(cache)["resident_files"] == len(dataset.content) - 1, "all others are resident", 60)
    assert errno_of((mountpoint / "large").read_bytes) == "EIO"
    seen = [one.stop() for one in reading]
    assert {name for one in seen for name in one["errors"]} <= {"EIO"}
    assert all(one["read"] > 20 for one in seen)
    slow.clear_faults()
    dataset.check(mountpoint)
    assert_sound(cache)


@pytest.mark.parametrize("code", ["ENOTCONN", "ESTALE", "EIO"])
def test_disconnected_and_back(code, dataset, slow, mounted, mountpoint, readers):
    """Resident files are read while it is away, all others when it is back."""
    cache = mounted(slow.path, at=mountpoint)
    for name in [name for name in dataset.content if name.startswith("0/")]:
        (mountpoint / name).read_bytes()
    slow.fail(errno=code)
    for name, data in dataset.content.items():
        if name.startswith("0/"):
            assert (mountpoint / name).read_bytes() == data
    assert errno_of((mountpoint / "large").read_bytes) == code
    reading = readers(mountpoint)
    wait_until(lambda: counters(cache)["hits"] > 100, "resident files are served")
    slow.clear_faults()
    wait_until(lambda: counters(cache)["resident_files"] == len(dataset.content), "all is served again", 60)
    assert set(reading.stop()["errors"]) <= {code}
    dataset.check(mountpoint)
    assert_sound(cache)


@pytest.mark.parametrize("change", ["a file deleted", "a directory emptied", "a directory replaced"])
def test_a_tree_that_changes(change, source, slow_source, mounted, mountpoint):
    """After --metadata-ttl the mount shows what the source shows, and no byte of what was there before."""
    for folder, text in ("data", b"old "), ("new", b"new!"):
        (source / folder / "sub").mkdir(parents=True)
        for number in range(10):
            (source / folder / "sub" / str(number)).write_bytes(text * 5000)
    slow = slow_source(source)
    cache = mounted(slow.path, "--metadata-ttl", "0.5", at=mountpoint)
    data = mountpoint / "data/sub"
    for number in range(10):
        assert (data / str(number)).read_bytes() == b"old " * 5000
    if change == "a file deleted":
        (source / "data/sub/3").unlink()
        expected = {str(number): b"old " * 5000 for number in range(10) if number != 3}
    elif change == "a directory emptied":
        shutil.rmtree(source / "data/sub")
        (source / "data/sub").mkdir()
        expected = {}
    else:
        (source / "data").rename(source / "away")
        (source / "new").rename(source / "data")
        expected = {str(number): b"new!" * 5000 for number in range(10)}

    def shown() -> dict[str, bytes]:
        try:
            return {name: (data / name).read_bytes() for name in os.listdir(data)}
        except OSError:
            return {"": b"in between"}

    wait_until(lambda: shown() == expected, "the mount shows what the source shows", 20)
    assert_sound(cache)
