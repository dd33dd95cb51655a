"""Copying a file into scratch: extents, versions, checksums, whoever else copies it, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.copying import (
    COPIED,
    DROPPED,
    FOUND,
    REVIVED,
    SMALL_FILE_BYTES,
    CopyHandlers,
    _extents,
    checksum_of,
)
from cachefs.cache.storage import GONE, IN_USE, Storage
from cachefs.errors import SourceChangedError, SourceError, StorageError
from cachefs.source.attributes import version_of
from cachefs.source.tree import SourceTree
from tests.unit.conftest import BOOT, EARLIER_BOOT, put
from tests.unit.profile import FEW

NAME = bytes(range(24))
MIB = 1 << 20


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def tree(source):
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    yield SourceTree(fd, 0.0)
    os.close(fd)


@pytest.fixture
def fetch(tree, storage):
    return CopyHandlers(tree, [storage]).table()["fetch"]


def run(generator):
    said = []
    while True:
        try:
            said.append(next(generator))
        except StopIteration as stop:
            return said, stop.value


def content_of(storage, name=NAME):
    fd = storage.open(name)
    try:
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


def is_empty(directory):
    return not list(directory.iterdir())


SIZES = [0, 1, 4096, 110_000, SMALL_FILE_BYTES, SMALL_FILE_BYTES + 1, 5 * MIB + 123, 20 * MIB]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_copied_whole_with_its_checksum(source, tree, storage, scratch, fetch, size):
    content = random.Random(size).randbytes(size)
    (source / "file").write_bytes(content)
    said, result = run(fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b""))
    assert result == (COPIED, xxhash.xxh3_64_digest(content), size)
    assert content_of(storage) == content
    assert said == sorted(said)
    assert not said or said[0] == 0
    assert is_empty(scratch.path / "staging")


@pytest.mark.parametrize("is_data_first", [True, False])
def test_a_sparse_file_is_copied_sparse(source, tree, storage, scratch, fetch, is_data_first):
    content = bytearray(24 * MIB)
    with open(source / "file", "wb") as file:
        file.truncate(len(content))
        for at in (0, 9 * MIB) if is_data_first else (5 * MIB, 23 * MIB):
            file.seek(at)
            file.write(b"data" * 1000)
            content[at : at + 4000] = b"data" * 1000
    _, (how, checksum, copied) = run(fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b""))
    assert (how, copied) == (COPIED, len(content))
    assert content_of(storage) == content
    assert checksum == xxhash.xxh3_64_digest(bytes(content))
    copy = scratch.path / "files" / BOOT / NAME.hex()[:2] / NAME.hex()
    assert copy.stat().st_blocks <= (source / "file").stat().st_blocks + 64


def test_a_file_that_is_nothing_but_a_hole(source, tree, storage, fetch):
    with open(source / "file", "wb") as file:
        file.truncate(3 * MIB)
    run(fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b""))
    assert content_of(storage) == bytes(3 * MIB)


def test_another_version_is_not_copied(source, tree, storage, scratch, fetch):
    (source / "file").write_bytes(b"old")
    version = version_of(tree.stat(b"file"))
    (source / "file").write_bytes(b"newer")
    with pytest.raises(SourceChangedError) as caught:
        run(fetch(NAME, b"file", version, "", b""))
    assert caught.value.errno == errno.ESTALE
    assert storage.open(NAME) is None
    assert is_empty(scratch.path / "staging")


@pytest.mark.parametrize("change", ["write", "append", "truncate", "touch"])
def test_a_change_while_it_is_copied_ends_the_copy(source, tree, storage, scratch, fetch, change):
    (source / "file").write_bytes(bytes(40 * MIB))
    job = fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b"")
    assert next(job) == 0
    with open(source / "file", "r+b") as file:
        if change == "write":
            file.seek(39 * MIB)
            file.write(b"new")
        elif change == "append":
            file.seek(0, os.SEEK_END)
            file.write(b"new")
        elif change == "truncate":
            file.truncate(20 * MIB)
        else:
            os.utime(file.fileno(), ns=(1, 1))
    with pytest.raises(SourceChangedError):
        run(job)
    assert storage.open(NAME) is None
    assert is_empty(scratch.path / "staging")


def test_a_file_that_is_replaced_or_linked_while_it_is_copied_is_copied_as_it_was(source, tree, storage, fetch):
    content = random.Random(1).randbytes(8 * MIB)
    (source / "file").write_bytes(content)
    (source / "other").write_bytes(b"other")
    job = fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b"")
    assert next(job) == 0
    os.rename(source / "other", source / "file")
    assert run(job)[1][0] == COPIED
    assert content_of(storage) == content


def test_what_is_no_file_any_more_is_an_error_of_the_source(source, tree, storage, scratch, fetch):
    (source / "file").write_bytes(b"x")
    version = version_of(tree.stat(b"file"))
    (source / "file").unlink()
    with pytest.raises(SourceError) as caught:
        run(fetch(NAME, b"file", version, "", b""))
    assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    (source / "file").mkdir()
    with pytest.raises(SourceError):
        run(fetch(NAME, b"file", version, "", b""))
    (source / "link").symlink_to("elsewhere")
    with pytest.raises(SourceError):
        run(fetch(NAME, b"link", version_of(tree.stat(b"link")), "", b""))
    os.mkfifo(source / "pipe")
    with pytest.raises(SourceError):
        run(fetch(NAME, b"pipe", version_of(tree.stat(b"pipe")), "", b""))
    assert is_empty(scratch.path / "staging")


def test_what_is_there_already_is_found(source, tree, storage, scratch, fetch):
    (source / "file").write_bytes(b"12345")
    version = version_of(tree.stat(b"file"))
    run(fetch(NAME, b"file", version, "", b""))
    (source / "file").unlink()
    assert run(fetch(NAME, b"file", version, "", b"")) == ([], (FOUND, b"", 0))
    assert is_empty(scratch.path / "staging")


def test_a_copy_that_another_mount_makes_is_waited_for(source, tree, storage, storage_of, fetch):
    (source / "file").write_bytes(b"12345")
    other = storage_of(BOOT)
    staged = other.stage(NAME)
    job = fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b"")
    assert next(job) == 0
    os.pwrite(staged, b"123", 0)
    assert next(job) == 3, "the other's frontier is ours"
    os.pwrite(staged, b"12345", 0)
    other.commit(NAME)
    os.close(staged)
    assert run(job)[1] == (FOUND, b"", 0)


def test_a_copy_that_another_mount_gives_up_is_made(source, tree, storage, storage_of, fetch):
    (source / "file").write_bytes(b"12345")
    staged = storage_of(BOOT).stage(NAME)
    os.pwrite(staged, b"123", 0)
    job = fetch(NAME, b"file", version_of(tree.stat(b"file")), "", b"")
    assert next(job) == 3
    os.close(staged)  # it died
    assert run(job)[1][0] == COPIED
    assert content_of(storage) == b"12345"


def test_a_copy_of_an_earlier_boot_is_taken_over_if_it_is_whole(source, tree, storage, storage_of, scratch, fetch):
    (source / "file").write_bytes(b"12345")
    version = version_of(tree.stat(b"file"))
    put(storage_of(EARLIER_BOOT), NAME, b"12345")
    (source / "file").unlink()
    checksum = xxhash.xxh3_64_digest(b"12345")
    assert run(fetch(NAME, b"file", version, EARLIER_BOOT, checksum))[1] == (REVIVED, checksum, 0)
    assert content_of(storage) == b"12345"
    assert not storage.has(NAME, EARLIER_BOOT)
    assert is_empty(scratch.path / "staging")


@pytest.mark.parametrize("damaged", [b"12346", b"1234", b"", b"123456"])
def test_a_copy_of_an_earlier_boot_that_is_not_whole_is_dropped(source, tree, storage, storage_of, fetch, damaged):
    (source / "file").write_bytes(b"12345")
    put(storage_of(EARLIER_BOOT), NAME, damaged)
    version, checksum = version_of(tree.stat(b"file")), xxhash.xxh3_64_digest(b"12345")
    assert run(fetch(NAME, b"file", version, EARLIER_BOOT, checksum))[1] == (DROPPED, b"", 5)
    assert not storage.has(NAME, EARLIER_BOOT)
    assert storage.open(NAME) is None
    assert run(fetch(NAME, b"file", version, "", b""))[1] == (COPIED, checksum, 5)
    assert content_of(storage) == b"12345"


def test_an_earlier_copy_without_a_checksum_is_not_believed(source, tree, storage, storage_of, fetch):
    """As of a file that was found in scratch, of which nobody knows what it should contain."""
    (source / "file").write_bytes(b"12345")
    put(storage_of(EARLIER_BOOT), NAME, b"rotten")
    assert run(fetch(NAME, b"file", version_of(tree.stat(b"file")), EARLIER_BOOT, bytes(8)))[1][0] == DROPPED
    assert storage.open(NAME) is None


def test_an_earlier_copy_that_is_gone_frees_nothing(source, tree, storage, scratch, fetch):
    """Another mount may have evicted it since this one looked: it has been taken off the count already."""
    (source / "file").write_bytes(b"12345")
    version = version_of(tree.stat(b"file"))
    assert run(fetch(NAME, b"file", version, EARLIER_BOOT, b"checksum"))[1] == (DROPPED, b"", 0)
    assert is_empty(scratch.path / "staging")


def test_an_earlier_copy_is_looked_at_by_one_at_a_time(source, tree, storage, storage_of, scratch):
    """The staged file's lock keeps two mounts from taking the same copy over, or one from copying it meanwhile."""
    (source / "file").write_bytes(b"12345")
    put(storage_of(EARLIER_BOOT), NAME, b"12345")
    others = []

    class Watched(Storage):
        def open_earlier(self, name, boot):
            others.append(storage.stage(name))  # another mount comes along while this one looks
            return super().open_earlier(name, boot)

    watched = Watched(scratch.fd, BOOT)
    job = CopyHandlers(tree, [watched]).table()["fetch"]
    checksum = xxhash.xxh3_64_digest(b"12345")
    assert run(job(NAME, b"file", version_of(tree.stat(b"file")), EARLIER_BOOT, checksum))[1][0] == REVIVED
    for fd in watched.fds:
        os.close(fd)
    for fd in others:
        if fd is not None:
            os.close(fd)
    assert others == [None]


