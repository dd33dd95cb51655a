"""What nobody here wrote, over a mount: programs that verify what they read. Each is skipped where it is not installed.

Each reads twice: what is not resident, and what is.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness import MountedCache, wait_until
from tests.mount.observing import counters

MIB = 1 << 20


@pytest.fixture
def shown(source: Path, mounted, mountpoint: Path) -> Callable[[], MountedCache]:
    """`shown()` mounts the source as it is then."""
    return lambda: mounted(source, at=mountpoint)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*command: object, **keywords: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **keywords)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@needs("fio")
@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_fio_verifies_what_it_has_written(engine, source, shown, mountpoint, tmp_path):
    """4 files of 8 MiB, written with checksums to the source, verified over the mount, cold and warm, by 4 jobs."""
    job = ["--name=job", "--bs=4k", "--size=8M", "--numjobs=4", "--verify=crc32c", "--filename_format=file.$jobnum"]
    run("fio", *job, "--rw=write", f"--directory={source}", "--do_verify=0", "--verify_state_save=0", cwd=tmp_path)
    shown()
    for pattern in ("read", "randread"):
        reading = [f"--rw={pattern}", f"--directory={mountpoint}", f"--ioengine={engine}", "--readonly"]
        run("fio", *job, *reading, "--verify_state_save=0", "--create_on_open=0", cwd=tmp_path)


@needs("stress-ng")
@needs("unshare")
@pytest.mark.parametrize("is_promoted", [False, True], ids=["served", "promoted"])
@pytest.mark.parametrize("stressor", ["fstat", "getdent"])
def test_stress_ng(stressor, is_promoted, source, mounted, mountpoint):
    """Those of its file system stressors that make no files. They walk /tmp, where they alone see the mount."""
    for number in range(200):
        folder = source / f"{number % 10}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}").write_bytes(bytes(number))
        (source / f"{number}.txt").write_bytes(bytes(number))
    cache = mounted(source, at=mountpoint, env={"CACHEFS_NO_PROMOTE": "0" if is_promoted else "1"})
    content = content_below(mountpoint)
    wait_until(lambda: counters(cache)["promoted_files"] == 400 * is_promoted, "all is promoted")
    before = counters(cache)["requests"]
    aim = ["--fstat-dir", "/tmp"] if stressor == "fstat" else []
    stress = ["stress-ng", f"--{stressor}", "4", f"--{stressor}-ops", "20000", "--temp-path", "/var/tmp", *aim]
    private = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    run(*private, "sh", "-c", f"mount --rbind '{mountpoint}' /tmp && cd / && exec {' '.join(stress)}")
    asked = counters(cache)["requests"] - before  # far fewer than there were calls: the kernel keeps attributes
    assert (asked == 0) == is_promoted, asked
    assert content_below(mountpoint) == content


def content_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@needs("rsync")
@needs("tar")
@pytest.mark.slow
def test_tar_and_rsync_compare_a_tree_of_50_000_files(source, shown, mountpoint, tmp_path):
    dice = random.Random(1)
    for number in range(50_000):
        folder = source / f"{number % 50:02}" / f"{number % 7}"
        if number < 350:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").write_bytes(dice.randbytes(dice.choice((0, 100, 900))))
    archive = tmp_path / "tree.tar"
    run("tar", "-cf", archive, "-C", source, ".")
    shown()
    assert run("tar", "--compare", "-f", archive, "-C", mountpoint) == ""
    changes = run("rsync", "--archive", "--checksum", "--dry-run", "--itemize-changes", f"{mountpoint}/", f"{source}/")
    assert changes == ""


def test_sqlite_finds_a_database_whole(source, shown, mountpoint):
    with closing(sqlite3.connect(source / "data.db")) as database, database:
        database.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, data BLOB)")
        database.execute("CREATE INDEX by_data ON samples (data)")
        dice = random.Random(2)
        database.executemany("INSERT INTO samples (data) VALUES (?)", [(dice.randbytes(500),) for _ in range(5000)])
    shown()
    for _ in range(2):
        with closing(sqlite3.connect(f"file:{mountpoint}/data.db?mode=ro&immutable=1", uri=True)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert database.execute("SELECT count(*) FROM samples").fetchone() == (5000,)


def test_lmdb_reads_a_database(source, shown, mountpoint):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(source / "lmdb"), map_size=64 * MIB) as database, database.begin(write=True) as writing:
        dice = random.Random(3)
        content = {f"{number:06}".encode(): dice.randbytes(2000) for number in range(5000)}
        for key, value in content.items():
            writing.put(key, value)
    shown()
    for _ in range(2):
        with lmdb.open(str(mountpoint / "lmdb"), readonly=True, lock=False) as database, database.begin() as reading:
            assert dict(reading.cursor()) == content


def test_h5py_reads_chunks(source, shown, mountpoint):
    h5py = pytest.importorskip("h5py")
    numpy = pytest.importorskip("numpy")
    data = numpy.random.default_rng(4).integers(0, 255, (200, 64, 64, 3), dtype=numpy.uint8)
    with h5py.File(source / "data.h5", "w") as file:
        file.create_dataset("images", data=data, chunks=(8, 64, 64, 3), compression="gzip", fletcher32=True)
    shown()
    for _ in range(2):
        with h5py.File(mountpoint / "data.h5", "r") as file:
            for start in numpy.random.default_rng(5).permutation(200)[:50]:
                assert (file["images"][start] == data[start]).all()
            assert (file["images"][...] == data).all()


def test_zarr_reads_many_small_chunks(source, shown, mountpoint):
    zarr = pytest.importorskip("zarr")
    numpy = pytest.importorskip("numpy")
    data = numpy.random.default_rng(6).normal(size=(100, 32, 32))
    array = zarr.open(str(source / "data.zarr"), mode="w", shape=data.shape, chunks=(4, 16, 16), dtype=data.dtype)
    array[:] = data
    shown()
    for _ in range(2):
        assert (zarr.open(str(mountpoint / "data.zarr"), mode="r")[:] == data).all()


PYTHON = "python{}.{}".format(*sys.version_info)
PYTHONS_TESTS = Path("/usr/lib", PYTHON, "test")


@pytest.mark.slow
@pytest.mark.skipif(
    not (PYTHONS_TESTS / "test_wave.py").exists(), reason="lib" + PYTHON + "-testsuite is not installed"
)
def test_pythons_own_tests_read_their_data(source, shown, mountpoint, tmp_path):
    """Those of its modules that read files lying beside them: modules and data are those of the mount."""
    shutil.copytree(PYTHONS_TESTS, source / "test", symlinks=True)
    shown()
    wanted = ("test_wave", "test_tarfile", "test_tomllib", "test_email", "test_xml_etree", "test_sndhdr")
    modules = [name for name in wanted if list(PYTHONS_TESTS.glob(f"{name}*"))]
    done = subprocess.run(
        [f"/usr/bin/{PYTHON}", "-W", "ignore", "-m", "test", "-v", *modules],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(mountpoint), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"All {len(modules)} tests OK" in done.stdout
