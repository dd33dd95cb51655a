"""The mount against the directory that it shows: random trees, random changes of them, and the same questions to both.

One mount serves all examples, each in a directory of its own; metadata are believed for 0 seconds, so what the source
says now is what the mount must say. A handle is compared with the content that the file had when it was opened: it
gives those bytes, or ESTALE or EIO, and never bytes of another version.

`CACHEFS_REFERENCE_EXAMPLES=500` looks at more examples, and at others in each run.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.harness import MountedCache

EXAMPLES = int(os.environ.get("CACHEFS_REFERENCE_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 100,
    stateful_step_count=40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

KIB, MIB = 1 << 10, 1 << 20
GONE = ("errno ESTALE", "errno EIO")
"""What a reader of a version that is gone may get."""

ODD_NAMES = (b"a", b"b", b"c d", b"new\nline", b"\xff\xfe\x80", b"\xc3\xa4", b"x" * 255, b"...", b"-rf *", b"\x01\x7f")
names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b"..")),
)
few_names = st.sampled_from(ODD_NAMES)
sizes = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 128 * KIB, 256 * KIB, 256 * KIB + 1]),
    st.integers(0, 300 * KIB),
    st.integers(0, 300 * KIB),
    st.integers(1 * MIB, 3 * MIB),
)
seeds = st.integers(0, 1 << 30)
offsets = st.integers(0, 3 * MIB + 100)

_directories = count()
_mtimes = count(1_600_000_000_000_000_000, 1_000_000_007)


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, or the errno of what it raises."""
    try:
        return call(*arguments)
    except OSError as error:
        return f"errno {errno.errorcode.get(error.errno or 0)}"


def shown(path: bytes, status_of: Callable[[bytes], os.stat_result] = os.lstat) -> Any:
    """What stat(2) says of a file, but its numbers of inode and device, and the time at which it was last read."""
    status = status_of(path)
    size = status.st_size if not stat.S_ISDIR(status.st_mode) else "directory"
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_mode, size, times, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev


