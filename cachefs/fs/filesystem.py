"""What the mount does, without a kernel: names, attributes, listings, open files. `operations` shows it to FUSE.

Invariants:
- Everything here runs in the event loop's thread. What is asked of the source is awaited; the tables are changed
  without an await in between.
- Metadata are believed for `ttl` seconds from the moment on at which the source was asked, absence and listings too.
- Whatever would change the tree is EROFS. Errors are OSError with the errno that the reader gets.
- A file that is not shown (`show_only`) has no entry in the tables: whatever looks at them sees what the kernel sees.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from cachefs.cache.cache import Cache
from cachefs.cache.files import Buffer, OpenFile
from cachefs.errors import SourceError, SourceTimeoutError
from cachefs.fs.inodes import Directory, Inodes, Node, directory_of
from cachefs.source.attributes import Attributes
from cachefs.source.client import NAMES_A_JOB, Source
from cachefs.source.tree import Entry

log = logging.getLogger(__name__)

_COLD_LOOKUPS = 2
"""From this many lookups in a listed directory without known attributes on, those of all its names are asked for."""
_GATHERS = 2
_NAMES_A_TURN = 1000
_BELIEVE_LONGER_SECONDS = 60.0


class FileSystem:
    """The tree of `source`, its files opened through `cache`.

    `ttl` is how many seconds metadata are believed. Background work runs in `nursery`.
    """

    def __init__(self, source: Source, cache: Cache, nursery: trio.Nursery, ttl: float) -> None:
        self.inodes = Inodes()
        self._source = source
        self._cache = cache
        self._nursery = nursery
        self._ttl = ttl
        self._files: dict[int, tuple[OpenFile, int]] = {}
        self.on_miss: Callable[[Node], None] | None = None
        """Called with each file that was opened and is not resident."""
        self.on_open: Callable[[Node], None] | None = None
        self.on_listing: Callable[[Node], None] | None = None
        """Called with each file, or directory, that is opened."""
        self._is_shown: Callable[[bytes], bool] | None = None
        self._hung_until = 0.0
        self._gathers = trio.CapacityLimiter(_GATHERS)

    # Names and attributes

    async def lookup(self, parent_inode: int, name: bytes) -> Node | None:
        """The entry of a name, with fresh attributes; None where there is no such name."""
        parent = self._node(parent_inode)
        directory = directory_of(parent)
        now = time.monotonic()
        node = self.inodes.child(parent, name)
        if node is not None and (now < node.expires or (now < self._hung_until and node.attributes is not None)):
            return node
        if now < directory.absent.get(name, 0.0):
            return None
        if now < directory.listed_until:
            if name not in directory.children:
                return None
            self._note_cold_lookup(parent, directory)
        path = parent.path
        try:
            attributes = await self._ask(parent, name)
        except SourceTimeoutError as error:
            if node is None or node.attributes is None:
                raise
            return self._believe_longer(node, error)
        except SourceError as error:
            if error.errno != errno.ENOENT:
                raise
            self.inodes.remove_child(parent, name, now + self._ttl)
            return None
        self._hung_until = 0.0
        if self._is_shown is not None and self._hides(path, name, Attributes.unpack(attributes).mode):
            self.inodes.remove_child(parent, name, now + self._ttl)
            return None
        return self.inodes.update(parent, name, attributes, now + self._ttl)

    def absent_until(self, parent_inode: int, name: bytes) -> float:
        """Until when (monotonic) the absence of a name is believed."""
        directory = directory_of(self._node(parent_inode))
        return directory.absent.get(name, directory.listed_until)

    async def getattr(self, inode: int) -> Node:
        """The entry with attributes that are fresh, or those of an open file's version."""
        node = self._node(inode)
        now = time.monotonic()
        if node.attributes is not None and (now < max(node.expires, self._hung_until) or inode in self._files):
            return node
        try:
            attributes = await self._source.stat(node.path)
        except SourceTimeoutError as error:
            if node.attributes is None:
                raise
            return self._believe_longer(node, error)
        if node.parent is None:
            self.inodes.refresh(node, attributes, now + self._ttl)
        elif self.inodes.update(node.parent, node.name, attributes, now + self._ttl) is not node:
            raise OSError(errno.ESTALE, "changed on the source", node.path)  # the kernel looks the name up afresh
        return node

    def _believe_longer(self, node: Node, error: SourceTimeoutError) -> Node:
        """A source that hangs says nothing new of any entry: what is resident stays readable with what was known."""
        log.warning("metadata believed longer path=%r error=%r", node.path, error.strerror)
        self._hung_until = time.monotonic() + _BELIEVE_LONGER_SECONDS
        return node

    async def readlink(self, inode: int) -> bytes:
        return await self._source.readlink(self._node(inode).path)

    async def access(self, inode: int, mode: int) -> bool:
        """Whether this process's user may do what access(2) asks."""
        if mode & os.W_OK:
            raise OSError(errno.EROFS, "read-only file system")
        node = await self.getattr(inode)
        if node.attributes is not None and _permits_plainly(Attributes.unpack(node.attributes), mode):
            return True
        return await self._source.access(node.path, mode)

    async def statfs(self) -> tuple[int, ...]:
        """The source's statvfs(2) fields, as SourceTree.statvfs orders them."""
        return await self._source.statvfs()

    def forget(self, forgotten: Sequence[tuple[int, int]]) -> None:
        """The kernel gives back references: pairs of an inode number and how many."""
        for inode, lookups in forgotten:
            self.inodes.forget(inode, lookups)

    # Directories

    async def snapshot(self, inode: int) -> list[bytes]:
        """The names of a directory, all and each once: a snapshot for one opendir."""
        node = self._node(inode)
        directory = directory_of(node)
        now = time.monotonic()
        if now >= directory.listed_until:
            path = node.path
            entries = await self._source.listing(path)
            if self._is_shown is not None:
                entries = await self._shown(path, entries)
            self.inodes.list_children(node, entries, now + self._ttl)
            untyped = [name for name, _, kind in entries if not kind]
            if untyped:
                await self._ask_attributes(node, untyped)
        if self.on_listing is not None:
            self.on_listing(node)
        return list(directory.children)

    async def show_only(self, is_shown: Callable[[bytes], bool]) -> None:
        """From now on show of the regular files those of which `is_shown` says so, by path; all of the rest.

        The kernel must not know any yet.
        """
        self._is_shown = is_shown
        waiting = [self.inodes.root]
        while waiting:
            directory = waiting.pop()
            path, hidden = directory.path, []
            for number, (name, child) in enumerate(list(directory_of(directory).children.items())):
                if number % _NAMES_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if isinstance(child, Node) and child.directory is not None:
                    waiting.append(child)
                elif self._hides(path, name, child.kind if isinstance(child, Node) else child):
                    hidden.append(name)
            self.inodes.hide_children(directory, hidden)

    async def _shown(self, path: bytes, entries: Sequence[Entry]) -> list[Entry]:
        """Those of a directory's entries that are shown, and those without a type, until they have one."""
        shown: list[Entry] = []
        for start in range(0, len(entries), _NAMES_A_TURN):
            await trio.lowlevel.checkpoint()
            part = entries[start : start + _NAMES_A_TURN]
            shown += [entry for entry in part if not self._hides(path, entry[0], entry[2])]
        return shown

    def _hides(self, path: bytes, name: bytes, mode: int) -> bool:
        """Whether the entry `name` of the directory `path` is a file that is not shown."""
        if self._is_shown is None or not stat.S_ISREG(mode):
            return False
        return not self._is_shown(path + b"/" + name if path else name)

    def listed_child(self, inode: int, name: bytes) -> Node | int | None:
        """What a listing shows of a name: its node, or its type where it has none, or None: it is gone."""
        return directory_of(self._node(inode)).children.get(name)

    def add_listed_child(self, inode: int, name: bytes, kind: int) -> Node:
        """Give a listed name its node; its number is `inodes.next_inode`."""
        return self.inodes.new_child(self._node(inode), name, kind)

    def _note_cold_lookup(self, parent: Node, directory: Directory) -> None:
        directory.cold_lookups += 1
        if directory.cold_lookups >= _COLD_LOOKUPS and not directory.is_gathering:
            directory.is_gathering = True
            self._nursery.start_soon(self._gather, parent, directory)

    async def _gather(self, parent: Node, directory: Directory) -> None:
        """Ask for the attributes of all names of a directory that have none: somebody reads them one by one."""
        try:
            async with self._gathers:
                await self.learn_attributes(parent, directory.children)
        except OSError as error:
            log.info("attributes not gathered path=%r error=%r", parent.path, error.strerror)
        finally:
            directory.is_gathering = False
            directory.cold_lookups = 0

    def _without_attributes(self, parent: Node, names: Iterable[bytes]) -> list[bytes]:
        """Those of the names in a directory of which no fresh attributes are known."""
        now, children = time.monotonic(), directory_of(parent).children
        return [
            name
            for name in names
            if not isinstance(child := children.get(name, 0), Node) or child.attributes is None or now >= child.expires
        ]

    async def learn_attributes(self, directory: Node, names: Iterable[bytes]) -> None:
        """Ask for those attributes of names in a directory that are not known, or not fresh."""
        await self._ask_attributes(directory, self._without_attributes(directory, names))

    async def _learn_surely(self, directory: Node, names: Sequence[bytes]) -> None:
        """The same, for nodes that are looked at at once: some may have been dropped again, because they were many."""
        await self.learn_attributes(directory, names)
        children = directory_of(directory).children
        dropped = [name for name in names if isinstance(children.get(name), int)]
        if dropped:
            await self.learn_attributes(directory, dropped)

    async def _ask_attributes(self, parent: Node, names: list[bytes]) -> None:
        path = parent.path
        for start in range(0, len(names), NAMES_A_JOB):
            expires = time.monotonic() + self._ttl

            def learn(batch: list[tuple[bytes, bytes | int]], expires: float = expires) -> None:
                for name, found in batch:
                    if isinstance(found, bytes):
                        if self._is_shown is not None and self._hides(path, name, Attributes.unpack(found).mode):
                            self.inodes.hide_children(parent, [name])
                        elif name in directory_of(parent).children:
                            self.inodes.update(parent, name, found, expires)
                    elif found == errno.ENOENT:
                        self.inodes.remove_child(parent, name, expires)

            await self._source.stat_many(path, names[start : start + NAMES_A_JOB], learn)

    async def find(self, path: bytes) -> Node:
        """The entry of a path relative to the source, b"" for its root. Raises FileNotFoundError and SourceError."""
        node: Node | None = self.inodes.root
        for name in path.split(b"/") if path else ():
            is_name = name not in (b"", b".", b"..") and b"\0" not in name
            node = await self.lookup(node.inode, name) if node is not None and is_name else None
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return await self.getattr(node.inode)

    async def walk(
        self,
        node: Node,
        *,
        is_tree: bool,
        on_file: Callable[[bytes, bytes], Awaitable[None]],
        by_name: bool = False,
        on_error: Callable[[bytes, OSError], None] | None = None,
    ) -> None:
        """Call `on_file` with path and packed attributes of each regular file below a directory, or of a file itself.

        Without `is_tree` its sub-directories are left out. What cannot be listed is passed over, but for `node` itself,
        and so is an entry of which there are no attributes to be had; both are told to `on_error` with their path. Hard
        links may be told by one of their names several times; `by_name` each by its own.
        """
        if node.kind == stat.S_IFREG and node.attributes is not None:
            return await on_file(node.path, node.attributes)
        held = [node]  # else its node could be dropped, with many others, before its turn comes
        self.inodes.know(node)
        try:
            await self._walk_held(held, is_tree, on_file, by_name, on_error)
        finally:
            for directory in held:
                self.inodes.forget(directory.inode, 1)

    async def _walk_held(
        self,
        held: list[Node],
        is_tree: bool,
        on_file: Callable[[bytes, bytes], Awaitable[None]],
        by_name: bool,
        on_error: Callable[[bytes, OSError], None] | None,
    ) -> None:
        node, waiting = held[0], [held[0]]
        while waiting:
            directory = waiting.pop()
            try:
                names = await self.snapshot(directory.inode)
            except OSError as error:
                if directory is node:
                    raise
                log.info("not walked path=%r error=%r", directory.path, error.strerror)
                if on_error is not None:
                    on_error(directory.path, error)
                continue
            below: list[Node] = []
            prefix = directory.path + b"/" if directory.path else b""
            for start in range(0, len(names), NAMES_A_JOB):
                part = names[start : start + NAMES_A_JOB]
                await self._learn_surely(directory, part)
                files: list[tuple[bytes, bytes]] = []
                for name in part:
                    child = self.inodes.child(directory, name)
                    if child is None or child.attributes is None:
                        if on_error is None or name not in directory_of(directory).children:  # or gone
                            continue
                        try:
                            child = await self._ask_once_more(directory, name)
                        except OSError as error:
                            on_error(prefix + name, error)
                    if child is None or child.attributes is None:
                        continue
                    if child.kind == stat.S_IFREG:
                        files.append((prefix + name if by_name else child.path, child.attributes))
                    elif child.kind == stat.S_IFDIR and is_tree:
                        self.inodes.know(child)
                        held.append(child)
                        below.append(child)
                for path, attributes in files:
                    await on_file(path, attributes)
            waiting += reversed(below)

    async def _ask_once_more(self, directory: Node, name: bytes) -> Node:
        """A listed entry whose attributes were asked for and did not come. Raises SourceError, which says why."""
        expires = time.monotonic() + self._ttl
        return self.inodes.update(directory, name, await self._ask(directory, name), expires)

    async def _ask(self, directory: Node, name: bytes) -> bytes:
        """The packed attributes of a name, from the source. Raises SourceError."""
        path = directory.path
        return await self._source.stat(path + b"/" + name if path else name)

    # Files

    async def open(self, inode: int, flags: int) -> int:
        """Open a regular file for reading; its handle. All handles of an inode share one open file."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise OSError(errno.EROFS, "read-only file system")
        shared = self._files.get(inode)
        if shared is not None and not shared[0].is_stale:
            self._files[inode] = shared[0], shared[1] + 1
            self._cache.count_open(shared[0])
            return inode
        node = self._node(inode)
        if shared is not None:
            self._expire(node)
            raise OSError(errno.ESTALE, "changed on the source", node.path)
        node = await self.getattr(inode)
        assert node.attributes is not None  # getattr's promise
        try:
            file = await self._cache.open(node.path, node.attributes)
        except SourceError:
            self._expire(node)
            raise
        if file.was_missing and self.on_miss is not None:
            self.on_miss(node)
        if self.on_open is not None:
            self.on_open(node)
        shared = self._files.get(inode)
        if shared is not None:  # opened by somebody else meanwhile
            file.close()
            self._files[inode] = shared[0], shared[1] + 1
        else:
            self._files[inode] = file, 1
        return inode

    async def read(self, handle: int, offset: int, size: int) -> Buffer:
        """Up to `size` bytes from `offset`; fewer only at the end of the file."""
        return await self._files[handle][0].read(offset, size)

    def release(self, handle: int) -> None:
        file, handles = self._files[handle]
        if handles > 1:
            self._files[handle] = file, handles - 1
        else:
            del self._files[handle]
            file.close()

    def close(self) -> None:
        """Close what the kernel has not released."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def _expire(self, node: Node) -> None:
        """Believe the names that lead to a node no more: at ESTALE the kernel looks all of them up afresh."""
        above: Node | None = node
        while above is not None:
            above.expires = 0.0
            above = above.parent

    def _node(self, inode: int) -> Node:
        node = self.inodes.get(inode)
        if node is None:
            raise OSError(errno.ESTALE, "unknown inode", str(inode))
        return node


def _permits_plainly(attributes: Attributes, mode: int) -> bool:
    """Whether the mode bits alone permit it, so that the source need not be asked; links and groups it is asked."""
    if os.geteuid() == 0:
        return not mode & os.X_OK or bool(attributes.mode & 0o111) or stat.S_ISDIR(attributes.mode)
    if attributes.uid == os.geteuid():
        granted = attributes.mode >> 6 & 7
    else:
        granted = attributes.mode & attributes.mode >> 3 & 7  # for whoever is in the group and for who is not
    return granted & mode == mode
