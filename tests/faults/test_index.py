"""The index lost, damaged, of another version, or locked: it costs time, never a wrong byte, and no reader waits."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cachefs.cache.index import BUSY_SECONDS
from tests.faults.conftest import assert_sound
from tests.harness import scripted, verify, wait_until
from tests.mount.observing import Watch, counters, opens


def remove(index: Path) -> None:
    for path in index.parent.glob("index.db*"):
        path.unlink()


def truncate(index: Path) -> None:
    _alone(index)
    os.truncate(index, index.stat().st_size // 2)


def overwrite_the_middle(index: Path) -> None:
    _alone(index)
    with open(index, "r+b") as file:
        for offset in range(4096, index.stat().st_size, 4096):
            file.seek(offset + 100)
            file.write(b"\xff" * 400)


def overwrite_the_head(index: Path) -> None:
    _alone(index)
    with open(index, "r+b") as file:
        file.write(b"not a database " * 20)


def make_older(index: Path) -> None:
    """As before the first migration: a database without tables."""
    remove(index)
    with closing(sqlite3.connect(index)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


def make_newer(index: Path) -> None:
    """With what a later version may have: a column that must not be empty."""
    with closing(sqlite3.connect(index)) as connection, connection:
        connection.execute("ALTER TABLE files ADD COLUMN tier INTEGER")
        connection.execute(
            "CREATE TRIGGER tiers BEFORE INSERT ON files WHEN NEW.tier IS NULL"
            " BEGIN SELECT RAISE(ABORT, 'a file has a tier'); END"
        )


def make_another(index: Path) -> None:
    """Tables of the same names with other columns."""
    remove(index)
    with closing(sqlite3.connect(index)) as connection, connection:
        connection.execute("CREATE TABLE files (id INTEGER PRIMARY KEY, what TEXT)")
        connection.execute("CREATE TABLE datasets (id INTEGER PRIMARY KEY, what TEXT)")


def _alone(index: Path) -> None:
    for path in index.parent.glob("index.db-*"):
        path.unlink()


DAMAGES = (remove, truncate, overwrite_the_middle, overwrite_the_head, make_older, make_newer, make_another)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_index(damage: Callable[[Path], None], dataset, mounted, mountpoint, readers):
    """The mount serves; what was copied during this boot is used; the mount after it has an index again."""
    first = mounted(dataset.path, at=mountpoint)
    dataset.check(mountpoint)
    first.unmount()
    damage(first.scratch / "index.db")
    second = mounted(dataset.path, at=mountpoint)
    second.expect_log("index")
    reading = readers(mountpoint)
    dataset.check(mountpoint)
    seen = reading.stop()
    assert not seen["errors"]
    assert counters(second)["fetches"] == 0
    assert opens(second)[1:] == (0, 0)
    second.unmount()
    verify(second.scratch, "--repair")
    third = mounted(dataset.path, at=mountpoint)
    third.expect_log("index")
    dataset.check(mountpoint)
    assert counters(third)["fetches"] == 0
    third.unmount()


@pytest.mark.parametrize("damage", [remove, overwrite_the_head, overwrite_the_middle, truncate])
def test_an_index_damaged_while_it_is_used(damage, dataset, mounted, mountpoint, readers):
    cache = mounted(dataset.path, at=mountpoint)
    cache.expect_log("index")
    (mountpoint / "large").read_bytes()
    time.sleep(3)  # the index has a row
    damage(cache.scratch / "index.db")
    reading = readers(mountpoint)
    dataset.check(mountpoint)
    assert not reading.stop()["errors"]
    cache.unmount()
    verify(cache.scratch, "--repair")
    again = mounted(dataset.path, at=mountpoint)
    again.expect_log("index")
    dataset.check(mountpoint)
    assert_sound(again)


_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_locked_index_holds_up_nobody(dataset, mounted, mountpoint, readers):
    """Locked by another process for longer than it is waited for: files are served, from the source if need be."""
    first = mounted(dataset.path, at=mountpoint)
    (mountpoint / "large").read_bytes()
    first.unmount()
    with scripted(_LOCK, first.scratch / "index.db", says="locked"):
        began = time.monotonic()
        second = mounted(dataset.path, at=mountpoint)
        second.expect_log("index")
        assert (mountpoint / "large").read_bytes() == dataset.content["large"]
        assert (mountpoint / "middle").read_bytes() == dataset.content["middle"]
        assert time.monotonic() - began < BUSY_SECONDS / 3, "it waited for the lock"
        assert opens(second)[0] == 1
        reading = readers(mountpoint)
        while time.monotonic() < began + BUSY_SECONDS + 5:
            dataset.check(mountpoint)
        assert not reading.stop()["errors"]
    dataset.check(mountpoint)
    wait_until(lambda: (dataset.check(mountpoint), counters(second)["resident_files"] > 1)[1], "it caches again", 60)
    assert_sound(second)


SENSELESS = (
    "size = 'x'", "size = -5", "size = 1 << 50", "size = NULL", "size = 1.5", "checksum = 'text'", "checksum = x'00'",
    "boot = '../../../../etc'", "boot = x'00ff'", "path = 7", "last_used = 'never'", "name = x'00' || name",
    "dataset = 'nobody'",
)  # fmt: skip


@pytest.mark.parametrize("change", SENSELESS)
def test_rows_that_make_no_sense(change, dataset, mounted, mountpoint, readers):
    """As a damaged page may hold them: nothing of it is believed, least of all how much room there is."""
    room = ("--capacity", str(int(dataset.bytes * 0.9)), "--policy", "lru")
    first = mounted(dataset.path, *room, at=mountpoint)
    dataset.check(mountpoint)
    first.unmount()
    with closing(sqlite3.connect(first.scratch / "index.db")) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        with suppress(sqlite3.IntegrityError):  # that one SQLite itself prevents
            connection.execute(f"UPDATE files SET {change} WHERE rowid % 2 = 0")
    second = mounted(dataset.path, *room, at=mountpoint)
    second.expect_log("index")
    reading = readers(mountpoint)
    with Watch(second.scratch) as watch:
        dataset.check(mountpoint)
        dataset.check(mountpoint)
    assert not reading.stop()["errors"]
    assert watch.largest <= int(dataset.bytes * 0.9)
    _, said = verify(second.scratch)
    assert "Traceback" not in said
    second.unmount()
    _, said = verify(second.scratch, "--repair")
    assert "Traceback" not in said
    third = mounted(dataset.path, *room, at=mountpoint)
    third.expect_log("index")
    dataset.check(mountpoint)
    assert_sound(third)
