"""Programs that people run over datasets see no difference (semantics 1, 3 and 5)."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.mount.observing import counters, describe_tree


def run(*command, **keywords):
    """Run a program to its end, with success, and return what it said."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no program {command[0]}")
    done = subprocess.run(list(map(os.fspath, command)), capture_output=True, check=False, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tree(source):
    """Folders, files of all sizes, links, and names that are hard to quote."""
    for number in range(120):
        folder = source / f"class {number % 7}" / f"part\t{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        generator = random.Random(number)
        (folder / f"image {number}.jpg").write_bytes(generator.randbytes(generator.randrange(200_000)))
    (source / "large").write_bytes(random.Random(10).randbytes(3_000_000))
    os.link(source / "large", source / "class 1/again")
    (source / "link").symlink_to("class 1/again")
    (source / "dangling").symlink_to("nowhere")
    (source / "empty").mkdir()
    (source / "line\nbreak").touch()
    return source


@pytest.mark.parametrize("program", ["find", "ls", "du"])
def test_programs_that_list(tree, mounted, mountpoint, program):
    """Semantics 3: find, ls and du say the same of the mount as of the source."""
    commands = {
        "find": ("find", ".", "-printf", r"%p %y %s %m %n %T@ %l\n"),
        "ls": ("ls", "-lR", "--time-style=full-iso", "."),
        "du": ("du", "-a", "."),
    }
    mounted(tree, at=mountpoint)
    want = sorted(run(*commands[program], cwd=tree).splitlines())
    assert want
    assert sorted(run(*commands[program], cwd=mountpoint).splitlines()) == want


def test_tar(tree, mounted, mountpoint):
    """Semantics 3: an archive made of the mount is the archive made of the source, byte for byte."""
    mounted(tree, at=mountpoint)
    command = ("tar", "--sort=name", "-cf", "-", ".")
    assert run(*command, cwd=mountpoint) == run(*command, cwd=tree)


def test_rsync(tree, mounted, mountpoint, tmp_path):
    """Semantics 3: rsync -c finds no difference in bytes, times, modes, owners or hard links."""
    mounted(tree, at=mountpoint)
    command = ("rsync", "-aHc", "--delete", "--itemize-changes")
    assert run(*command, "--dry-run", f"{mountpoint}/", f"{tree}/") == b""
    run(*command, f"{mountpoint}/", f"{tmp_path / 'copy'}/")
    assert run(*command, "--dry-run", f"{tree}/", f"{tmp_path / 'copy'}/") == b""


def test_copying_the_tree(tree, mounted, mountpoint, tmp_path):
    """Semantics 3: cp -a of the whole mount, and diff -r of it with the source, find the same tree."""
    cache = mounted(tree, at=mountpoint)
    run("cp", "-a", mountpoint, tmp_path / "copy")
    same = describe_tree(tree)
    assert describe_tree(mountpoint) == same
    assert describe_tree(tmp_path / "copy").keys() == same.keys()
    run("diff", "-r", "--no-dereference", tree, mountpoint)
    run("diff", "-r", "--no-dereference", tree, tmp_path / "copy")
    said = counters(cache)
    assert (said["bypasses"], said["fetch_errors"]) == (0, 0)
    assert said["fetches"] == said["resident_files"] == 122


def test_git(source, mounted, mountpoint):
    """Semantics 3: git checks a repository in the mount and reads its history."""
    git = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "safe.directory=*")
    run(*git, "init", "-q", source)
    for number in range(5):
        (source / "file").write_text(f"version {number}\n" * 1000)
        run(*git, "-C", source, "add", "file")
        run(*git, "-C", source, "commit", "-q", "-m", f"version {number}")
    run(*git, "-C", source, "repack", "-q", "-a", "-d")
    (source / "file").write_text("loose\n")
    run(*git, "-C", source, "commit", "-q", "-a", "-m", "loose")
    mounted(source, at=mountpoint)
    run(*git, "-C", mountpoint, "fsck", "--full", "--strict")
    assert run(*git, "-C", mountpoint, "log", "-p") == run(*git, "-C", source, "log", "-p")
    assert run(*git, "-C", mountpoint, "--no-optional-locks", "status", "--porcelain") == b""


@pytest.mark.parametrize("how", ["mode=ro", "immutable=1", "mode=ro&immutable=1"])
def test_sqlite(source, mounted, mountpoint, how):
    """Semantics 3: a database in the mount, with the locks that SQLite takes and without."""
    database = sqlite3.connect(source / "data.db")
    with database:
        database.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, label TEXT, data BLOB)")
        rows = [(number, f"class {number % 10}", random.Random(number).randbytes(900)) for number in range(3000)]
        database.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows)
        database.execute("CREATE INDEX labels ON samples (label)")
    database.close()
    mounted(source, at=mountpoint)

    def read(_):
        seen = sqlite3.connect(f"file:{mountpoint}/data.db?{how}", uri=True)
        try:
            assert seen.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert seen.execute("SELECT count(*) FROM samples WHERE label = 'class 3'").fetchone() == (300,)
            return seen.execute("SELECT * FROM samples ORDER BY id").fetchall() == rows
        finally:
            seen.close()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_hdf5(source, mounted, mountpoint):
    """Semantics 3: HDF5 with its locks, chunks read in random order."""
    h5py = pytest.importorskip("h5py")
    numpy = pytest.importorskip("numpy")
    data = numpy.random.default_rng(1).integers(0, 255, (400, 64, 64), dtype="uint8")
    with h5py.File(source / "data.h5", "w") as file:
        file.create_dataset("images", data=data, chunks=(8, 64, 64))
        file["images"].attrs["name"] = "test"
    mounted(source, at=mountpoint)
    with h5py.File(mountpoint / "data.h5", "r") as file:
        assert file["images"].attrs["name"] == "test"
        for number in random.Random(1).sample(range(400), 100):
            assert (file["images"][number] == data[number]).all()
        assert (file["images"][:] == data).all()


def test_numpy_memmap(source, mounted, mountpoint):
    """Semantics 3: arrays that are mapped, not read."""
    numpy = pytest.importorskip("numpy")
    data = numpy.random.default_rng(2).normal(size=(500, 1000))
    numpy.save(source / "data.npy", data)
    mounted(source, at=mountpoint)
    for mode in ("r", "c"):
        seen = numpy.load(mountpoint / "data.npy", mmap_mode=mode)
        assert (seen[::7, ::3] == data[::7, ::3]).all()
        assert (seen == data).all()
        del seen


def test_running_a_program_from_the_mount(source, mounted, mountpoint):
    """Semantics 3: scripts, modules and binaries are executed from the mount."""
    (source / "package").mkdir()
    (source / "package/__init__.py").write_text("answer = 42\n")
    shutil.copy2(shutil.which("true"), source / "binary")
    mounted(source, at=mountpoint)
    run(mountpoint / "binary")
    said = run(sys.executable, "-c", "import package; print(package.answer)", env={"PYTHONPATH": str(mountpoint)})
    assert said == b"42\n"
    assert not (source / "package/__pycache__").exists()
