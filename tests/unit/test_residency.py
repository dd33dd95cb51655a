"""The view of what is resident: versions, order of use, and what is written behind it to the index."""

from __future__ import annotations

import sys

import pytest
import trio

from cachefs.cache.residency import Residency, Resident
from cachefs.errors import StorageError
from cachefs.source.attributes import VERSION_BYTES
from cachefs.workers.protocol import BUFFER_BYTES, encode
from tests.unit.conftest import BOOT, EARLIER_BOOT

DATASET = b"d" * 16


class FakePool:
    """The index's worker: gives `rows` to a load, and keeps what it is told to record."""

    def __init__(self, rows=(), fails=False):
        self.rows = rows
        self.fails = fails
        self.jobs = []

    async def run(self, job, *, what="", timeout=None, on_progress=None):
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise StorageError(5, "Input/output error", "index.db")
        self.jobs.append(job)
        if job[0] == "load":
            on_progress(list(self.rows))

    def recorded(self):
        """What the index holds after all jobs: names in the order of the last use."""
        files = {}
        for _, _, added, used, forgotten in (job for job in self.jobs if job[0] == "record"):
            for name in forgotten:
                files.pop(name, None)
            files.update({row[0]: row[5] for row in added})
            files.update({name: at for at, name in used if name in files})
        return files


def version(number, size=100):
    return size.to_bytes(8, "little") + number.to_bytes(VERSION_BYTES - 8, "little")


def view(pool=None, *, recency=False):
    return Residency(DATASET, BOOT, pool or FakePool(), recency=recency)


def test_a_name_is_of_one_path_and_one_version_of_one_dataset():
    residency = view()
    name = residency.name_of(b"a", version(1))
    assert len(name) == 24
    assert name == residency.name_of(b"a", version(1))
    assert name[:16] == residency.name_of(b"a", version(2))[:16]
    others = [
        residency.name_of(b"a", version(2)),
        residency.name_of(b"b", version(1)),
        Residency(b"e" * 16, BOOT, FakePool(), recency=False).name_of(b"a", version(1)),
    ]
    assert len({name, *others}) == 4


def test_what_is_added_is_there_until_it_is_discarded():
    residency = view()
    name = residency.name_of(b"a", version(1))
    assert residency.get(name) is None
    residency.add(name, b"a", version(1), b"checksum")
    assert residency.get(name) == Resident(name, 100, b"checksum", BOOT)
    assert len(residency) == 1
    residency.discard(name)
    assert residency.get(name) is None
    assert len(residency) == 0
    residency.discard(name)


def test_a_new_version_supersedes_the_old_one():
    residency = view()
    old, new = (residency.name_of(b"a", version(n, size=n)) for n in (1, 2))
    residency.add(old, b"a", version(1, 1), b"")
    residency.add(new, b"a", version(2, 2), b"")
    assert residency.get(old) is None
    assert residency.get(new) is not None
    assert residency.take_superseded() == [(old, BOOT, 1)]
    assert residency.take_superseded() == []
    residency.put_back_superseded([(old, BOOT, 1)])
    assert residency.take_superseded() == [(old, BOOT, 1)]
    residency.discard(old)
    assert residency.get(new) is not None, "an old version that goes does not take the new one with it"


def test_the_same_version_again_supersedes_nothing():
    residency = view()
    name = residency.name_of(b"a", version(1))
    for _ in range(2):
        residency.add(name, b"a", version(1), b"")
    assert residency.take_superseded() == []


def test_oldest_goes_by_use():
    residency = view(recency=True)
    names = [residency.name_of(path, version(1)) for path in (b"a", b"b", b"c")]
    for name, path in zip(names, (b"a", b"b", b"c"), strict=True):
        residency.add(name, path, version(1), b"")
    assert [file.name for file in residency.oldest()] == names
    residency.touch(names[0])
    assert [file.name for file in residency.oldest()] == [names[1], names[2], names[0]]
    residency.add(names[1], b"b", version(1), b"")
    assert [file.name for file in residency.oldest()] == [names[2], names[0], names[1]]
    residency.touch(b"x" * 24)


def load(rows, residency=None, **keywords):
    pool = FakePool(rows)
    if residency is None:
        residency = view(pool, **keywords)
    residency._pool = pool
    trio.run(residency.load, b"/source")
    assert residency.loaded.is_set()
    return residency


