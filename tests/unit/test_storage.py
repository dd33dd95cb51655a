"""Complete and staged files of a scratch directory, and the locks that keep mounts out of each other's way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from contextlib import contextmanager

import pytest

from cachefs.cache.storage import GONE, IN_USE, is_same_time
from cachefs.errors import ChangedCopyError, StorageError
from tests.unit.conftest import BOOT, EARLIER_BOOT, put

NAME = bytes(range(24))
OTHER = bytes(range(1, 25))


def content_of(fd):
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


@contextmanager
def another_process(work):
    """`work()` in a child that keeps what it took until the block ends; then it is killed and gone."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            os.write(writing, b"x")
            signal.pause()
        finally:
            os._exit(status)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x", "the other process failed"
        yield
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_file_is_there_when_it_is_committed_and_not_before(storage):
    fd = storage.stage(NAME)
    os.write(fd, b"half")
    assert storage.open(NAME) is None
    assert not storage.has(NAME)
    assert storage.frontier(NAME) == 4
    assert content_of(storage.open_staged(NAME)) == b"half"
    os.write(fd, b" and half")
    storage.commit(NAME)
    os.close(fd)
    assert storage.has(NAME)
    assert content_of(storage.open(NAME)) == b"half and half"
    assert storage.open_staged(NAME) is None
    assert storage.frontier(NAME) == 0
    assert list(storage.scan()) == [(NAME, BOOT, 13)]


def test_an_empty_file_is_a_file(storage):
    put(storage, NAME, b"")
    assert content_of(storage.open(NAME)) == b""
    assert list(storage.scan()) == [(NAME, BOOT, 0)]


def test_what_is_not_there_is_none_and_frees_nothing(storage):
    assert storage.open(NAME) is None
    assert storage.open_earlier(NAME, EARLIER_BOOT) is None
    assert storage.open_staged(NAME) is None
    assert storage.remove(NAME) == GONE
    assert storage.remove(NAME, EARLIER_BOOT) == GONE
    storage.discard_held(NAME)
    storage.discard_staged(NAME)
    storage.discard_abandoned()
    assert list(storage.scan()) == []


def test_one_copies_at_a_time(storage, storage_of):
    with another_process(lambda: storage.stage(NAME)):
        assert storage.stage(NAME) is None
        assert storage_of(BOOT).stage(NAME) is None
        storage.discard_staged(NAME)
        storage.discard_abandoned()
        assert storage.open_staged(NAME) is not None, "what somebody copies was dropped"
        other = storage.stage(OTHER)
        assert other is not None
        os.close(other)
    fd = storage.stage(NAME)  # whoever copied has died
    assert fd is not None
    os.close(fd)


