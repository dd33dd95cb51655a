"""Names are bytes, and trees may be deep, wide and empty (semantics 3)."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.mount.observing import describe_tree, errno_of

NAMES = [
    b"plain",
    b"two\nlines",
    b"\n",
    b"tab\tand space ",
    b" ",
    b"invalid \xff\xfe\x80 utf-8",
    b"\xed\xa0\x80 surrogate",
    b"back\\slash",
    b"\x01\x7f control",
    b"*?[x]{y}~",
    b"'quotes\"",
    b"-rf",
    b"...",
    b".hidden",
    b"n" * 255,
    b"\xff" * 255,
    b"\xc3\xa4" * 127,
]
DEPTH = 60


def descend(root, name, depth, make=None):
    """A descriptor of the directory `depth` times `name` below `root`; `make` is called with each on the way."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        if make is not None:
            make(fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def read_at(name, fd):
    with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=fd)) as file:
        return file.read()


@pytest.mark.parametrize("warm", [False, True], ids=["by name", "after a listing"])
def test_any_bytes_are_a_name(source, mounted, mountpoint, warm):
    """Semantics 3: newlines, invalid UTF-8, 255 bytes: of files, directories and links, as in the source."""
    top = os.fsencode(source)
    for name in NAMES:
        os.mkdir(os.path.join(top, b"d" + name[:254]))
        for path in (os.path.join(top, name), os.path.join(top, b"d" + name[:254], name)):
            with open(path, "wb") as file:
                file.write(b"content of " + name)
        os.symlink(name, os.path.join(top, b"l" + name[:254]))
    want = describe_tree(source)
    cache = mounted(source, at=mountpoint)
    seen = os.fsencode(mountpoint)
    if warm:
        assert Counter(os.listdir(seen)) == Counter(os.listdir(top))
    for name in NAMES:
        with open(os.path.join(seen, b"d" + name[:254], name), "rb") as file:
            assert file.read() == b"content of " + name
        assert os.readlink(os.path.join(seen, b"l" + name[:254])) == name
    assert describe_tree(mountpoint) == want
    assert cache.count("fetches") == 2 * len(NAMES)


def test_a_name_that_is_too_long_or_absent(source, mounted, mountpoint):
    """Semantics 3: 256 bytes are ENAMETOOLONG, an absent name ENOENT, a file on the way ENOTDIR: as in the source."""
    (source / "file").touch()
    mounted(source, at=mountpoint)
    for root in (source, mountpoint):
        assert errno_of(os.stat, root / ("n" * 256)) == "ENAMETOOLONG"
        assert errno_of(os.stat, root / "absent") == "ENOENT"
        assert errno_of(os.stat, root / "file/below") == "ENOTDIR"
        assert errno_of(os.listdir, root / "file") == "ENOTDIR"
        assert errno_of(open, root, "rb") == "EISDIR"


@pytest.mark.parametrize("over", [False, True], ids=["elsewhere", "over the source"])
def test_a_tree_deeper_than_the_longest_path(source, mounted, mountpoint, over):
    """Semantics 3: a tree of more than PATH_MAX bytes in all, reached name by name."""
    name = b"d" * 250
    fd = descend(source, name, DEPTH, make=lambda above: os.mkdir(name, dir_fd=above))
    with open("file", "wb", opener=lambda path, flags: os.open(path, flags, dir_fd=fd)) as file:
        file.write(b"deep down")
    os.close(fd)
    assert len(name) * DEPTH > os.pathconf(source, "PC_PATH_MAX")
    cache = mounted(source, at=None if over else mountpoint)
    fd = descend(cache.path, name, DEPTH)
    try:
        assert os.listdir(fd) == ["file"]
        assert os.stat("file", dir_fd=fd).st_size == 9
        assert read_at("file", fd) == b"deep down"
    finally:
        os.close(fd)
    assert (cache.count("fetches"), cache.count("bypasses")) == (1, 0)


def test_a_very_deep_directory_with_many_long_names(source, mounted, mountpoint):
    """Semantics 3: a path of 40,000 bytes, and 500 names of 255 bytes at its end, listed and looked at."""
    name = b"d" * 250
    fd = descend(source, name, 160, make=lambda above: os.mkdir(name, dir_fd=above))
    names = [b"%0255d" % number for number in range(500)]
    for each in names:
        os.close(os.open(each, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
    os.close(fd)
    mounted(source, at=mountpoint)
    fd = descend(mountpoint, name, 160)
    try:
        assert Counter(map(os.fsencode, os.listdir(fd))) == Counter(names)
        assert {os.stat(each, dir_fd=fd).st_size for each in names} == {0}
        assert read_at(os.fsdecode(names[7]), fd) == b""
    finally:
        os.close(fd)


def test_empty_files_and_empty_directories(source, mounted, mountpoint):
    """Semantics 3: an empty source, empty directories, and an empty file, which is fetched and resident like any."""
    (source / "empty").mkdir()
    cache = mounted(source, at=mountpoint)
    assert os.listdir(mountpoint / "empty") == []
    cache.unmount()
    (source / "empty").rmdir()
    cache = mounted(source, at=mountpoint)
    assert os.listdir(mountpoint) == []
    cache.unmount()
    (source / "nothing").touch()
    cache = mounted(source, at=mountpoint)
    for _ in range(2):
        assert (mountpoint / "nothing").read_bytes() == b""
    assert (cache.count("misses"), cache.count("hits"), cache.count("resident_files")) == (1, 1, 1)


@pytest.mark.slow
def test_a_directory_of_100_000_entries(source, mounted, mountpoint):
    """Semantics 3: a wide directory is listed completely and each name once, also while names are looked up."""
    count = 100_000
    (source / "wide").mkdir()
    fd = os.open(source / "wide", os.O_RDONLY)
    for number in range(count):
        os.close(os.open(f"entry {number}", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
    os.close(fd)
    mounted(source, at=mountpoint)
    names = os.listdir(mountpoint / "wide")
    assert len(names) == count
    assert set(names) == {f"entry {number}" for number in range(count)}
    seen = Counter()
    with os.scandir(mountpoint / "wide") as entries:
        for position, entry in enumerate(entries):
            seen[entry.name] += 1
            assert entry.is_file(follow_symlinks=False)
            if position % 5000 == 0:
                assert os.stat(entry.path).st_size == 0
    assert len(seen) == count
    assert set(seen.values()) == {1}
