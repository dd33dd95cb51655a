"""cachefs verify: finds whatever is wrong in scratch, and drops it when it is told to."""

from __future__ import annotations

import os
import random
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.harness import (
    MountedCache,
    clean_environment,
    detach,
    on_a_terminal,
    run_cachefs,
    scripted,
    verify,
    wait_until,
)
from tests.mount.observing import counters, stored_bytes
from tests.mount.test_recovery import reboot

READ_ALL_THE_TIME = """
import os, random, sys
print("reading", flush=True)
while True:
    open(os.path.join(sys.argv[1], random.choice(os.listdir(sys.argv[1]))), "rb").read()
"""
SIZE = 50_000
FILES = 12


@pytest.fixture
def filled(source: Path, mounted, mountpoint: Path) -> MountedCache:
    """A mount that has all files; live."""
    for number in range(FILES):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(SIZE))
    cache = mounted(source, at=mountpoint)
    read(cache)
    return cache


def read(cache: MountedCache) -> None:
    for number in range(FILES):
        assert (cache.path / f"{number}").read_bytes() == random.Random(number).randbytes(SIZE)


def copies(cache: MountedCache) -> list[Path]:
    return sorted(cache.resident_data_files())


def flip_keeping_times(path: Path) -> None:
    """As a disk may, that forgets a bit."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[SIZE // 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shorten(path: Path) -> None:
    os.truncate(path, SIZE - 1)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[4] / "source" / "0")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    flip_keeping_times: "its content is not what was fetched",
    shorten: "its size is not what was fetched",
    replace_by_link: "it is not a regular file",
    replace_by_directory: "it is not a regular file",
    Path.unlink: "the index knows it, and it is not there",
}


def test_all_is_well(filled: MountedCache):
    """While it is mounted, and when it is not; what a live mount has not recorded yet is no fault."""
    assert verify(filled.scratch)[0] == 0
    filled.unmount()
    status, said = verify(filled.scratch)
    assert (status, said) == (
        0,
        f"{filled.scratch}: {FILES} files, {FILES * SIZE / 1024:.1f} KiB checked: all is well\n",
    )


def test_a_bar_on_a_terminal(filled: MountedCache):
    """It says how many files and bytes, and the time that is left."""
    shown, printed = on_a_terminal("verify", "--scratch", filled.scratch, env=clean_environment())
    for words in (f"{FILES} of {FILES} files", "KiB", "0:00:00"):
        assert words.encode() in shown
    assert "all is well" in printed


def test_while_it_fetches_and_evicts(source: Path, mounted, mountpoint: Path):
    """Files come and go all the time; that is no fault."""
    for number in range(FILES):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(SIZE))
    cache = mounted(source, "--policy", "lru", "--capacity", str(FILES * SIZE // 2), at=mountpoint)
    with scripted(READ_ALL_THE_TIME, mountpoint, says="reading"):
        for _ in range(5):
            before = counters(cache)["evictions"]
            status, said = verify(cache.scratch)
            assert status == 0, said
            wait_until(lambda before=before: counters(cache)["evictions"] > before, "it evicts")
    cache.unmount()
    assert verify(cache.scratch)[0] == 0


@pytest.mark.parametrize("is_live", [False, True], ids=["unmounted", "live"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_repaired(
    damage: Callable[[Path], None], is_live: bool, filled: MountedCache, source: Path, mounted, mountpoint
):
    filled.unmount()
    cache = mounted(source, at=mountpoint, scratch=filled.scratch) if is_live else filled
    victims = copies(cache)[3:5]
    for victim in victims:
        damage(victim)
    before = [path.lstat() for path in cache.scratch.rglob("*") if path.parent.name != "logs"]
    status, said = verify(cache.scratch)
    assert status == 1, said
    assert said.count(DAMAGES[damage]) == 2
    assert all(victim.name in said for victim in victims)
    assert said.count(str(source)) == 2, "the path of the source is not named"
    assert "to be repaired with --repair" in said
    assert len(before) == len([path for path in cache.scratch.rglob("*") if path.parent.name != "logs"])
    status, said = verify(cache.scratch, "--repair")
    assert status == 1
    assert "2 faults repaired" in said or "3 faults repaired" in said  # without a mount the count is wrong too
    assert verify(cache.scratch)[0] == 0, verify(cache.scratch)
    if not is_live:
        cache = mounted(source, at=mountpoint, scratch=filled.scratch)
    read(cache)
    assert counters(cache)["fetches"] == 2
    cache.unmount()
    status, said = verify(cache.scratch)
    assert status == 0, said


def test_what_a_dead_mount_left(filled: MountedCache, source: Path, mounted, mountpoint):
    filled.kill()
    detach(filled.path)
    with open(filled.scratch / "staging" / ("ab" * 24), "wb") as file:
        file.write(b"half")
    (filled.scratch / "trees" / "deadbeef").mkdir()
    with open(filled.scratch / "ledger", "r+b") as ledger:
        ledger.seek(8)
        ledger.write(struct.pack("<qq", 123, 1))
    status, said = verify(filled.scratch)
    assert status == 1
    assert "staging: 1 half-copied" in said
    assert "trees/deadbeef: of a mount that has died" in said
    assert f"ledger: it counts 1 files, 123 bytes, 0 reserved, and there are {FILES}, {FILES * SIZE} bytes" in said
    assert verify(filled.scratch, "--repair")[0] == 1
    assert verify(filled.scratch)[0] == 0
    cache = mounted(source, at=mountpoint, scratch=filled.scratch)
    read(cache)
    assert counters(cache)["fetches"] == 0


def test_copies_from_before_the_last_boot(filled: MountedCache):
    """They are checked as all others; one of which nothing is known is dropped."""
    filled.unmount()
    folder = reboot(filled.scratch)
    assert verify(filled.scratch)[0] == 0
    victim = next(path for path in folder.rglob("*") if path.is_file())
    with closing(sqlite3.connect(filled.scratch / "index.db")) as connection, connection:
        connection.execute("DELETE FROM files WHERE name = ?", (bytes.fromhex(victim.name),))
    status, said = verify(filled.scratch, "--repair")
    assert status == 1
    assert "nothing says what it should hold" in said
    assert not victim.exists()
    assert verify(filled.scratch)[0] == 0


def test_a_damaged_index(filled: MountedCache, source: Path, mounted, mountpoint):
    filled.unmount()
    for path in filled.scratch.glob("index.db-*"):  # what is in there would mend it
        path.unlink()
    (filled.scratch / "index.db").write_bytes(b"no database" * 1000)
    status, said = verify(filled.scratch)
    assert status == 1
    assert "index.db: it is damaged" in said
    assert f"{FILES} files without a checksum" in said
    assert verify(filled.scratch, "--repair")[0] == 1
    assert not (filled.scratch / "index.db").exists()
    cache = mounted(source, at=mountpoint, scratch=filled.scratch)
    read(cache)
    assert counters(cache)["fetches"] == 0


def test_an_eviction_that_the_index_does_not_know(source: Path, mounted, mountpoint: Path, tmp_path: Path):
    """It is counted no more: taking it off again would let scratch grow beyond its capacity."""
    for number in range(9):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(SIZE))
    options = ("--policy", "lru", "--capacity", str(7 * SIZE))
    (tmp_path / "other").mkdir()
    other = mounted(source, *options, at=tmp_path / "other")
    cache = mounted(source, *options, at=mountpoint, scratch=other.scratch)
    for number in range(6):
        (mountpoint / f"{number}").read_bytes()
    with closing(sqlite3.connect(cache.scratch / "index.db")) as connection:
        wait_until(lambda: connection.execute("SELECT count(*) FROM files").fetchone() == (6,), "they are recorded")
        connection.execute("BEGIN IMMEDIATE")  # from here on nothing is
        for number in range(6, 9):
            (mountpoint / f"{number}").read_bytes()
        assert counters(cache)["evictions"] >= 2
        cache.kill()
        detach(mountpoint)
    status, said = verify(cache.scratch, "--repair")
    assert status == 1
    assert said.count("it is not there") >= 2
    assert counters(other)["resident_bytes"] == stored_bytes(cache.scratch)


@needs_root
def test_a_copy_that_is_promoted(source: Path, mounted, mountpoint: Path):
    """The kernel shows it, whatever we drop: it is said to be left until the mount is gone."""
    for number in range(FILES):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(SIZE))
    cache = mounted(source, at=mountpoint, env={"CACHEFS_NO_PROMOTE": "0"})
    read(cache)
    wait_until(lambda: counters(cache)["promoted_files"] == FILES, "all is promoted")
    names = "SELECT count(*) FROM files WHERE checksum IS NOT NULL"
    with closing(sqlite3.connect(cache.scratch / "index.db")) as connection:
        wait_until(lambda: connection.execute(names).fetchone() == (FILES,), "all is recorded")
    cache.must_log("promoted directories are taken back, because scratch was changed")
    flip_keeping_times(copies(cache)[0])
    for _ in range(2):
        status, said = verify(cache.scratch, "--repair")
        assert status == 1
        assert "it is promoted: unmount before it can be repaired" in said
        assert "1 fault left" in said
    cache.unmount()
    status, said = verify(cache.scratch, "--repair")
    assert "1 fault repaired" in said
    assert verify(cache.scratch)[0] == 0


def test_a_copy_in_use(filled: MountedCache, source: Path, mounted, mountpoint):
    """Who has it open keeps it; who opens it next gets a new one."""
    filled.unmount()
    cache = mounted(source, at=mountpoint, scratch=filled.scratch)
    with open(mountpoint / "0", "rb"):
        for copy in copies(cache):
            if copy.read_bytes() == random.Random(0).randbytes(SIZE):
                flip_keeping_times(copy)
        status, said = verify(cache.scratch, "--repair")
        assert status == 1
        assert "1 fault repaired" in said
    assert verify(cache.scratch)[0] == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no scratch directory"),
        (lambda path: path.mkdir(0o700), "is not a scratch directory of cachefs"),
        (lambda path: path.write_text(""), "is not a directory"),
    ],
    ids=["missing", "of somebody else", "a file"],
)
def test_refused(make: Callable[[Path], object], words: str, tmp_path: Path):
    make(tmp_path / "scratch")
    done = run_cachefs("verify", "--scratch", tmp_path / "scratch", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
