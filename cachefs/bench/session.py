"""A reader process, on the source or within `cachefs run`: asked over its input, killed where it does not answer.

Invariants:

- Waiting for an answer ends when it comes, when its time is over, or when `stop` can be read: who interrupts us is
  heard here alone, so that nothing is interrupted half way.
- When a session is closed its process has ended, and so have its workers, its mount and its scratch.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cachefs.bench import reader
from cachefs.errors import CachefsError

END_SECONDS, READER_END_SECONDS = 60.0, 2.0
"""Of `cachefs run`, which has a mount to take away; of a reader alone, which the kernel cleans up after."""
_CHUNK = 1 << 16


class StoppedError(Exception):
    """`stop` could be read."""


class Session:
    """`around` is what a user writes before the command: nothing, or `cachefs run ... --`."""

    def __init__(self, around: Sequence[str], stop: int) -> None:
        self._stop = stop
        self._end_seconds = END_SECONDS if around else READER_END_SECONDS
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
        try:
            process.wait(self._end_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass

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
            raise CachefsError(f"the files cannot be read: {said['error']}")
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
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return CachefsError(f"the reader ended: {said[-1].removeprefix('cachefs: ')}")


def _environment() -> dict[str, str]:
    """Ours, without settings for cachefs: the trial has its own. It finds the same modules as we do."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CACHEFS_")}
    modules = [str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, modules))}
