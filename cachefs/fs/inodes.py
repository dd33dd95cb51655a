"""The entries that are known, by inode number and by name; what is remembered of them, and until when.

Invariants:
- A node stands for one version of a regular file: when the source has another version, the name gets another node
  with another inode number. So pages, sizes and open handles of two versions can never mix, and the kernel's page
  cache may be kept for ever. A directory keeps its node while it is the same directory.
- Inode numbers count up and are not used twice. All hard links of a file have one node.
- A node stays while the kernel knows it (`lookups` > 0). The others are a metadata cache: they go when no name leads
  to them any more, or all together when the table has grown to twice what the kernel knows (REMEMBERED_NODES at least).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from cachefs.source.attributes import Attributes, version_of

ROOT_INODE = 1
REMEMBERED_NODES = 400_000
"""Below this many nodes none is dropped because the kernel does not know it."""

_KINDS = {kind: kind for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)}  # one object for each, not a million


class Node:
    """One entry. `attributes` are packed, None until they are asked for; they hold until `expires` (monotonic)."""

    __slots__ = ("attributes", "directory", "expires", "inode", "kind", "lookups", "name", "names", "parent")

    def __init__(self, inode: int, parent: Node | None, name: bytes, kind: int) -> None:
        self.inode = inode
        self.parent = parent
        self.name = name
        self.kind = kind  # the file type bits of a mode, or 0 while they are not known
        self.attributes: bytes | None = None
        self.expires = 0.0
        self.lookups = 0
        self.names = 0  # how many names lead to it: more than one for hard links
        self.directory: Directory | None = None

    @property
    def path(self) -> bytes:
        """Relative to the source; b"" for the root."""
        names: list[bytes] = []
        node = self
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return b"/".join(reversed(names))


class Directory:
    """What is known of a directory's names. `children` maps a name to its node or, before it has one, to its type.

    Until `listed_until` (monotonic) `children` are all names there are, in the source's order.
    """

    __slots__ = ("absent", "children", "cold_lookups", "is_gathering", "listed_until")

    def __init__(self) -> None:
        self.children: dict[bytes, Node | int] = {}
        self.absent: dict[bytes, float] = {}
        self.listed_until = 0.0
        self.cold_lookups = 0
        self.is_gathering = False


class Inodes:
    """The table of nodes of one mount."""

    def __init__(self) -> None:
        self.root = Node(ROOT_INODE, None, b"", stat.S_IFDIR)
        self.root.lookups = 1
        self.root.directory = Directory()
        self._by_inode = {ROOT_INODE: self.root}
        self._by_identity: dict[bytes, Node] = {}
        self._next = ROOT_INODE + 1
        self._idle = 0  # nodes that the kernel does not know
        self._idle_kept = 0  # of these, how many the last sweep could not drop

    def __len__(self) -> int:
        return len(self._by_inode)

    def get(self, inode: int) -> Node | None:
        return self._by_inode.get(inode)

    def child(self, parent: Node, name: bytes) -> Node | None:
        """The node of a name, if it has one."""
        found = directory_of(parent).children.get(name)
        return found if isinstance(found, Node) else None

    @property
    def next_inode(self) -> int:
        """The number that the next new node gets."""
        return self._next

    def new_child(self, parent: Node, name: bytes, kind: int) -> Node:
        """A new node for a name, in place of what it had."""
        self._idle += 1
        self._sweep_if_many()
        node = Node(self._next, parent, name, kind)
        self._next += 1
        self._by_inode[node.inode] = node
        self._set_child(parent, name, node)
        return node

    def update(self, parent: Node, name: bytes, attributes: bytes, expires: float) -> Node:
        """The node for what the source says of a name now: the same one where it is the same thing."""
        new = Attributes.unpack(attributes)
        node = self.child(parent, name)
        if node is not None and not _is_same(node, attributes, new):
            node = None
        if node is None or node.attributes is None:
            other = self._by_identity.get(_identity(new))
            if other is not None:
                node = other
                self._set_child(parent, name, node)
        if node is None:
            node = self.new_child(parent, name, stat.S_IFMT(new.mode))
        node.parent, node.name = parent, name  # of several names, the one that was seen last is there
        directory_of(parent).absent.pop(name, None)
        self.refresh(node, attributes, expires)
        return node

    def refresh(self, node: Node, attributes: bytes, expires: float) -> None:
        """The source has said the same of a node again."""
        new = Attributes.unpack(attributes)
        self._drop_identity(node)
        node.attributes = attributes
        node.expires = expires
        node.kind = stat.S_IFMT(new.mode)
        if node.directory is None and node.kind == stat.S_IFDIR:
            node.directory = Directory()
        if _identity(new):
            self._by_identity[_identity(new)] = node

    def know(self, node: Node) -> None:
        """The kernel gets one more reference."""
        if node.lookups <= 0:
            self._idle -= 1
        node.lookups += 1

    def remove_child(self, parent: Node, name: bytes, until: float) -> None:
        """The source has no such name (any more)."""
        directory = directory_of(parent)
        self._unname(directory.children.pop(name, None))
        if len(directory.absent) > 10_000:
            directory.absent.clear()
        directory.absent[name] = until

    def hide_children(self, parent: Node, names: Iterable[bytes]) -> None:
        """These names are not shown: as if the source did not list them."""
        children = directory_of(parent).children
        for name in names:
            self._unname(children.pop(name, None))

    def list_children(self, parent: Node, entries: list[tuple[bytes, int, int]], until: float) -> None:
        """All names of a directory, as the source lists them: (name, inode number, type)."""
        directory = directory_of(parent)
        before = directory.children
        now: dict[bytes, Node | int] = {}
        for name, _, kind in entries:
            child = before.get(name)
            if isinstance(child, Node) and kind in (child.kind, 0):
                now[name] = before.pop(name)
            else:
                now[name] = _KINDS.get(kind, 0)
        directory.children = now
        directory.absent.clear()
        directory.listed_until = until
        directory.cold_lookups = 0
        for child in before.values():
            self._unname(child)

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel gives back `lookups` of its references."""
        node = self._by_inode.get(inode)
        if node is None or node is self.root:
            return
        node.lookups -= lookups
        if node.lookups > 0:
            return
        self._idle += 1
        if node.names == 0 or not self._is_in_table(node.parent):
            self._drop(node)
        else:
            self._sweep_if_many()

    def _set_child(self, parent: Node, name: bytes, node: Node) -> None:
        children = directory_of(parent).children
        before = children.get(name)
        if before is not node:
            children[name] = node
            node.names += 1
            self._unname(before)

    def _unname(self, child: Node | int | None) -> None:
        """A name leads to `child` no more."""
        if isinstance(child, Node):
            child.names -= 1
            if child.names == 0 and child.lookups <= 0:
                self._drop(child)

    def _is_in_table(self, node: Node | None) -> bool:
        return node is not None and self._by_inode.get(node.inode) is node

    def _sweep_if_many(self) -> None:
        """Drop the nodes that neither the kernel knows nor a directory above one that it knows needs."""
        if self._idle - self._idle_kept <= REMEMBERED_NODES:
            return
        for node in sorted(self._by_inode.values(), key=lambda node: node.inode, reverse=True):  # children first
            if node.lookups > 0 or node.names != 1 or node.parent is None or _has_nodes(node):
                continue
            self._drop(node)
            children = directory_of(node.parent).children
            if children.get(node.name) is node:
                children[node.name] = node.kind
        self._idle_kept = self._idle

    def _drop(self, node: Node) -> None:
        """Forget a node, and below it what the kernel does not know."""
        dropped = [node]
        while dropped:
            node = dropped.pop()
            self._drop_identity(node)
            if self._by_inode.pop(node.inode, None) is not None and node.lookups <= 0:
                self._idle -= 1
            if node.directory is not None:
                for child in node.directory.children.values():
                    if isinstance(child, Node):
                        child.names -= 1
                        if child.names <= 0 and child.lookups <= 0:
                            dropped.append(child)
                node.directory.children = {}

    def _drop_identity(self, node: Node) -> None:
        if node.attributes is not None:
            identity = _identity(Attributes.unpack(node.attributes))
            if self._by_identity.get(identity) is node:
                del self._by_identity[identity]


def _identity(attributes: Attributes) -> bytes:
    """What all hard links of one version of a file have in common, b"" for what has one name."""
    if attributes.links < 2 or not stat.S_ISREG(attributes.mode):
        return b""
    return version_of(attributes.pack()) + b"%d %d" % (attributes.device, attributes.inode)


def directory_of(node: Node) -> Directory:
    """What is known of a directory's names. Raises NotADirectoryError."""
    if node.directory is None:
        raise NotADirectoryError(20, "Not a directory", node.path)
    return node.directory


def _has_nodes(node: Node) -> bool:
    return node.directory is not None and any(isinstance(c, Node) for c in node.directory.children.values())


def _is_same(node: Node, attributes: bytes, new: Attributes) -> bool:
    """Whether a node still stands for what the source describes with `attributes`."""
    if node.kind and node.kind != stat.S_IFMT(new.mode):
        return False
    if node.attributes is None:
        return True
    if node.kind == stat.S_IFREG:
        return version_of(node.attributes) == version_of(attributes)
    old = Attributes.unpack(node.attributes)
    return old.inode == new.inode and old.device == new.device
