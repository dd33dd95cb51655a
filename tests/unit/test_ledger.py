"""The ledger: what several mounts of one scratch store and reserve together, also when some of them crash."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachefs.cache.ledger import _SLOTS, Ledger, LedgerFullError
from tests.unit.profile import FEW

BOOT = "b" * 32
NEXT_BOOT = "c" * 32
CAPACITY = 1000


@pytest.fixture
def ledger_of(tmp_path):
    """`ledger_of(lease, boot)`: one mount's view; those that are still open are closed at the end."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    made = []

    def make(lease, boot=BOOT):
        made.append(Ledger(fd, lease, boot))
        return made[-1]

    yield make
    for ledger in made:
        if ledger._fd >= 0:
            ledger.close()
    os.close(fd)


def test_a_new_ledger_counts_nothing_and_is_not_trusted(ledger_of):
    ledger = ledger_of("a")
    assert not ledger.join([])
    assert ledger.stored() == (0, 0)
    assert ledger.reserved() == 0


def test_reservations_become_stored_or_are_given_back(ledger_of):
    ledger = ledger_of("a")
    ledger.join([])
    assert ledger.reserve(600, CAPACITY)
    assert not ledger.reserve(401, CAPACITY)
    assert ledger.reserve(400, CAPACITY)
    assert not ledger.reserve(1, CAPACITY)
    assert ledger.reserve(0, CAPACITY), "an empty file always has room"
    ledger.settle(600)
    ledger.release(400)
    assert (ledger.stored(), ledger.reserved()) == ((600, 1), 0)
    ledger.remove(600)
    assert ledger.stored() == (0, 0)


def test_mounts_see_each_other(ledger_of):
    one, other = ledger_of("a"), ledger_of("b")
    one.join([])
    assert other.join(["a"]), "who has company trusts the count"
    assert one.reserve(700, CAPACITY)
    assert other.reserved() == 700
    assert not other.reserve(301, CAPACITY)
    assert other.reserve(300, CAPACITY)
    other.settle(300)
    assert one.stored() == (300, 1)
    one.remove(300)
    assert other.stored() == (0, 0)


def test_a_count_is_trusted_after_a_clean_end_in_the_same_boot_alone(ledger_of):
    first = ledger_of("a")
    first.join([])
    first.set_stored(70, 7)
    first.leave(clean=True)
    second = ledger_of("b")
    assert second.join([])
    assert second.stored() == (70, 7)
    second.close()  # a crash
    third = ledger_of("c")
    assert not third.join([]), "the one before did not end in order"
    third.leave(clean=True)
    fourth = ledger_of("d", NEXT_BOOT)
    assert not fourth.join([]), "another boot"
    fourth.leave(clean=False)
    assert not ledger_of("e", NEXT_BOOT).join([]), "it was said not to be clean"


def test_what_a_dead_mount_reserved_counts_as_stored(ledger_of):
    one, other = ledger_of("a"), ledger_of("b")
    one.join([])
    other.join(["a"])
    other.reserve(300, CAPACITY)
    other.close()
    third = ledger_of("c")
    assert third.join(["a"])
    assert third.stored()[0] == 300
    assert third.reserved() == 0
    assert not third.reserve(701, CAPACITY)


def test_a_dead_mounts_reservations_are_counted_afresh_by_the_next_mount_without_company(ledger_of):
    """Also if a mount that lived on ended in order after the crash (head of cachefs/cache/ledger.py)."""
    one, other = ledger_of("a"), ledger_of("b")
    one.join([])
    one.set_stored(0, 0)
    other.join(["a"])
    other.reserve(300, CAPACITY)
    other.close()  # a crash: its copy was never finished
    one.leave(clean=True)
    third = ledger_of("c")
    trusted = third.join([])
    assert not trusted or third.stored()[0] == 0, "300 bytes are lost to every mount from now on"


