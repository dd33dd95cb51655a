"""The source as a worker sees it: everything below one descriptor, whatever its names and modes are."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from cachefs.source.attributes import Attributes
from cachefs.source.tree import SourceTree


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def tree(root):
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield SourceTree(fd, 0.0)
    os.close(fd)


def as_an_ordinary_user(work):
    """`work()` in a child without root's rights; True if it gave True."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_directory_that_may_be_passed_but_not_listed_can_be_passed(root, tree):
    """Mode 0711, as many data and home directories have: path names work in it, listings do not."""
    (root / "closed").mkdir()
    (root / "closed" / "file").write_bytes(b"12345")
    (root / "closed" / "file").chmod(0o644)
    (root / "closed").chmod(0o111)
    try:

        def natively():
            fd = os.open("closed/file", os.O_RDONLY, dir_fd=tree._root_fd)
            return os.read(fd, 9) == b"12345"

        def through_the_tree():
            fd = tree.open(b"closed/file")
            return os.read(fd, 9) == b"12345" and Attributes.unpack(tree.stat(b"closed/file")).size == 5

        assert as_an_ordinary_user(natively)
        assert as_an_ordinary_user(through_the_tree)
    finally:
        (root / "closed").chmod(0o755)


def test_deep_trees_and_long_paths(root, tree):
    depth = 200
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(b"n" * 100, dir_fd=fd)
        below = os.open(b"n" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    path = b"/".join([b"n" * 100] * depth) + b"/file"
    for lifetime in 0.0, 100.0:
        tree._lifetime = lifetime
        for _ in range(2):
            assert stat.S_ISREG(Attributes.unpack(tree.stat(path)).mode)
            os.close(tree.open(path))
    assert len(tree._directories) <= 64
    for known, _ in tree._directories.values():
        os.close(known)


def test_links_are_not_followed(root, tree, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "file")
    assert stat.S_ISLNK(Attributes.unpack(tree.stat(b"link")).mode)
    assert tree.readlink(b"link") == os.fsencode(tmp_path / "outside")
    for call in tree.stat, tree.open:
        with pytest.raises(NotADirectoryError):
            call(b"link/file")
    with pytest.raises(OSError, match="symbolic links") as caught:
        tree.open(b"file")
    assert caught.value.errno == errno.ELOOP


def test_a_listing_and_the_attributes_of_its_names(root, tree):
    names = [b"%03d" % n for n in range(50)] + [b"\xff\n", b"x" * 255]
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(root), name), os.O_CREAT | os.O_WRONLY))
    os.mkfifo(root / "pipe")
    found = [entry for batch in tree.entries(b"", 7) for entry in batch]
    assert sorted(name for name, _, _ in found) == sorted([*names, b"pipe"])
    assert dict((name, kind) for name, _, kind in found)[b"pipe"] == 0
    for is_slow in False, True:
        tree._is_slow = is_slow
        known = [pair for batch in tree.stat_many(b"", [*names, b"none"], 9) for pair in batch]
        assert [name for name, _ in known] == [*names, b"none"]
        assert known[-1][1] == errno.ENOENT
        assert all(isinstance(attributes, bytes) for _, attributes in known[:-1])


def test_a_directory_descriptor_is_reused_for_its_lifetime_and_no_longer(root, tree):
    (root / "d").mkdir()
    (root / "d" / "file").write_bytes(b"old")
    tree._lifetime = 1000.0
    tree.stat(b"d/file")
    (root / "d").rename(root / "e")
    (root / "d").mkdir()
    (root / "d" / "file").write_bytes(b"newer")
    assert Attributes.unpack(tree.stat(b"d/file")).size == 3
    tree._lifetime = 0.0
    assert Attributes.unpack(tree.stat(b"d/file")).size == 5
    for known, _ in tree._directories.values():
        os.close(known)
