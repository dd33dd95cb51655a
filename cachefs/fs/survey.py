"""Which directories are complete: every name is known and every file is resident, so that they may be promoted.

Invariants:
- What is believed is what the mount itself would show: a fresh listing, fresh attributes, copies of that version.
- A directory that is not complete has a witness, a file that is not resident, and is not looked at again before that
  has come; then the look goes on where it ended. So all looks together cost as much as one from end to end.
- No look holds up the event loop for longer than a few hundred names take.
"""

from __future__ import annotations

import stat
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from cachefs.cache.residency import Residency
from cachefs.cache.storage import KEY_BYTES
from cachefs.cache.trees import ENTRIES_A_JOB, ENTRY_BYTES_A_JOB, Entry
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.inodes import Node, directory_of
from cachefs.source.attributes import Attributes, size_of, version_of
from cachefs.source.client import NAMES_A_JOB

LARGE_FILE_BYTES = 8 * 1024 * 1024
"""Files of this size are promoted on their own where their directory cannot be."""
_MOST_LARGE_FILES = 1000
_OPENS_TO_LIST = 4
"""From this many opened files on, a directory that nobody has listed is listed."""
_NAMES_A_TURN = 250
_FORGET_LOOKS = 1000

MayShow = Callable[[Attributes], bool]
"""Whether a file or directory with these attributes can be shown by a tree as the mount shows it."""


@dataclass
class _Look:
    """How far a directory has been looked at. `names` is its listing, `position` that of the first name in question."""

    listed_until: float
    names: list[bytes]
    position: int = 0
    below: list[bytes] = field(default_factory=list)  # names of sub-directories
    built: int = 0  # how many of these, from the first on, are built
    has_hole: bool = False  # something that cannot be promoted

    def start_again(self) -> None:
        self.position = self.built = 0
        self.below = []


@dataclass
class Batch:
    """Entries of a directory, as many as fit into a job. `files` and `size` (bytes) count the regular ones."""

    entries: list[Entry] = field(default_factory=list)
    files: int = 0
    size: int = 0


class IncompleteError(Exception):
    """A directory has turned out not to be complete after all."""


