"""The index in SQLite: what is recorded comes back, and it is made to agree with what lies in scratch."""

from __future__ import annotations

import os
import sqlite3

import pytest

from cachefs.cache.index import Index, IndexHandlers
from cachefs.errors import StorageError
from tests.unit.conftest import BOOT, EARLIER_BOOT, put

DATASET, OTHER_DATASET = b"d" * 16, b"e" * 16


def name_of(number):
    return number.to_bytes(16, "big") + b"version1"


def row(number, size=100, used=None, boot=BOOT, checksum=b"checksum"):
    return (name_of(number), size, checksum, boot, b"path/%d" % number, number if used is None else used)


def run(generator):
    """What a handler yields, and what it returns."""
    said = []
    while True:
        try:
            said.append(next(generator))
        except StopIteration as stop:
            return said, stop.value


@pytest.fixture
def index(tmp_path):
    index = Index(tmp_path / "index.db")
    yield index
    index.close()


@pytest.fixture
def handlers(scratch, storage):
    handlers = IndexHandlers(scratch.path / "index.db", storage)
    yield handlers
    handlers.close()


def files_of(index, dataset=DATASET):
    return [row for batch in index.files_of(dataset) for row in batch]


def all_rows(path):
    connection = sqlite3.connect(path)
    try:
        return sorted(connection.execute("SELECT name, size, boot FROM files"))
    finally:
        connection.close()


def test_a_new_index_is_made_and_opened_again(tmp_path):
    for _ in range(2):
        index = Index(tmp_path / "index.db")
        assert files_of(index) == []
        index.close()


def test_what_is_recorded_comes_back_least_recently_used_first(index):
    index.use_dataset(DATASET, b"/source")
    index.record(DATASET, [row(1, used=30), row(2, used=10), row(3, used=20)], [])
    assert [name for name, *_ in files_of(index)] == [name_of(2), name_of(3), name_of(1)]
    index.record(DATASET, [], [(40, name_of(2))])
    assert files_of(index) == [(name_of(n), 100, b"checksum", BOOT) for n in (3, 1, 2)]
    assert files_of(index, OTHER_DATASET) == []


def test_a_file_found_again_keeps_its_checksum_and_changes_hands(index):
    index.record(DATASET, [row(1, boot=EARLIER_BOOT)], [])
    index.record(OTHER_DATASET, [row(1, checksum=b"", used=50)], [])
    assert files_of(index) == []
    assert files_of(index, OTHER_DATASET) == [(name_of(1), 100, b"checksum", BOOT)]
    index.record(OTHER_DATASET, [row(1, checksum=b"another.")], [])
    assert files_of(index, OTHER_DATASET)[0][2] == b"another."


def test_forgotten_files_are_gone(index):
    index.record(DATASET, [row(1), row(2)], [])
    index.forget([name_of(1), name_of(7)])
    assert [name for name, *_ in files_of(index)] == [name_of(2)]


def test_a_source_path_of_any_bytes_is_kept(index):
    index.use_dataset(DATASET, b"/net/\xff\x00\n'\"")
    index.use_dataset(DATASET, b"/net/\xff\x00\n'\"")
    index.record(DATASET, [(name_of(1), 1, b"", BOOT, b"\xff\x00';--", 1)], [])
    assert files_of(index) == [(name_of(1), 1, b"", BOOT)]


def test_more_files_than_fit_into_one_message(index):
    index.record(DATASET, [row(n) for n in range(2500)], [])
    batches = list(index.files_of(DATASET))
    assert [len(batch) for batch in batches] == [1000, 1000, 500]


def test_unused_files_are_those_of_no_live_dataset_in_order_of_use(index):
    index.record(DATASET, [row(1, used=1), row(2, used=5)], [])
    index.record(OTHER_DATASET, [row(3, used=3), row(4, used=4)], [])
    assert [name for name, *_ in index.unused([], -1, 10)] == [name_of(n) for n in (1, 3, 4, 2)]
    assert index.unused([DATASET], -1, 10) == [(name_of(3), BOOT, 100, 3), (name_of(4), BOOT, 100, 4)]
    assert index.unused([DATASET], 3, 10) == [(name_of(4), BOOT, 100, 4)]
    assert index.unused([DATASET], -1, 1) == [(name_of(3), BOOT, 100, 3)]
    assert index.unused([DATASET, OTHER_DATASET], -1, 10) == []


def test_a_failed_transaction_leaves_nothing(index):
    with pytest.raises(sqlite3.Error):
        index.record(DATASET, [row(1), (name_of(2), None, b"", BOOT, b"", 1)], [])
    assert files_of(index) == []
    index.record(DATASET, [row(3)], [])
    assert len(files_of(index)) == 1