@pytest.fixture(autouse=True)
def _descriptors_are_closed():
    """Close what a test leaves open, so that no lock outlives it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for fd in set(os.listdir("/proc/self/fd")) - before:
        try:
            os.close(int(fd))
        except OSError:
            continue


def test_a_copy_is_begun_afresh(storage):
    fd = storage.stage(NAME)
    os.write(fd, b"from a worker that died")
    os.close(fd)
    fd = storage.stage(NAME)
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_what_nobody_copies_is_dropped(storage):
    for name in NAME, OTHER:
        os.close(storage.stage(name))
    storage.discard_staged(NAME)
    assert storage.open_staged(NAME) is None
    assert storage.open_staged(OTHER) is not None
    storage.discard_abandoned()
    assert storage.open_staged(OTHER) is None


def test_an_open_file_is_not_removed(storage, storage_of):
    put(storage, NAME, b"12345")
    fd = storage.open(NAME)
    assert storage.remove(NAME) == IN_USE
    assert storage_of(BOOT).remove(NAME, BOOT) == IN_USE
    assert content_of(fd) == b"12345"
    assert storage.remove(NAME) == 5
    assert storage.remove(NAME) == GONE
    assert storage.open(NAME) is None


def test_a_file_that_another_process_has_open_is_not_removed(storage):
    put(storage, NAME, b"12345")
    with another_process(lambda: storage.open(NAME)):
        assert storage.remove(NAME) == IN_USE
        assert content_of(storage.open(NAME)) == b"12345"
    assert storage.remove(NAME) == 5


def test_a_file_that_is_being_removed_is_not_opened(storage, scratch):
    put(storage, NAME, b"12345")
    path = scratch.path / "files" / BOOT / NAME.hex()[:2] / NAME.hex()
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert storage.open(NAME) is None
    fd = storage.open(NAME)
    assert fd is not None
    os.close(fd)


def test_a_reader_of_a_staged_file_holds_on_to_it_when_it_is_complete(storage):
    staged = storage.stage(NAME)
    os.write(staged, b"12345")
    reader = storage.open_staged(NAME)
    storage.commit(NAME)
    storage.share(reader)  # the worker has not closed it: no lock yet, and no error
    os.close(staged)
    storage.share(reader)
    assert storage.remove(NAME) == IN_USE
    assert content_of(reader) == b"12345"
    assert storage.remove(NAME) == 5


def test_a_file_of_an_earlier_boot_is_not_believed_until_it_is_adopted(storage, storage_of):
    put(storage_of(EARLIER_BOOT), NAME, b"12345")
    assert storage.open(NAME) is None
    assert not storage.has(NAME)
    assert storage.has(NAME, EARLIER_BOOT)
    assert content_of(storage.open_earlier(NAME, EARLIER_BOOT)) == b"12345"
    assert list(storage.scan()) == [(NAME, EARLIER_BOOT, 5)]
    storage.adopt(NAME, EARLIER_BOOT)
    assert content_of(storage.open(NAME)) == b"12345"
    assert list(storage.scan()) == [(NAME, BOOT, 5)]
    with pytest.raises(StorageError) as caught:
        storage.adopt(NAME, EARLIER_BOOT)
    assert caught.value.errno == errno.ENOENT


def test_an_earlier_file_is_removed_by_its_boot_alone(storage, storage_of):
    put(storage_of(EARLIER_BOOT), NAME, b"123")
    put(storage, NAME, b"12345")
    assert sorted(storage.scan()) == [(NAME, EARLIER_BOOT, 3), (NAME, BOOT, 5)]
    assert storage.remove(NAME, EARLIER_BOOT) == 3
    assert list(storage.scan()) == [(NAME, BOOT, 5)]


def test_scratch_that_fails_is_a_storage_error_with_its_errno(storage, scratch):
    folder = scratch.path / "files" / BOOT / NAME.hex()[:2]
    folder.mkdir()
    (folder / NAME.hex()).symlink_to(scratch.path.parent)
    for call in storage.open, storage.remove:
        with pytest.raises(StorageError) as caught:
            call(NAME)
        assert caught.value.errno == errno.ELOOP, "no link is followed"
    (scratch.path / "staging" / NAME.hex()).symlink_to(scratch.path.parent)
    for call in storage.stage, storage.open_staged:
        with pytest.raises(StorageError):
            call(NAME)
    with pytest.raises(StorageError):
        storage.commit(OTHER)


def test_files_that_are_not_ours_are_passed_over(storage, scratch):
    """As on a file system that makes them, such as NFS (.nfs...), and as purge does."""
    put(storage, NAME, b"12345")
    folder = scratch.path / "files" / BOOT / NAME.hex()[:2]
    (folder / ".nfs0001").write_bytes(b"not ours")
    (scratch.path / "files" / "README").write_bytes(b"not ours")
    (scratch.path / "staging" / "lost+found").write_bytes(b"not ours")
    assert list(storage.scan()) == [(NAME, BOOT, 5)]
    storage.discard_abandoned()
    assert (scratch.path / "staging" / "lost+found").exists()


def test_space_is_that_of_the_file_system(storage, scratch):
    status = os.statvfs(scratch.path)
    available, total = storage.space()
    assert total == status.f_blocks * status.f_frsize
    assert 0 < available <= total


@pytest.mark.parametrize(
    ("stored", "given", "is_same"),
    [
        (1_700_000_000_123_456_789, 1_700_000_000_123_456_789, True),
        (1_700_000_000_123_456_700, 1_700_000_000_123_456_789, True),
        (1_700_000_000_123_000_000, 1_700_000_000_123_456_789, True),
        (1_700_000_000_000_000_000, 1_700_000_001_123_456_789, True),
        (-3_000_000_000, -2_123_456_789, True),
        (1_700_000_000_123_456_788, 1_700_000_000_123_456_789, False),
        (1_700_000_000_123_456_700, 1_700_000_000_123_456_889, False),
        (1_700_000_003_000_000_000, 1_700_000_000_123_456_789, False),
        (0, 1_700_000_000_123_456_789, False),
    ],
)
def test_times_as_file_systems_keep_them(stored, given, is_same):
    assert is_same_time(stored, given) is is_same


def test_a_copy_that_is_not_as_it_was_left(storage, scratch):
    put(storage, NAME, b"12345")
    (path,) = [path for path in (scratch.path / "files").rglob("*") if path.is_file()]
    os.utime(path, ns=(1, 10**18 + 1))
    os.close(storage.open_unchanged(NAME, 5, 10**18 + 1))
    for size, mtime_ns in (4, 10**18 + 1), (5, 10**18 + 2):
        with pytest.raises(ChangedCopyError):
            storage.open_unchanged(NAME, size, mtime_ns)
    assert storage.drop(NAME, storage.boot)
    assert not storage.drop(NAME, storage.boot)
    path.mkdir()
    (path / "file").write_text("of somebody else")
    assert not storage.has(NAME)
    assert [name for name, _, size in storage.scan_all() if size is None] == [NAME]
    with pytest.raises(ChangedCopyError):
        storage.open_unchanged(NAME, 5, 10**18 + 1)
    assert storage.drop(NAME, storage.boot)
    (aside,) = (scratch.path / "staging").iterdir()
    assert (aside / "file").read_text() == "of somebody else"


def test_a_staged_name_that_is_a_link_to_somebody_elses_file(storage, scratch, tmp_path):
    """Neither is that file written to, nor does the link keep its place."""
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    place = scratch.path / "staging" / NAME.hex()
    place.hardlink_to(victim)
    put(storage, NAME, b"ours")
    assert victim.read_text() == "of somebody else"
    assert victim.stat().st_nlink == 1
    fd = storage.open(NAME)
    assert os.pread(fd, 10, 0) == b"ours"
    os.close(fd)