def test_reservations_taken_over_from_the_dead_are_not_trusted_for_ever(ledger_of):
    one, other = ledger_of("a"), ledger_of("b")
    one.join([])
    other.join(["a"])
    other.reserve(300, CAPACITY)
    other.close()
    third = ledger_of("c")
    third.join(["a"])  # takes the dead mount's reservations over as stored
    one.leave(clean=False)
    third.leave(clean=True)
    fourth = ledger_of("d")
    trusted = fourth.join([])
    assert not trusted or fourth.stored()[0] == 0


def test_slots_are_used_again(ledger_of):
    for number in range(3 * _SLOTS):
        ledger = ledger_of(f"lease{number}")
        ledger.join([])
        ledger.reserve(1, CAPACITY)
        ledger.close()  # each crashes
    assert ledger_of("last").join([]) is False


def test_a_full_table_is_an_error_of_its_own(ledger_of):
    live = []
    for number in range(_SLOTS):
        ledger_of(f"lease{number}").join(live)
        live.append(f"lease{number}")
    with pytest.raises(LedgerFullError):
        ledger_of("one too many").join(live)


@pytest.mark.parametrize("damage", [b"", b"short", b"\xa5" * 64, bytes(5000)])
def test_a_damaged_file_is_begun_afresh(ledger_of, tmp_path, damage):
    (tmp_path / "ledger").write_bytes(damage)
    ledger = ledger_of("a")
    assert not ledger.join([])
    assert ledger.stored() == (0, 0)
    assert ledger.reserve(CAPACITY, CAPACITY)


def test_a_long_lease_id_is_found_again(ledger_of):
    first = ledger_of("0123456789abcdef")
    first.join([])
    first.reserve(10, CAPACITY)
    second = ledger_of("b")
    assert second.join(["0123456789abcdef"])
    assert second.reserved() == 10


@dataclass
class _Mount:
    """What a mount knows of itself: its reservations, and whether it trusts the count."""

    ledger: Ledger
    reserved: list[int] = field(default_factory=list)


