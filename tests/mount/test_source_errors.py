"""Errors of the source are the reader's, and a source that hangs stops nothing else (semantics 9)."""

from __future__ import annotations

import os
import subprocess

import psutil
import pytest

from tests.harness import CACHEFS, clean_environment, over_a_fuse_mount, run_cachefs, wait_until
from tests.mount.observing import Reader, counters, errno_of, opens

SIZE = 110_000


@pytest.fixture
def slow(source, slow_source):
    (source / "sub").mkdir()
    for name in ("file", "good", "sub/file"):
        (source / name).write_bytes(name.encode() * (SIZE // len(name)))
    (source / "link").symlink_to("file")
    return slow_source(source)


@pytest.mark.parametrize("size", [SIZE, 5_000_000], ids=["small", "large"])
@pytest.mark.parametrize("code", ["EIO", "EACCES", "ENOMEM", "ETIMEDOUT"])
@pytest.mark.parametrize("operation", ["lookup", "getattr", "open", "read"])
def test_the_errno_is_the_sources_and_not_cached(slow, source, mounted, mountpoint, operation, code, size):
    """Semantics 9: what the source answers reaches the reader, twice; when it answers again, so do we."""
    (source / "file").write_bytes(b"x" * size)
    cache = mounted(slow.path, at=mountpoint)
    slow.fail("file", operation, code)
    for _ in range(2):
        # the kernel makes EIO of a failed read in the page cache, and of a failed getattr in the middle of an open
        assert errno_of((mountpoint / "file").read_bytes) in ({code, "EIO"} if operation == "read" else {code})
    assert counters(cache)["resident_files"] == 0
    slow.clear_faults()
    assert (mountpoint / "file").read_bytes() == b"x" * size
    wait_until(lambda: counters(cache)["resident_files"] == 1, "the file is resident")


@pytest.mark.parametrize(
    ("operation", "pattern", "call"),
    [
        ("readdir", "sub", lambda root: os.listdir(root / "sub")),
        ("readdir", ".", os.listdir),
        ("readlink", "link", lambda root: os.readlink(root / "link")),
        ("lookup", "sub", lambda root: os.listdir(root / "sub")),
        ("lookup", "sub", lambda root: os.stat(root / "sub/file")),
        ("statfs", ".", os.statvfs),
    ],
)
def test_errors_of_metadata(slow, mounted, mountpoint, operation, pattern, call):
    """Semantics 9: listings, links, directories on the way, statfs: the source's errno, and not cached."""
    mounted(slow.path, at=mountpoint)
    slow.fail(pattern, operation, "EREMOTEIO")
    assert errno_of(call, mountpoint) == "EREMOTEIO"
    slow.clear_faults()
    call(mountpoint)


def test_an_error_in_the_middle_of_a_file(slow, source, mounted, mountpoint):
    """Semantics 9: the bytes before the bad place, an error at it, the rest after it heals: with one handle."""
    data = os.urandom(6_000_000)
    (source / "file").write_bytes(data)
    cache = mounted(slow.path, at=mountpoint)
    slow.fail("file", "read", "EIO", after_bytes=4_000_000)
    fd = os.open(mountpoint / "file", os.O_RDONLY)
    try:
        assert errno_of(os.pread, fd, 1000, 5_000_000) == "EIO"
        wait_until(lambda: counters(cache)["fetch_errors"] == 1, "the fetch is over: who waits for one has its error")
        slow.clear_faults()
        assert os.pread(fd, 1000, 5_000_000) == data[5_000_000:5_001_000]
    finally:
        os.close(fd)
    assert (mountpoint / "file").read_bytes() == data


def test_an_error_of_a_bypass(slow, mounted, mountpoint):
    """Semantics 9: also where the source serves."""
    cache = mounted(slow.path, "--capacity", "1K", at=mountpoint)
    for name, operation in ("file", "open"), ("good", "read"):  # the page cache has a file once it was read
        slow.fail(name, operation, "EIO")
        assert errno_of((mountpoint / name).read_bytes) == "EIO"
        slow.clear_faults()
        assert len((mountpoint / name).read_bytes()) == SIZE
    assert opens(cache)[1] == 0


@pytest.mark.parametrize("operation", ["open", "read", "lookup"])
def test_the_reader_of_a_hung_file_gets_an_error(slow, mounted, mountpoint, reader, operation):
    """Semantics 9: after --source-timeout the reader has EIO, and so has the next one; then the source heals."""
    mounted(slow.path, "--source-timeout", "1", at=mountpoint)
    slow.fail("file", operation, hang=True)
    for number in range(2):
        process: Reader = reader(mountpoint / "file")
        wait_until(lambda process=process: not process.is_running, f"reader {number} has an answer", 20)
        assert process.result() == "EIO"
    slow.clear_faults()
    assert len((mountpoint / "file").read_bytes()) == SIZE


def test_a_hung_source_stops_nothing_else(slow, mounted, mountpoint, reader):
    """Semantics 9: while the source hangs for good: resident files, status and umount --lazy work."""
    cache = mounted(slow.path, "--source-timeout", "0", at=mountpoint)
    assert len((mountpoint / "good").read_bytes()) == SIZE
    slow.fail(hang=True)
    hung = [reader(mountpoint / "file") for _ in range(2)]
    wait_until(lambda: slow.statistics().file("file").lookups >= 1, "the source is asked")
    hung.append(reader(mountpoint / "sub/file"))  # later: a source looks up one name of a directory at a time
    assert len((mountpoint / "good").read_bytes()) == SIZE
    assert cache.status()["hits"] == 1
    assert all(process.is_running for process in hung)
    for process in hung:
        process.kill()
    run_cachefs("umount", mountpoint, "--lazy")  # the kernel keeps killed readers until they are answered
    assert not cache.is_mounted()
    slow.clear_faults()  # only now can the workers end: the kernel does not let go of what the source has not answered


def test_hung_fetches_stop_nothing_else(slow, source, mounted, mountpoint, reader):
    """Semantics 9: more hung fetches than there are workers: resident files are served, umount --lazy works."""
    for number in range(40):
        (source / f"hung {number}").write_bytes(b"x" * 1000)
    cache = mounted(slow.path, "--source-timeout", "0", at=mountpoint)
    assert len((mountpoint / "good").read_bytes()) == SIZE
    slow.fail("hung *", "open", hang=True)
    hung = [reader(mountpoint / f"hung {number}") for number in range(40)]
    wait_until(lambda: slow.statistics().operations["open"] >= 17, "the workers are busy")
    with open(mountpoint / "good", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(file.read()) == SIZE
    assert cache.status()["hits"] == 1
    for process in hung:
        process.kill()
    run_cachefs("umount", mountpoint, "--lazy")  # the kernel keeps killed readers until they are answered
    assert not cache.is_mounted()
    slow.clear_faults()  # only now can the workers end: the kernel does not let go of what the source has not answered


@pytest.fixture
def command(slow):
    """`command(...)`: the exit status of a command of ours, None if it hangs; what hangs ends with the test."""
    made = []

    def run(*arguments):
        words = [*CACHEFS, *map(str, arguments)]
        made.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, env=clean_environment()))
        try:
            wait_until(lambda: made[-1].poll() is not None, "the command ends", 15)
        except AssertionError:
            return None
        return made[-1].returncode

    yield run
    slow.clear_faults()
    for process in made:
        process.kill()
        process.wait()


@over_a_fuse_mount
@pytest.mark.parametrize("place", [".", "sub"], ids=["over the whole source", "over a directory inside it"])
@pytest.mark.parametrize("ttl", ["3600", "0"])
def test_status_and_umount_over_a_hung_source(slow, mounted, command, place, ttl):
    """Semantics 9: mounted over the data path, the source hangs for good: status and umount answer all the same.

    The way to a directory inside leads through the source, and the kernel has to go it to unmount (a source that
    keeps names in the kernel for a while, as network file systems do, is not asked): there umount comes after.
    """
    path = slow.path / place
    cache = mounted(path, "--source-timeout", "0", "--metadata-ttl", ttl)
    assert (path / "file").read_bytes()
    slow.fail(hang=True)
    assert command("status", path, "--json") == 0
    if place != ".":
        slow.clear_faults()
    assert command("umount", path) == 0
    assert not cache.is_mounted()


def test_what_was_known_is_believed_while_the_source_hangs(slow, mounted, mountpoint):
    """Semantics 9: a resident file stays readable when its metadata are due again and nobody answers."""
    cache = mounted(slow.path, "--source-timeout", "1", "--metadata-ttl", "0.2", at=mountpoint)
    cache.expect_log("metadata believed longer")
    assert len((mountpoint / "file").read_bytes()) == SIZE
    slow.fail(hang=True)
    before = slow.statistics().operations["lookup"]
    wait_until(lambda: os.stat(mountpoint / "file") and slow.statistics().operations["lookup"] > before, "it was asked")
    assert len((mountpoint / "file").read_bytes()) == SIZE
    assert counters(cache)["fetches"] == 1
    slow.clear_faults()


def test_a_slow_source_is_no_error(slow, mounted, mountpoint):
    """Semantics 9: a source that takes its time, but less than the time-out an operation, is waited for."""
    cache = mounted(slow.path, "--source-timeout", "3", at=mountpoint)
    slow.set(bandwidth=30_000)  # some four seconds for the file
    slow.fail("file", "open", delay=1.5)
    with open(mountpoint / "file", "rb") as file:
        slow.set(bandwidth=None)
        assert len(file.read()) == SIZE
    assert counters(cache)["fetch_errors"] == 0


@pytest.mark.parametrize("operation", ["lookup", "getattr", "open", "read"])
def test_a_worker_that_is_killed_costs_the_reader_no_error(slow, source, mounted, mountpoint, reader, operation):
    """The out-of-memory killer takes what it likes: the reader gets what it would have got without us."""
    cache = mounted(slow.path, at=mountpoint)
    cache.expect_log("a worker was killed|fetch failed")
    os.listdir(mountpoint)
    slow.fail("file", operation, delay=0.5, count=1)
    slow.reset()
    reading = reader(mountpoint / "file")
    wait_until(lambda: slow.statistics().operations.get(operation), "the source is asked")
    server = psutil.Process(cache.pid).children()[0]
    for worker in server.children():
        worker.kill()
    wait_until(lambda: not reading.is_running, "the reader ends")
    assert reading.result() == SIZE
    assert (mountpoint / "file").read_bytes() == (source / "file").read_bytes()
