"""The handlers of the slow source: a read-only view of a backing directory that remembers nothing.

Invariants:

- Attributes and entries time out at once and an open drops the pages of the last one, so that each LOOKUP,
  GETATTR, OPEN, READ, READLINK, STATFS and each READDIR batch comes here and pays (see `slow_conditions`).
  RELEASE, FORGET, OPENDIR and the answer "no more entries" cost nothing.
- The backing directory may change at any time. Names are resolved at each lookup; an inode is reached through
  its open descriptor or its last name, and if that name means another inode now, the answer is ESTALE, never
  the other file's (the kernel then looks the path up again).
- Inode numbers are the backing's. Every system call is relative to a directory descriptor with a single name,
  so that no path is ever too long. There is no await between taking a descriptor and using it, nor between
  counting a lookup and answering it.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import ROOT_INODE, EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, RequestContext

from cachefs.demo.slow_conditions import Conditions

DIRECTORY_DESCRIPTORS = 4096

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Node:
    """An inode that the kernel knows, under the name by which it was last looked up."""

    inode: int
    parent: Node | None
    name: bytes
    path: bytes
    lookups: int = 0
    descriptors: tuple[int, ...] = ()


@dataclass(slots=True)
class Listing:
    node: Node
    entries: list[tuple[bytes, int, int]] | None = None  # name, inode, type


def handler(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The one place where an OSError becomes the errno of the answer (anything else would end the mount)."""

    @functools.wraps(function)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error

    return answer