class Mounts(RuleBasedStateMachine):
    """Several mounts of one scratch that reserve, store, remove, end in order, and crash.

    The model is the disk: the files that are complete, and those of which a part may have been written.
    """

    def __init__(self):
        super().__init__()
        self.mounts: dict[str, _Mount] = {}
        self.files: list[int] = []
        self.boot = BOOT
        self.next_lease = 0
        self.has_crashed = False

    @initialize()
    def make_scratch(self):
        self.folder = tempfile.TemporaryDirectory(prefix="cachefs-ledger-")
        self.fd = os.open(self.folder.name, os.O_RDONLY | os.O_DIRECTORY)

    def teardown(self):
        for mount in self.mounts.values():
            mount.ledger.close()
        if hasattr(self, "folder"):
            os.close(self.fd)
            self.folder.cleanup()

    @property
    def on_disk(self):
        """Bytes complete and the most that can have been written on the way."""
        return sum(self.files) + sum(sum(mount.reserved) for mount in self.mounts.values())

    def some_mount(self, data):
        return self.mounts[data.draw(st.sampled_from(sorted(self.mounts)))]

    @precondition(lambda self: len(self.mounts) < 4)
    @rule()
    def mount(self):
        lease = f"lease{self.next_lease}"
        self.next_lease += 1
        ledger = Ledger(self.fd, lease, self.boot)
        trusted = ledger.join(list(self.mounts))
        assert not (self.mounts and not trusted), "a count with live mounts on it may not be made anew"
        if trusted and not self.mounts:
            assert ledger.stored()[0] >= sum(self.files)
            if not self.has_crashed:
                assert ledger.stored() == (sum(self.files), len(self.files)), "trusted and alone: it must be exact"
        if not trusted:
            self.has_crashed = False
            ledger.set_stored(sum(self.files), len(self.files))
        self.mounts[lease] = _Mount(ledger)

    @precondition(lambda self: self.mounts)
    @rule(data=st.data(), size=st.integers(0, CAPACITY + 50))
    def reserve(self, data, size):
        mount = self.some_mount(data)
        if mount.ledger.reserve(size, CAPACITY):
            mount.reserved.append(size)
        else:
            stored, _ = mount.ledger.stored()
            assert stored + mount.ledger.reserved() + size > CAPACITY

    @precondition(lambda self: any(mount.reserved for mount in self.mounts.values()))
    @rule(data=st.data(), is_whole=st.booleans())
    def finish(self, data, is_whole):
        mount = data.draw(st.sampled_from([m for m in self.mounts.values() if m.reserved]))
        size = mount.reserved.pop()
        if is_whole:
            self.files.append(size)
            mount.ledger.settle(size)
        else:
            mount.ledger.release(size)

    @precondition(lambda self: self.mounts and self.files)
    @rule(data=st.data())
    def evict(self, data):
        mount = self.some_mount(data)
        size = self.files.pop(data.draw(st.integers(0, len(self.files) - 1)))
        mount.ledger.remove(size)

    @precondition(lambda self: self.mounts)
    @rule(data=st.data())
    def end_in_order(self, data):
        lease = data.draw(st.sampled_from(sorted(self.mounts)))
        mount = self.mounts.pop(lease)
        for size in mount.reserved:
            mount.ledger.release(size)
        mount.ledger.leave(clean=not self.mounts)

    @precondition(lambda self: self.mounts)
    @rule(data=st.data(), renamed=st.booleans())
    def crash(self, data, renamed):
        """The mount is gone at once; a file may have been renamed into place that it could not count any more."""
        lease = data.draw(st.sampled_from(sorted(self.mounts)))
        mount = self.mounts.pop(lease)
        mount.ledger.close()
        self.has_crashed = True
        if renamed and mount.reserved:
            self.files.append(mount.reserved[0])

    @precondition(lambda self: not self.mounts)
    @rule()
    def boot_again(self):
        self.boot = NEXT_BOOT if self.boot == BOOT else BOOT

    @invariant()
    def never_more_than_the_capacity(self):
        assert self.on_disk <= CAPACITY

    @invariant()
    def never_counted_too_low(self):
        for mount in self.mounts.values():
            stored, _ = mount.ledger.stored()
            assert stored + mount.ledger.reserved() >= self.on_disk
            assert mount.ledger.reserved() >= sum(sum(m.reserved) for m in self.mounts.values())


TestMounts = Mounts.TestCase
TestMounts.settings = settings(FEW, stateful_step_count=40, max_examples=60)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 900),
        lambda path: path.write_bytes(b"x" * 2000),
    ],
    ids=["empty", "cut", "other"],
)
def test_a_ledger_that_somebody_damaged_counts_as_full(ledger_of, tmp_path, damage):
    """While it is used: nothing is stored any more, and who comes to it alone counts afresh."""
    one = ledger_of("a")
    one.join([])
    one.set_stored(100, 1)
    assert one.reserve(50, CAPACITY)
    damage(tmp_path / "ledger")
    assert not one.reserve(1, CAPACITY)
    one.settle(50)
    one.remove(30)
    one.doubt()
    assert not one.reserve(1, CAPACITY)
    other = ledger_of("b")
    assert other.join(["a"])
    assert not other.reserve(1, CAPACITY), "who has company cannot count"
    other.leave(clean=False)
    one.leave(clean=True)
    last = ledger_of("c")
    assert not last.join([]), "alone it counts"
    last.set_stored(150, 2)
    assert last.reserve(CAPACITY - 150, CAPACITY)
    last.close()


def test_the_count_is_never_negative(ledger_of):
    """A size that the index had wrong makes room for nothing."""
    ledger = ledger_of("a")
    ledger.join([])
    ledger.set_stored(100, 1)
    ledger.remove(1 << 40)
    assert ledger.stored() == (0, 0)
    assert not ledger.reserve(CAPACITY + 1, CAPACITY)
