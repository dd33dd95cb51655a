"""Scratch that is full, fails, vanishes, or holds what we did not write: readers get the source's bytes all along."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.mount.mountinfo import find_mount
from tests.conftest import needs_root
from tests.faults.conftest import KIB, MIB, Dataset, assert_sound, assert_undisturbed
from tests.harness import CACHEFS, clean_environment, run_cachefs, verify, wait_until
from tests.mount.observing import counters

ANY_FAILURE = "scratch failed|fetch failed|staged copy not removed|index not|no room|not removed|not recorded|trees"


@pytest.fixture
def file_system(tmp_path_factory: pytest.TempPathFactory, mounted: object) -> Iterator[Callable[..., Path]]:
    """`file_system("-t", "tmpfs", ...)` mounts a small real one for scratch, which ends after the mount of ours."""
    made: list[Path] = []

    def make(device: object, *options: str) -> Path:
        made.append(tmp_path_factory.mktemp("small"))
        subprocess.run(["mount", *options, os.fspath(device), made[-1]], check=True)
        return made[-1]

    yield make
    for place in made:
        subprocess.run(["umount", "-l", place], check=True)


def fill(fd: int) -> None:
    while True:
        os.write(fd, bytes(KIB))


def copy_of(cache, dataset: Dataset, name: str) -> Path:
    """Where in scratch the copy of a file lies."""
    data = dataset.content[name]
    return next(path for path in cache.resident_data_files() if path.read_bytes() == data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("of somebody else")


def replace_by_link(path: Path) -> None:
    elsewhere = path.parents[4] / "elsewhere"
    elsewhere.write_text("of somebody else")
    path.unlink()
    path.symlink_to(elsewhere)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (truncate, flip, replace_by_directory, replace_by_link, replace_by_fifo, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["large", "middle"])
def test_a_copy_that_somebody_changed(damage, name, dataset, mounted, mountpoint, readers):
    """Right bytes at once, another fetch, and a line in the log that says which file and which copy."""
    cache = mounted(dataset.path, at=mountpoint)
    dataset.check(mountpoint)
    before = counters(cache)["fetches"]
    copy = copy_of(cache, dataset, name)
    if damage is not Path.unlink:
        cache.must_log(f"path=b'{name}' copy={copy.name}")
    damage(copy)
    drop_page_cache(mountpoint / name)
    assert (mountpoint / name).read_bytes() == dataset.content[name]
    wait_until(lambda: counters(cache)["fetches"] == before + 1, "it is fetched again")
    reading = readers(mountpoint)
    wait_until(lambda: counters(cache)["hits"] > 200, "readers are served")
    reading.stop()
    assert copy_of(cache, dataset, name) == copy
    if damage is replace_by_link:
        assert (cache.scratch.parent / "elsewhere").read_text() == "of somebody else"
    if damage is Path.unlink:  # it stays counted until it is counted afresh: another mount could have evicted it
        cache.unmount()
        assert verify(cache.scratch, "--repair")[0] == 1
        assert verify(cache.scratch)[0] == 0
        return
    for strange in (cache.scratch / "staging").glob("strange-*"):  # set aside, not removed: it is not ours
        assert (strange / "file").read_text() == "of somebody else"
        shutil.rmtree(strange)
    assert_sound(cache)


def drop_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_copy_that_changes_while_it_is_open(dataset, mounted, mountpoint):
    """Cut off under a reader: the rest comes from the source."""
    cache = mounted(dataset.path, at=mountpoint)
    dataset.check(mountpoint)
    cache.must_log("path=b'large' copy=")
    copy = copy_of(cache, dataset, "large")
    drop_page_cache(mountpoint / "large")
    with open(mountpoint / "large", "rb", buffering=0) as file:
        begin = file.read(100 * KIB)
        os.truncate(copy, MIB)
        rest = b"".join(iter(lambda: file.read(MIB), b""))
    assert begin + rest == dataset.content["large"]
    assert (mountpoint / "large").read_bytes() == dataset.content["large"]
    wait_until(lambda: copy.exists() and copy.stat().st_size == len(dataset.content["large"]), "it is fetched again")
    assert_sound(cache)


def test_scratch_is_removed(dataset, mounted, mountpoint, readers):
    """As a cleaner of temporary directories does, in the middle of everything."""
    cache = mounted(dataset.path, at=mountpoint)
    cache.expect_log(ANY_FAILURE)
    reading = readers(mountpoint)
    wait_until(lambda: counters(cache)["misses"] > 10, "readers are served")
    while cache.scratch.exists():  # something may be written meanwhile
        shutil.rmtree(cache.scratch, ignore_errors=True)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    seen = reading.stop()
    assert seen["read"] > 10
    assert not seen["errors"]
    done = run_cachefs("umount", mountpoint, check=False)
    assert not cache.is_mounted(), done.stderr


def test_scratch_is_removed_from_a_foreground_mount(dataset, mountpoint, tmp_path, mounted):
    """It ends in order, with one line that says so."""
    command = [*CACHEFS, "mount", dataset.path, mountpoint, "--scratch", tmp_path / "scratch", "--foreground"]
    with subprocess.Popen([*map(str, command)], env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: find_mount(mountpoint), "it serves")
        assert (mountpoint / "middle").read_bytes() == dataset.content["middle"]
        shutil.rmtree(tmp_path / "scratch")
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "scratch has been removed" in said
    assert "Traceback" not in said
    assert find_mount(mountpoint) is None


@needs_root
def test_a_full_file_system(dataset, mounted, mountpoint, readers, file_system):
    """Somebody else fills it, while copies are on their way; later there is room again."""
    place = file_system("none", "-t", "tmpfs", "-o", "size=12m")
    cache = mounted(dataset.path, "--capacity", "8M", at=mountpoint, scratch=place / "scratch")
    cache.expect_log(ANY_FAILURE)
    (mountpoint / "middle").read_bytes()
    with open(place / "filler", "wb") as filler:
        with pytest.raises(OSError, match="No space left"):
            fill(filler.fileno())
        assert_undisturbed(dataset, mountpoint, readers)
        assert counters(cache)["bypasses"]
    (place / "filler").unlink()
    wait_until(lambda: (mountpoint / "0/0").read_bytes() is not None and counters(cache)["fetches"] > 1, "room", 30)
    dataset.check(mountpoint)
    cache.unmount()


@needs_root
def test_a_disk_that_fails(dataset, mounted, mountpoint, readers, file_system, tmp_path):
    """A real file system whose device is gone: errors of each read that the page cache cannot answer, and of writes."""
    device = tmp_path / "device"
    with open(device, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", device], check=True)  # a journal would keep them
    place = file_system(device, "-o", "loop,errors=remount-ro")
    cache = mounted(dataset.path, "--capacity", "40M", at=mountpoint, scratch=place / "scratch")
    cache.expect_log(f"{ANY_FAILURE}|copy=|error=")
    for name in list(dataset.content)[:20]:
        (mountpoint / name).read_bytes()
    subprocess.run(["sync", "-f", place], check=True)
    copies = cache.resident_data_files()
    os.truncate(device, 0)  # of other devices' caches nothing may be dropped: other tests count on them
    for copy in copies:
        drop_page_cache(copy)
    with pytest.raises(OSError, match="Errno"):
        [copy.read_bytes() for copy in copies]
    assert_undisturbed(dataset, mountpoint, readers)
    run_cachefs("umount", mountpoint, check=False)
    assert not cache.is_mounted()


@needs_root
def test_a_disk_that_gets_read_only(dataset, mounted, mountpoint, readers, file_system, tmp_path):
    """As the kernel makes it after an error. What is there is served, the rest by the source; no mount is made."""
    device = tmp_path / "device"
    with open(device, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    place = file_system(device, "-o", "loop,errors=remount-ro")
    scratch = place / "scratch"
    cache = mounted(dataset.path, "--capacity", "40M", at=mountpoint, scratch=scratch)
    cache.expect_log(f"{ANY_FAILURE}|error=")
    for name in list(dataset.content)[:20]:
        (mountpoint / name).read_bytes()
    number = os.stat(place).st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")
    with pytest.raises(OSError, match="Read-only"):
        (place / "new").touch()
    assert_undisturbed(dataset, mountpoint, readers)
    assert counters(cache)["hits"] >= 20
    assert counters(cache)["bypasses"]
    run_cachefs("umount", mountpoint, check=False)
    assert not cache.is_mounted()
    done = run_cachefs("mount", dataset.path, mountpoint, "--scratch", scratch, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Read-only file system" in done.stderr
    done = run_cachefs("run", "--data", dataset.path, "--scratch", scratch, "--", "md5sum", dataset.path / "middle")
    assert done.stdout.startswith(hashlib.md5(dataset.content["middle"]).hexdigest())
    assert "Read-only file system" in done.stderr
