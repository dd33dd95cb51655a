"""What is shown and what is kept, without a kernel: whatever is asked first, and whatever the source says of types."""

from __future__ import annotations

import errno
import os

import pytest

from cachefs.config import Sharding
from cachefs.errors import ShardError
from cachefs.fs import inodes
from cachefs.mount.sharding import find_share
from cachefs.source.attributes import Attributes
from cachefs.source.tree import SourceTree
from tests.filesystem.test_metadata import in_world


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    for folder in ("", "a", "a/b"):
        (path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("shown", "hidden"):
            (path / folder / name).write_bytes(b"content")
    (path / "a" / "link").symlink_to("hidden")
    return path


async def plenty():
    return 1 << 30


def fail_attributes(monkeypatch, name, number):
    """Whoever asks for those of an entry of that name gets an error."""

    def stat(tree, entry, directory, plain=SourceTree._stat):
        if entry == name:
            raise OSError(number, os.strerror(number))
        return plain(tree, entry, directory)

    monkeypatch.setattr(SourceTree, "_stat", stat)


def is_shown(path):
    return not path.endswith(b"hidden")


async def names(made, path):
    node = await made.filesystem.find(path)
    return sorted(await made.filesystem.snapshot(node.inode))


async def everything(made, **options):
    """What a walk tells, by path."""
    found = {}

    async def tell(path, attributes):
        found[path] = attributes

    await made.filesystem.walk(made.filesystem.inodes.root, is_tree=True, on_file=tell, **options)
    return found


@pytest.mark.parametrize("is_known", [True, False], ids=["what is known already", "what is asked later"])
@pytest.mark.parametrize("ttl", [0.0, 3600.0])
def test_what_is_not_shown_has_no_entry(source, tmp_path, is_known, ttl):
    async def main(made):
        if is_known:
            assert len(await everything(made)) == 6
        await made.filesystem.show_only(is_shown)
        for path in b"", b"a", b"a/b":
            with pytest.raises(FileNotFoundError):
                await made.filesystem.find(os.path.join(path, b"hidden"))
            await made.filesystem.find(os.path.join(path, b"shown"))
        assert await names(made, b"") == [b"a", b"shown"]
        assert await names(made, b"a") == [b"b", b"link", b"shown"]
        for path in b"", b"a", b"a/b":
            with pytest.raises(FileNotFoundError):
                await made.filesystem.find(os.path.join(path, b"hidden"))
        assert sorted(await everything(made)) == [b"a/b/shown", b"a/shown", b"shown"]

    in_world(tmp_path, main, ttl=ttl)


def test_a_name_without_a_type_is_hidden_when_it_has_one(source, tmp_path):
    async def main(made):
        async def untyped(path, listing=made.source.listing):
            return [(name, inode, 0) for name, inode, _ in await listing(path)]

        made.source.listing = untyped
        await made.filesystem.show_only(is_shown)
        assert await names(made, b"") == [b"a", b"shown"]
        assert sorted(await everything(made)) == [b"a/b/shown", b"a/shown", b"shown"]

    in_world(tmp_path, main)


def test_what_becomes_a_file_is_hidden_as_one(source, tmp_path):
    (source / "hidden").unlink()
    (source / "hidden").mkdir()

    async def main(made):
        await made.filesystem.show_only(is_shown)
        assert await names(made, b"") == [b"a", b"hidden", b"shown"]
        node = await made.node("hidden")
        (source / "hidden").rmdir()
        (source / "hidden").write_bytes(b"content")
        with pytest.raises(OSError, match="changed on the source"):
            await made.filesystem.getattr(node.inode)
        assert await made.filesystem.lookup(made.filesystem.inodes.root.inode, b"hidden") is None
        assert await names(made, b"") == [b"a", b"shown"]

    in_world(tmp_path, main, ttl=0.0)


def test_what_is_not_kept_is_served_by_the_source_alone(source, tmp_path):
    async def main(made):
        made.cache.keeps = is_shown
        for path in "hidden", "a/hidden", "shown":
            handle = await made.filesystem.open((await made.node(path)).inode, os.O_RDONLY)
            assert bytes(await made.filesystem.read(handle, 0, 100)) == b"content"
            await made.filesystem.open(handle, os.O_RDONLY)
        await made.settled()
        assert (made.metrics.fetches, made.metrics.bypasses) == (1, 4)
        assert made.accounted == (7, 0)

    in_world(tmp_path, main)


def test_hard_links_are_told_by_each_name(source, tmp_path):
    os.link(source / "shown", source / "another")
    os.link(source / "shown", source / "a" / "third")

    async def main(made):
        told = await everything(made, by_name=True)
        assert {b"shown", b"another", b"a/third"} <= {*told}
        assert {Attributes.unpack(told[name]).links for name in (b"shown", b"another", b"a/third")} == {3}

    in_world(tmp_path, main)


def test_a_walk_tells_all_files_of_more_than_are_remembered(tmp_path, monkeypatch):
    """Nodes that the kernel does not know are dropped, many together: also of directories that are to be walked yet."""
    monkeypatch.setattr(inodes, "REMEMBERED_NODES", 50)
    wanted = set()
    for folder in range(20):
        path = tmp_path / "source" / str(folder)
        path.mkdir(parents=True)
        for file in range(20):
            (path / str(file)).write_bytes(b"")
            wanted.add(b"%d/%d" % (folder, file))

    async def main(made):
        told = await everything(made, by_name=True)
        assert {*told} == wanted
        assert {*await everything(made)} == wanted
        await made.filesystem.show_only(lambda path: path.endswith(b"/3"))
        assert {*await everything(made)} == {path for path in wanted if path.endswith(b"/3")}
        assert all(node.lookups == 0 for node in made.filesystem.inodes._by_inode.values() if node.parent is not None)

    in_world(tmp_path, main)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_a_directory_that_has_gone_or_is_closed_is_passed_over(source, tmp_path, number):
    async def main(made):
        made.source.errors["list", b"a"] = number
        share = await find_share(Sharding(0, 1), plenty, made.filesystem)
        assert share.files == 2

    in_world(tmp_path, main)


@pytest.mark.parametrize("path", [b"", b"a", b"a/b"])
def test_a_directory_that_cannot_be_listed_is_an_error(source, tmp_path, path):
    async def main(made):
        made.source.errors["list", path] = errno.EIO
        with pytest.raises(ShardError, match="could not be listed: Input/output error"):
            await find_share(Sharding(0, 2), plenty, made.filesystem)

    in_world(tmp_path, main)


@pytest.mark.parametrize("name", [b"shown", b"a", b"b"])
@pytest.mark.parametrize("ttl", [0.0, 3600.0])
def test_an_entry_whose_attributes_cannot_be_had_is_an_error(source, tmp_path, monkeypatch, name, ttl):
    """Of a directory all that is below it would be missing."""

    fail_attributes(monkeypatch, name, errno.EIO)

    async def main(made):
        with pytest.raises(ShardError, match="could not be listed: Input/output error"):
            await find_share(Sharding(0, 2), plenty, made.filesystem)

    in_world(tmp_path, main, ttl=ttl)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_an_entry_that_has_gone_or_is_closed_is_passed_over(source, tmp_path, monkeypatch, number):
    fail_attributes(monkeypatch, b"b", number)

    async def main(made):
        share = await find_share(Sharding(0, 1), plenty, made.filesystem)
        assert share.files == 4

    in_world(tmp_path, main)
