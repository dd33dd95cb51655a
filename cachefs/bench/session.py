"""A reader process, on the source or within `cachefs run`: asked over its input, killed where it does not answer.

Invariants:

- Waiting for an answer ends when it comes, when its time is over, or when `stop` can be read: who interrupts us is
  heard here alone, so that nothing is interrupted half way.
- When a session is closed its process has ended, and so have its workers, its mount and its scratch; or what the kernel
  does not let go is among those that `remaining` names. Closing takes no longer than the seconds below together.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cachefs.bench import reader
from cachefs.errors import CachefsError

END_SECONDS, READER_END_SECONDS = 60.0, 2.0
"""Of `cachefs run`, which has a mount to take away; of a reader alone, which the kernel cleans up after."""
_STOP_SECONDS = 5.0
"""Of `cachefs run` that is to stop: its reader may wait for the mount, which goes only when the run has."""
_CLEAN_UP_SECONDS, _KILL_SECONDS = 15.0, 2.0
"""Of what outlives our process, as a keeper does whose run was killed; of whatever is left then."""
_HELD_SECONDS = 1.0
"""Who waits in the kernel for so long, and cannot be killed, waits for a file system that does not answer."""
_PR_SET_CHILD_SUBREAPER = 36
_CHUNK = 1 << 16
_LOOK_SECONDS = 0.05


class StoppedError(Exception):
    """`stop` could be read."""


def adopt_orphans() -> None:
    """Whoever outlives the process of ours that has started it is a child of ours from now on, so that it is found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def what_to_do(reason: str) -> str:
    """About files that cannot be read, with what the kernel says of it."""
    if reason in map(os.strerror, (errno.EACCES, errno.EPERM)):
        return "check its permissions"
    if reason in map(os.strerror, (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN)):
        return "was it moved or unmounted meanwhile?"
    return "look after its file server or disk"


def _is_held(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_DISK_SLEEP)
    except psutil.Error:  # it has ended
        return True


def remaining() -> list[psutil.Process]:
    """The processes that we have started, and those that they have, that have not ended."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Session:
    """`around` is what a user writes before the command: nothing, or `cachefs run ... --`."""

    def __init__(self, around: Sequence[str], stop: int) -> None:
        self.was_killed = False
        """Whether closing it has taken force: its mount may be left, without a daemon."""
        self._stop = stop
        self._has_keeper = bool(around)
        self._others = remaining()
        self._said = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*around, sys.executable, reader.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,  # a key on the terminal interrupts us, who end it in order
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        process = self._process
        assert process.stdin is not None
        if kind is None:
            process.stdin.close()  # it ends with its input
        else:
            process.terminate()
        seconds = (END_SECONDS if kind is None else _STOP_SECONDS) if self._has_keeper else READER_END_SECONDS
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # alone, so that a keeper takes the mount away
        if not self._have_ended(_CLEAN_UP_SECONDS):
            self._kill()
        for stream in (process.stdin, process.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def _kill(self) -> None:
        """Whatever is left."""
        self.was_killed = True
        for process in remaining():
            if process not in self._others:
                with suppress(psutil.Error):
                    process.kill()
        self._have_ended(_KILL_SECONDS)

    def _have_ended(self, seconds: float) -> bool:
        """Wait for all that was started by this session, until only such are left as the kernel holds."""
        deadline = time.monotonic() + seconds
        moved = time.monotonic()
        while left := [process for process in remaining() if process not in self._others]:
            if not all(map(_is_held, left)):
                moved = time.monotonic()
            if time.monotonic() > min(deadline, moved + _HELD_SECONDS):
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def ask(self, do: str, timeout: float, **arguments: Any) -> Any:
        """What the reader answers. Raises CachefsError if it fails or does not answer in time, and StoppedError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        said: dict[str, Any] = json.loads(self._receive(timeout))
        if "error" in said:
            raise CachefsError(f"the files cannot be read: {said['error']}", what_to_do(said["error"]))
        return said["answer"]

    def _receive(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._said:
            ready, _, _ = select.select([output, self._stop], [], [], max(0.0, deadline - time.monotonic()))
            if self._stop in ready:
                raise StoppedError
            if not ready:
                raise CachefsError(f"no answer within {timeout:.0f} s", "cachefs doctor SOURCE says where it hangs")
            part = os.read(output, _CHUNK)
            if not part:
                raise self._failure()
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _failure(self) -> CachefsError:
        """It has ended: with what it said last, which is why."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(READER_END_SECONDS)
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return CachefsError(f"the reader ended: {said[-1].removeprefix('cachefs: ')}")


def _environment() -> dict[str, str]:
    """Ours, without settings for cachefs: the trial has its own. It finds the same modules as we do."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CACHEFS_")}
    modules = [str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, modules))}
