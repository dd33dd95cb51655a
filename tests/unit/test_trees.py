"""Trees: links to complete files that look like the source's, and their removal whatever their shape."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.scratch import DIRECTORIES
from cachefs.cache.storage import Storage
from cachefs.cache.trees import MISSING, TreeHandlers, Trees, fell
from cachefs.cache.write_watch import WriteWatch
from cachefs.mount.mountinfo import Mount, mount_id_of
from cachefs.mount.promotion import may_be_shown
from cachefs.source.attributes import Attributes, pack_stat
from cachefs.source.tree import SourceTree
from tests.unit.profile import FIXED

NAME, OTHER = b"n" * 24, b"o" * 24
MTIME_NS = 2 * 10**18 + 3
BOOT = "0" * 32


class Place:
    """A scratch with storage and trees, and a source."""

    def __init__(self, folder):
        self.scratch, self.source = folder / "scratch", folder / "source"
        self.source.mkdir()
        for name in DIRECTORIES:
            (self.scratch / name).mkdir(parents=True)
        fd = os.open(self.scratch, os.O_RDONLY)
        self.storage, self.trees = Storage(fd, BOOT), Trees(fd)
        source = SourceTree(os.open(self.source, os.O_RDONLY), 0.0)
        self.watch = WriteWatch()
        self._jobs = TreeHandlers(source, self.storage, self.trees, mount_id_of, self.watch).table()

    def store(self, name, content):
        fd = self.storage.stage(name)
        os.write(fd, content)
        os.utime(fd, ns=(MTIME_NS, MTIME_NS))
        self.storage.commit(name)
        os.close(fd)

    def run(self, job, *arguments):
        running = self._jobs[job]("1ease", *arguments) if job != "fell" else self._jobs[job](*arguments)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return end.value

    def at(self, *names):
        return self.scratch.joinpath("trees", "1ease", *names)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def attributes_of(path):
    return pack_stat(os.lstat(path))


def shown(path):
    status = os.lstat(path)
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns


def plant(place, name, content=b"content", mode=0o640):
    """Put a file of the source into the tree; why it is not there, or None."""
    path = place.source / name
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(1, MTIME_NS))
    place.store(NAME, content)
    place.run("sprout", b"")
    return dict(place.run("plant", b"", [(os.fsencode(name), NAME, attributes_of(path))])).get(os.fsencode(name))


def test_a_file_looks_like_the_source_s_and_is_not_removed(place):
    assert plant(place, "file") is None
    assert shown(place.at("file")) == shown(place.source / "file")
    assert place.at("file").read_bytes() == b"content"
    assert place.storage.remove(NAME) == -1
    place.run("fell", ["1ease"])
    assert place.storage.remove(NAME) == 7


def test_a_tree_that_is_left_over_keeps_nothing_where_no_mount_is(place):
    """What reconciling the index drops, and copies of an earlier boot, go all the same."""
    plant(place, "file")
    assert place.storage.remove(NAME, is_alone=True) == 7


def test_a_copy_that_is_gone_or_of_another_size(place):
    (place.source / "file").write_bytes(b"content")
    place.store(NAME, b"longer content")
    place.run("sprout", b"")
    attributes = attributes_of(place.source / "file")
    assert place.run("plant", b"", [(b"file", OTHER, attributes)]) == [(b"file", MISSING)]
    assert place.run("plant", b"", [(b"file", NAME, attributes)]) == [(b"file", MISSING)]
    place.run("sprout", b"")
    assert os.listdir(place.at()) == []


def test_what_needs_no_copy(place):
    (place.source / "empty").write_bytes(b"")
    (place.source / "link").symlink_to("target")
    os.utime(place.source / "link", ns=(5, 7), follow_symlinks=False)
    place.run("sprout", b"")
    entries = [(name, b"", attributes_of(os.path.join(place.source, name.decode()))) for name in (b"empty", b"link")]
    assert place.run("plant", b"", entries) == []
    for name in ("empty", "link"):
        assert shown(place.at(name)) == shown(place.source / name)
    assert os.readlink(place.at("link")) == "target"


def test_a_directory_is_finished_when_all_is_in_it(place):
    folder = place.source / "sub"
    folder.mkdir(mode=0o555)
    os.utime(folder, ns=(1, 10**18))
    place.run("sprout", b"sub/below")
    place.run("sprout", b"sub")
    assert not place.run("finish", b"sub", 2, attributes_of(folder))
    assert place.run("finish", b"sub", 1, attributes_of(folder))
    assert shown(place.at("sub"))[0] == shown(folder)[0] == stat.S_IFDIR | 0o555
    assert shown(place.at("sub"))[4] == 10**18
    place.run("fell", ["1ease"])
    assert os.listdir(place.scratch / "trees") == []


def test_a_path_that_is_longer_than_path_max(place):
    path = b"/".join([b"d" * 250] * 40)
    place.run("sprout", path)
    place.run("fell", ["1ease", "not there"])
    assert place.trees.names() == []


def test_felling_enters_no_other_mount(place):
    place.run("sprout", b"sub/below")
    mounts = iter([1, 1, 2])  # of the folder of trees, the tree, and what lies in it
    with pytest.raises(OSError, match="is a mount") as caught:
        list(fell(place.trees.fd, "1ease", lambda _: next(mounts)))
    assert caught.value.errno == errno.EXDEV


@pytest.mark.parametrize(
    ("mode", "for_root", "for_user"),
    [
        (stat.S_IFREG | 0o644, True, True),
        (stat.S_IFREG | 0o004, True, False),
        (stat.S_IFREG | 0o4755, False, False),
        (stat.S_IFREG | 0o2644, False, False),
        (stat.S_IFDIR | 0o2755, True, True),
        (stat.S_IFDIR | 0o500, True, True),
        (stat.S_IFDIR | 0o411, True, False),
        (stat.S_IFDIR | 0o311, True, False),
    ],
)
def test_what_may_be_shown(mode, for_root, for_user):
    attributes = Attributes(*[0] * 8, mode, 1, 0, 0, 0)
    assert may_be_shown(attributes, is_root=True) == for_root
    assert may_be_shown(attributes, is_root=False) == for_user
    is_program = stat.S_ISREG(mode) and bool(mode & 0o111)
    assert may_be_shown(attributes, is_root=True, may_execute=False) == (for_root and not is_program)


@FIXED
@given(st.text(min_size=1), st.text("0123456789abcdef", min_size=1, max_size=12))
def test_a_tree_is_told_by_its_root(above, lease):
    """Whatever scratch's path is, and whatever part of the tree shows."""
    for root in (f"/trees/{lease}", f"/{above}/trees/{lease}", f"/{above}/trees/{lease}/sub\n/x"):
        mount = Mount(*[None] * 4, frozenset(), root)
        assert mount.tree == lease or "/trees" in f"/{above}"
    assert Mount(*[None] * 4, frozenset(), f"/x/trees{lease}").tree is None
