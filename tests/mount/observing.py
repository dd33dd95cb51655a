"""What the tests look at: errors, trees, scratch from outside, and readers that may hang."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.cache.scratch import open_scratch
from cachefs.demo.slow_source import SlowSource
from cachefs.mount.control_client import ask
from cachefs.mount.mountinfo import find_mount
from tests.harness import MountedCache

SHOWN_FIELDS = (
    "st_mode",
    "st_nlink",
    "st_uid",
    "st_gid",
    "st_rdev",
    "st_size",
    "st_blocks",
    "st_blksize",
    "st_mtime_ns",
    "st_ctime_ns",
)
"""The fields of a stat result that are the source's; st_atime_ns is too, as long as nobody reads."""

_ASKING = ("lookup", "getattr", "open", "read", "readdir", "readlink", "statfs")

_READER = """
import os, sys
try:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.write(1, b"opened ")
    size = int(sys.argv[3])
    os.write(1, b"got %d" % len(os.pread(fd, size if size >= 0 else 1 << 30, int(sys.argv[2]))))
except OSError as error:
    os.write(1, b"error %d" % error.errno)
"""


class Reader:
    """One process that opens a file, reads a range of it and says how that went."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, os.fspath(path), str(offset), str(size)], stdout=subprocess.PIPE
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def result(self) -> int | str:
        """The number of bytes, or the name of the errno; waits for the end."""
        said, _ = self._process.communicate(timeout=60)
        words = said.decode().split()
        return int(words[-1]) if words[-2] == "got" else errno.errorcode[int(words[-1])]

    def kill(self) -> None:
        """End it; the kernel lets it go when its request is answered or the mount has gone."""
        self._process.kill()

    def reap(self) -> None:
        """See it end."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def errno_of(call: Callable[..., object], *arguments: object, **keywords: object) -> str:
    """The name of the errno with which a call fails."""
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call(*arguments, **keywords)
    return errno.errorcode[caught.value.errno]


def describe_tree(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything below a directory that a program can see, but for times of access: by relative path."""
    found: dict[bytes, tuple[object, ...]] = {}
    top = os.fsencode(root)
    for folder, folders, files in os.walk(top):
        for name in (b".", *folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = digest(path)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[os.path.relpath(path, top)] = (*(getattr(status, field) for field in SHOWN_FIELDS), content)
    return found


def digest(path: bytes | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha(file.read())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored_files(scratch: Path) -> dict[str, int]:
    """Sizes of all complete and staged files in scratch, by path; what vanishes while looking is left out."""
    sizes = {}
    for folder, _, names in os.walk(scratch / "files"):
        sizes.update(_sizes(folder, names))
    sizes.update(_sizes(scratch / "staging", os.listdir(scratch / "staging")))
    return sizes


def stored_bytes(scratch: Path) -> int:
    """What complete and staged files take together at some moment, or less: a look at all of them takes a while, so
    only those count that are there in two looks, one after the other.
    """
    first, second = stored_files(scratch), stored_files(scratch)
    return sum(min(size, second[path]) for path, size in first.items() if path in second)


class Watch:
    """Samples how much lies in scratch, from outside, while its block runs."""

    def __init__(self, scratch: Path) -> None:
        self.largest = 0
        self.samples = 0
        self._scratch = scratch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.largest = max(self.largest, stored_bytes(self._scratch))
            self.samples += 1


def _sizes(folder: str | Path, names: list[str]) -> dict[str, int]:
    sizes = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            sizes[path] = os.stat(path).st_size
        except FileNotFoundError:
            continue
    return sizes


def asked(slow: SlowSource) -> int:
    """How many operations with latency the source has seen since the last reset."""
    operations = slow.statistics().operations
    return sum(operations.get(name, 0) for name in _ASKING)


def counters(cache: MountedCache) -> dict[str, int]:
    """What `cachefs status` says of a mount, asked over its control socket: some 0.3 s less than the command."""
    mount = find_mount(cache.path)
    assert mount is not None
    assert mount.lease is not None
    scratch = open_scratch(cache.scratch)
    try:
        return ask(scratch, mount.lease[1], "status")
    finally:
        os.close(scratch.fd)


def opens(cache: MountedCache) -> tuple[int, int, int]:
    """(hits, misses, bypasses)"""
    said = counters(cache)
    return said["hits"], said["misses"], said["bypasses"]
