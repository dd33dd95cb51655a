"""The tree cannot be changed, and the mount over its own source works (semantics 1 and 2)."""

from __future__ import annotations

import os
import stat

import pytest

from tests.harness import find_mount, over_a_fuse_mount, run_cachefs, wait_until
from tests.mount.observing import describe_tree, digest, errno_of

CHANGES = {
    "create": lambda root: (root / "new").open("xb"),
    "open for writing": lambda root: (root / "file").open("r+b"),
    "open for appending": lambda root: (root / "file").open("ab"),
    "open and truncate": lambda root: os.open(root / "file", os.O_RDONLY | os.O_TRUNC),
    "open write-only and truncate": lambda root: (root / "file").open("wb"),
    "truncate": lambda root: os.truncate(root / "file", 0),
    "unlink": lambda root: os.unlink(root / "file"),
    "rename": lambda root: os.rename(root / "file", root / "new"),
    "rename over": lambda root: os.rename(root / "file", root / "other"),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "rmdir": lambda root: os.rmdir(root / "empty"),
    "chmod": lambda root: os.chmod(root / "file", 0o600),
    "chown": lambda root: os.chown(root / "file", os.getuid(), os.getgid()),
    "utime": lambda root: os.utime(root / "file"),
    "utime of a directory": lambda root: os.utime(root / "empty", ns=(1, 1)),
    "link": lambda root: os.link(root / "file", root / "new"),
    "symlink": lambda root: os.symlink("file", root / "new"),
    "mkfifo": lambda root: os.mkfifo(root / "new"),
    "setxattr": lambda root: os.setxattr(root / "file", "user.x", b"x"),
    "removexattr": lambda root: os.removexattr(root / "file", "user.x"),
}


@pytest.fixture
def tree(source):
    (source / "file").write_bytes(b"content")
    (source / "other").write_bytes(b"other")
    (source / "empty").mkdir()
    (source / "sub").mkdir()
    (source / "sub/file").write_bytes(os.urandom(110_000))
    (source / "link").symlink_to("sub/file")
    return source


@pytest.mark.parametrize("at_source", [True, False], ids=["over the source", "elsewhere"])
def test_every_change_is_refused(tree, mounted, mountpoint, at_source):
    """Semantics 1: whatever would change the tree is EROFS, also for root, and changes nothing."""
    before = describe_tree(tree)
    cache = mounted(tree, at=None if at_source else mountpoint)
    answers = {name: errno_of(change, cache.path) for name, change in CHANGES.items()}
    assert answers == dict.fromkeys(CHANGES, "EROFS")
    assert not os.access(cache.path / "file", os.W_OK)
    cache.unmount()
    assert describe_tree(tree) == before


def test_the_mount_over_its_own_source_shows_the_same_tree(tree, mounted):
    """Semantics 2: over the source, the same names, attributes and bytes; below, nothing was touched."""
    before = describe_tree(tree)
    cache = mounted(tree)
    assert describe_tree(tree) == before
    assert os.stat(tree).st_dev != os.stat(tree.parent).st_dev
    assert cache.count("misses") == 3
    cache.unmount()
    assert os.stat(tree).st_dev == os.stat(tree.parent).st_dev
    assert describe_tree(tree) == before


def test_the_mount_elsewhere_leaves_the_source_as_it_is(tree, mounted, mountpoint):
    """Semantics 2: at another mountpoint, both show the same; the mountpoint is empty again afterwards."""
    before = describe_tree(tree)
    cache = mounted(tree, at=mountpoint)
    assert describe_tree(mountpoint) == before
    assert find_mount(tree) is None
    cache.unmount()
    assert os.listdir(mountpoint) == []
    assert describe_tree(tree) == before


@over_a_fuse_mount
def test_the_covered_source_is_reached_through_its_descriptor(tree, mounted, slow_source):
    """Semantics 2: what changes below the mount that covers the source is seen through the mount."""
    slow = slow_source(tree)
    mounted(slow.path, "--metadata-ttl", "0")
    assert sorted(os.listdir(slow.path)) == ["empty", "file", "link", "other", "sub"]
    (tree / "later").write_bytes(b"later")
    assert (slow.path / "later").read_bytes() == b"later"
    assert slow.statistics().file("later").bytes_read == 5


def test_a_mountpoint_inside_the_source(tree, mounted):
    """Semantics 2: it is refused in words, or shows itself empty: the daemon does not wait for itself."""
    inside = tree / "empty"
    refused = ""
    try:
        mounted(tree, at=inside)
    except AssertionError as refusal:
        refused = str(refusal)
    if refused:
        assert "inside the source" in refused
        return
    assert (inside / "sub/file").read_bytes() == (tree / "sub/file").read_bytes()
    assert os.listdir(inside / "empty") == []


def test_a_mount_is_not_the_source_of_another_mount_with_the_same_scratch(tree, mounted, mountpoint):
    """Semantics 2 and 5: each would wait for the other's copy; it is refused in words."""
    cache = mounted(tree)
    refused = run_cachefs("mount", tree, mountpoint, "--scratch", cache.scratch, check=False)
    assert refused.returncode == 1
    assert "is a mount of cachefs with the same scratch" in refused.stderr
    assert not os.path.ismount(mountpoint)


def test_mounting_a_subdirectory_of_a_mount(tree, mounted, mountpoint):
    """Semantics 2: a directory inside a mount can be the source of another mount."""
    mounted(tree)
    cache = mounted(tree / "sub", at=mountpoint)
    assert digest(mountpoint / "file") == digest(tree / "sub/file")
    assert cache.count("fetches") == 1
    cache.unmount()


def test_mounting_again_shows_the_tree_from_scratch(tree, mounted):
    """Semantics 2: mount, unmount, mount again: what was fetched before is there."""
    want = digest(tree / "sub/file")
    first = mounted(tree)
    assert digest(tree / "sub/file") == want
    first.unmount()
    second = mounted(tree)
    assert digest(tree / "sub/file") == want
    assert (second.count("hits"), second.count("fetches")) == (1, 0)


def test_a_working_directory_inside_keeps_the_mount(tree, mounted, monkeypatch):
    """Semantics 2: a mount in use is not taken away, and the message names who holds it."""
    cache = mounted(tree)
    monkeypatch.chdir(tree / "sub")
    with pytest.raises(AssertionError, match=rf"busy.*{os.getpid()}, working directory"):
        cache.unmount()
    assert stat.S_ISREG(os.stat("file").st_mode)
    monkeypatch.undo()
    wait_until(cache.is_mounted, "the mount is still there")
