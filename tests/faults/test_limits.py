"""Limits of the process and the machine: fewer descriptors than open files, a limit of file size, many mounts."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import needs_root
from tests.faults.conftest import assert_sound
from tests.harness import clean_environment, wait_until
from tests.mount.observing import counters


@contextmanager
def started_with(do: Callable[[], object]) -> Iterator[None]:
    """What the harness starts within the block calls `do` before it becomes a command of ours."""
    real = subprocess.run

    def run(*arguments, **keywords):
        return real(*arguments, preexec_fn=do, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


def limit(which: int, value: int) -> Callable[[], object]:
    return lambda: resource.setrlimit(which, (value, value))


def test_more_open_files_than_descriptors(source, mounted, mountpoint):
    """2,000 files are open at once, and the daemon may have 256 descriptors: the rest is served by the source."""
    for number in range(2000):
        (source / str(number)).write_bytes(str(number).encode() * 1000)
    with started_with(limit(resource.RLIMIT_NOFILE, 256)):
        cache = mounted(source, at=mountpoint)
    cache.expect_log("scratch failed|fetch failed|Too many open files")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(mountpoint / str(number), "rb")) for number in range(2000)]
            for number, file in enumerate(files):
                assert file.read() == str(number).encode() * 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for number in range(2000):
        assert (mountpoint / str(number)).read_bytes() == str(number).encode() * 1000
    assert_sound(cache)


def test_a_limit_of_file_size(dataset, mounted, mountpoint, readers):
    """RLIMIT_FSIZE: what may not be written to scratch is served by the source."""
    with started_with(limit(resource.RLIMIT_FSIZE, 1 << 20)):
        cache = mounted(dataset.path, at=mountpoint)
    cache.expect_log("fetch failed path=b'large'")
    reading = readers(mountpoint)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    assert not reading.stop()["errors"]
    wait_until(lambda: counters(cache)["resident_files"] == len(dataset.content) - 1, "all but the large one")
    assert_sound(cache)


@pytest.mark.slow
def test_100_mounts_in_a_row(dataset, mountpoint, tmp_path, mounted):
    """Nothing grows in the process that starts them, nor in scratch."""
    scratch = tmp_path / "scratch"
    script = """
import json, os, sys, psutil
from pathlib import Path
from cachefs.config import Settings
from cachefs.mount.daemon import serve_in_background
from cachefs.mount.unmount import find_our_mount, unmount
source, mountpoint, scratch = map(Path, sys.argv[1:])
me, seen = psutil.Process(), []
for _ in range(100):
    pid = serve_in_background(Settings(source, mountpoint, scratch, no_promote=True))
    (mountpoint / "middle").read_bytes()
    unmount(find_our_mount(mountpoint), lazy=False)
    os.waitpid(pid, 0)
    seen.append((me.num_fds(), me.num_threads(), me.memory_info().rss, sum(1 for _ in scratch.rglob("*"))))
print(json.dumps([seen[19], seen[-1], len(me.children(recursive=True))]))
"""
    command = [sys.executable, "-c", script, dataset.path, mountpoint, scratch]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    early, late, children = json.loads(done.stdout)
    assert early[:2] == late[:2]
    assert late[2] < early[2] + (4 << 20)
    assert late[3] <= early[3]
    assert children == 0
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)
    assert os.listdir(mountpoint) == []


MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of so many bytes, for as long as its block; all that is put into it must have ended then."""
    group = MEMORY_GROUPS / f"cachefs-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "its processes end")
        group.rmdir()


@needs_root
@pytest.mark.skipif(not os.access(MEMORY_GROUPS / "memory.limit_in_bytes", os.W_OK), reason="no memory cgroups (v1)")
def test_a_limit_of_memory(source, mounted, mountpoint):
    """A job's control group of 100 MB, through which 400 MB are fetched and read: nothing is killed."""
    data = {f"{number}": os.urandom(20 << 20) for number in range(4)}
    for name, content in data.items():
        (source / name).write_bytes(content * 5)
    with memory_group(100 << 20) as group:
        with started_with(lambda: (group / "cgroup.procs").write_text("0")):
            cache = mounted(source, at=mountpoint)
        assert str(cache.pid) in (group / "cgroup.procs").read_text().split()
        for _ in range(2):
            for name, content in data.items():
                assert (mountpoint / name).read_bytes() == content * 5
        assert counters(cache)["resident_files"] == 4
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        assert_sound(cache)


