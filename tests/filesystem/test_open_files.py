"""Open files without a kernel: handles, hits, misses and bypasses, and what serves a read when something fails."""

from __future__ import annotations

import errno
import os
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing
import xxhash

from cachefs.cache.fetches import Fetch
from cachefs.cache.files import OpenFile
from cachefs.cache.index import Index
from cachefs.cache.residency import Residency
from cachefs.cache.scratch import claim_scratch, unlock_scratch
from cachefs.cache.storage import Storage
from cachefs.errors import SourceChangedError, SourceError, StorageError
from cachefs.metrics import Metrics
from cachefs.source.attributes import VERSION_BYTES, pack_stat, version_of
from cachefs.workers.pool import WorkerBugError
from tests.filesystem.fakes import Gate, bytes_or_errno, until
from tests.filesystem.test_metadata import change, in_world
from tests.unit.conftest import EARLIER_BOOT, put

MIB = 1 << 20


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


def content(size, seed=1):
    return random.Random(seed).randbytes(size)


def write_at(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


async def read_all(made, handle, size, step=128 * 1024):
    got = bytearray()
    while part := bytes(await made.filesystem.read(handle, len(got), step)):
        got += part
        assert len(got) <= size
    return bytes(got)


async def open_file(made, name):
    node = await made.node(name)
    return await made.filesystem.open(node.inode, os.O_RDONLY)


# Handles


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT]
)
def test_opening_for_writing_is_refused(source, tmp_path, flags):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        with pytest.raises(OSError, match="read-only") as caught:
            await made.filesystem.open(node.inode, flags)
        assert caught.value.errno == errno.EROFS
        assert made.counts == (0, 0, 0)

    in_world(tmp_path, main)


@pytest.mark.parametrize("size", [0, 1, 110_000, 256 * 1024 + 1, 3 * MIB])
def test_a_file_is_fetched_once_and_hit_from_then_on(source, tmp_path, size):
    data = content(size)
    (source / "file").write_bytes(data)

    async def main(made):
        for opens in range(1, 4):
            handle = await open_file(made, "file")
            assert await read_all(made, handle, size) == data
            await made.settled()
            made.filesystem.release(handle)
            assert made.counts == (opens - 1, 1, 0)
        assert made.metrics.fetches == 1
        assert made.metrics.source_bytes_read == size
        assert made.metrics.bytes_served == 3 * size
        assert made.accounted == (size, 0)
        assert made.source.calls["read"] == 0

    in_world(tmp_path, main)


