"""What stat says of every kind of file, and inode numbers and links (semantics 3)."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from tests.conftest import needs_root
from tests.mount.observing import SHOWN_FIELDS, errno_of

FIELDS = (*SHOWN_FIELDS, "st_atime_ns")


def shown(path, fields=FIELDS):
    status = os.lstat(path)
    return {field: getattr(status, field) for field in fields}


def make_kinds(source):
    """One of each kind that an ordinary user can make; their paths."""
    (source / "file").write_bytes(b"x" * 5000)
    (source / "empty").touch()
    (source / "folder/below").mkdir(parents=True)
    (source / "link").symlink_to("file")
    (source / "dangling").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(source / "socket"))
    with open(source / "sparse", "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"data")
    os.link(source / "file", source / "folder/again")
    for mode in (0o000, 0o444, 0o755, 0o4755, 0o2711, 0o1777):
        path = source / f"mode {mode:o}"
        path.touch()
        path.chmod(mode)
    times = {
        "old": -1_500_000_000,
        "before": -1,
        "sub second": 1_234_567_890_123_456_789,
        "late": 4_000_000_000 * 10**9,
    }
    for name, when in times.items():
        (source / name).touch()
        os.utime(source / name, ns=(when, when))
    return [*sorted(path.relative_to(source) for path in source.rglob("*")), source.relative_to(source)]


@pytest.mark.parametrize("warm", [False, True], ids=["by name", "after a listing"])
def test_every_field_is_the_sources(source, mounted, mountpoint, warm):
    """Semantics 3: all fields of stat but st_dev and st_ino, for many kinds of files, modes and times."""
    paths = make_kinds(source)
    mounted(source, at=mountpoint)
    if warm:
        os.listdir(mountpoint)
    for path in paths:
        assert (path, shown(mountpoint / path)) == (path, shown(source / path))


@needs_root
def test_owners_and_devices(source, mounted, mountpoint):
    """Semantics 3: owners are the source's, a device shows its number and cannot be opened (nodev)."""
    for uid, gid in ((65534, 65534), (1, 2), (4_000_000_000, 4_000_000_001)):
        path = source / f"of {uid}"
        path.touch()
        os.chown(path, uid, gid)
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(source / "disk", stat.S_IFBLK | 0o660, os.makedev(250, 70_000))
    mounted(source, at=mountpoint)
    for path in source.iterdir():
        assert shown(mountpoint / path.name) == shown(path)
    assert errno_of(open, mountpoint / "null", "rb") == "EACCES"


def test_attributes_of_an_open_file(source, mounted, mountpoint):
    """Semantics 3: fstat says what stat says, before and after reading."""
    (source / "file").write_bytes(os.urandom(300_000))
    mounted(source, at=mountpoint)
    with open(mountpoint / "file", "rb", buffering=0) as file:
        for _ in range(2):
            status = os.fstat(file.fileno())
            assert {field: getattr(status, field) for field in SHOWN_FIELDS} == shown(source / "file", SHOWN_FIELDS)
            assert status.st_ino == os.stat(mountpoint / "file").st_ino
            file.read()


@pytest.mark.parametrize("warm", [False, True], ids=["by name", "after a listing"])
def test_hard_links_are_one_file(source, mounted, mountpoint, warm):
    """Semantics 3: one inode number and link count for all names of a file, wherever they are; fetched once."""
    (source / "sub").mkdir()
    (source / "a").write_bytes(os.urandom(110_000))
    for name in ("b", "sub/c"):
        os.link(source / "a", source / name)
    cache = mounted(source, at=mountpoint)
    if warm:
        for folder in (mountpoint, mountpoint / "sub"):
            assert os.listdir(folder)
    statuses = [os.stat(mountpoint / name) for name in ("a", "b", "sub/c")]
    assert len({status.st_ino for status in statuses}) == 1
    assert {status.st_nlink for status in statuses} == {3}
    want = (source / "a").read_bytes()
    handles = [open(mountpoint / name, "rb", buffering=0) for name in ("a", "b", "sub/c")]  # noqa: SIM115
    assert all(handle.read() == want for handle in handles)
    for handle in handles:
        handle.close()
    assert cache.count("fetches") == 1


