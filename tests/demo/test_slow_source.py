"""What the slow source promises to the tests and benchmarks that rely on it, on real mounts."""

import contextlib
import errno
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cachefs.demo import slow_operations
from cachefs.demo.slow_source import MODULE, FileStatistics, SlowSource, SlowSourceError, mounted_at
from tests.harness import over_a_fuse_mount

SIZE = 110_000
LATENCY = 0.02
PATIENCE = 30.0
NAMES = [
    b"plain",
    b"two\nlines",
    b"invalid \xff\xfe utf-8",
    b"back\\slash \t*?[x]",
    b"n" * 255,
    b"\xc3\xa4" * 127,
]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@contextlib.contextmanager
def readers(source, count=1):
    """Threads that may hang, until the faults are cleared at the end."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        finally:
            with contextlib.suppress(SlowSourceError):
                source.clear_faults()


def seconds(action, *arguments):
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def fails_with(action, *arguments):
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        action(*arguments)
    return errno.errorcode[caught.value.errno]


@pytest.fixture
def backing(tmp_path):
    directory = tmp_path / "backing"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "file").write_bytes(os.urandom(SIZE))
    (directory / "other").write_bytes(b"other")
    (directory / "link").symlink_to("sub/file")
    return directory


@pytest.fixture
def mountpoint(tmp_path):
    directory = tmp_path / "mount"
    directory.mkdir()
    yield directory
    assert not mounted_at(directory)


@pytest.fixture
def source(backing, mountpoint):
    with SlowSource(backing, mountpoint) as started:
        yield started
    assert not psutil.pid_exists(started.pid)


def test_shows_the_backing_directory(source, backing):
    assert sorted(os.listdir(source.path)) == ["link", "other", "sub"]
    assert (source.path / "sub/file").read_bytes() == (backing / "sub/file").read_bytes()
    assert os.readlink(source.path / "link") == "sub/file"
    assert (source.path / "link").read_bytes() == (backing / "sub/file").read_bytes()
    for name in ("sub", "sub/file", "link"):
        seen, there = os.lstat(source.path / name), os.lstat(backing / name)
        for field in (
            "st_ino",
            "st_mode",
            "st_nlink",
            "st_uid",
            "st_size",
            "st_mtime_ns",
            "st_ctime_ns",
            "st_blocks",
        ):
            assert getattr(seen, field) == getattr(there, field)
    assert os.statvfs(source.path).f_blocks == os.statvfs(backing).f_blocks
    assert os.statvfs(source.path).f_namemax == os.statvfs(backing).f_namemax


def test_counts_one_read_of_a_file_exactly(source):
    with open(source.path / "sub/file", "rb") as file:
        file.read()
    counted = source.statistics()
    file = counted.file("sub/file")
    assert (file.lookups, file.opens, file.bytes_read) == (1, 1, SIZE)
    assert counted.file("sub") == FileStatistics(lookups=1)
    assert counted.file("other") == FileStatistics()
    assert counted.bytes_read == SIZE
    assert counted.operations["open"] == 1
    assert counted.operations["read"] == file.reads
    assert counted.requests == sum(counted.operations.values())


def test_data_are_read_again_at_each_open(source):
    for _ in range(3):
        (source.path / "other").read_bytes()
    assert source.statistics().file("other").opens == 3
    assert source.statistics().file("other").bytes_read == 3 * len(b"other")
    source.reset()
    assert source.statistics().file("other") == FileStatistics()


def test_latency_is_paid_by_each_operation_each_time(source):
    source.set(latency=LATENCY)
    for _ in range(2):
        assert seconds(os.stat, source.path / "sub/file") >= 2 * LATENCY
        assert seconds(os.readlink, source.path / "link") >= 2 * LATENCY
        assert seconds(os.listdir, source.path) >= LATENCY
        assert seconds(os.statvfs, source.path) >= LATENCY
    descriptor = os.open(source.path / "other", os.O_RDONLY)
    try:
        assert seconds(os.pread, descriptor, 5, 0) >= LATENCY
    finally:
        os.close(descriptor)
    source.set(latency=0)
    source.reset()
    os.stat(source.path / "other")
    assert source.statistics().file("other").lookups == 1


def test_pending_requests_wait_together(source, backing):
    names = [f"file {number}" for number in range(300)]
    for name in names:
        (backing / name).write_text(name)
    source.fail("file *", "read", hang=True)
    with readers(source, len(names)) as pool:
        answers = [pool.submit((source.path / name).read_text) for name in names]
        wait_until(lambda: source.statistics().operations.get("read", 0) == len(names))
        assert not any(answer.done() for answer in answers)
        source.clear_faults()
        assert [answer.result() for answer in answers] == names


def test_bandwidth_is_shared_by_all_readers(source):
    source.set(bandwidth=SIZE / 0.1)
    files = [source.path / "sub/file", source.path / "copy"]
    shutil.copy(source.path / "sub/file", source.path.parent / "backing/copy")
    with ThreadPoolExecutor(2) as pool:
        assert seconds(lambda: list(pool.map(Path.read_bytes, files))) >= 2 * 0.1
    source.set(bandwidth=None)
    source.reset()
    assert len(files[0].read_bytes()) == SIZE
    assert source.statistics().bytes_read == SIZE


@pytest.mark.parametrize("name", NAMES)
def test_names_are_bytes(source, backing, name):
    Path(os.fsdecode(os.path.join(os.fsencode(backing), name))).write_bytes(name)
    root = os.fsencode(source.path)
    assert name in os.listdir(root)
    with open(os.path.join(root, name), "rb") as file:
        assert file.read() == name
    assert source.statistics().file(name).opens == 1


def test_a_path_longer_than_any_system_call_takes(source, backing, monkeypatch):
    name, depth = "d" * 250, 40

    def descend(start, visit):
        descriptor = os.open(start, os.O_RDONLY)
        for _ in range(depth):
            visit(descriptor)
            below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        return descriptor

    bottom = descend(backing, lambda descriptor: os.mkdir(name, dir_fd=descriptor))
    with open("file", "w", opener=lambda path, flags: os.open(path, flags, dir_fd=bottom)) as file:
        file.write("deep")
    os.close(bottom)
    bottom = descend(source.path, lambda descriptor: None)
    with open("file", opener=lambda path, flags: os.open(path, flags, dir_fd=bottom)) as file:
        assert file.read() == "deep"
    os.close(bottom)
    assert source.statistics().file("/".join([name] * depth + ["file"])).opens == 1


def test_hard_links_are_one_inode(source, backing):
    os.link(backing / "other", backing / "sub" / "again")
    first, second = os.stat(source.path / "other"), os.stat(source.path / "sub/again")
    assert first.st_ino == second.st_ino
    assert first.st_nlink == second.st_nlink == 2
    (backing / "other").unlink()
    assert (source.path / "sub/again").read_bytes() == b"other"
    assert fails_with(os.stat, source.path / "other") == "ENOENT"


@pytest.mark.parametrize(
    "change",
    [
        lambda root: os.open(root / "new", os.O_WRONLY | os.O_CREAT),
        lambda root: os.open(root / "other", os.O_RDWR),
        lambda root: os.open(root / "other", os.O_WRONLY | os.O_APPEND),
        lambda root: os.truncate(root / "other", 0),
        lambda root: os.unlink(root / "other"),
        lambda root: os.mkdir(root / "new"),
        lambda root: os.rmdir(root / "sub"),
        lambda root: os.rename(root / "other", root / "new"),
        lambda root: os.link(root / "other", root / "new"),
        lambda root: os.symlink("other", root / "new"),
        lambda root: os.mkfifo(root / "new"),
        lambda root: os.chmod(root / "other", 0o600),
        lambda root: os.utime(root / "other"),
        lambda root: os.setxattr(root / "other", "user.x", b"x"),
    ],
)
def test_every_change_is_refused(source, backing, change):
    assert fails_with(change, source.path) == "EROFS"
    assert os.access(source.path, os.W_OK)
    assert (backing / "other").read_bytes() == b"other"


def test_fault_of_reads_of_some_files(source):
    source.fail("sub/*", "read", "EIO")
    assert fails_with((source.path / "sub/file").read_bytes) == "EIO"
    assert (source.path / "other").read_bytes() == b"other"
    source.clear_faults()
    assert len((source.path / "sub/file").read_bytes()) == SIZE


def test_fault_that_fires_once(source):
    source.fail("other", "lookup", "ENOENT", count=1)
    assert fails_with(os.stat, source.path / "other") == "ENOENT"
    assert os.stat(source.path / "other").st_size == 5


def test_fault_after_some_bytes(source, backing):
    (backing / "long").write_bytes(bytes(1 << 20))
    source.fail("long", "read", after_bytes=1 << 19)
    descriptor = os.open(source.path / "long", os.O_RDONLY)
    try:
        assert len(os.pread(descriptor, 4096, 0)) == 4096
        assert fails_with(os.pread, descriptor, 4096, 1 << 19) == "EIO"
    finally:
        os.close(descriptor)


def test_fault_that_delays(source):
    source.fail("other", "open", delay=0.1)
    assert seconds((source.path / "other").read_bytes) >= 0.1


@pytest.mark.parametrize("rule", [{"errno": "EWRONG"}, {"op": "write"}])
def test_a_wrong_rule_is_refused_in_words(source, rule):
    with pytest.raises(SlowSourceError, match=next(iter(rule.values()))):
        source.fail(**rule)


def test_what_hangs_goes_on_when_the_faults_are_cleared(source):
    source.fail("other", "read", hang=True)
    with readers(source) as pool:
        content = pool.submit((source.path / "other").read_bytes)
        wait_until(lambda: source.statistics().file("other").reads == 1)
        assert not content.done()
        assert len((source.path / "sub/file").read_bytes()) == SIZE
        source.clear_faults()
        assert content.result() == b"other"


def test_changes_in_backing_are_seen_at_once(source, backing):
    seen = source.path / "sub/file"
    assert len(seen.read_bytes()) == SIZE
    (backing / "sub/file").write_bytes(b"in place")
    assert seen.read_bytes() == b"in place"
    (backing / "new").write_bytes(b"replaced, longer")
    (backing / "new").replace(backing / "sub/file")
    assert seen.stat().st_size == len(b"replaced, longer")
    assert seen.read_bytes() == b"replaced, longer"
    (backing / "sub").rename(backing / "moved")
    assert fails_with(seen.read_bytes) == "ENOENT"
    assert (source.path / "moved/file").read_bytes() == b"replaced, longer"
    (backing / "sub").mkdir()
    (backing / "sub/file").write_bytes(b"another")
    assert seen.read_bytes() == b"another"
    (backing / "other").unlink()
    (backing / "other").mkdir()
    assert os.listdir(source.path / "other") == []


def test_an_open_file_stays_itself(source, backing):
    with open(source.path / "other", "rb", buffering=0) as file:
        (backing / "other").unlink()
        (backing / "other").write_bytes(b"a longer one in its place")
        assert os.fstat(file.fileno()).st_size == 5
        assert os.fstat(file.fileno()).st_nlink == 0
        assert file.read() == b"other"


def test_an_open_directory_follows_its_rename(source, backing):
    descriptor = os.open(source.path / "sub", os.O_RDONLY)
    try:
        os.stat("file", dir_fd=descriptor)
        (backing / "sub").rename(backing / "moved")
        (backing / "sub").mkdir()
        assert os.listdir(descriptor) == ["file"]
        assert os.stat("file", dir_fd=descriptor).st_size == SIZE
    finally:
        os.close(descriptor)


def test_listing_of_many_names_is_complete_and_brings_names_alone(source, backing):
    names = {f"name {number}" for number in range(10_000)}
    (backing / "many").mkdir()
    for name in names:
        (backing / "many" / name).touch()
    found = os.listdir(source.path / "many")
    assert len(found) == len(names)
    assert set(found) == names
    source.reset()
    os.stat(source.path / "many/name 7")
    assert source.statistics().file("many/name 7").lookups == 1
    assert source.statistics().file("many/name 7").getattrs == 1


def test_listing_knows_types(source, backing):
    os.mkfifo(backing / "pipe")
    with os.scandir(source.path) as entries:
        kinds = {entry.name: (entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries}
    assert kinds == {
        "link": (True, False),
        "other": (False, False),
        "sub": (False, True),
        "pipe": (False, False),
    }
    assert stat.S_ISFIFO(os.lstat(source.path / "pipe").st_mode)


def test_listing_does_not_disturb_a_reader(source, backing):
    with open(source.path / "sub/file", "rb", buffering=0) as file:
        start = file.read(1000)
        assert os.listdir(source.path / "sub") == ["file"]
        assert os.fstat(file.fileno()).st_size == SIZE
        assert start + file.read() == (backing / "sub/file").read_bytes()


def test_directory_descriptors_are_bounded(backing, mountpoint):
    """Runs the mount in a process that keeps two of them."""
    for number in range(8):
        (backing / f"{number}/below").mkdir(parents=True)
        (backing / f"{number}/below/file").write_text(str(number))
    program = (
        "import sys; from cachefs.demo import slow_operations, slow_source;"
        "slow_operations.DIRECTORY_DESCRIPTORS = 2; sys.exit(slow_source.main())"
    )
    control = mountpoint.parent / "control"
    command = [sys.executable, "-c", program, backing, mountpoint, "--control", control]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert json.loads(process.stdout.readline()) == {"serving": str(mountpoint)}
            held = len(os.listdir(f"/proc/{process.pid}/fd"))
            for _ in range(2):
                for number in range(8):
                    assert (mountpoint / f"{number}/below/file").read_text() == str(number)
            wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) <= held + 2)
        finally:
            process.terminate()
        assert process.wait() == 0
    assert slow_operations.DIRECTORY_DESCRIPTORS > 2


def test_close_while_a_reader_hangs(backing, mountpoint):
    source = SlowSource(backing, mountpoint)
    source.fail("sub/file", "read", hang=True)
    with readers(source) as pool:
        content = pool.submit((source.path / "sub/file").read_bytes)
        wait_until(lambda: source.statistics().file("sub/file").reads == 1)
        source.close()
        assert fails_with(content.result) in ("ENOTCONN", "ECONNABORTED", "EIO")
    source.close()
    assert os.listdir(mountpoint) == []
    with pytest.raises(SlowSourceError, match="does not answer"):
        source.statistics()


def test_close_while_a_process_is_inside(backing, mountpoint):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=backing) as inside:
        with SlowSource(backing, mountpoint) as source:
            descriptor = os.open(source.path / "sub", os.O_RDONLY)
        assert not mounted_at(mountpoint)
        os.close(descriptor)
        inside.stdin.close()


def test_close_after_the_process_was_killed(backing, mountpoint):
    source = SlowSource(backing, mountpoint)
    os.kill(source.pid, signal.SIGKILL)
    source.close()
    assert not mounted_at(mountpoint)


@over_a_fuse_mount
def test_close_below_a_dead_mount(backing, mountpoint):
    lower = SlowSource(backing, mountpoint)
    upper = SlowSource(mountpoint, mountpoint)
    assert (mountpoint / "other").read_bytes() == b"other"
    assert lower.statistics().file("other").opens == upper.statistics().file("other").opens == 1
    os.kill(upper.pid, signal.SIGKILL)
    lower.close()
    assert not mounted_at(mountpoint)
    upper.close()


@over_a_fuse_mount
def test_close_leaves_what_lies_below(backing, mountpoint):
    with SlowSource(backing, mountpoint) as lower:
        with SlowSource(mountpoint, mountpoint) as upper:
            assert (mountpoint / "other").read_bytes() == b"other"
        assert upper.path.is_mount()
        assert (mountpoint / "other").read_bytes() == b"other"
        assert lower.statistics().file("other").opens == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
@pytest.mark.parametrize("gone", [True, False])
def test_close_below_another_file_system(backing, mountpoint, gone):
    with SlowSource(backing, mountpoint):
        subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
        if gone:
            subprocess.run(["umount", mountpoint], check=True)
            assert (mountpoint / "other").read_bytes() == b"other"
    assert not mountpoint.is_mount()


def test_the_source_ends_with_its_parent(backing, mountpoint):
    program = (
        "import os, sys; from cachefs.demo.slow_source import SlowSource;"
        "source = SlowSource(sys.argv[1], sys.argv[2]); print(source.pid, source._socket, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", program, backing, mountpoint], capture_output=True, text=True)
    pid, control = result.stdout.split()
    wait_until(lambda: not mounted_at(mountpoint))
    wait_until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    assert not os.path.exists(control)


def test_a_mountpoint_that_is_not_there(backing, tmp_path):
    with pytest.raises(SlowSourceError, match=r"did not start: .*absent"):
        SlowSource(backing, tmp_path / "absent")


def test_a_backing_directory_that_is_not_there(tmp_path, mountpoint):
    with pytest.raises(SlowSourceError, match=r"No such file or directory: .*absent"):
        SlowSource(tmp_path / "absent", mountpoint)


@pytest.mark.parametrize("end", ["terminate", "interrupt", "unmount"])
def test_as_a_command(backing, mountpoint, tmp_path, end):
    control = tmp_path / "control"
    command = [
        sys.executable,
        "-m",
        MODULE,
        backing,
        mountpoint,
        "--control",
        control,
        "--latency",
        str(LATENCY),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            assert json.loads(process.stdout.readline()) == {"serving": str(mountpoint)}
            assert stat.S_IMODE(control.stat().st_mode) == 0o600
            assert seconds(os.stat, mountpoint / "other") >= LATENCY
            with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
                connection.connect(str(control))
                for sent, answer in (
                    ('{"command": "ping"}', {}),
                    ('{"command": "dance"}', None),
                    ("?", None),
                ):
                    print(sent, file=lines, flush=True)
                    received = json.loads(lines.readline())
                    assert received == answer if answer is not None else list(received) == ["error"]
            if end == "unmount":
                unmount = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
                subprocess.run([*unmount, mountpoint], check=True)
            else:
                process.send_signal(signal.SIGTERM if end == "terminate" else signal.SIGINT)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert not control.exists()


AS_USER = """
import os, sys
from cachefs.demo.slow_source import SlowSource, mounted_at