def test_reconciling_makes_the_index_agree_with_the_files(scratch, storage, storage_of):
    earlier = storage_of(EARLIER_BOOT)
    put(storage, name_of(1), bytes(10))  # as recorded
    put(storage, name_of(2), bytes(20))  # not recorded: its mount died before it could
    put(storage, name_of(3), bytes(33))  # of another size than recorded
    put(earlier, name_of(5), bytes(50))  # of an earlier boot, as recorded
    put(earlier, name_of(6), bytes(60))  # of an earlier boot, not recorded
    put(earlier, name_of(7), bytes(77))  # of an earlier boot, of another size
    fd = storage.stage(name_of(8))  # half-copied, its worker is gone
    index = Index(scratch.path / "index.db")
    os.close(fd)
    index.record(DATASET, [row(1, 10), row(3, 30), row(4, 40)], [])
    index.record(DATASET, [row(5, 50, boot=EARLIER_BOOT), row(7, 70, boot=EARLIER_BOOT)], [])
    assert index.reconcile(storage) == (10 + 20 + 50, 3)
    kept = [(name_of(1), BOOT, 10), (name_of(2), BOOT, 20), (name_of(5), EARLIER_BOOT, 50)]
    assert sorted(storage.scan()) == sorted(kept)
    assert storage.open_staged(name_of(8)) is None
    assert all_rows(scratch.path / "index.db") == sorted((name, size, boot) for name, boot, size in kept)
    assert [name for name, *_ in files_of(index)] == [name_of(1), name_of(5)]
    assert [name for name, *_ in index.unused([DATASET], -1, 10)] == [name_of(2)], "found, and nobody's so far"
    assert index.reconcile(storage) == (80, 3), "once is enough"
    index.close()


def test_a_file_that_is_there_under_two_boots_is_counted_as_what_it_takes(scratch, storage, storage_of):
    put(storage_of(EARLIER_BOOT), name_of(1), bytes(10))
    put(storage, name_of(1), bytes(10))
    index = Index(scratch.path / "index.db")
    index.record(DATASET, [row(1, 10, boot=EARLIER_BOOT)], [])
    total, files = index.reconcile(storage)
    found = list(storage.scan())
    assert (total, files) == (sum(size for _, _, size in found), len(found))
    again = index.reconcile(storage)
    found = list(storage.scan())
    assert again == (sum(size for _, _, size in found), len(found)) == (10, 1)
    index.close()


def test_the_handlers_do_what_the_mount_asks(handlers):
    table = handlers.table()
    assert run(table["reconcile"]()) == ([], (0, 0))
    assert run(table["load"](DATASET, b"/source")) == ([], None)
    run(table["record"](DATASET, [row(1), row(2)], [(9, name_of(1))], []))
    run(table["record"](DATASET, [row(2)], [], [name_of(2)]))  # evicted and fetched again: forgotten comes first
    assert run(table["load"](DATASET, b"/source"))[0] == [
        [(name_of(2), 100, b"checksum", BOOT), (name_of(1), 100, b"checksum", BOOT)]
    ]
    assert [name for name, *_ in run(table["unused"]([], -1))[1]] == [name_of(2), name_of(1)]


@pytest.mark.parametrize(
    "damage",
    [
        b"this is no database at all, but it is long enough to look at" * 100,
        b"SQLite format 3\0" + b"\xa5" * 8000,
        b"",
        b"\0" * 4096,
    ],
    ids=["text", "garbage behind the magic", "empty", "zeros"],
)
def test_a_damaged_index_is_made_anew_from_what_is_there(scratch, storage, handlers, damage):
    put(storage, name_of(1), bytes(10))
    for suffix in "", "-wal":
        (scratch.path / f"index.db{suffix}").write_bytes(damage)
    table = handlers.table()
    assert run(table["reconcile"]()) == ([], (10, 1))
    run(table["record"](DATASET, [row(1, 10)], [], []))
    assert run(table["load"](DATASET, b"/source"))[0] == [[(name_of(1), 10, b"checksum", BOOT)]]


def test_an_index_damaged_in_the_middle_is_made_anew(scratch, storage):
    index = Index(scratch.path / "index.db")
    index.record(DATASET, [row(n) for n in range(2000)], [])
    index.close()
    path = scratch.path / "index.db"
    content = bytearray(path.read_bytes())
    content[4096 : len(content)] = b"\x5a" * (len(content) - 4096)
    path.write_bytes(content)
    put(storage, name_of(1), bytes(10))
    handlers = IndexHandlers(path, storage)
    assert run(handlers.table()["reconcile"]()) == ([], (10, 1))
    handlers.close()


@pytest.mark.parametrize("job", [("load", DATASET, b"/source"), ("unused", [], -1), ("record", DATASET, [], [], [])])
def test_a_damaged_index_is_made_anew_by_whoever_meets_it(scratch, handlers, job):
    """Also after a clean end, when nothing is reconciled: what it knew is lost, what is on disk is not."""
    (scratch.path / "index.db").write_bytes(b"no database" * 1000)
    name, *arguments = job
    run(handlers.table()[name](*arguments))
    run(handlers.table()["record"](DATASET, [row(1, 10)], [], []))
    assert run(handlers.table()["load"](DATASET, b"/source"))[0] == [[(name_of(1), 10, b"checksum", BOOT)]]


def test_an_index_that_is_locked_or_not_to_be_opened_is_not_thrown_away(scratch, storage):
    path = scratch.path / "index.db"
    path.mkdir()
    handlers = IndexHandlers(path, storage)
    with pytest.raises(StorageError):
        run(handlers.table()["reconcile"]())
    assert path.is_dir()


def test_two_mounts_share_an_index(tmp_path):
    one, other = Index(tmp_path / "index.db"), Index(tmp_path / "index.db")
    one.record(DATASET, [row(1)], [])
    other.record(DATASET, [row(2)], [])
    assert len(files_of(one)) == len(files_of(other)) == 2
    one.close()
    other.close()
