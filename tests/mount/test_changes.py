"""The source changes: a reader has one version or an error, and an open after the time-to-live the new one (7)."""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import wait_until
from tests.mount.observing import counters, errno_of, opens

OLD, NEW = b"o" * 300_000, b"n" * 300_000
LARGE = 32 << 20
NOW = ("--metadata-ttl", "0")
STALE = ("ESTALE", "EIO")


def replace(path, data):
    new = path.with_name("replacement")
    new.write_bytes(data)
    new.replace(path)


def overwrite(path, data):
    with open(path, "r+b", buffering=0) as file:
        file.write(data)


def set_back(path, data):
    """The same size and time of modification as before; only ctime tells."""
    before = path.stat()
    overwrite(path, data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


CHANGES = {
    "replaced": (lambda path: replace(path, NEW), NEW),
    "replaced, shorter": (lambda path: replace(path, NEW[:5000]), NEW[:5000]),
    "overwritten": (lambda path: overwrite(path, NEW), NEW),
    "grown": (lambda path: append(path, NEW), OLD + NEW),
    "truncated": (lambda path: os.truncate(path, 1000), OLD[:1000]),
    "emptied": (lambda path: os.truncate(path, 0), b""),
    "set back": (lambda path: set_back(path, NEW), NEW),
}


def read_on(file, so_far=b""):
    """(what a reader has got until the end or an error, the error's name or None)."""
    parts = [so_far]
    while True:
        try:
            part = file.read(100_000)
        except OSError as error:
            return b"".join(parts), errno.errorcode[error.errno]
        if not part:
            return b"".join(parts), None
        parts.append(part)


def assert_one_version(got, error, old):
    """Only bytes of the old version, and all of them unless an error says so."""
    assert old.startswith(got)
    assert got == old if error is None else error in STALE


@pytest.mark.parametrize("ttl", ["0", "0.2"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_new_version_is_seen_after_the_ttl(source, mounted, mountpoint, change, ttl):
    """Semantics 7: whatever the change: new bytes, new size, and another inode number; nobody sees a mixture."""
    (source / "file").write_bytes(OLD)
    cache = mounted(source, "--metadata-ttl", ttl, at=mountpoint)
    assert (mountpoint / "file").read_bytes() == OLD
    inode = os.stat(mountpoint / "file").st_ino
    make, new = CHANGES[change]
    with open(mountpoint / "file", "rb", buffering=0) as reader:
        first = reader.read(1000)
        make(source / "file")
        wait_until(lambda: os.stat(mountpoint / "file").st_ino != inode, "the new version is seen")
        assert (mountpoint / "file").read_bytes() == new
        assert os.stat(mountpoint / "file").st_size == len(new)
        assert os.fstat(reader.fileno()).st_size == len(OLD)
        assert_one_version(*read_on(reader, first), OLD)
    wait_until(lambda: counters(cache)["fetches"] == 2, "both fetches are over: the last byte comes a little earlier")
    assert (mountpoint / "file").read_bytes() == new


@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_of_an_uncached_file_never_gets_two_versions(source, mounted, mountpoint, change):
    """Semantics 7: also where the source serves (bypass), a reader has the old bytes or an error."""
    (source / "file").write_bytes(OLD)
    cache = mounted(source, *NOW, "--capacity", "1K", at=mountpoint)
    make, new = CHANGES[change]
    with open(mountpoint / "file", "rb", buffering=0) as reader:
        first = reader.read(1000)
        make(source / "file")
        assert_one_version(*read_on(reader, first), OLD)
    assert (mountpoint / "file").read_bytes() == new
    assert opens(cache)[2] >= 1


@pytest.mark.parametrize("change", ["replaced", "overwritten", "set back", "truncated", "grown", "deleted"])
def test_a_file_that_changes_while_it_is_fetched(source, mounted, mountpoint, slow_source, change):
    """Semantics 7: the reader has the old bytes or ESTALE, no copy of two versions stays, then the new one is read."""
    old, new = random.Random(5).randbytes(LARGE), random.Random(6).randbytes(LARGE)
    file = source / "file"
    file.write_bytes(old)
    slow = slow_source(source, bandwidth=16 << 20)
    mounted(slow.path, *NOW, at=mountpoint)
    with open(mountpoint / "file", "rb", buffering=0) as reader:
        first = reader.read(1 << 20)
        if change == "replaced":
            replace(file, new)
        elif change == "overwritten":
            overwrite(file, new)
        elif change == "set back":
            before = file.stat()
            overwrite(file, new)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "truncated":
            os.truncate(file, LARGE // 2)
        elif change == "grown":
            append(file, new)
        else:
            file.unlink()
        slow.set(bandwidth=None)
        assert_one_version(*read_on(reader, first), old)
    if change == "deleted":
        assert errno_of(open, mountpoint / "file", "rb") == "ENOENT"
    else:
        assert (mountpoint / "file").read_bytes() == file.read_bytes()


def test_replaced_again_and_again(source, mounted, mountpoint):
    """Semantics 7: 8 readers while a file is replaced again and again: each has one whole version, or an error."""
    path = source / "file"

    def version(number):
        return bytes([number % 251]) * (10_000 + 1000 * (number % 300))

    path.write_bytes(version(0))
    mounted(source, *NOW, at=mountpoint)
    finished = False
    seen = [0] * 8

    def read_until_finished(reader):
        while not finished:
            try:
                data = (mountpoint / "file").read_bytes()
            except OSError as error:
                if errno.errorcode[error.errno] in STALE:
                    continue
                raise
            assert len(data) >= 10_000
            number = (len(data) - 10_000) // 1000
            assert data == bytes([data[0]]) * len(data)
            assert data == version(number)
            seen[reader] += 1

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read_until_finished, reader) for reader in range(8)]
        number = 0
        give_up = time.monotonic() + 60
        try:
            while number < 300 or (min(seen) < 3 and time.monotonic() < give_up):
                number += 1
                replace(path, version(number % 300))
        finally:
            finished = True
        for reader in readers:
            reader.result()
    assert min(seen) >= 3
    assert (mountpoint / "file").read_bytes() == version(number % 300)


def test_a_map_keeps_its_version(source, mounted, mountpoint):
    """Semantics 7: a file that is mapped stays what it was, beside the new version."""
    (source / "file").write_bytes(OLD)
    mounted(source, *NOW, at=mountpoint)
    with open(mountpoint / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:4096] == OLD[:4096]
        overwrite(source / "file", NEW)
        assert (mountpoint / "file").read_bytes() == NEW
        assert mapped[:] == OLD


def test_until_the_ttl_the_old_version_is_served(source, mounted, mountpoint):
    """Semantics 7 and 10: within the time-to-live a resident file is what it was, whatever the source has."""
    (source / "file").write_bytes(OLD)
    cache = mounted(source, at=mountpoint)
    assert (mountpoint / "file").read_bytes() == OLD
    wait_until(lambda: counters(cache)["resident_files"] == 1, "the file is resident")
    replace(source / "file", NEW[:1000])
    assert (mountpoint / "file").read_bytes() == OLD
    assert opens(cache) == (1, 1, 0)


def test_a_file_that_changed_before_its_first_open_is_read_new(source, mounted, mountpoint):
    """Semantics 7: known by its old attributes, then replaced, then opened: the new version, and no error."""
    (source / "file").write_bytes(OLD)
    mounted(source, at=mountpoint)
    assert os.stat(mountpoint / "file").st_size == len(OLD)
    replace(source / "file", NEW[:1000])
    assert (mountpoint / "file").read_bytes() == NEW[:1000]


def test_deleted_and_made_again(source, mounted, mountpoint):
    """Semantics 7: a deleted file is ENOENT, its reader goes on; made again it is the new one."""
    (source / "file").write_bytes(OLD)
    mounted(source, *NOW, at=mountpoint)
    with open(mountpoint / "file", "rb", buffering=0) as reader:
        first = reader.read(1000)
        (source / "file").unlink()
        assert errno_of(os.stat, mountpoint / "file") == "ENOENT"
        assert os.listdir(mountpoint) == []
        assert_one_version(*read_on(reader, first), OLD)
        (source / "file").write_bytes(NEW[:77])
        assert (mountpoint / "file").read_bytes() == NEW[:77]


def test_a_directory_is_renamed(source, mounted, mountpoint):
    """Semantics 7: the old name is ENOENT, the new one has everything; another directory may take its place."""
    (source / "a/sub").mkdir(parents=True)
    (source / "a/sub/file").write_bytes(OLD)
    mounted(source, *NOW, at=mountpoint)
    assert (mountpoint / "a/sub/file").read_bytes() == OLD
    (source / "a").rename(source / "b")
    assert errno_of(os.stat, mountpoint / "a/sub/file") == "ENOENT"
    assert (mountpoint / "b/sub/file").read_bytes() == OLD
    (source / "a/sub").mkdir(parents=True)
    (source / "a/sub/file").write_bytes(NEW)
    assert (mountpoint / "a/sub/file").read_bytes() == NEW
    assert sorted(os.listdir(mountpoint)) == ["a", "b"]


@pytest.mark.parametrize("looked_at", [False, True], ids=["listed", "listed and looked at"])
def test_a_file_becomes_a_directory_and_back(source, mounted, mountpoint, looked_at):
    """Semantics 7: stat, listings with their types, and what is below follow."""

    def kinds():
        if looked_at and (mountpoint / "x").exists():
            os.stat(mountpoint / "x")
        with os.scandir(mountpoint) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}

    (source / "x").write_bytes(OLD)
    mounted(source, *NOW, at=mountpoint)
    assert (mountpoint / "x").read_bytes() == OLD
    assert kinds() == {"x": False}
    (source / "x").unlink()
    (source / "x").mkdir()
    (source / "x/y").write_bytes(NEW)
    assert kinds() == {"x": True}
    assert (mountpoint / "x/y").read_bytes() == NEW
    assert kinds() == {"x": True}
    (source / "x/y").unlink()
    (source / "x").rmdir()
    (source / "x").symlink_to("nowhere")
    assert kinds() == {"x": False}
    assert os.readlink(mountpoint / "x") == "nowhere"
    (source / "x").unlink()
    (source / "x").write_bytes(OLD)
    assert kinds() == {"x": False}
    assert (mountpoint / "x").read_bytes() == OLD


def test_modes_and_owners_that_change(source, mounted, mountpoint):
    """Semantics 7: attributes are new after the time-to-live, of directories too, which stay the same directory."""
    (source / "sub").mkdir()
    (source / "file").touch()
    mounted(source, *NOW, at=mountpoint)
    inode = os.stat(mountpoint / "sub").st_ino
    for mode in (0o700, 0o550):
        (source / "sub").chmod(mode)
        (source / "file").chmod(mode)
        assert os.stat(mountpoint / "sub").st_mode & 0o777 == mode
        assert os.stat(mountpoint / "file").st_mode & 0o777 == mode
    assert os.stat(mountpoint / "sub").st_ino == inode


def test_the_source_itself_is_replaced(source, mounted, mountpoint, tmp_path):
    """Semantics 2: the directory that was opened is served for the life of the mount, wherever it is by now."""
    (source / "file").write_bytes(OLD)
    cache = mounted(source, *NOW, at=mountpoint)
    source.rename(tmp_path / "aside")
    source.mkdir()
    (source / "other").write_bytes(b"another dataset")
    assert (mountpoint / "file").read_bytes() == OLD
    assert os.listdir(mountpoint) == ["file"]
    (tmp_path / "aside/new").write_bytes(b"new")
    wait_until((mountpoint / "new").exists, "what is new in it is seen")
    cache.unmount()
    again = mounted(source, *NOW, at=mountpoint, scratch=cache.scratch)
    assert os.listdir(mountpoint) == ["other"]
    assert (mountpoint / "other").read_bytes() == b"another dataset"
    again.unmount()