def test_scratch_that_is_full_is_an_error_of_storage(source, tree, storage, scratch, fetch):
    (source / "file").write_bytes(b"12345")
    version = version_of(tree.stat(b"file"))
    (scratch.path / "files" / BOOT / NAME.hex()[:2]).write_bytes(b"in the way")
    with pytest.raises(StorageError):
        run(fetch(NAME, b"file", version, "", b""))
    assert is_empty(scratch.path / "staging")


def test_remove_says_of_each_file_what_became_of_it(tree, storage):
    names = [bytes([n]) * 24 for n in range(3)]
    for name in names:
        put(storage, name, b"12345")
    fd = storage.open(names[1])
    job = CopyHandlers(tree, [storage]).table()["remove"]
    assert run(job([(names[0], BOOT), (names[1], BOOT), (b"x" * 24, BOOT)]))[1] == [5, IN_USE, GONE]
    os.close(fd)


@FEW
@given(
    blocks=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9000)), max_size=5),
    size=st.integers(0, 64 * 65536),
    ask=st.integers(0, 64 * 65536),
)
def test_extents_cover_a_file_once_and_holes_are_zeros(tmp_path, blocks, size, ask):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(size)
        for number, length in blocks:
            start = number * 65536
            if start < size:
                file.seek(start)
                file.write(b"x" * min(length, size - start))
    with open(path, "rb") as file:
        extents = list(_extents(file.fileno(), size))
        at = 0
        for start, end, is_hole in extents:
            assert start == at < end
            at = end
            if is_hole:
                assert not os.pread(file.fileno(), end - start, start).strip(b"\0")
        assert at == size
        larger = list(_extents(file.fileno(), size + ask))  # the file got shorter since its version was taken
        assert not larger or larger[-1][1] == size + ask


def test_the_checksum_is_of_the_whole_file(tmp_path):
    content = random.Random(5).randbytes(9 * MIB + 5)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        assert checksum_of(file.fileno()) == xxhash.xxh3_64_digest(content)