def content(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 192 * KIB + 1):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes, fewer only at the end of the file. pread(2) gives fewer, too, where an error comes after them."""
    got = b""
    while len(got) < size and (part := os.pread(fd, size - len(got), offset + len(got))):
        got += part
    return got


def listing(path: bytes) -> list[bytes]:
    return sorted(os.listdir(path))


def open_and_close(flags: int) -> Callable[[bytes], None]:
    return lambda path: os.close(os.open(path, flags | os.O_CLOEXEC))


def file_system(path: bytes) -> tuple[int, ...]:
    status = os.statvfs(path)
    return status.f_bsize, status.f_frsize, status.f_blocks, status.f_namemax


def typed_listing(path: bytes) -> list[tuple[bytes, bool, bool, bool]]:
    with os.scandir(path) as entries:
        return sorted(
            (e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False), e.is_symlink()) for e in entries
        )


QUESTIONS: dict[str, Callable[[bytes], Any]] = {
    "lstat": shown,
    "stat": lambda path: shown(path, os.stat),
    "content": content,
    "listdir": listing,
    "scandir": typed_listing,
    "readlink": os.readlink,
    "statvfs": file_system,
    "exists": os.path.exists,
    "readable": lambda path: os.access(path, os.R_OK),
    "executable": lambda path: os.access(path, os.X_OK),
    "open directory": open_and_close(os.O_RDONLY | os.O_DIRECTORY),
    "open no link": open_and_close(os.O_RDONLY | os.O_NOFOLLOW),
}


@dataclass
class Handle:
    """A descriptor in the mount, and the bytes that its file had when it was opened."""

    fd: int
    path: bytes
    content: bytes
    is_old: bool = False
    position: int = 0


class Mirror(RuleBasedStateMachine):
    """One directory of the source, changed at random, and looked at through the mount."""

    mount: MountedCache

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []

    @initialize()
    def begin(self) -> None:
        name = b"example%d" % next(_directories)
        self.source = os.path.join(os.fsencode(self.mount.source), name)
        self.mirror = os.path.join(os.fsencode(self.mount.path), name)
        os.mkdir(self.source)

    def teardown(self) -> None:
        for handle in self.handles:
            os.close(handle.fd)

    # What there is, by the source; paths are relative to the example

    def entries(self, is_wanted: Callable[[int], bool] = lambda _: True) -> list[bytes]:
        found: list[bytes] = []
        for folder, folders, files in os.walk(self.source):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                if is_wanted(os.lstat(path).st_mode):
                    found.append(os.path.relpath(path, self.source))
        return sorted(found)

    def pick(self, data: st.DataObject, is_wanted: Callable[[int], bool]) -> bytes | None:
        found = self.entries(is_wanted)
        return data.draw(st.sampled_from(found)) if found else None

    def new_path(self, data: st.DataObject, name: bytes) -> bytes | None:
        """A path for a new entry in some directory; None where it exists."""
        folder = data.draw(st.sampled_from([b"", *self.entries(stat.S_ISDIR)]))
        path = os.path.join(folder, name)
        return None if os.path.lexists(os.path.join(self.source, path)) or len(path) > 1500 else path

    def at_source(self, path: bytes) -> bytes:
        return os.path.join(self.source, path)

    def written(self, path: bytes) -> None:
        """Give a file that was written a time that it never had: what tells its versions apart."""
        at = next(_mtimes)
        os.utime(self.at_source(path), ns=(at, at))
        for handle in self.handles:
            handle.is_old = True  # of this file or of another: then it costs nothing

    # Changes on the source

    @rule(data=st.data(), name=names, size=sizes, seed=seeds)
    def make_file(self, data, name, size, seed):
        path = self.new_path(data, name)
        if path is not None and len(self.entries()) < 20:
            with open(self.at_source(path), "wb") as file:
                file.write(random.Random(seed).randbytes(size))
            self.written(path)

    @rule(data=st.data(), name=names)
    def make_directory(self, data, name):
        path = self.new_path(data, name)
        if path is not None and path.count(b"/") < 4:
            os.mkdir(self.at_source(path))

    @rule(data=st.data(), name=few_names, points_to=st.sampled_from([*ODD_NAMES, b"..", b"/", b"../a", b"a/b"]))
    def make_link(self, data, name, points_to):
        path = self.new_path(data, name)
        if path is not None:
            os.symlink(points_to, self.at_source(path))

    @rule(data=st.data(), name=few_names)
    def make_hard_link(self, data, name):
        path, file = self.new_path(data, name), self.pick(data, stat.S_ISREG)
        if path is not None and file is not None:
            os.link(self.at_source(file), self.at_source(path))

    @rule(data=st.data(), offset=offsets, size=st.integers(1, 100 * KIB), seed=seeds)
    def write(self, data, offset, size, seed):
        path = self.pick(data, stat.S_ISREG)
        if path is not None:
            with open(self.at_source(path), "r+b") as file:
                length = os.fstat(file.fileno()).st_size
                file.seek(offset % max(1, length))
                file.write(random.Random(seed).randbytes(size)[: max(1, length - offset % max(1, length))])
            self.written(path)

    @rule(data=st.data(), size=st.integers(1, 100 * KIB), seed=seeds)
    def append(self, data, size, seed):
        path = self.pick(data, stat.S_ISREG)
        if path is not None:
            with open(self.at_source(path), "ab") as file:
                file.write(random.Random(seed).randbytes(size))
            self.written(path)

    @rule(data=st.data(), size=offsets)
    def truncate(self, data, size):
        path = self.pick(data, stat.S_ISREG)
        if path is not None:
            os.truncate(self.at_source(path), size)
            self.written(path)

    @rule(data=st.data(), size=sizes, seed=seeds)
    def replace(self, data, size, seed):
        path = self.pick(data, lambda mode: not stat.S_ISDIR(mode))
        if path is not None:
            temporary = os.path.join(os.fsencode(self.mount.source), b"temporary")
            with open(temporary, "wb") as file:
                file.write(random.Random(seed).randbytes(size))
            os.rename(temporary, self.at_source(path))
            self.written(path)

    @rule(data=st.data())
    def unlink(self, data):
        path = self.pick(data, lambda mode: not stat.S_ISDIR(mode))
        if path is not None:
            os.unlink(self.at_source(path))

    @rule(data=st.data())
    def remove_directory(self, data):
        path = self.pick(data, stat.S_ISDIR)
        if path is not None and not os.listdir(self.at_source(path)):
            os.rmdir(self.at_source(path))

    @rule(data=st.data(), name=few_names)
    def rename(self, data, name):
        path, target = self.pick(data, lambda _: True), self.new_path(data, name)
        if path is not None and target is not None and not (target + b"/").startswith(path + b"/"):
            os.rename(self.at_source(path), self.at_source(target))

    @rule(data=st.data())
    def rename_over(self, data):
        path, target = (self.pick(data, lambda mode: not stat.S_ISDIR(mode)) for _ in range(2))
        if path is not None and target is not None:
            os.rename(self.at_source(path), self.at_source(target))

    @rule(data=st.data(), mode=st.sampled_from([0o600, 0o644, 0o755, 0o400, 0o777, 0o4755]))
    def change_mode(self, data, mode):
        path = self.pick(data, lambda mode: not stat.S_ISLNK(mode))
        if path is not None:
            os.chmod(self.at_source(path), mode)

    @rule(data=st.data(), at=st.sampled_from([-1_000_000_001, 0, 1, 4_102_444_800_123_456_789]))
    def change_times(self, data, at):
        path = self.pick(data, lambda _: True)
        if path is not None:
            os.utime(self.at_source(path), ns=(at, at), follow_symlinks=False)

    # Looks at the mount

    @rule(data=st.data(), question=st.sampled_from(sorted(QUESTIONS)), below=st.one_of(st.none(), few_names))
    def ask(self, data, question, below):
        """The same question to both, also about names that are not there, or below what is no directory."""
        path = data.draw(st.sampled_from([b"", *self.entries()]))
        if below is not None:
            path = os.path.join(path, below)
        call = QUESTIONS[question]
        assert outcome(call, os.path.join(self.mirror, path)) == outcome(call, self.at_source(path)), (question, path)

    @rule(name=st.sampled_from([b"n" * 256, b"none", b"a/../a", b"./a", b"a/.", b"none/none"]))
    def ask_for_odd_paths(self, name):
        for question in "lstat", "content", "listdir":
            call = QUESTIONS[question]
            assert outcome(call, os.path.join(self.mirror, name)) == outcome(call, self.at_source(name)), question

    @rule(data=st.data(), offset=offsets, size=st.integers(1, 300 * KIB))
    def read_a_part(self, data, offset, size):
        path = self.pick(data, stat.S_ISREG)
        if path is not None:
            parts = []
            for root in self.mirror, self.source:
                fd = os.open(os.path.join(root, path), os.O_RDONLY)
                try:
                    parts.append(read_at(fd, size, offset))
                finally:
                    os.close(fd)
            assert parts[0] == parts[1]

    @rule(name=few_names)
    def change_the_mount(self, name):
        """Read-only: refused, and nothing of it reaches the source (the comparison after each step sees that)."""
        path = os.path.join(self.mirror, name)
        exists = os.path.lexists(path)
        for call in (
            lambda: os.mkdir(path),
            lambda: os.symlink(b"x", path),
            lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
        ):
            assert outcome(call) == ("errno EEXIST" if exists else "errno EROFS")
        if exists:
            refused = [lambda: os.rename(path, path + b"2"), lambda: os.utime(path, ns=(0, 0), follow_symlinks=False)]
            if not os.path.islink(path):
                refused += [lambda: os.chmod(path, 0o600), lambda: os.truncate(path, 0)]
            for call in refused:
                assert outcome(call) in ("errno EROFS", "errno EISDIR", "errno ENAMETOOLONG")

    # Handles

    @precondition(lambda self: len(self.handles) < 4)
    @rule(data=st.data())
    def open_handle(self, data):
        path = self.pick(data, stat.S_ISREG)
        if path is not None:
            expected = content(self.at_source(path))
            fd = os.open(os.path.join(self.mirror, path), os.O_RDONLY | os.O_CLOEXEC)
            self.handles.append(Handle(fd, path, expected))

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), offset=offsets, size=st.integers(1, 300 * KIB), in_sequence=st.booleans())
    def read_handle(self, data, offset, size, in_sequence):
        handle = data.draw(st.sampled_from(self.handles))
        if in_sequence:
            offset = handle.position
        got = outcome(read_at, handle.fd, size, offset)
        if isinstance(got, str):
            assert got in GONE
            current = outcome(content, self.at_source(handle.path))
            assert current != handle.content or handle.is_old, "the file is as it was"
            return
        assert got == handle.content[offset : offset + size], "bytes of another version, or a short file"
        handle.position = offset + len(got)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def stat_handle(self, data):
        handle = data.draw(st.sampled_from(self.handles))
        assert os.fstat(handle.fd).st_size == len(handle.content)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def close_handle(self, data):
        handle = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        os.close(handle.fd)

    @invariant()
    def the_mount_shows_the_source(self):
        if not hasattr(self, "source"):
            return
        held = {handle.path for handle in self.handles}
        inodes: dict[tuple[int, int], int] = {}
        todo = [b""]
        while todo:
            path = todo.pop()
            here, there = os.path.join(self.mirror, path), self.at_source(path)
            status = os.lstat(there)
            seen = shown(here)
            if path not in held:  # an open file keeps the attributes of its version
                assert seen == shown(there), path
            if stat.S_ISDIR(status.st_mode):
                assert typed_listing(here) == typed_listing(there), path
                todo += [os.path.join(path, name) for name in os.listdir(there)]
            elif stat.S_ISLNK(status.st_mode):
                assert os.readlink(here) == os.readlink(there), path
            elif stat.S_ISREG(status.st_mode):
                assert content(here) == content(there), path
                if status.st_nlink > 1:
                    identity = status.st_dev, status.st_ino
                    assert inodes.setdefault(identity, os.lstat(here).st_ino) == os.lstat(here).st_ino, path


MOUNTS = {
    "everything fits": ("--capacity", "2G"),
    "little fits": ("--capacity", "600K", "--policy", "lru"),
}


@pytest.fixture(scope="module", params=MOUNTS.values(), ids=MOUNTS.keys())
def mount(request, tmp_path_factory) -> Iterator[MountedCache]:
    """One mount for all examples, at a place of its own: the source can be changed behind it."""
    folder = tmp_path_factory.mktemp("reference")
    for name in "source", "mountpoint":
        (folder / name).mkdir()
    cache = MountedCache(
        folder / "source", folder / "mountpoint", folder / "scratch", "--metadata-ttl", "0", *request.param
    )
    try:
        yield cache
        assert cache.is_mounted(), "the mount has ended"
    finally:
        cache.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_mount_is_as_the_source(mount):
    class MirrorOfMount(Mirror):
        pass

    MirrorOfMount.mount = mount
    run_state_machine_as_test(MirrorOfMount, settings=PROFILE)


def _overwrite(path, new):
    with open(path, "r+b") as file:
        file.write(new)


def _append(path, new):
    with open(path, "ab") as file:
        file.write(new)


def _cut(path, _):
    os.truncate(path, 5 * MIB)


def _rename_over(path, new):
    path.with_name("temporary").write_bytes(new)
    path.with_name("temporary").rename(path)


def _unlink(path, _):
    path.unlink()


def _move(path, _):
    path.rename(path.with_name("moved"))


@pytest.mark.parametrize("change", [_overwrite, _append, _cut, _rename_over, _unlink, _move])
def test_a_reader_of_a_large_file_never_sees_two_versions(mount, change):
    """The change comes while the file is being fetched, or read past the cache."""
    size = 32 * MIB
    old, new = random.Random(1).randbytes(size), random.Random(2).randbytes(size)
    folder = mount.source / f"large{next(_directories)}"
    folder.mkdir()
    path = folder / "file"
    path.write_bytes(old)
    fd = os.open(mount.path / folder.name / "file", os.O_RDONLY)
    try:
        assert os.pread(fd, 1000, 0) == old[:1000]
        change(path, new)
        for offset in [*range(0, size, 3 * MIB), size - 1000, 10]:
            assert outcome(read_at, fd, 200 * KIB, offset) in (old[offset : offset + 200 * KIB], *GONE)
    finally:
        os.close(fd)
    for name in listing(os.fsencode(folder)):
        through = os.path.join(os.fsencode(mount.path / folder.name), name)
        assert content(through) == content(os.path.join(os.fsencode(folder), name)), "an open after the change is new"
    for path in folder.iterdir():
        path.unlink()