def test_what_the_index_says_is_known_after_loading():
    names = [view().name_of(path, version(1)) for path in (b"a", b"b")]
    residency = load([(names[0], 10, b"checksum", EARLIER_BOOT), (names[1], 20, b"", BOOT)])
    assert residency.get(names[0]) == Resident(names[0], 10, b"checksum", EARLIER_BOOT)
    assert residency.get(names[1]).size == 20
    assert residency.get(names[1]).boot == BOOT


def test_what_was_added_while_the_index_was_read_stays():
    residency = view()
    name, older = (residency.name_of(b"a", version(n)) for n in (2, 1))
    residency.add(name, b"a", version(2), b"")
    load([(older, 10, b"", BOOT)], residency)
    assert residency.get(name) is not None
    assert residency.take_superseded() == [(older, BOOT, 10)]


def test_of_two_versions_in_the_index_the_last_recorded_one_is_current():
    """The index gives the least recently used first; the older version's copy was not evicted yet."""
    old, new = (view().name_of(b"a", version(n)) for n in (1, 2))
    residency = load([(old, 10, b"", BOOT), (new, 20, b"", BOOT)])
    assert residency.get(new) is not None
    assert residency.take_superseded() == [(old, BOOT, 10)]


def test_what_was_used_while_the_index_was_read_is_not_the_oldest():
    residency = view(recency=True)
    used, idle = (residency.name_of(path, version(1)) for path in (b"used", b"idle"))
    residency.add(used, b"used", version(1), b"")
    residency.touch(used)
    load([(idle, 10, b"", BOOT)], residency)
    assert [file.name for file in residency.oldest()] == [idle, used]


def test_changes_are_written_in_order():
    pool = FakePool()
    residency = view(pool, recency=True)
    names = [residency.name_of(b"%d" % n, version(1)) for n in range(900)]
    for number, name in enumerate(names):
        residency.add(name, b"%d" % number, version(1), b"checksum")
    for name in names[:50]:
        residency.touch(name)
    for name in names[800:]:
        residency.discard(name)
    trio.run(residency.flush)
    assert set(names[:800]) <= set(pool.recorded())
    assert len(pool.jobs) > 1
    before = len(pool.jobs)
    trio.run(residency.flush)
    assert len(pool.jobs) == before, "nothing is written twice"


def test_a_file_that_went_before_the_flush_is_not_recorded():
    pool = FakePool()
    residency = view(pool)
    name = residency.name_of(b"a", version(1))
    residency.add(name, b"a", version(1), b"")
    residency.discard(name)
    trio.run(residency.flush)
    assert name not in pool.recorded()


def test_a_file_that_went_and_came_back_before_the_flush_is_recorded():
    pool = FakePool()
    residency = view(pool)
    names = [residency.name_of(b"%d" % n, version(1)) for n in range(500)]
    for name in names:
        residency.discard(name)
    for number, name in enumerate(names):
        residency.add(name, b"%d" % number, version(1), b"")
    trio.run(residency.flush)
    assert set(pool.recorded()) == set(names)


def test_long_paths_are_sent_in_messages_that_fit():
    pool = FakePool()
    residency = view(pool)
    for number in range(300):
        path = b"%03d" % number + b"/long" * 800
        residency.add(residency.name_of(path, version(1)), path, version(1), b"checksum")
    trio.run(residency.flush)
    assert len(pool.recorded()) == 300
    assert all(len(encode(job)) < BUFFER_BYTES for job in pool.jobs)


def test_an_index_that_cannot_be_written_does_not_hold_up_anything(caplog):
    residency = view(FakePool(fails=True))
    name = residency.name_of(b"a", version(1))
    residency.add(name, b"a", version(1), b"")
    trio.run(residency.flush)
    assert "index not written" in caplog.text
    assert residency.get(name) is not None


@pytest.mark.parametrize("recency", [False, True])
def test_a_file_takes_some_hundred_bytes_of_memory(recency):
    residency = view(recency=recency)
    rows = [(n.to_bytes(16, "big") + bytes(8), 100, b"checksum", BOOT) for n in range(1000)]
    load(rows, residency)
    records = sum(sys.getsizeof(key) + sys.getsizeof(record) for key, record in residency._files.items())
    assert len(residency) == 1000
    assert records + sys.getsizeof(residency._files) < 400 * 1000
    assert not residency._added
    assert not residency._used
