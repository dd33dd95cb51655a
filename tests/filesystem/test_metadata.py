"""Names, attributes and listings without a kernel: what is asked, what is remembered, and for how long."""

from __future__ import annotations

import errno
import os
import time

import pytest
import trio
import trio.testing

from cachefs.errors import SourceError
from cachefs.fs.inodes import ROOT_INODE
from cachefs.source.attributes import Attributes
from cachefs.workers.pool import WorkerBugError
from tests.filesystem.fakes import until, world


def in_world(tmp_path, main, **settings):
    """Run `main(world)`. What it raises comes out as it is; what background work raises, as a group."""

    async def run():
        failure = None
        async with world(tmp_path, **settings) as made:
            try:
                await main(made)
            except (Exception, pytest.fail.Exception) as error:
                failure = error
        if failure is not None:
            raise failure

    trio.run(run)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


def change(path, content):
    """Write `content`, with a time that no earlier version had."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


def test_attributes_are_those_of_the_source(source, tmp_path):
    (source / "file").write_bytes(b"12345")
    (source / "link").symlink_to("file")
    (source / "folder").mkdir(mode=0o751)

    async def main(made):
        for name in "file", "link", "folder":
            node = await made.node(name)
            known, status = Attributes.unpack(node.attributes), (source / name).lstat()
            assert (known.size, known.mode, known.mtime_ns, known.links, known.inode) == (
                status.st_size,
                status.st_mode,
                status.st_mtime_ns,
                status.st_nlink,
                status.st_ino,
            )
        assert await made.filesystem.readlink((await made.node("link")).inode) == b"file"
        assert Attributes.unpack((await made.filesystem.getattr(ROOT_INODE)).attributes).inode == source.stat().st_ino
        assert len(await made.filesystem.statfs()) == 9

    in_world(tmp_path, main)


def test_what_is_known_is_not_asked_again(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        change(source / "file", b"123")
        assert await made.node("file") is node
        assert await made.filesystem.getattr(node.inode) is node
        assert made.source.calls == {"stat": 1}

    in_world(tmp_path, main)


def test_nothing_is_believed_without_a_time_to_live(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        assert await made.node("file") is node
        assert made.source.calls["stat"] == 2
        (source / "file").unlink()
        assert await made.filesystem.lookup(ROOT_INODE, b"file") is None
        (source / "file").write_bytes(b"123")
        assert (await made.node("file")).inode != node.inode

    in_world(tmp_path, main, ttl=0.0)


def test_what_has_expired_is_asked_again(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        before = time.monotonic()
        node = await made.node("file")
        assert before + 0.05 <= node.expires <= time.monotonic() + 0.05
        change(source / "file", b"123")
        await until(lambda: time.monotonic() >= node.expires)
        newer = await made.node("file")
        assert newer.inode != node.inode
        assert Attributes.unpack(newer.attributes).size == 3

    in_world(tmp_path, main, ttl=0.05)


def test_time_counts_from_the_question_and_not_from_the_answer(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        made.source.gate.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.node, "file")
            await trio.testing.wait_all_tasks_blocked()
            asked = time.monotonic()
            await until(lambda: time.monotonic() >= asked + 0.05)
            made.source.gate.open()
        assert made.filesystem.inodes.child(made.filesystem.inodes.root, b"file").expires <= asked + 100

    in_world(tmp_path, main, ttl=100.0)


def test_absence_is_remembered(source, tmp_path):
    async def main(made):
        for _ in range(3):
            assert await made.filesystem.lookup(ROOT_INODE, b"none") is None
        assert made.source.calls == {"stat": 1}
        assert made.filesystem.absent_until(ROOT_INODE, b"none") > time.monotonic() + 3000

    in_world(tmp_path, main)


def test_absence_expires(source, tmp_path):
    async def main(made):
        assert await made.filesystem.lookup(ROOT_INODE, b"file") is None
        (source / "file").write_bytes(b"")
        await until(lambda: time.monotonic() >= made.filesystem.absent_until(ROOT_INODE, b"file"))
        assert await made.filesystem.lookup(ROOT_INODE, b"file") is not None

    in_world(tmp_path, main, ttl=0.05)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOTDIR, errno.ESTALE, errno.ENAMETOOLONG])
def test_errors_are_the_sources_own_and_are_not_remembered(source, tmp_path, number):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        made.source.errors = {"stat": number, "list": number}
        for call in made.filesystem.lookup(ROOT_INODE, b"file"), made.filesystem.snapshot(ROOT_INODE):
            with pytest.raises(SourceError) as caught:
                await call
            assert caught.value.errno == number
        made.source.errors.clear()
        assert await made.filesystem.lookup(ROOT_INODE, b"file") is not None
        assert await made.filesystem.snapshot(ROOT_INODE) == [b"file"]

    in_world(tmp_path, main)


def test_a_new_version_is_a_new_inode_and_the_old_one_is_stale(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        old = await made.node("file")
        change(source / "file", b"123")
        new = await made.node("file")
        assert new.inode != old.inode
        with pytest.raises(OSError, match="changed on the source") as caught:
            await made.filesystem.getattr(old.inode)
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="changed on the source"):
            await made.filesystem.open(old.inode, os.O_RDONLY)
        made.filesystem.forget([(old.inode, 1)])
        assert made.filesystem.inodes.get(old.inode) is None
        assert made.filesystem.inodes.get(new.inode) is new

    in_world(tmp_path, main, ttl=0.0)


def test_an_open_file_keeps_the_attributes_of_its_version(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        node = await made.node("file")
        handle = await made.filesystem.open(node.inode, os.O_RDONLY)
        change(source / "file", b"123")
        assert Attributes.unpack((await made.filesystem.getattr(node.inode)).attributes).size == 5
        made.filesystem.release(handle)
        with pytest.raises(OSError, match="changed on the source"):
            await made.filesystem.getattr(node.inode)

    in_world(tmp_path, main, ttl=0.0)


def test_an_inode_that_nobody_knows_is_stale(source, tmp_path):
    async def main(made):
        for call in (
            made.filesystem.getattr(99),
            made.filesystem.lookup(99, b"x"),
            made.filesystem.open(99, os.O_RDONLY),
            made.filesystem.snapshot(99),
            made.filesystem.readlink(99),
        ):
            with pytest.raises(OSError, match="unknown inode") as caught:
                await call
            assert caught.value.errno == errno.ESTALE

    in_world(tmp_path, main)


def test_a_file_has_no_names(source, tmp_path):
    (source / "file").write_bytes(b"")

    async def main(made):
        node = await made.node("file")
        for call in made.filesystem.lookup(node.inode, b"x"), made.filesystem.snapshot(node.inode):
            with pytest.raises(NotADirectoryError):
                await call

    in_world(tmp_path, main)


def test_a_listing_has_every_name_once_and_no_more_questions(source, tmp_path):
    names = [b"%04d" % number for number in range(700)] + [b"\xff\n", b"x" * 255]
    for name in names:
        with open(os.path.join(os.fsencode(source), name), "wb"):
            pass

    async def main(made):
        listed = await made.filesystem.snapshot(ROOT_INODE)
        assert sorted(listed) == sorted(names)
        assert await made.filesystem.snapshot(ROOT_INODE) == listed
        assert made.source.calls == {"list": 1}
        assert await made.filesystem.lookup(ROOT_INODE, b"not there") is None
        assert made.source.calls == {"list": 1}, "what is not listed is absent"

    in_world(tmp_path, main)


def test_a_listing_shows_types_and_what_is_gone(source, tmp_path):
    (source / "file").write_bytes(b"")
    (source / "folder").mkdir()
    os.mkfifo(source / "pipe")

    async def main(made):
        await made.filesystem.snapshot(ROOT_INODE)
        kinds = {name: made.filesystem.listed_child(ROOT_INODE, name) for name in (b"file", b"folder")}
        assert kinds == {b"file": 0o100000, b"folder": 0o040000}
        assert made.filesystem.listed_child(ROOT_INODE, b"pipe").kind == 0o010000, "attributes were asked for"
        node = made.filesystem.add_listed_child(ROOT_INODE, b"file", 0o100000)
        assert await made.filesystem.lookup(ROOT_INODE, b"file") is node
        assert made.filesystem.listed_child(ROOT_INODE, b"none") is None

    in_world(tmp_path, main)


def test_lookups_after_a_listing_bring_all_attributes_at_once(source, tmp_path):
    for number in range(1000):
        (source / f"{number}").write_bytes(b"x" * (number % 7))

    async def main(made):
        names = await made.filesystem.snapshot(ROOT_INODE)
        await made.filesystem.lookup(ROOT_INODE, names[0])
        assert made.source.calls["stat_many"] == 0, "one lookup is no scan"
        await made.filesystem.lookup(ROOT_INODE, names[1])
        directory = made.filesystem.inodes.root.directory
        await until(lambda: not directory.is_gathering)
        asked = dict(made.source.calls)
        assert asked["stat_many"] == 3
        for name in names:
            node = await made.filesystem.lookup(ROOT_INODE, name)
            assert Attributes.unpack(node.attributes).size == int(name) % 7
        assert made.source.calls == asked

    in_world(tmp_path, main)


def test_a_gather_sees_what_went_since_the_listing(source, tmp_path):
    for number in range(10):
        (source / f"{number}").write_bytes(b"")

    async def main(made):
        names = await made.filesystem.snapshot(ROOT_INODE)
        (source / os.fsdecode(names[5])).unlink()
        for name in names[:2]:
            await made.filesystem.lookup(ROOT_INODE, name)
        await until(lambda: not made.filesystem.inodes.root.directory.is_gathering)
        asked = dict(made.source.calls)
        assert await made.filesystem.lookup(ROOT_INODE, names[5]) is None
        assert made.source.calls == asked
        assert names[5] not in await made.filesystem.snapshot(ROOT_INODE)

    in_world(tmp_path, main)


def test_a_gather_that_fails_is_no_ones_error(source, tmp_path):
    for number in range(10):
        (source / f"{number}").write_bytes(b"")

    async def main(made):
        names = await made.filesystem.snapshot(ROOT_INODE)
        made.source.errors = {"stat_many": errno.EIO}
        for name in names:
            assert await made.filesystem.lookup(ROOT_INODE, name) is not None
        await until(lambda: not made.filesystem.inodes.root.directory.is_gathering)

    in_world(tmp_path, main)


def test_a_bug_in_background_work_does_not_end_the_mount(source, tmp_path):
    """It runs in the mount's own nursery: what it raises takes every reader's file system away."""
    for number in range(10):
        (source / f"{number}").write_bytes(b"")

    async def main(made):
        names = await made.filesystem.snapshot(ROOT_INODE)

        async def broken(*_):
            raise WorkerBugError(errno.EIO, "a bug of cachefs", "a job")

        made.source.stat_many = broken
        for name in names:
            assert await made.filesystem.lookup(ROOT_INODE, name) is not None
        await trio.testing.wait_all_tasks_blocked()

    in_world(tmp_path, main)


def test_a_listing_is_asked_for_again_when_it_has_expired(source, tmp_path):
    async def main(made):
        assert await made.filesystem.snapshot(ROOT_INODE) == []
        (source / "new").write_bytes(b"")
        assert await made.filesystem.snapshot(ROOT_INODE) == [b"new"]
        (source / "new").unlink()
        assert await made.filesystem.snapshot(ROOT_INODE) == []

    in_world(tmp_path, main, ttl=0.0)


def test_access_is_decided_by_the_source_where_modes_do_not_say(source, tmp_path):
    (source / "file").write_bytes(b"")
    (source / "file").chmod(0o600)

    async def main(made):
        node = await made.node("file")
        with pytest.raises(OSError, match="read-only") as caught:
            await made.filesystem.access(node.inode, os.W_OK)
        assert caught.value.errno == errno.EROFS
        assert await made.filesystem.access(node.inode, os.R_OK)
        assert await made.filesystem.access(node.inode, os.F_OK)
        assert await made.filesystem.access(node.inode, os.X_OK) is False
        assert await made.filesystem.access(ROOT_INODE, os.R_OK | os.X_OK)

    in_world(tmp_path, main)


def test_forgetting_keeps_what_is_remembered_and_numbers_are_not_used_again(source, tmp_path):
    (source / "file").write_bytes(b"")

    async def main(made):
        node = await made.node("file")
        made.filesystem.forget([(node.inode, 1), (12345, 1)])
        asked = dict(made.source.calls)
        assert (await made.node("file")) is node
        assert made.source.calls == asked
        made.filesystem.forget([(node.inode, 1)])

    in_world(tmp_path, main)


def test_a_hard_link_is_still_there_when_its_other_name_goes(source, tmp_path):
    """design.md 5.3. Attributes are fresh, the kernel has forgotten the file, and a listing no longer has `b`."""
    (source / "a").write_bytes(b"12345")
    os.link(source / "a", source / "b")

    async def main(made):
        node = await made.node("a")
        assert await made.node("b") is node
        made.filesystem.forget([(node.inode, 2)])
        (source / "b").unlink()
        assert await made.filesystem.snapshot(ROOT_INODE) == [b"a"]
        node = await made.node("a")
        try:
            handle = await made.filesystem.open(node.inode, os.O_RDONLY)
        except OSError:  # ESTALE: the kernel looks the name up afresh and tries once more
            node = await made.node("a")
            handle = await made.filesystem.open(node.inode, os.O_RDONLY)
        assert bytes(await made.filesystem.read(handle, 0, 10)) == b"12345"
        made.filesystem.release(handle)

    in_world(tmp_path, main)


def test_lookups_of_one_name_at_the_same_time_agree(source, tmp_path):
    (source / "file").write_bytes(b"12345")

    async def main(made):
        made.source.gate.close()
        found = []

        async def look():
            found.append(await made.filesystem.lookup(ROOT_INODE, b"file"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            made.source.gate.open()
        assert len(set(map(id, found))) == 1

    in_world(tmp_path, main)