def test_handles_of_an_inode_are_shared_counted_and_closed_with_the_last(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        handles = [await open_file(made, "file") for _ in range(3)]
        await made.settled()
        assert sum(made.counts) == 3
        assert made.copies.count("fetch") == 1
        name = next(iter(made.residency.oldest())).name
        for handle in handles:
            assert bytes(await made.filesystem.read(handle, 1, 2)) == b"23"
            assert made.storage.remove(name) == -1, "it is open"
            made.filesystem.release(handle)
        assert made.storage.remove(name) == 5

    in_world(tmp_path, main)


def test_concurrent_opens_of_an_inode_leave_one_open_file(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        made.copies.gate.close()
        handles = []

        async def open_it():
            handles.append(await made.filesystem.open(node.inode, os.O_RDONLY))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(open_it)
            await until(lambda: made.copies.gate.waiting)
            made.copies.gate.open()
        assert made.copies.count("fetch") == 1
        assert made.counts == (0, 10, 0)
        await made.settled()
        for handle in handles:
            assert bytes(await made.filesystem.read(handle, 0, 9)) == b"12345"
            made.filesystem.release(handle)
        assert made.filesystem._files == {}
        assert made.storage.remove(next(iter(made.residency.oldest())).name) == 5, "no descriptor is left"

    in_world(tmp_path, main)


def test_open_does_not_wait_for_the_copy(source, tmp_path):
    (source / "file").write_bytes(content(8 * MIB))

    async def main(made):
        made.copies.gate.close()
        handle = await open_file(made, "file")
        assert made.counts == (0, 1, 0)
        made.copies.gate.open()
        assert await read_all(made, handle, 8 * MIB) == content(8 * MIB)
        made.filesystem.release(handle)

    in_world(tmp_path, main)


def test_reads_end_at_the_end_of_the_file(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        handle = await open_file(made, "file")
        for offset, size, expected in (
            (0, 5, b"12345"),
            (3, 100, b"45"),
            (5, 10, b""),
            (50, 10, b""),
            (0, 0, b""),
            (1 << 62, 1, b""),
        ):
            assert bytes(await made.filesystem.read(handle, offset, size)) == expected
        made.filesystem.release(handle)

    in_world(tmp_path, main)


# Errors of the source


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EPERM])
def test_an_error_of_the_source_is_the_readers_at_open_and_is_not_remembered(source, tmp_path, number):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        fetch = made.copies.handlers["fetch"]

        def fail(*_):
            yield from ()
            raise SourceError(number, os.strerror(number), b"file")

        made.copies.handlers["fetch"] = fail
        with pytest.raises(SourceError) as caught:
            await made.filesystem.open(node.inode, os.O_RDONLY)
        assert caught.value.errno == number
        made.copies.handlers["fetch"] = fetch
        handle = await open_file(made, "file")
        assert await read_all(made, handle, 5) == b"12345"
        made.filesystem.release(handle)
        assert made.counts == (0, 1, 0)
        assert made.accounted == (5, 0)
        assert made.metrics.fetch_errors == 1

    in_world(tmp_path, main)


def _unlink(source):
    (source / "d" / "file").unlink()


def _write(source):
    change(source / "d" / "file", b"123")


def _replace_by_link(source):
    (source / "other").write_bytes(b"other")
    (source / "d" / "file").unlink()
    (source / "d" / "file").symlink_to("../other")


def _replace_by_directory(source):
    (source / "d" / "file").unlink()
    (source / "d" / "file").mkdir()


def _replace_by_pipe(source):
    (source / "d" / "file").unlink()
    os.mkfifo(source / "d" / "file")


def _replace_parent_by_link(source):
    (source / "d").rename(source / "e")
    (source / "d").symlink_to("e")


def _replace_parent_by_file(source):
    (source / "d").rename(source / "e")
    (source / "d").write_bytes(b"")


CHANGES = [
    _unlink,
    _write,
    _replace_by_link,
    _replace_by_directory,
    _replace_by_pipe,
    _replace_parent_by_link,
    _replace_parent_by_file,
]


@pytest.mark.parametrize("is_cacheable", [True, False])
@pytest.mark.parametrize("happen", CHANGES)
def test_a_change_before_open_is_stale_so_that_the_kernel_looks_again(source, tmp_path, happen, is_cacheable):
    """Only ESTALE makes the kernel look the path up afresh; ELOOP or ENOTDIR would reach the application."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("d/file")
        happen(source)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
            await made.filesystem.open(node.inode, os.O_RDONLY)
        assert caught.value.errno == errno.ESTALE

    in_world(tmp_path, main, capacity=MIB if is_cacheable else 1)


@pytest.mark.parametrize("happen", CHANGES)
def test_a_reader_past_the_cache_goes_on_or_gets_estale_or_eio(source, tmp_path, happen):
    """design.md 5.7: never ENOENT from read(2), never bytes of two versions."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"12345")

    async def main(made):
        handle = await open_file(made, "d/file")
        assert made.counts == (0, 0, 1)
        happen(source)
        made.source._handlers["read"].__self__._files.clear()  # another worker of the pool: it has to open the file
        assert await bytes_or_errno(made.filesystem.read(handle, 0, 5)) in (b"12345", errno.ESTALE, errno.EIO)
        made.filesystem.release(handle)

    in_world(tmp_path, main, capacity=1)


@pytest.mark.parametrize("happen", CHANGES)
def test_a_reader_whose_fetch_comes_too_late_gets_estale_or_eio(source, tmp_path, happen):
    """The fetch waited in the queue for longer than open does."""
    (source / "d").mkdir()
    (source / "d" / "file").write_bytes(b"12345")

    async def main(made):
        made.copies.gate.close()
        handle = await open_file(made, "d/file")
        happen(source)
        made.copies.gate.open()
        for _ in range(2):
            assert await bytes_or_errno(made.filesystem.read(handle, 0, 5)) in (b"12345", errno.ESTALE, errno.EIO)
        made.filesystem.release(handle)
        assert made.accounted[1] == 0

    in_world(tmp_path, main)


def test_an_open_after_a_failed_fetch_does_not_get_the_handle_that_is_stale(source, tmp_path):
    """Else whoever opens the file while somebody still has the old version open can never read it."""
    (source / "file").write_bytes(content(8 * MIB))

    async def main(made):
        made.copies.gate.close()
        old = await open_file(made, "file")
        change(source / "file", b"new")
        made.copies.gate.open()
        with pytest.raises(OSError, match="changed on the source"):
            await made.filesystem.read(old, 0, 10)
        inode = old
        with pytest.raises(OSError, match="changed on the source") as caught:
            await made.filesystem.open(inode, os.O_RDONLY)
        assert caught.value.errno == errno.ESTALE
        new = await open_file(made, "file")  # as the kernel does then
        assert bytes(await made.filesystem.read(new, 0, 10)) == b"new"
        made.filesystem.release(old)
        made.filesystem.release(new)

    in_world(tmp_path, main)


def test_a_fetch_that_sees_a_change_half_way_gives_old_bytes_or_estale(source, tmp_path):
    data = content(40 * MIB)
    (source / "file").write_bytes(data)

    async def main(made):
        made.copies.step.close()
        handle = await open_file(made, "file")
        write_at(source / "file", 39 * MIB, b"new")
        made.copies.step.open()
        for offset in range(0, len(data), 3 * MIB):
            got = await bytes_or_errno(made.filesystem.read(handle, offset, 128 * 1024))
            assert got in (data[offset : offset + 128 * 1024], errno.ESTALE, errno.EIO)
        made.filesystem.release(handle)
        await made.settled()
        assert made.accounted == (0, 0)

    in_world(tmp_path, main)


# What cannot be cached


def test_what_is_too_large_is_a_bypass(source, tmp_path):
    data = content(300_000)
    (source / "file").write_bytes(data)

    async def main(made):
        for opens in 1, 2:
            handle = await open_file(made, "file")
            assert await read_all(made, handle, len(data)) == data
            made.filesystem.release(handle)
            assert made.counts == (0, 0, opens)
        assert made.accounted == (0, 0)
        assert made.copies.count("fetch") == 0

    in_world(tmp_path, main, capacity=299_999)


def test_hold_keeps_what_is_there(source, tmp_path):
    for name in "ab":
        (source / name).write_bytes(content(600, ord(name)))

    async def main(made):
        for name in "abab":
            handle = await open_file(made, name)
            assert await read_all(made, handle, 600) == content(600, ord(name))
            made.filesystem.release(handle)
            await made.settled()
        assert made.counts == (1, 1, 2)
        assert made.accounted == (600, 0)
        assert made.metrics.evictions == 0

    in_world(tmp_path, main, capacity=1000)


@pytest.mark.parametrize("was_read", [True, False])
def test_lru_evicts_what_was_used_least_recently_but_nothing_that_is_open(source, tmp_path, was_read):
    for name in "abc":
        (source / name).write_bytes(content(400, ord(name)))

    async def main(made):
        handles = {}
        for name in "ab":
            handles[name] = await open_file(made, name)
            await made.settled()
            if was_read:
                await made.filesystem.read(handles[name], 0, 10)
        third = await open_file(made, "c")
        assert made.counts == (0, 2, 1), "both others are open"
        made.filesystem.release(third)
        made.filesystem.release(handles["b"])
        made.filesystem.release(await open_file(made, "c"))
        await made.settled()
        assert made.counts == (0, 3, 1)
        assert made.metrics.evictions == 1
        assert made.accounted == (800, 0)
        assert await read_all(made, handles["a"], 400) == content(400, ord("a"))
        made.filesystem.release(handles["a"])

    in_world(tmp_path, main, capacity=1000, policy="lru")


def test_a_superseded_version_goes_first_also_under_hold(source, tmp_path):
    """Else a full cache keeps copies that nobody can ever read again, and their new versions find no room."""
    (source / "file").write_bytes(content(600))

    async def main(made):
        for version in range(3):
            handle = await open_file(made, "file")
            await made.settled()
            made.filesystem.release(handle)
            change(source / "file", content(600 + version, version))
        assert made.metrics.evictions == 2
        assert made.counts == (0, 3, 0)

    in_world(tmp_path, main, capacity=1000, ttl=0.0)


# Copies from before the machine's last boot


@contextmanager
def an_earlier_copy(tmp_path, path, data):
    """A copy of the source file `path` from an earlier boot, in scratch and in the index; its name."""
    scratch = claim_scratch(tmp_path / "scratch")
    unlock_scratch(scratch.fd)
    storage = Storage(scratch.fd, EARLIER_BOOT)
    index = Index(scratch.path / "index.db")
    try:
        version = version_of(pack_stat(path.stat()))
        name = Residency(b"d" * 16, EARLIER_BOOT, None, recency=False).name_of(os.fsencode(path.name), version)
        put(storage, name, data)
        checksum = xxhash.xxh3_64_digest(path.read_bytes())
        index.record(b"d" * 16, [(name, len(data), checksum, EARLIER_BOOT, os.fsencode(path.name), 1)], [])
        yield name
    finally:
        index.close()
        for fd in (*storage.fds, scratch.fd):
            os.close(fd)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_copy_of_an_earlier_boot_is_used_if_its_content_is_right(source, tmp_path, is_whole):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        assert made.accounted == (5, 0)
        for _ in range(2):
            handle = await open_file(made, "file")
            assert await read_all(made, handle, 5) == b"12345"
            made.filesystem.release(handle)
            await made.settled()
        assert made.counts == (1, 1, 0)
        assert made.metrics.source_bytes_read == (0 if is_whole else 5)
        assert made.accounted == (5, 0)

    with an_earlier_copy(tmp_path, source / "file", b"12345" if is_whole else b"12346"):
        in_world(tmp_path, main)


def test_a_copy_of_an_earlier_boot_that_another_mount_evicts_is_not_taken_off_the_count_twice(source, tmp_path, caplog):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        assert made.accounted == (5, 0)
        made.ledger.remove(made.storage.remove(name, EARLIER_BOOT))  # as another mount does
        handle = await open_file(made, "file")
        assert await read_all(made, handle, 5) == b"12345"
        made.filesystem.release(handle)
        await made.settled()
        assert made.accounted[0] >= sum(size for _, _, size in made.storage.scan()), "counted too low"

    with an_earlier_copy(tmp_path, source / "file", b"12345") as name:
        in_world(tmp_path, main)


# Failures of scratch


def test_scratch_that_fails_is_a_bypass_and_the_reservation_is_given_back(source, tmp_path, caplog):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        def fail(*_):
            yield from ()
            raise StorageError(errno.ENOSPC, "No space left on device", "copy")

        made.copies.handlers["fetch"] = fail
        for opens in 1, 2:
            handle = await open_file(made, "file")
            assert await read_all(made, handle, 5) == b"12345"
            made.filesystem.release(handle)
            assert made.counts == (0, 0, opens)
        assert made.copies.count("fetch") == 1, "for a while nothing is tried in vain"
        assert made.accounted == (0, 0)

    in_world(tmp_path, main)


def test_a_staged_copy_that_cannot_be_removed_does_not_end_the_mount(source, tmp_path, caplog):
    """As on a scratch that the kernel has made read-only after an I/O error, in the middle of a fetch."""
    (source / "file").write_bytes(b"12345")

    async def main(made):
        def fail(name, *_):
            yield from ()
            (made.scratch / "staging" / name.hex()).mkdir()  # opens like a file, but cannot be unlinked
            raise StorageError(errno.EROFS, "Read-only file system", "copy")

        made.copies.handlers["fetch"] = fail
        handle = await open_file(made, "file")
        assert await read_all(made, handle, 5) == b"12345"
        made.filesystem.release(handle)
        assert made.counts == (0, 0, 1)
        assert made.accounted == (0, 5), "it takes room still"

    in_world(tmp_path, main)


def test_a_bug_in_a_worker_costs_the_copy_and_not_the_mount(source, tmp_path, caplog):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        def fail(*_):
            yield from ()
            raise WorkerBugError(errno.EIO, "a bug of cachefs", "a job")

        made.copies.handlers["fetch"] = fail
        handle = await open_file(made, "file")
        assert await read_all(made, handle, 5) == b"12345"
        made.filesystem.release(handle)
        assert made.accounted == (0, 0)

    in_world(tmp_path, main)


def test_a_second_open_after_a_failed_fetch_is_counted_as_what_it_is(source, tmp_path, caplog):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        def fail(*_):
            yield from ()
            raise StorageError(errno.ENOSPC, "No space left on device", "copy")

        made.copies.handlers["fetch"] = fail
        made.copies.gate.close()
        node = await made.node("file")
        await made.filesystem.open(node.inode, os.O_RDONLY)
        made.copies.gate.open()
        await made.settled()
        await made.filesystem.open(node.inode, os.O_RDONLY)
        assert made.counts == (0, 1, 1), "there is nothing in scratch that could be hit"
        for _ in range(2):
            made.filesystem.release(node.inode)

    in_world(tmp_path, main)


# What serves a read: one open file, a fetch that the test moves, and a scratch reader that it can hold up

VERSION_SIZE = 64 * MIB


class HeldReader:
    """ScratchReader whose reads wait at `gate`; `short` cuts off what they give, `number` is the errno they raise."""

    def __init__(self):
        self.gate = Gate()
        self.short = 0
        self.number = 0

    async def read(self, fd, offset, size):
        await self.gate.passed()
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return memoryview(os.pread(fd, size - self.short, offset))


class Served:
    """An OpenFile of `size` bytes whose fetch is moved by hand. What the source is asked for is in `asked`."""

    def __init__(self, made, size=VERSION_SIZE, *, resident=False):
        self.version = size.to_bytes(8, "little") + bytes(VERSION_BYTES - 8)
        self.name = b"n" * 24
        self.storage = made.storage
        self.reader = HeldReader()
        self.tier = SimpleNamespace(storage=self.storage, reader=self.reader)
        self.asked = []
        self.fetch = None if resident else Fetch(self.name, b"file", self.version, self.tier)
        self.staged = self.storage.stage(self.name)
        if resident:
            os.pwrite(self.staged, b"s" * size, 0)
            self.storage.commit(self.name)
            os.close(self.staged)
        self.metrics = Metrics()
        self.file = OpenFile(
            self.name,
            b"file",
            self.version,
            tier=self.tier,
            source_read=self.read_source,
            metrics=self.metrics,
            fd=self.storage.open(self.name) if resident else None,
            fetch=self.fetch,
        )

    async def read_source(self, path, version, offset, size):
        self.asked.append((offset, size))
        await trio.lowlevel.checkpoint()
        return b"r" * size  # the same bytes; told apart to see who served

    def advance(self, frontier):
        os.pwrite(self.staged, b"s" * (frontier - self.fetch.frontier), self.fetch.frontier)
        self.fetch.advance(frontier)

    def finish(self):
        self.storage.commit(self.name)
        os.close(self.staged)
        self.fetch.finish(None)

    def fail(self, error):
        self.storage.discard_held(self.name)
        os.close(self.staged)
        self.fetch.finish(error)


def reads(made, served, *ranges):
    """Start reads as tasks; each puts what it gave, or its error, into the list."""
    results = [None] * len(ranges)

    async def read(number, offset, size):
        try:
            data = bytes(await served.file.read(offset, size))
            results[number] = data[:1].decode() if len(set(data)) == 1 and len(data) == size else data
        except OSError as error:
            results[number] = error.errno

    for number, (offset, size) in enumerate(ranges):
        made.nursery.start_soon(read, number, offset, size)
    return results


def test_a_read_waits_until_the_frontier_has_passed_its_end(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.advance(MIB)
        results = reads(made, served, (0, 1000), (MIB - 10, 10), (MIB - 10, 11), (2 * MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s", "s", None, None]
        served.advance(MIB + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s", "s", "s", None]
        served.advance(2 * MIB + 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s"] * 4
        assert served.asked == []
        served.fail(SourceChangedError(b"file"))
        served.file.close()

    in_world(tmp_path, main)


def test_a_read_far_beyond_the_frontier_is_served_by_the_source(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.fetch.started -= 1000  # slow: what it will do in the next moments does not count
        served.advance(MIB)
        results = reads(made, served, (3 * MIB + 1, 1000), (60 * MIB, 1000), (3 * MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["r", "r", None]
        assert sorted(served.asked) == [(3 * MIB + 1, 1000), (60 * MIB, 1000)]
        served.advance(4 * MIB)
        await trio.testing.wait_all_tasks_blocked()
        assert results[2] == "s"
        assert served.metrics.source_bytes_read == 2000
        assert served.metrics.bytes_served == 3000
        served.fail(SourceChangedError(b"file"))
        served.file.close()

    in_world(tmp_path, main)


def test_what_is_far_depends_on_how_fast_the_fetch_is(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.advance(8 * MIB)
        served.fetch.started += 1000  # began just now: 8 MiB in a millisecond
        results = reads(made, served, (40 * MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == [None], "it waits: the fetch will be there sooner than the source could answer"
        served.fetch.started -= 2000
        served.advance(8 * MIB + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["r"], "the fetch has become slow"
        served.fail(SourceChangedError(b"file"))
        served.file.close()

    in_world(tmp_path, main)


def test_a_fetch_that_ends_serves_all_who_wait(source, tmp_path):
    async def main(made):
        served = Served(made, size=MIB)
        results = reads(made, served, (0, MIB), (MIB - 1, 1))
        await trio.testing.wait_all_tasks_blocked()
        os.pwrite(served.staged, b"s" * MIB, 0)
        served.finish()
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s", "s"]
        assert served.file.kind == "hit"
        assert made.storage.remove(served.name) == -1, "it holds on to its copy"
        served.file.close()
        assert made.storage.remove(served.name) == MIB

    in_world(tmp_path, main)


def test_a_fetch_that_fails_for_scratch_leaves_its_readers_to_the_source(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.advance(MIB)
        results = reads(made, served, (0, 1000), (2 * MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s", None]
        served.fail(StorageError(errno.ENOSPC, "full", "copy"))
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["s", "r"]
        again = reads(made, served, (0, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert again == ["r"]
        assert served.file.kind == "bypass"
        served.file.close()

    in_world(tmp_path, main)


def test_a_fetch_that_fails_for_the_source_fails_its_readers(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.advance(MIB)
        results = reads(made, served, (2 * MIB, 1000), (MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        served.fail(SourceChangedError(b"file"))
        await trio.testing.wait_all_tasks_blocked()
        assert results == [errno.ESTALE, errno.ESTALE]
        served.file.close()

    in_world(tmp_path, main)


def test_a_fetch_that_fails_does_not_close_the_copy_under_a_read_that_is_on_its_way(source, tmp_path):
    """A read hops into a thread where the page cache has not the bytes (on tmpfs: always). Its descriptor must be
    its own until it is done: a number that was closed is given to the next file that anybody opens."""
    (tmp_path / "somebody else's").write_bytes(b"X" * 2 * MIB)

    async def main(made):
        served = Served(made)
        served.advance(MIB)
        served.reader.gate.close()
        results = reads(made, served, (0, 1000), (2 * MIB, 1000))
        await trio.testing.wait_all_tasks_blocked()
        served.fail(SourceChangedError(b"file"))
        await trio.testing.wait_all_tasks_blocked()
        assert results == [None, errno.ESTALE]
        others = [os.open(tmp_path / "somebody else's", os.O_RDONLY) for _ in range(8)]
        served.reader.gate.open()
        await trio.testing.wait_all_tasks_blocked()
        for fd in others:
            os.close(fd)
        assert results[0] in ("s", "r", errno.ESTALE), "bytes of another file"
        served.file.close()

    in_world(tmp_path, main)


@pytest.mark.parametrize("fault", ["short", "EIO", "EBADF"])
def test_what_scratch_cannot_give_the_source_gives(source, tmp_path, caplog, fault):
    async def main(made):
        served = Served(made, size=MIB, resident=True)
        if fault == "short":
            served.reader.short = 1
        else:
            served.reader.number = getattr(errno, fault)
        results = reads(made, served, (0, 1000), (MIB - 1000, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["r", "r"]
        assert "scratch failed" in caplog.text
        served.file.close()

    in_world(tmp_path, main)


def test_a_copy_that_was_cut_off_is_never_a_short_file(source, tmp_path, caplog):
    data = content(300_000)
    (source / "file").write_bytes(data)

    async def main(made):
        made.filesystem.release(await open_file(made, "file"))
        await made.settled()
        (copy,) = [path for path in (made.scratch / "files").rglob("*") if path.is_file()]
        os.truncate(copy, 100_000)
        handle = await open_file(made, "file")
        assert await read_all(made, handle, len(data)) == data
        made.filesystem.release(handle)

    in_world(tmp_path, main)


def test_a_source_that_gives_too_little_is_an_error_and_no_short_file(source, tmp_path):
    async def main(made):
        served = Served(made)
        served.fail(StorageError(errno.ENOSPC, "full", "copy"))

        async def too_little(path, version, offset, size):
            await trio.lowlevel.checkpoint()
            return b"r" * (size - 1)

        served.file._source_read = too_little
        results = reads(made, served, (0, 1000))
        await trio.testing.wait_all_tasks_blocked()
        assert results == [errno.EIO]
        served.file.close()

    in_world(tmp_path, main)