def stale(path: bytes) -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def entry_attributes(inode: int, found: os.stat_result | None, mode: int = 0) -> EntryAttributes:
    """Without `found`: an entry of which only inode number and type are known."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(inode)
    entry.entry_timeout = entry.attr_timeout = 0
    if found is None:
        entry.st_mode = pyfuse3.ModeT(mode)
        return entry
    entry.st_mode = pyfuse3.ModeT(found.st_mode)
    entry.st_nlink = found.st_nlink
    entry.st_uid = found.st_uid
    entry.st_gid = found.st_gid
    entry.st_rdev = found.st_rdev
    entry.st_size = found.st_size
    entry.st_blksize = found.st_blksize
    entry.st_blocks = found.st_blocks
    entry.st_atime_ns = found.st_atime_ns
    entry.st_mtime_ns = found.st_mtime_ns
    entry.st_ctime_ns = found.st_ctime_ns
    return entry


class SlowOperations(pyfuse3.Operations):
    """The handlers, and the table of the inodes that the kernel knows."""

    supports_dot_lookup = False

    def __init__(self, backing: str, conditions: Conditions) -> None:
        super().__init__()
        self._conditions = conditions
        self._root = Node(ROOT_INODE, None, b".", b".", lookups=1)
        self._root_descriptor = os.open(backing, os.O_PATH | os.O_DIRECTORY)
        self._device = os.fstat(self._root_descriptor).st_dev
        self._nodes: dict[int, Node] = {ROOT_INODE: self._root}
        self._directories: OrderedDict[Node, int] = OrderedDict()
        self._handles: dict[int, Node] = {}
        self._listings: dict[int, Listing] = {}
        self._next_listing = 0

    # Inodes.

    def _inode(self, number: int, device: int) -> int:
        return number if device == self._device else (number + (device << 44)) % 2**64

    def _node(self, inode: int) -> Node:
        try:
            return self._nodes[inode]
        except KeyError:
            raise stale(b"") from None

    def _path(self, parent: Node, name: bytes) -> bytes:
        return name if parent is self._root else parent.path + b"/" + name

    def _directory(self, node: Node) -> int:
        """An O_PATH descriptor, valid until the next call, opened from the nearest one that is held."""
        missing = []
        while node.parent is not None and node not in self._directories:
            missing.append(node)
            node = node.parent
        if node.parent is None:
            descriptor = self._root_descriptor
        else:
            descriptor = self._directories[node]
            self._directories.move_to_end(node)
        for child in reversed(missing):
            descriptor = self._open(child, os.O_PATH | os.O_DIRECTORY, descriptor)
            self._directories[child] = descriptor
            if len(self._directories) > DIRECTORY_DESCRIPTORS:
                os.close(self._directories.popitem(last=False)[1])
        return descriptor

    def _open(self, node: Node, flags: int, directory: int) -> int:
        try:
            descriptor = os.open(node.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise stale(node.path) from error
            raise
        found = os.fstat(descriptor)
        if self._inode(found.st_ino, found.st_dev) != node.inode:
            os.close(descriptor)
            raise stale(node.path)
        return descriptor

    def _stat(self, node: Node) -> os.stat_result:
        if node.parent is None:
            return os.fstat(self._root_descriptor)
        if node.descriptors:
            return os.fstat(node.descriptors[0])
        if (held := self._directories.get(node)) is not None:
            return os.fstat(held)
        try:
            found = os.stat(node.name, dir_fd=self._directory(node.parent), follow_symlinks=False)
        except FileNotFoundError:
            raise stale(node.path) from None
        if self._inode(found.st_ino, found.st_dev) != node.inode:
            raise stale(node.path)
        return found

    # Handlers with latency.

    @handler
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._node(parent_inode)
        path = self._path(parent, name)
        await self._conditions.arrive("lookup", path)
        found = os.stat(name, dir_fd=self._directory(parent), follow_symlinks=False)
        inode = self._inode(found.st_ino, found.st_dev)
        node = self._nodes.get(inode)
        if node is None:
            node = self._nodes[inode] = Node(inode, parent, name, path)
        else:
            node.parent, node.name, node.path = parent, name, path
        node.lookups += 1
        return entry_attributes(inode, found)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        await self._conditions.arrive("getattr", node.path)
        return entry_attributes(inode, self._stat(node))

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.FileNameT:
        node = self._node(inode)
        await self._conditions.arrive("readlink", node.path)
        assert node.parent is not None
        return pyfuse3.FileNameT(os.readlink(node.name, dir_fd=self._directory(node.parent)))

    @handler
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        node = self._node(inode)
        await self._conditions.arrive("open", node.path)
        if flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), node.path)
        assert node.parent is not None
        descriptor = self._open(node, os.O_RDONLY, self._directory(node.parent))
        node.descriptors += (descriptor,)
        self._handles[descriptor] = node
        return FileInfo(fh=FileHandleT(descriptor), keep_cache=False)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        path = self._handles[fh].path
        if self._conditions.bandwidth is not None:
            size = max(0, min(size, os.fstat(fh).st_size - off))
        await self._conditions.arrive("read", path, offset=off, size=size)
        data = os.pread(fh, size, off)
        self._conditions.count_bytes(path, len(data))
        return data

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if listing.entries is not None and 0 < start_id >= len(listing.entries):
            return
        await self._conditions.arrive("readdir", listing.node.path)
        if start_id == 0 or listing.entries is None:
            listing.entries = self._scan(listing.node)
        for position in range(start_id, len(listing.entries)):
            name, inode, kind = listing.entries[position]
            node = self._nodes.get(inode)
            entry = entry_attributes(inode, self._current(listing.node, name, node), kind)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position + 1):
                return
            if node is None:
                node = Node(inode, listing.node, name, self._path(listing.node, name))
                self._nodes[inode] = node
            node.lookups += 1

    def _scan(self, node: Node) -> list[tuple[bytes, int, int]]:
        descriptor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._directory(node))
        try:
            device = os.fstat(descriptor).st_dev
            with os.scandir(descriptor) as found:
                return [
                    (os.fsencode(entry.name), self._inode(entry.inode(), device), file_type(entry)) for entry in found
                ]
        finally:
            os.close(descriptor)

    def _current(self, parent: Node, name: bytes, node: Node | None) -> os.stat_result | None:
        """Attributes of a listed entry, if the kernel knows its inode; a listing has names alone otherwise.

        The kernel may be reading that file, and would take the zero size of a bare entry for its end."""
        if node is None:
            return None
        try:
            if node.descriptors:
                return self._stat(node)
            found = os.stat(name, dir_fd=self._directory(parent), follow_symlinks=False)
        except OSError:
            return None
        return found if self._inode(found.st_ino, found.st_dev) == node.inode else None

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        await self._conditions.arrive("statfs", self._root.path)
        found = os.fstatvfs(self._root_descriptor)
        answer = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(answer, f"f_{name}", getattr(found, f"f_{name}"))
        return answer

    # Handlers without. FLUSH, ACCESS, GETXATTR, LISTXATTR and FSYNC are left to the base class: ENOSYS.

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        self._conditions.count("opendir")
        self._next_listing += 1
        self._listings[self._next_listing] = Listing(self._node(inode))
        return FileHandleT(self._next_listing)

    async def releasedir(self, fh: FileHandleT) -> None:
        self._conditions.count("releasedir")
        del self._listings[fh]

    async def release(self, fh: FileHandleT) -> None:
        self._conditions.count("release")
        node = self._handles.pop(fh)
        node.descriptors = tuple(descriptor for descriptor in node.descriptors if descriptor != fh)
        os.close(fh)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self._conditions.count("forget")
        for inode, lookups in inode_list:
            node = self._nodes[inode]
            node.lookups -= lookups
            if node.lookups <= 0:
                del self._nodes[inode]
                if (descriptor := self._directories.pop(node, None)) is not None:
                    os.close(descriptor)

    async def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        self._conditions.count("refused")
        raise FUSEError(errno.EROFS)

    create = mknod = mkdir = symlink = link = _refuse
    unlink = rmdir = rename = _refuse
    write = setattr = setxattr = removexattr = _refuse


def file_type(entry: os.DirEntry[str]) -> int:
    """The S_IFMT bits of an entry, without a stat for all but devices, pipes and sockets."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