def test_a_hard_link_outlives_its_other_name(source, mounted, mountpoint):
    """Semantics 3: when one of two names is removed on the source, the other still is the file."""
    (source / "a").write_bytes(b"content")
    os.link(source / "a", source / "b")
    mounted(source, "--metadata-ttl", "0", at=mountpoint)
    assert os.stat(mountpoint / "a").st_ino == os.stat(mountpoint / "b").st_ino
    (source / "b").unlink()  # the one that was seen last
    assert errno_of(os.stat, mountpoint / "b") == "ENOENT"
    assert (mountpoint / "a").read_bytes() == b"content"
    assert os.stat(mountpoint / "a").st_nlink == 1


def test_inode_numbers_are_stable_and_unique(source, mounted, mountpoint):
    """Semantics 3: numbers are ours, differ between files, stay while the kernel knows them."""
    for number in range(50):
        (source / str(number)).touch()
    mounted(source, at=mountpoint)
    first = {path.name: path.stat().st_ino for path in mountpoint.iterdir()}
    assert len(set(first.values())) == 50
    assert {path.name: path.stat().st_ino for path in mountpoint.iterdir()} == first


@pytest.mark.parametrize("name", ["file", "linked"])
def test_a_listing_shows_the_inode_numbers_that_stat_shows(source, mounted, mountpoint, name):
    """Semantics 3: the number in a directory entry is that of its file, as programs that look for links expect."""
    (source / "file").touch()
    (source / "linked").touch()
    os.link(source / "linked", source / "link")
    mounted(source, at=mountpoint)
    os.listdir(mountpoint)
    os.stat(mountpoint / "link")
    number = os.stat(mountpoint / name).st_ino
    with os.scandir(mountpoint) as entries:
        assert {entry.name: entry.inode() for entry in entries}[name] == number


def test_symbolic_links(source, mounted):
    """Semantics 3: relative, absolute into the tree, to a directory, dangling and circular links, as in the source."""
    (source / "sub").mkdir()
    (source / "sub/file").write_bytes(b"content")
    targets = {
        "relative": "sub/file",
        "up": "sub/../sub/file",
        "absolute": os.fspath(source / "sub/file"),
        "folder": "sub",
        "dangling": "not/there",
        "circular": "circular",
        "long": "x" * 4000,
    }
    for name, target in targets.items():
        (source / name).symlink_to(target)
    cache = mounted(source)
    for name, target in targets.items():
        assert os.readlink(source / name) == target
        assert os.lstat(source / name).st_size == len(target)
    for name in ("relative", "up", "absolute"):
        assert (source / name).read_bytes() == b"content"
    assert os.listdir(source / "folder") == ["file"]
    assert errno_of(os.stat, source / "dangling") == "ENOENT"
    assert errno_of(os.stat, source / "circular") == "ELOOP"
    assert errno_of(os.open, source / "relative", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert errno_of(os.readlink, source / "sub/file") == "EINVAL"
    assert cache.count("fetches") == 1


def test_a_fifo_and_a_socket_are_shown_and_do_not_block(source, mounted, mountpoint):
    """Semantics 3: a FIFO works locally, a socket refuses; neither is ever opened on the source."""
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(source / "socket"))
    cache = mounted(source, at=mountpoint)
    with os.scandir(mountpoint) as entries:
        assert not any(entry.is_file() or entry.is_dir() or entry.is_symlink() for entry in entries)
    fd = os.open(mountpoint / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.close(fd)
    assert errno_of(open, mountpoint / "socket", "rb") == "ENXIO"
    assert (cache.count("misses"), cache.count("bypasses")) == (0, 0)


def test_statfs_is_the_sources(source, mounted, mountpoint):
    """Semantics 3: statfs is the source's, apart from its number and flags."""
    mounted(source, at=mountpoint)
    here, there = os.statvfs(mountpoint), os.statvfs(source)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(here, field) == getattr(there, field)
    assert abs(here.f_bavail - there.f_bavail) < there.f_blocks // 10  # others write at the same time
    assert here.f_flag & os.ST_RDONLY
