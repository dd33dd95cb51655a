"""Every way to read a file gives the source's bytes (semantics 3 and 4)."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource

import pytest

from tests.conftest import needs_root
from tests.harness import wait_until
from tests.mount.observing import counters, digest, errno_of, opens

SIZE = 3_000_001
RANGES = [(0, 1), (0, 4096), (4095, 2), (131_072, 131_072), (1_000_003, 777_777), (SIZE - 1, 1), (SIZE - 10, 100)]


@pytest.fixture
def content(source):
    data = random.Random(1).randbytes(SIZE)
    (source / "file").write_bytes(data)
    return data


def pread_all(fd, size, offset):
    parts = []
    while size and (part := os.pread(fd, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


@pytest.mark.parametrize("capacity", ["80%", "1M"], ids=["cached", "bypass"])
def test_ranges(source, mounted, mountpoint, content, capacity):
    """Semantics 3: seeking, many ranges in any order, at and past the end: as in the source; also uncached."""
    cache = mounted(source, "--capacity", capacity, at=mountpoint)
    shuffled = random.Random(2)
    fd = os.open(mountpoint / "file", os.O_RDONLY)
    try:
        for offset, size in RANGES:
            assert os.pread(fd, size, offset) == content[offset : offset + size]
        for _ in range(200):
            offset, size = shuffled.randrange(SIZE), shuffled.randrange(1, 50_000)
            assert pread_all(fd, size, offset) == content[offset : offset + size]
        for past in (SIZE, SIZE + 1, SIZE + (1 << 33)):
            assert os.pread(fd, 10, past) == b""
        assert os.lseek(fd, -5, os.SEEK_END) == SIZE - 5
        assert os.read(fd, 100) == content[-5:]
        assert os.read(fd, 100) == b""
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == SIZE
    finally:
        os.close(fd)
    assert digest(mountpoint / "file") == digest(source / "file")
    assert bool(opens(cache)[2]) == (capacity == "1M")


@pytest.mark.parametrize("capacity", ["80%", "1M"], ids=["cached", "bypass"])
def test_memory_maps(source, mounted, mountpoint, content, capacity):
    """Semantics 3: shared read-only and private maps show the bytes; a private one is written without the source."""
    mounted(source, "--capacity", capacity, at=mountpoint)
    with open(mountpoint / "file", "rb") as file:
        shared = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        assert errno_of(mmap.mmap, file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) == "EACCES"
    with shared, private:
        assert shared[SIZE // 2 :] == content[SIZE // 2 :]
        private[:4] = b"mine"
        assert private[:] == b"mine" + content[4:]
        assert shared[:] == content
    assert (source / "file").read_bytes() == content


def test_sendfile_and_copies(source, mounted, mountpoint, content, tmp_path):
    """Semantics 3: sendfile and copy_file_range out of the mount."""
    mounted(source, at=mountpoint)
    with open(mountpoint / "file", "rb") as file, open(tmp_path / "sent", "wb") as target:
        sent = 0
        while more := os.sendfile(target.fileno(), file.fileno(), sent, SIZE):
            sent += more
    assert (tmp_path / "sent").read_bytes() == content
    with open(mountpoint / "file", "rb") as file, open(tmp_path / "copied", "wb") as target:
        failed = 0
        try:
            while os.copy_file_range(file.fileno(), target.fileno(), 1 << 20):
                continue
        except OSError as error:
            failed = error.errno
    assert failed in (0, errno.EXDEV)  # what a program falls back from
    assert failed or (tmp_path / "copied").read_bytes() == content


def test_direct_reads(source, mounted, mountpoint, content):
    """Semantics 3: O_DIRECT works, or fails as on a network file system that does not know it."""
    mounted(source, at=mountpoint)
    try:
        fd = os.open(mountpoint / "file", os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return
        raise
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            for offset in (0, 4096, 1 << 20, SIZE // 4096 * 4096):
                got = os.preadv(fd, [buffer], offset)
                assert got == min(1 << 20, SIZE - offset)
                assert buffer[:got] == content[offset : offset + got]
    finally:
        os.close(fd)


def test_500_handles_on_one_file(source, mounted, mountpoint, content):
    """Semantics 5: 500 handles are one fetch and 500 opens, and each reads for itself."""
    cache = mounted(source, at=mountpoint)
    handles = [open(mountpoint / "file", "rb", buffering=0) for _ in range(500)]  # noqa: SIM115
    try:
        for number, handle in enumerate(handles):
            assert handle.seek(number * 5000) == number * 5000
            assert handle.read(1000) == content[number * 5000 :][:1000]
        wait_until(lambda: counters(cache)["fetches"], "the fetch ends")
    finally:
        for handle in handles:
            handle.close()
    said = counters(cache)
    assert (sum(opens(cache)), said["bypasses"]) == (500, 0)
    assert (said["fetches"], said["resident_files"], said["resident_bytes"]) == (1, 1, SIZE)


def test_more_files_open_than_a_process_may_have_by_default(source, mounted, mountpoint):
    """Semantics 8: 1,200 files open at once, where a process may have 1,024: no reader gets an error of ours."""
    count = 1200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        pytest.skip(f"this process may have {hard} files open")
    for number in range(count):
        (source / str(number)).write_bytes(b"%d" % number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    handles = []
    try:
        cache = mounted(source, at=mountpoint)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for number in range(count):
            handles.append(os.open(mountpoint / str(number), os.O_RDONLY))
            assert os.pread(handles[-1], 10, 0) == b"%d" % number
        assert sum(opens(cache)) == count
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_sparse(path, size, places):
    """A file of holes with 64 KiB of data at `places`."""
    with open(path, "wb") as file:
        file.truncate(size)
        for place in places:
            file.seek(place)
            file.write(random.Random(place).randbytes(65_536))


@pytest.mark.parametrize("gigabytes", [pytest.param(0.05, id="50 MB"), pytest.param(5, id="over 4 GiB")])
def test_sparse_and_huge_files(source, mounted, mountpoint, gigabytes):
    """Semantics 3: holes and offsets beyond 4 GiB, read as in the source, and holes stay holes in scratch."""
    size = int(gigabytes * (1 << 30)) + 12_345
    places = [0, size // 3, size // 2 + 7, size - 65_536]
    write_sparse(source / "sparse", size, places)
    cache = mounted(source, at=mountpoint)
    with open(mountpoint / "sparse", "rb", buffering=0) as seen, open(source / "sparse", "rb", buffering=0) as wanted:
        for _ in range(2):
            for place in places:
                for offset in (max(0, place - 100_000), max(0, place - 1), place + 65_000):
                    assert pread_all(seen.fileno(), 200_000, offset) == pread_all(wanted.fileno(), 200_000, offset)
            wait_until(lambda: counters(cache)["fetches"] == 1, "the file is fetched", 120)
    said = counters(cache)
    assert (said["resident_bytes"], said["bypasses"]) == (size, 0)
    (copy,) = cache.resident_data_files()
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks * 512 < 20 << 20


@needs_root
def test_a_sequential_reader_asks_for_256_kib_at_once(source, mounted, mountpoint):
    """Half as many requests as with the kernel's own 128 KiB."""
    size = 8 << 20
    (source / "large").write_bytes(random.Random(3).randbytes(size))
    cache = mounted(source, at=mountpoint)
    (mountpoint / "large").read_bytes()
    wait_until(lambda: cache.count("fetches") == 1, "the file is resident")
    fd = os.open(mountpoint / "large", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before = cache.count("requests")
        assert len(pread_all(fd, size, 0)) == size
        assert size / (256 << 10) <= cache.count("requests") - before < 1.5 * size / (256 << 10)
    finally:
        os.close(fd)
