"""The table of inodes: what the kernel knows stays, what nobody knows goes, and a name leads to a node of the table."""

from __future__ import annotations

import stat

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from cachefs.fs import inodes as inodes_module
from cachefs.fs.inodes import ROOT_INODE, Inodes, Node, directory_of
from cachefs.source.attributes import Attributes
from tests.unit.profile import FEW

LATER = 1e12
FILE, FOLDER, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK


def packed(kind=FILE, *, inode=10, version=1, links=1):
    return Attributes(
        size=version,
        mtime_ns=version,
        ctime_ns=version,
        inode=inode,
        device=1,
        atime_ns=0,
        blocks=1,
        block_size=4096,
        mode=kind | 0o644,
        links=links,
        uid=0,
        gid=0,
        special_device=0,
    ).pack()


@pytest.fixture
def inodes():
    table = Inodes()
    table.refresh(table.root, packed(FOLDER, inode=1), LATER)
    return table


def know(node, lookups=1):
    node.lookups += lookups
    return node


def test_the_root_is_there_and_stays(inodes):
    assert inodes.get(ROOT_INODE) is inodes.root
    inodes.forget(ROOT_INODE, 5)
    assert inodes.get(ROOT_INODE) is inodes.root
    assert inodes.root.path == b""


def test_the_same_thing_keeps_its_node_and_another_one_gets_a_new_number(inodes):
    node = inodes.update(inodes.root, b"a", packed(), LATER)
    assert inodes.update(inodes.root, b"a", packed(), LATER) is node
    assert inodes.get(node.inode) is node
    newer = inodes.update(inodes.root, b"a", packed(version=2), LATER)
    assert newer.inode > node.inode
    assert inodes.child(inodes.root, b"a") is newer
    folder = inodes.update(inodes.root, b"a", packed(FOLDER), LATER)
    assert folder.inode > newer.inode


def test_a_directory_keeps_its_node_while_it_is_the_same_directory(inodes):
    folder = inodes.update(inodes.root, b"d", packed(FOLDER, inode=5), LATER)
    child = inodes.update(folder, b"a", packed(inode=6), LATER)
    assert child.path == b"d/a"
    assert inodes.update(inodes.root, b"d", packed(FOLDER, inode=5, version=9), LATER) is folder
    assert inodes.child(folder, b"a") is child
    assert inodes.update(inodes.root, b"d", packed(FOLDER, inode=7), LATER) is not folder


def test_what_is_not_a_directory_has_no_names(inodes):
    node = inodes.update(inodes.root, b"a", packed(), LATER)
    with pytest.raises(NotADirectoryError):
        inodes.update(node, b"b", packed(), LATER)


def test_hard_links_have_one_node(inodes):
    one = know(inodes.update(inodes.root, b"a", packed(links=2), LATER))
    other = inodes.update(inodes.root, b"b", packed(links=2), LATER)
    assert other is one
    assert one.path == b"b", "the name that was seen last"
    assert inodes.update(inodes.root, b"c", packed(links=2, inode=11), LATER) is not one
    newer = inodes.update(inodes.root, b"a", packed(links=2, version=2), LATER)
    assert newer is not one
    assert inodes.update(inodes.root, b"b", packed(links=2, version=2), LATER) is newer


def test_what_the_kernel_knows_stays_when_the_source_has_lost_it(inodes):
    node = know(inodes.update(inodes.root, b"a", packed(), LATER), 2)
    inodes.remove_child(inodes.root, b"a", LATER)
    assert inodes.get(node.inode) is node
    inodes.forget(node.inode, 1)
    assert inodes.get(node.inode) is node
    inodes.forget(node.inode, 1)
    assert inodes.get(node.inode) is None


def test_what_nobody_knows_goes_with_its_name(inodes):
    node = inodes.update(inodes.root, b"a", packed(), LATER)
    inodes.remove_child(inodes.root, b"a", LATER)
    assert inodes.get(node.inode) is None
    assert inodes.child(inodes.root, b"a") is None
    assert len(inodes) == 1


def test_a_listing_keeps_what_is_known_and_drops_what_is_gone(inodes):
    stays = inodes.update(inodes.root, b"stays", packed(inode=2), LATER)
    goes = inodes.update(inodes.root, b"goes", packed(inode=3), LATER)
    held = know(inodes.update(inodes.root, b"held", packed(inode=4), LATER))
    inodes.list_children(inodes.root, [(b"new", 9, FOLDER), (b"stays", 2, FILE)], LATER)
    assert list(directory_of(inodes.root).children.items()) == [(b"new", FOLDER), (b"stays", stays)]
    assert inodes.get(goes.inode) is None
    assert inodes.get(held.inode) is held
    new = inodes.new_child(inodes.root, b"new", FOLDER)
    assert inodes.child(inodes.root, b"new") is new
    assert inodes.update(inodes.root, b"new", packed(FOLDER, inode=9), LATER) is new
    assert new.directory is not None


