"""What is remembered of names and attributes, and for how long (semantics 10)."""

from __future__ import annotations

import os

import pytest

from tests.harness import wait_until
from tests.mount.observing import Reader, asked, errno_of

COUNT = 1000


@pytest.fixture
def slow(source, slow_source):
    (source / "sub/below").mkdir(parents=True)
    (source / "sub/below/file").write_bytes(b"content")
    (source / "sub/link").symlink_to("below/file")
    (source / "wide").mkdir()
    for number in range(COUNT):
        (source / f"wide/{number}").write_bytes(b"x" * number)
    return slow_source(source)


def scan(folder):
    """What `ls -l` asks: a listing, then the attributes of each name."""
    with os.scandir(folder) as entries:
        return {entry.name: os.lstat(entry.path).st_size for entry in entries}


def test_a_second_scan_asks_nothing(slow, mounted, mountpoint):
    """Semantics 10: listings and attributes are remembered: the second scan costs the source nothing."""
    mounted(slow.path, at=mountpoint)
    first = scan(mountpoint / "wide")
    assert first == {str(number): number for number in range(COUNT)}
    slow.reset()
    assert scan(mountpoint / "wide") == first
    assert os.stat(mountpoint / "wide/7").st_size == 7
    assert asked(slow) == 0


def test_looking_at_files_again_asks_nothing(slow, mounted, mountpoint):
    """Semantics 10: attributes of a path are asked for once, of each directory on the way too."""
    mounted(slow.path, at=mountpoint)
    for _ in range(2):
        assert os.stat(mountpoint / "sub/below/file").st_size == 7
        assert os.stat(mountpoint / "sub/link").st_size == 7
    slow.reset()
    for _ in range(10):
        assert os.stat(mountpoint / "sub/below/file").st_size == 7
        assert os.lstat(mountpoint / "sub/link").st_size == len("below/file")
    assert asked(slow) == 0


def test_a_scan_asks_for_each_name_once(slow, mounted, mountpoint):
    """Semantics 10: `ls -l` over 1,000 files asks some 2,000 operations, and no contents."""
    slow.set(latency=0.002)
    mounted(slow.path, at=mountpoint)
    slow.reset()
    assert len(scan(mountpoint / "wide")) == COUNT
    operations = slow.statistics().operations
    assert operations["lookup"] <= 1.1 * COUNT
    assert operations["getattr"] <= 1.1 * COUNT
    assert operations.get("open", 0) == operations.get("read", 0) == 0
    assert operations["readdir"] <= 100


def test_a_scan_of_a_slow_source_asks_in_parallel(slow, mounted, mountpoint, reader):
    """Semantics 10: the scan looks at one name after the other, the source is asked for many at once."""
    slow.set(latency=0.005)
    mounted(slow.path, at=mountpoint)
    order = os.listdir(slow.path / "wide")
    for name in order[50:150]:
        slow.fail(f"wide/{name}", "lookup", hang=True)
    os.listdir(mountpoint / "wide")
    for name in order[:5]:
        os.stat(mountpoint / "wide" / name)
    process: Reader = reader(mountpoint / "wide" / order[50])

    def asked_for():
        seen = slow.statistics()
        return sum(seen.file(f"wide/{name}").lookups > 0 for name in order[50:150])

    wait_until(lambda: asked_for() >= 16, "16 names are asked for at the same time")
    assert process.is_running
    slow.clear_faults()
    assert process.result() == int(order[50])


def test_absence_is_remembered(slow, source, mounted, mountpoint):
    """Semantics 10: a name that is not there is asked for once; after a listing not even that."""
    mounted(slow.path, at=mountpoint)
    for _ in range(5):
        assert errno_of(os.stat, mountpoint / "sub/absent") == "ENOENT"
        assert errno_of(open, mountpoint / "sub/absent", "rb") == "ENOENT"
    assert slow.statistics().file("sub/absent").lookups == 1
    os.listdir(mountpoint / "wide")
    for number in range(20):
        assert not (mountpoint / f"wide/absent {number}").exists()
    assert slow.statistics().file("wide/absent 0").lookups == 0
    (source / "sub/absent").touch()
    assert errno_of(os.stat, mountpoint / "sub/absent") == "ENOENT"


@pytest.mark.parametrize("listed", [False, True], ids=["by name", "listed"])
def test_what_is_new_is_seen_after_the_ttl(slow, source, mounted, mountpoint, listed):
    """Semantics 10: absence, listings and attributes are asked for again after the time-to-live."""
    mounted(slow.path, "--metadata-ttl", "0.2", at=mountpoint)
    if listed:
        assert sorted(os.listdir(mountpoint / "sub")) == ["below", "link"]
    assert errno_of(os.stat, mountpoint / "sub/new") == "ENOENT"
    (source / "sub/new").write_bytes(b"new")
    (source / "sub/link").unlink()
    wait_until(lambda: (mountpoint / "sub/new").exists(), "the new name is seen")
    wait_until(lambda: not os.path.lexists(mountpoint / "sub/link"), "the old name is gone")
    wait_until(lambda: sorted(os.listdir(mountpoint / "sub")) == ["below", "new"], "the listing is new")
    (source / "sub/new").chmod(0o400)
    wait_until(lambda: os.stat(mountpoint / "sub/new").st_mode & 0o777 == 0o400, "the mode is new")


def test_without_a_ttl_everything_is_asked_again(slow, source, mounted, mountpoint):
    """Semantics 10: --metadata-ttl 0 believes nothing for longer than its own answer."""
    mounted(slow.path, "--metadata-ttl", "0", at=mountpoint)
    for number in range(5):
        (source / "sub/counter").write_bytes(b"x" * number)
        assert os.stat(mountpoint / "sub/counter").st_size == number
        assert (mountpoint / "sub/counter").read_bytes() == b"x" * number
        (source / "sub/counter").unlink()
        assert not (mountpoint / "sub/counter").exists()
        assert sorted(os.listdir(mountpoint / "sub")) == ["below", "link"]


def test_a_hit_asks_the_source_nothing(slow, mounted, mountpoint):
    """Semantics 10: within the time-to-live, opening and reading a resident file is local."""
    mounted(slow.path, at=mountpoint)
    assert (mountpoint / "sub/below/file").read_bytes() == b"content"
    slow.reset()
    for _ in range(5):
        assert (mountpoint / "sub/below/file").read_bytes() == b"content"
    assert asked(slow) == 0