backing, mountpoint = sys.argv[1:]
with SlowSource(backing, mountpoint) as source:
    assert os.getuid() != 0
    below = len(mounted_at(source.path)) - 1
    assert os.access(source.path, os.W_OK)
    assert open(source.path / "file").read() == "hello"
    assert source.statistics().file("file").opens == 1
assert len(mounted_at(source.path)) == below
"""


@pytest.fixture
def users_directory():
    """A directory of an ordinary user, with a backing directory and a mountpoint, and a way to run Python there.

    The user may read everything, since the interpreter and this repository may lie in a private directory."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("fusermount3"):
        pytest.skip("becomes an ordinary user, who mounts: needs root, setpriv, fusermount3")
    uid = next((user.pw_uid for user in pwd.getpwall() if 1000 <= user.pw_uid < 65534), None)
    if uid is None:
        pytest.skip("no ordinary user")

    def run_as_user(*arguments):
        identity = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        capability = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command = ["setpriv", *identity, *capability, sys.executable, "-c", AS_USER, *arguments]
        modules = str(Path(__file__).parents[2])
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": modules, "TMPDIR": directory}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with tempfile.TemporaryDirectory(prefix="slowsource-test-") as directory:
        os.chown(directory, uid, uid)
        backing, mountpoint = Path(directory, "backing"), Path(directory, "mount")
        backing.mkdir()
        (backing / "file").write_text("hello")
        mountpoint.mkdir()
        os.chown(mountpoint, uid, uid)
        yield backing, mountpoint, run_as_user
        assert not mounted_at(mountpoint)


def test_as_an_ordinary_user(users_directory):
    backing, mountpoint, run_as_user = users_directory
    result = run_as_user(backing, mountpoint)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_ordinary_user_can_mount_over_a_source_of_root(users_directory):
    backing, mountpoint, run_as_user = users_directory
    with SlowSource(backing, mountpoint, allow_other=True) as source:
        result = run_as_user(mountpoint, mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert source.statistics().file("file").opens == 1
        assert (mountpoint / "file").read_text() == "hello"
