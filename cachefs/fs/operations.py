"""The pyfuse3 adapter: types and errno, nothing else. What it means is in `filesystem`.

Invariants:
- No exception but FUSEError leaves a handler: anything else would end the mount. An error that is not an OSError is a
  bug, logged with its traceback and answered with EIO.
- The lookup count of a node grows by one for each entry that the kernel was given, with no await in between.
- FLUSH, GETXATTR and LISTXATTR are answered with ENOSYS, which the kernel remembers: it never asks again.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    StatvfsData,
)

from cachefs.cache.files import Buffer
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.inodes import Node
from cachefs.metrics import Metrics
from cachefs.source.attributes import Attributes

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def _handler(
    call: Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    @functools.wraps(call)
    async def handle(self: Operations, /, *arguments: P.args, **keywords: P.kwargs) -> T:
        self.metrics.requests += 1
        try:
            return await call(self, *arguments, **keywords)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("bug in handler=%s", call.__name__)
            raise FUSEError(errno.EIO) from None

    return handle


async def _refuse(*_: object) -> Any:
    raise FUSEError(errno.EROFS)


class Operations(pyfuse3.Operations):
    """Shows a FileSystem to the kernel."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: FileSystem, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics
        self._fs = filesystem
        self._listings: dict[int, tuple[int, list[bytes]]] = {}
        self._next_listing = 1

    @_handler
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        node = await self._fs.lookup(parent_inode, name)
        if node is None:
            entry = EntryAttributes()
            entry.st_ino = InodeT(0)
            entry.entry_timeout = max(0.0, self._fs.absent_until(parent_inode, name) - time.monotonic())
            return entry
        self._fs.inodes.know(node)
        return _entry(node)

    @_handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return _entry(await self._fs.getattr(inode))

    @_handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        return await self._fs.readlink(inode)

    @_handler
    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        return await self._fs.access(inode, mode)

    @_handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        (
            data.f_bsize,
            data.f_frsize,
            data.f_blocks,
            data.f_bfree,
            data.f_bavail,
            data.f_files,
            data.f_ffree,
            data.f_favail,
            data.f_namemax,
        ) = await self._fs.statfs()
        return data

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self._fs.forget(inode_list)

    @_handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        names = await self._fs.snapshot(inode)
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = inode, names
        return FileHandleT(handle)

    @_handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        inode, names = self._listings[fh]
        for position in range(start_id, len(names)):
            name = names[position]
            child = self._fs.listed_child(inode, name)
            if child is None:
                continue
            if isinstance(child, Node):
                entry = _entry(child)
            else:
                entry = _typed_entry(child, self._fs.inodes.next_inode)
            if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                break
            if not isinstance(child, Node):
                child = self._fs.add_listed_child(inode, name, child)
            self._fs.inodes.know(child)

    @_handler
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    @_handler
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        # An inode is one version of a file, so pages of it are good for ever
        return FileInfo(fh=FileHandleT(await self._fs.open(inode, flags)), keep_cache=True)

    @_handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]
        return await self._fs.read(fh, off, size)

    @_handler
    async def release(self, fh: FileHandleT) -> None:
        self._fs.release(fh)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse  # type: ignore[assignment]
    create = write = setxattr = removexattr = _refuse  # type: ignore[assignment]


def _entry(node: Node) -> EntryAttributes:
    if node.attributes is None:
        return _typed_entry(node.kind, node.inode)
    entry = EntryAttributes()
    entry.st_ino = InodeT(node.inode)
    entry.entry_timeout = entry.attr_timeout = max(0.0, node.expires - time.monotonic())
    attributes = Attributes.unpack(node.attributes)
    entry.st_mode = ModeT(attributes.mode)
    entry.st_nlink = attributes.links
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.special_device
    entry.st_size = attributes.size
    entry.st_blocks = attributes.blocks
    entry.st_blksize = attributes.block_size
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


def _typed_entry(kind: int, inode: int) -> EntryAttributes:
    """An entry of which the type alone is known: the kernel asks for the rest when it needs it."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(inode)
    entry.st_mode = ModeT(kind)
    entry.entry_timeout = entry.attr_timeout = 0.0
    return entry
