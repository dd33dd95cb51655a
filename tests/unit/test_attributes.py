"""Packed attributes: nothing is lost, and the version is what tells contents apart."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from cachefs.source.attributes import (
    VERSION_BYTES,
    Attributes,
    is_same_content,
    pack_stat,
    size_of,
    version_of,
)
from tests.unit.profile import FIXED

signed = st.integers(-(2**63), 2**63 - 1)
unsigned = st.integers(0, 2**64 - 1)
word = st.integers(0, 2**32 - 1)
attributes = st.builds(
    Attributes,
    size=st.integers(0, 2**63 - 1),
    mtime_ns=signed,
    ctime_ns=signed,
    inode=unsigned,
    device=unsigned,
    atime_ns=signed,
    blocks=signed,
    block_size=signed,
    mode=word,
    links=word,
    uid=word,
    gid=word,
    special_device=unsigned,
)


@FIXED
@given(attributes)
def test_packing_keeps_everything(known):
    packed = known.pack()
    assert Attributes.unpack(packed) == known
    assert size_of(packed) == size_of(version_of(packed)) == known.size
    assert len(version_of(packed)) == VERSION_BYTES


@FIXED
@given(attributes, attributes)
def test_versions_are_the_same_where_size_mtime_and_ctime_are(one, other):
    def same(a, b):
        return (a.size, a.mtime_ns, a.ctime_ns) == (b.size, b.mtime_ns, b.ctime_ns)

    assert (version_of(one.pack()) == version_of(other.pack())) == same(one, other)
    twin = other._replace(size=one.size, mtime_ns=one.mtime_ns, ctime_ns=one.ctime_ns)
    assert version_of(one.pack()) == version_of(twin.pack())


@FIXED
@given(attributes, st.sampled_from(["size", "mtime_ns", "ctime_ns"]), st.sampled_from([-1, 1]))
def test_any_of_the_three_alone_makes_another_version(known, field, step):
    value = max(0, min(2**63 - 1, getattr(known, field) + step))
    changed = known._replace(**{field: value})
    assert (version_of(known.pack()) == version_of(changed.pack())) == (changed == known)


def test_what_stat_says_is_what_is_packed(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"12345")
    for times in (-1, 0, 4_102_444_800_123_456_789), (-5_000_000_001, -1), (0, 2**33 * 10**9 + 1):
        os.utime(path, ns=times[-2:])
        status = os.stat(path)
        known = Attributes.unpack(pack_stat(status))
        assert (known.atime_ns, known.mtime_ns) == (status.st_atime_ns, status.st_mtime_ns)
        assert (known.size, known.inode, known.mode, known.links) == (
            5,
            status.st_ino,
            status.st_mode,
            status.st_nlink,
        )


def _now(fd):
    return pack_stat(os.fstat(fd))


def test_an_open_file_has_its_content_until_it_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    with open(path, "rb") as file:
        before = _now(file.fileno())
        assert is_same_content(before, _now(file.fileno()))
        os.link(path, tmp_path / "link")
        assert is_same_content(before, _now(file.fileno())), "a link more is no write"
        os.unlink(path)
        os.unlink(tmp_path / "link")
        assert is_same_content(before, _now(file.fileno())), "unlinked is no write"
    path.write_bytes(b"12345")
    with open(path, "r+b") as file:
        before = _now(file.fileno())
        file.write(b"1234567")
        file.flush()
        assert not is_same_content(before, _now(file.fileno()))
        before = _now(file.fileno())
        os.utime(path, ns=(0, 0))
        assert not is_same_content(before, _now(file.fileno()))
