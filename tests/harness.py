"""Mounts for tests: the real command on real directories, with proof at the end that nothing is left."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cachefs.mount.mountinfo import FSTYPE, find_mount, read_mounts

CACHEFS = (sys.executable, "-m", "cachefs")


def run_cachefs(
    *arguments: object, check: bool = True, env: dict[str, str] | None = None, **keywords: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line; with `check`, an exit status other than 0 fails with what it said."""
    done = subprocess.run(
        [*CACHEFS, *map(os.fspath, map(_plain, arguments))],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean_environment(), **(env or {})},
        check=False,
        **keywords,
    )
    if check and done.returncode:
        raise AssertionError(f"cachefs {arguments} exited with {done.returncode}: {done.stderr}{done.stdout}")
    return done


@contextmanager
def scripted(script: str, *arguments: object, says: str) -> Iterator[None]:
    """A process that runs a script while its block runs, from when it has printed the line `says` on."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{says}\n"
            yield
        finally:
            process.kill()


def on_a_terminal(*arguments: object, env: dict[str, str]) -> tuple[bytes, str]:
    """What a command that works shows on its terminal, which is stderr, and what it prints."""
    ours, theirs = pty.openpty()
    try:
        environment = {**env, "TERM": "xterm", "COLUMNS": "100"}
        command = [*CACHEFS, *map(str, arguments)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True)
    finally:
        os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:
        pass  # the terminal has no writer any more
    os.close(ours)
    return shown, done.stdout.decode()


def verify(scratch: Path, *options: str) -> tuple[int, str]:
    """Exit status and words of `cachefs verify`."""
    done = run_cachefs("verify", "--scratch", scratch, *options, check=False)
    return done.returncode, done.stdout + done.stderr


def clean_environment() -> dict[str, str]:
    """The environment without settings for cachefs."""
    return {key: value for key, value in os.environ.items() if not key.startswith("CACHEFS_")}


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition, never for a time; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


over_a_fuse_mount = pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 may not enter a user's own FUSE mount")
"""Of tests that mount over the slow source itself."""


def lives(process: psutil.Process) -> bool:
    """Whether a process runs: one that has ended, and that init has not taken note of for a second or two, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class MountedCache:
    """One mount made by `cachefs mount`. `path` is where it appears.

    It promotes nothing unless the environment says CACHEFS_NO_PROMOTE=0, and fetches nothing ahead unless an option or
    the environment says so: counters, link counts and times of change are exact only where requests reach us, and what
    is fetched is known only where it was asked for.
    """

    def __init__(self, source: Path, mountpoint: Path | None, scratch: Path, *options: object, **environment: str):
        self.source = source
        self.path = mountpoint or source
        self.scratch = scratch
        self.expected_log: list[str] = []
        self.demanded_log: list[str] = []
        self.is_purging = False
        places = [source] if mountpoint is None else [source, mountpoint]
        environment = {"CACHEFS_NO_PROMOTE": "1", "CACHEFS_PREFETCH": "off", **environment}
        self.started = run_cachefs("mount", *places, "--scratch", scratch, *options, env=environment)
        self.pid = int(self.status()["pid"])
        self.log = Path(str(self.status()["log"]))
        self.processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]

    def status(self) -> dict[str, object]:
        return json.loads(run_cachefs("status", self.path, "--json").stdout)

    def count(self, name: str) -> int:
        """One counter of status."""
        return int(self.status()[name])

    def resident_data_files(self) -> list[Path]:
        """The complete copies in scratch."""
        return [path for path in (self.scratch / "files").rglob("*") if path.is_file() and not path.is_symlink()]

    def expect_log(self, pattern: str) -> None:
        """Warnings that match are part of the test."""
        self.expected_log.append(pattern)

    def must_log(self, pattern: str) -> None:
        """A warning that matches has to be there at the end."""
        self.expect_log(pattern)
        self.demanded_log.append(pattern)

    def is_mounted(self) -> bool:
        mount = find_mount(self.path)
        return mount is not None and mount.lease is not None and mount.lease[0] == self.scratch

    def unmount(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Unmount with the command; then nothing of the mount may be left. Fails on unexpected lines in its log."""
        everything = self._processes()
        log = self._read_log()
        done = run_cachefs("umount", self.path, *options)
        log = self._read_log() or log
        assert not self.is_mounted(), f"{self.path} is still mounted"
        wait_until(lambda: not any(map(lives, everything)), "the processes of the mount end")
        unexpected = [
            line
            for line in log.splitlines()
            if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", line)
            and not any(re.search(pattern, line) for pattern in self.expected_log)
        ]
        assert not unexpected, f"unexpected log lines: {unexpected}"
        silent = [pattern for pattern in self.demanded_log if not re.search(pattern, log)]
        assert not silent, f"not in the log: {silent}"
        return done

    def kill(self) -> None:
        """SIGKILL the daemon, as a crash would, and wait until its workers have gone too."""
        everything = self._processes()
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(lives, everything)), "the processes of the mount end")

    def end(self) -> None:
        """Whatever happened: leave no mount and no process."""
        processes = self._processes()
        try:
            if self.is_mounted():
                self.unmount()
        finally:
            if self.is_mounted():
                detach(self.path)
            for process in processes:
                if process.is_running():
                    process.kill()

    def _processes(self) -> list[psutil.Process]:
        found = {process.pid: process for process in self.processes if process.is_running()}
        for process in list(found.values()):
            try:
                found.update({child.pid: child for child in process.children(recursive=True)})
            except psutil.NoSuchProcess:
                continue
        self.processes = list(found.values())
        return self.processes

    def _read_log(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def detach(path: Path) -> None:
    """Take a mount away, whatever state it is in."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, os.fspath(path)], check=False, capture_output=True)


def mounts_below(folder: Path) -> list[Path]:
    return [mount.path for mount in read_mounts() if folder == mount.path or folder in mount.path.parents]


def cachefs_mounts_below(folder: Path) -> list[Path]:
    mounts = [mount for mount in read_mounts() if mount.lease is not None]
    return [mount.path for mount in mounts if folder == mount.path or folder in mount.path.parents]


def mount_lines(pid: int | str = "self") -> list[str]:
    """The lines of a process's mountinfo; names need not be UTF-8."""
    return Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines()


def mounts_everywhere(folder: Path) -> list[str]:
    """The mounts of cachefs with `folder` in their line, in all mount namespaces that this user may look into."""
    seen, found = set(), []
    for pid in psutil.pids():
        with suppress(OSError):
            view = (os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink(f"/proc/{pid}/root"))
            if view not in seen:
                lines = mount_lines(pid)
                seen.add(view)
                found += [line for line in lines if f" - {FSTYPE} " in line and str(folder) in line]
    return found


def _plain(argument: object) -> str:
    return (
        argument if isinstance(argument, str) else os.fspath(argument) if isinstance(argument, Path) else str(argument)
    )