@needs_root
@pytest.mark.skipif(not os.access(MEMORY_GROUPS / "memory.limit_in_bytes", os.W_OK), reason="no memory cgroups (v1)")
def test_a_memory_tier_stays_within_a_limit_of_memory(source, mounted, mountpoint):
    """It may have 300 MB of a job's 400 MB, of which the mount takes some: it leaves a tenth, nothing is killed."""
    data = {f"{number}": os.urandom(8 << 20) for number in range(50)}
    for name, content in data.items():
        (source / name).write_bytes(content)
    limit = 400 << 20
    with memory_group(limit) as group:
        with started_with(lambda: (group / "cgroup.procs").write_text("0")):
            cache = mounted(source, "--memory", "300M", at=mountpoint)
        for _ in range(2):
            for name, content in data.items():
                assert (mountpoint / name).read_bytes() == content
        memory, scratch = counters(cache)["tiers"]
        assert 0 < memory["bytes"] < 300 << 20
        assert memory["files"] + scratch["files"] >= 50
        taken = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        assert int(taken["total_rss"]) + int(taken["total_shmem"]) < 0.95 * limit
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        cache.unmount()
        assert not Path(memory["path"]).exists()


@needs_root
@pytest.mark.skipif(not os.access(MEMORY_GROUPS / "memory.limit_in_bytes", os.W_OK), reason="no memory cgroups (v1)")
def test_a_large_file_gives_way_while_it_comes(source, slow_source, mounted, mountpoint):
    """250 MB come into memory, the job takes 130 MB of its 400 MB meanwhile: it is not killed for that."""
    (source / "big").write_bytes(os.urandom(250 << 20))
    slow = slow_source(source, latency=0.001, bandwidth=60e6)
    script = "import time; x = bytearray(130 << 20); x[::4096] = bytes(len(x) // 4096); time.sleep(6)"
    with memory_group(400 << 20) as group:

        def enter() -> object:
            return (group / "cgroup.procs").write_text("0")

        with started_with(enter):
            cache = mounted(slow.path, "--memory", "300M", at=mountpoint)
        cache.expect_log("fetch failed|needed otherwise")
        with open(mountpoint / "big", "rb", buffering=0) as file:
            file.read(1000)
            job = subprocess.run([sys.executable, "-c", script], preexec_fn=enter, check=False)
        assert job.returncode == 0
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        cache.unmount()


_CROWD = """
import os, random, sys, threading
mountpoint, backing, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
threading.stack_size(128 << 10)
names = sorted(os.listdir(backing))
content = {name: open(os.path.join(backing, name), "rb").read() for name in names}
together, wrong = threading.Barrier(threads), []
def read(number):
    name = names[number % len(names)]
    together.wait()
    try:
        if open(os.path.join(mountpoint, name), "rb").read() != content[name]:
            wrong.append(name)
    except OSError as error:
        wrong.append(f"{name}: {error}")
crowd = [threading.Thread(target=read, args=(random.randrange(1 << 20),)) for _ in range(threads)]
for one in crowd: one.start()
for one in crowd: one.join()
print(wrong)
"""


def test_10_000_readers_at_once(source, slow_source, mounted, mountpoint):
    """20 processes of 500 threads, of files that are not resident, and once more of files that are."""
    for number in range(300):
        (source / f"{number}").write_bytes(os.urandom(30_000))
    cache = mounted(slow_source(source, latency=0.001).path, at=mountpoint)
    for _ in range(2):
        crowd = [
            subprocess.Popen(
                [sys.executable, "-c", _CROWD, mountpoint, source, "500"], stdout=subprocess.PIPE, text=True
            )
            for _ in range(20)
        ]
        assert [one.communicate(timeout=120)[0] for one in crowd] == ["[]\n"] * 20
    cache.expect_log(r"fuse_release\(\): fuse_reply")  # thousands are on their way, and unmounting ends them
    said = counters(cache)
    assert said["fetches"] == said["resident_files"] == 300
    assert said["hits"] + said["misses"] >= 10_000
    assert_sound(cache)


@pytest.fixture
def many() -> Iterator[Path]:
    """A source in memory, where a million files are made in seconds."""
    with tempfile.TemporaryDirectory(prefix="cachefs-many-", dir="/dev/shm") as name:
        yield Path(name).resolve()


@pytest.mark.slow
def test_a_directory_of_1_000_000_entries(many, mounted, mountpoint):
    """It is listed whole, with a name of each, looked into, and unmounted in order."""
    folder = many / "many"
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    try:
        for number in range(1_000_000):
            os.mknod(f"{number:07}", dir_fd=here)
    finally:
        os.close(here)
    cache = mounted(many, at=mountpoint)
    names = os.listdir(mountpoint / "many")
    assert len(names) == 1_000_000
    assert set(names) == {f"{number:07}" for number in range(1_000_000)}
    assert (mountpoint / "many/0999999").read_bytes() == b""
    assert psutil.Process(cache.pid).memory_info().rss < 700 << 20
    assert_sound(cache)