def test_forgetting_what_is_not_known_is_no_error(inodes):
    inodes.forget(99, 1)
    node = inodes.update(inodes.root, b"a", packed(), LATER)
    inodes.forget(node.inode, 1)


def test_a_superseded_version_that_nobody_knows_leaves_the_table(inodes):
    """As after a look at all attributes of a directory (gather), when the files have changed since."""
    for version in range(1, 20):
        inodes.update(inodes.root, b"a", packed(version=version), LATER)
    assert len(inodes) <= 3, "older versions pile up"


def test_a_replaced_directory_that_nobody_knows_leaves_the_table_with_what_is_in_it(inodes):
    for number in range(10, 20):
        folder = inodes.update(inodes.root, b"d", packed(FOLDER, inode=number), LATER)
        inodes.update(folder, b"a", packed(inode=100 + number), LATER)
    assert len(inodes) <= 4


def test_a_file_in_a_directory_that_is_gone_leaves_the_table_when_it_is_forgotten_last(inodes):
    folder = know(inodes.update(inodes.root, b"d", packed(FOLDER, inode=5), LATER))
    child = know(inodes.update(folder, b"a", packed(inode=6), LATER))
    inodes.remove_child(inodes.root, b"d", LATER)
    inodes.forget(folder.inode, 1)
    inodes.forget(child.inode, 1)
    assert len(inodes) == 1


def test_a_hard_link_whose_other_name_goes_is_still_there(inodes):
    """Attributes of all names were asked for (the kernel knows none); one name goes, as a listing tells."""
    inodes.update(inodes.root, b"a", packed(links=2), LATER)
    inodes.update(inodes.root, b"b", packed(links=2), LATER)
    inodes.list_children(inodes.root, [(b"a", 10, FILE)], LATER)
    node = inodes.child(inodes.root, b"a")
    assert node is None or inodes.get(node.inode) is node, "a name leads to an inode that the table does not know"


def test_a_hard_link_that_the_kernel_forgets_is_known_by_its_other_name_or_not_at_all(inodes):
    know(inodes.update(inodes.root, b"a", packed(links=2), LATER))
    node = know(inodes.update(inodes.root, b"b", packed(links=2), LATER))
    inodes.remove_child(inodes.root, b"b", LATER)
    inodes.forget(node.inode, 2)
    node = inodes.child(inodes.root, b"a")
    assert node is None or inodes.get(node.inode) is node


def small_table(monkeypatch, nodes):
    """A table that remembers only so many nodes that the kernel does not know."""
    monkeypatch.setattr(inodes_module, "REMEMBERED_NODES", nodes)
    table = Inodes()
    table.refresh(table.root, packed(FOLDER, inode=1), LATER)
    return table


def test_nodes_that_the_kernel_does_not_know_are_bounded_in_number(monkeypatch):
    """A gather of a directory with a million names makes a million nodes (head of cachefs/fs/inodes.py)."""
    inodes = small_table(monkeypatch, 100)
    for number in range(1000):
        inodes.update(inodes.root, b"%d" % number, packed(inode=1000 + number), LATER)
    assert len(inodes) <= 200
    assert len(directory_of(inodes.root).children) == 1000, "its name stays"
    assert set(map(type, directory_of(inodes.root).children.values())) == {Node, int}


def test_what_the_kernel_knows_stays_beyond_the_bound(monkeypatch):
    inodes = small_table(monkeypatch, 10)
    folder = know(inodes.update(inodes.root, b"d", packed(FOLDER, inode=5), LATER))
    nodes = [know(inodes.update(folder, b"%d" % n, packed(inode=10 + n), LATER)) for n in range(50)]
    for number in range(500):
        inodes.update(inodes.root, b"%d" % number, packed(inode=1000 + number), LATER)
    assert all(inodes.get(node.inode) is node for node in (folder, *nodes))
    for node in nodes:
        inodes.forget(node.inode, 1)
        assert directory_of(folder).children[node.name] in (node, FILE)


def test_a_listing_knows_better_what_type_a_name_has(inodes):
    """Its types come from the source later than the attributes that were known."""
    inodes.update(inodes.root, b"a", packed(LINK), LATER)
    inodes.list_children(inodes.root, [(b"a", 11, FILE)], LATER)
    child = directory_of(inodes.root).children[b"a"]
    assert (child.kind if isinstance(child, Node) else child) == FILE