class Survey:
    """The directories of one mount, as far as they have been used.

    `boot` names the machine's current boot. Without `with_root` the root is never complete.
    """

    def __init__(
        self, filesystem: FileSystem, residency: Residency, boot: str, may_show: MayShow, *, with_root: bool
    ) -> None:
        self._fs = filesystem
        self._residency = residency
        self._boot = boot
        self._may_show = may_show
        self._with_root = with_root
        self._looks: dict[int, _Look] = {}
        self._witnesses: dict[bytes, int] = {}  # key of a file → inode of the directory that waits for it
        self._waiting: set[int] = set()
        self._opens: Counter[int] = Counter()
        self._wanted: set[int] = set()  # to be listed
        self._due: dict[int, None] = {}
        self._due_at_once: dict[int, None] = {}
        self._large: dict[int, None] = {}
        self._copies: dict[tuple[int, int, int], bytes] = {}  # hard links: the copy of which all are links
        self.built: dict[bytes, tuple[int, int]] = {}
        """(files, bytes) of each complete tree that is not part of a larger one, by path."""
        self.woken = trio.Event()
        self.resident_at = 0.0
        """When a file has become resident last (monotonic)."""

    # What happens

    def note_open(self, node: Node) -> None:
        """A file was opened. Some 0.5 us."""
        if node.parent is not None:
            self._opens[node.parent.inode] += 1
            self._make_due(node.parent.inode)
            if node.attributes is not None and size_of(node.attributes) >= LARGE_FILE_BYTES:
                self._note_large(node)

    def note_listing(self, node: Node) -> None:
        """A directory was opened: what it waits for may be there no more."""
        self._waiting.discard(node.inode)
        self._make_due(node.inode)

    def note_resident(self, name: bytes) -> None:
        """A file has become resident. Some 0.2 us."""
        self.resident_at = time.monotonic()
        inode = self._witnesses.pop(name[:KEY_BYTES], None)
        if inode is not None:
            self._waiting.discard(inode)
            self._make_due(inode)

    def note_built(self, node: Node, files: int, size: int) -> None:
        """The tree of a directory is complete. It takes in those of its sub-directories."""
        look = self._looks.pop(node.inode)
        prefix = _prefix(node)
        for name in look.below:
            below = self.built.pop(prefix + name, (0, 0))
            files, size = files + below[0], size + below[1]
        self.built[node.path] = files, size
        if node.parent is not None:
            self._want(node.parent)

    def note_hole(self, node: Node) -> None:
        """The tree of a directory cannot be made."""
        look = self._looks.get(node.inode)
        if look is not None:
            look.has_hole = True

    def note_missing(self, node: Node, stored: bytes) -> None:
        """Storage has no copy `stored` of one of its files (any more)."""
        self._residency.discard(stored)
        self.look_again(node)

    def look_again(self, node: Node) -> None:
        """A directory has turned out to be incomplete after all."""
        look = self._looks.get(node.inode)
        if look is not None:
            look.start_again()
        self._make_due(node.inode)

    # Looking

    def take_due(self) -> list[Node]:
        """The directories that are to be looked at, each once."""
        due, self._due = self._due, {}
        self.woken = trio.Event()
        if len(self._looks) > _FORGET_LOOKS:
            self._looks = {inode: look for inode, look in self._looks.items() if self._fs.inodes.get(inode)}
        return self._directories(due)

    def take_due_at_once(self) -> list[Node]:
        """Those that are to be looked at because of what has been found in others just now."""
        due, self._due_at_once = self._due_at_once, {}
        return self._directories(due)

    def large_files(self) -> list[tuple[Node, Entry]]:
        """Large files that were opened, are resident, and lie in a directory that is not complete."""
        found: list[tuple[Node, Entry]] = []
        for inode in list(self._large):
            node = self._fs.inodes.get(inode)
            if node is None or node.parent is None or node.attributes is None or self.is_built(node.parent.path):
                del self._large[inode]
                continue
            attributes = Attributes.unpack(node.attributes)
            stored = self._find_copy(node.path, node, attributes)
            if stored and self._may_show(attributes) and time.monotonic() < node.expires:
                found.append((node, (node.name, stored, node.attributes)))
        return found

    def has_large_files(self) -> bool:
        return bool(self._large)

    def drop_large(self, node: Node) -> None:
        """A large file is not to be named again before it is opened again."""
        self._large.pop(node.inode, None)

    async def is_complete(self, node: Node) -> bool:
        """Whether a directory is complete and all below it are built. Raises SourceError."""
        if self.is_built(node.path) or node.inode in self._waiting or (node.parent is None and not self._with_root):
            return False
        look = await self._listed(node)
        if look is None or look.has_hole:
            return False
        node = await self._fs.getattr(node.inode)
        if node.attributes is None or not self._may_show(Attributes.unpack(node.attributes)):
            look.has_hole = True
            return False
        if not await self._are_files_resident(node, look) or not await self._are_all_below_built(node, look):
            return False
        await self._learn_all(node, look)
        return self._looks.get(node.inode) is look and directory_of(node).listed_until == look.listed_until

    def is_built(self, path: bytes) -> bool:
        """Whether a directory is in a tree that is complete."""
        return path in self.built or is_below(path, self.built)

    def batches(self, node: Node) -> Iterator[Batch]:
        """All entries of a complete directory but its sub-directories. Raises IncompleteError."""
        look = self._looks[node.inode]
        batch, room = Batch(), ENTRY_BYTES_A_JOB
        for name in look.names:
            child = directory_of(node).children.get(name)
            kind = child.kind if isinstance(child, Node) else child
            if kind in (None, stat.S_IFDIR):
                continue
            if not isinstance(child, Node) or child.attributes is None or time.monotonic() >= child.expires:
                raise IncompleteError(name)
            stored = b""
            if kind == stat.S_IFREG:
                attributes = Attributes.unpack(child.attributes)
                copy = self._find_copy(_prefix(node) + name, child, attributes)
                if copy is None or not self._may_show(attributes):
                    raise IncompleteError(name)
                stored = copy
                batch.files += 1
                batch.size += attributes.size
            batch.entries.append((name, stored, child.attributes))
            room -= len(name) + len(child.attributes) + 2 * KEY_BYTES
            if room <= 0 or len(batch.entries) == ENTRIES_A_JOB:
                yield batch
                batch, room = Batch(), ENTRY_BYTES_A_JOB
        if batch.entries:
            yield batch

    def below(self, node: Node) -> int:
        """How many sub-directories a complete directory has."""
        return len(self._looks[node.inode].below)

    async def _listed(self, node: Node) -> _Look | None:
        """The look at a directory with a fresh listing, or None where that is not worth asking the source."""
        directory = directory_of(node)
        if time.monotonic() >= directory.listed_until:
            if self._opens[node.inode] < _OPENS_TO_LIST and node.inode not in self._wanted:
                return None
            await self._fs.snapshot(node.inode)
        self._wanted.discard(node.inode)
        look = self._looks.get(node.inode)
        if look is None or look.listed_until != directory.listed_until:
            look = self._looks[node.inode] = _Look(directory.listed_until, list(directory.children))
        return look

    async def _are_files_resident(self, node: Node, look: _Look) -> bool:
        """Go on with a look until something is missing; with attributes that are known, or any version if not."""
        prefix = _prefix(node)
        while look.position < len(look.names):
            await trio.lowlevel.checkpoint()
            problem = self._look_at_some(node, look, prefix)
            if problem is None:
                continue
            if look.has_hole:
                return False
            names = look.names[look.position : look.position + NAMES_A_JOB]
            if look.position and await self._learns_more(node, names):
                continue  # it may be empty, or resident in the version that the source has now
            self._wait_for(node, problem)
            return False
        return True

    def _look_at_some(self, node: Node, look: _Look, prefix: bytes) -> bytes | None:
        """Look at the next names: None, or the path of one that is missing or a hole."""
        children, now = directory_of(node).children, time.monotonic()
        for position in range(look.position, min(look.position + _NAMES_A_TURN, len(look.names))):
            name = look.names[position]
            child = children.get(name)
            kind = child.kind if isinstance(child, Node) else child
            if kind == stat.S_IFDIR:
                look.below.append(name)
            elif kind == stat.S_IFREG:
                path = prefix + name
                if isinstance(child, Node) and child.attributes is not None and now < child.expires:
                    attributes = Attributes.unpack(child.attributes)
                    look.has_hole = not self._may_show(attributes)
                    is_missing = self._find_copy(path, child, attributes) is None
                else:
                    is_missing = not self._residency.has_any_version(path)
                if look.has_hole or is_missing:
                    look.position = position
                    return path
            elif kind not in (stat.S_IFLNK, None):
                look.has_hole = True
                return prefix + name
            look.position = position + 1
        return None

    async def _learns_more(self, node: Node, names: list[bytes]) -> bool:
        """Ask for attributes of the next names in question. Whether those of the first were not known."""
        child = self._fs.inodes.child(node, names[0])
        if child is not None and child.attributes is not None and time.monotonic() < child.expires:
            return False
        await self._fs.learn_attributes(node, names)
        child = self._fs.inodes.child(node, names[0])
        return child is None or (child.attributes is not None and time.monotonic() < child.expires)

    async def _learn_all(self, node: Node, look: _Look) -> None:
        """Ask for all attributes that are not known, but for those of sub-directories."""
        for start in range(0, len(look.names), NAMES_A_JOB):
            await trio.lowlevel.checkpoint()
            children = directory_of(node).children
            names = look.names[start : start + NAMES_A_JOB]
            await self._fs.learn_attributes(node, [name for name in names if children.get(name) != stat.S_IFDIR])

    async def _are_all_below_built(self, node: Node, look: _Look) -> bool:
        """Else the first that is not is made due, if it has not been looked at."""
        prefix = _prefix(node)
        while look.built < len(look.below):
            if look.built % _NAMES_A_TURN == 0:
                await trio.lowlevel.checkpoint()
            name = look.below[look.built]
            if prefix + name in self.built:
                look.built += 1
                continue
            child = await self._fs.lookup(node.inode, name)
            if child is None:
                look.below.remove(name)
                continue
            if child.directory is not None and child.inode not in self._looks:
                self._want(child)
            return False
        return True

    def _find_copy(self, path: bytes, child: Node, attributes: Attributes) -> bytes | None:
        """The name in storage of a file's copy, b"" for a file that needs none, None if it is not resident.

        All hard links of a file get the same copy, whichever of its paths it was fetched by.
        """
        version = version_of(child.attributes or b"")
        if attributes.links < 2:
            if not attributes.size:
                return b""
            return self._resident(self._residency.name_of(path, version))
        identity = attributes.device, attributes.inode, attributes.ctime_ns
        names = [self._residency.name_of(known, version) for known in dict.fromkeys((path, child.path))]
        for name in [self._copies.get(identity, names[0]), *names]:
            if self._resident(name) is not None:
                self._copies[identity] = name
                return name
        return None

    def _resident(self, name: bytes) -> bytes | None:
        known = self._residency.get(name)
        return name if known is not None and known.boot == self._boot else None

    def _wait_for(self, node: Node, path: bytes) -> None:
        """`path` is missing: look at its directory again when it has come."""
        child = self._fs.inodes.child(node, path.rpartition(b"/")[2])
        if child is not None and child.names > 1:
            return  # it may come under another name
        self._witnesses[self._residency.name_of(path, b"")[:KEY_BYTES]] = node.inode
        self._waiting.add(node.inode)

    def _note_large(self, node: Node) -> None:
        if len(self._large) < _MOST_LARGE_FILES:
            self._large[node.inode] = None

    def _directories(self, inodes: Iterable[int]) -> list[Node]:
        nodes = [self._fs.inodes.get(inode) for inode in inodes]
        return [node for node in nodes if node is not None and node.directory is not None]

    def _want(self, node: Node) -> None:
        self._wanted.add(node.inode)
        if node.inode not in self._waiting:
            self._due_at_once[node.inode] = None

    def _make_due(self, inode: int) -> None:
        if inode not in self._waiting:
            self._due[inode] = None
            self.woken.set()


def _prefix(node: Node) -> bytes:
    path = node.path
    return path + b"/" if path else b""


def is_below(path: bytes, others: Container[bytes]) -> bool:
    """Whether a directory above `path` is among `others`."""
    while path:
        path = path.rpartition(b"/")[0]
        if path in others:
            return True
    return False