def reachable(inodes):
    """Every node that a name leads to, from the root down."""
    todo, seen = [inodes.root], []
    while todo:
        node = todo.pop()
        seen.append(node)
        if node.directory is not None:
            todo += [child for child in node.directory.children.values() if isinstance(child, Node)]
    return seen


class Tree(RuleBasedStateMachine):
    """A source that changes, and a kernel that looks names up, lists and forgets, in any order."""

    nodes = Bundle("nodes")
    names = st.sampled_from([b"a", b"b", b"c"])

    def __init__(self):
        super().__init__()
        self.inodes = Inodes()
        self.inodes.refresh(self.inodes.root, packed(FOLDER, inode=1), LATER)
        self.lookups: dict[int, int] = {}
        self.objects: dict[int, Node] = {}
        self.every = {ROOT_INODE: self.inodes.root}

    @initialize(target=nodes)
    def root(self):
        return ROOT_INODE

    def folder(self, number):
        """The node of a directory that the kernel can still name, else the root."""
        known = number == ROOT_INODE or self.lookups.get(number, 0) > 0
        node = self.inodes.get(number) if known else None
        return node if node is not None and node.directory is not None else self.inodes.root

    @rule(
        target=nodes,
        number=nodes,
        name=names,
        kind=st.sampled_from([FILE, FILE, FOLDER, LINK]),
        inode=st.integers(10, 14),
        version=st.integers(1, 2),
        links=st.integers(1, 2),
        is_known=st.booleans(),
    )
    def look_up(self, number, name, kind, inode, version, links, is_known):
        """A name has been asked for: by the kernel, or in a gather of attributes."""
        parent = self.folder(number)
        # one more link is another ctime, and so another version
        attributes = packed(kind, inode=inode + 10 * (kind == FOLDER), version=10 * version + links, links=links)
        node = self.inodes.update(parent, name, attributes, LATER)
        assert self.inodes.child(parent, name) is node
        assert node.attributes == attributes
        assert self.every.setdefault(node.inode, node) is node, "a number was used twice"
        if is_known:
            node.lookups += 1
            self.lookups[node.inode] = self.lookups.get(node.inode, 0) + 1
            self.objects[node.inode] = node
        return node.inode

    @rule(number=nodes, entries=st.dictionaries(names, st.sampled_from([FILE, FOLDER, LINK, 0])), shown=st.booleans())
    def list_names(self, number, entries, shown):
        parent = self.folder(number)
        self.inodes.list_children(parent, [(name, 0, kind) for name, kind in entries.items()], LATER)
        assert list(directory_of(parent).children) == list(entries)
        if shown:
            for name, child in list(directory_of(parent).children.items()):
                if not isinstance(child, Node):
                    child = self.inodes.new_child(parent, name, child)
                    assert self.every.setdefault(child.inode, child) is child, "a number was used twice"
                child.lookups += 1
                self.lookups[child.inode] = self.lookups.get(child.inode, 0) + 1
                self.objects[child.inode] = child

    @rule(number=nodes, name=names)
    def lose(self, number, name):
        parent = self.folder(number)
        self.inodes.remove_child(parent, name, LATER)
        assert self.inodes.child(parent, name) is None

    @rule(data=st.data())
    def forget(self, data):
        known = sorted(number for number, lookups in self.lookups.items() if lookups)
        if known:
            number = data.draw(st.sampled_from(known))
            lookups = data.draw(st.integers(1, self.lookups[number]))
            self.lookups[number] -= lookups
            self.inodes.forget(number, lookups)

    @invariant()
    def what_the_kernel_knows_is_there(self):
        for number, lookups in self.lookups.items():
            if lookups:
                assert self.inodes.get(number) is self.objects[number]
                assert self.objects[number].lookups == lookups

    @invariant()
    def a_name_leads_to_a_node_of_the_table(self):
        for node in reachable(self.inodes):
            assert self.inodes.get(node.inode) is node

    @invariant()
    def one_version_of_a_file_has_one_node(self):
        seen: dict[tuple[int, int], Node] = {}
        for node in reachable(self.inodes):
            if node.kind == FILE and node.attributes is not None:
                known = Attributes.unpack(node.attributes)
                if known.links > 1:
                    other = seen.setdefault((known.inode, known.size), node)
                    assert other is node or other.attributes != node.attributes

    def teardown(self):
        for number, lookups in self.lookups.items():
            if lookups:
                self.inodes.forget(number, lookups)
        self.inodes.list_children(self.inodes.root, [], LATER)
        assert len(self.inodes) == 1, "everything is gone and forgotten, but nodes are left"


TestTree = Tree.TestCase
TestTree.settings = settings(FEW, max_examples=80, stateful_step_count=25)
