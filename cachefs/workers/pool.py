"""Pools of worker processes: a bounded number of jobs at once, in the order in which they came.

Invariants:
- A worker does one job at a time; the one that was used last is used next, so that what it keeps open stays warm.
- A job that says nothing for its time-out has its worker killed and raises SourceTimeoutError. So has a job whose
  caller is cancelled (then Cancelled goes on). A pool of `size` never has more than `size` live workers.
- Between taking an idle worker and using it nothing is awaited.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from cachefs import errors
from cachefs.workers.fork_server import ForkServer
from cachefs.workers.protocol import BUFFER_BYTES, BUG, ERROR, PROGRESS, decode, encode

log = logging.getLogger(__name__)

_ERROR_CLASSES = {name: getattr(errors, name) for name in ("SourceError", "SourceChangedError", "StorageError")}

_KILL_SECONDS = 2.0
"""How long to wait for a killed worker: one that is stuck in the kernel may outlive this."""


class WorkerBugError(OSError):
    """A handler raised something that it should not have; its traceback is in the log. The errno is EIO."""


@dataclass
class _Worker:
    socket: socket.socket
    pidfd: int

    async def kill(self) -> None:
        """End the process and see it gone, so that its locks are; one that cannot be ended is left behind."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with trio.move_on_after(_KILL_SECONDS, shield=True):
            await trio.lowlevel.wait_readable(self.pidfd)
        self.socket.close()
        os.close(self.pidfd)


class _Turn:
    """A caller that waits for a worker (or, when `worker` is None, for the place of one)."""

    def __init__(self) -> None:
        self.come = trio.Event()
        self.worker: _Worker | None = None


class WorkerPool:
    """At most `size` workers, started when they are needed."""

    def __init__(self, fork_server: ForkServer, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._fork_server = fork_server
        self._idle: list[_Worker] = []
        self._alive = 0
        self._waiting: deque[_Turn] = deque()
        self._buffer = bytearray(BUFFER_BYTES)

    @property
    def busy(self) -> int:
        return self._alive - len(self._idle)

    async def run(
        self,
        job: tuple[Any, ...],
        *,
        what: str = "",
        timeout: float = math.inf,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Any:
        """Do `job` in a worker and return its result; `on_progress` is called with what it yields.

        Raises what the handler raised (OSError and its classes of cachefs.errors), SourceTimeoutError after
        `timeout` seconds without a word, WorkerDiedError, or WorkerBugError. `what` names the job in errors.
        """
        packet = encode(job)
        if len(packet) > BUFFER_BYTES:
            raise OSError(errno.ENAMETOOLONG, "does not fit into a message", what)
        worker = await self._take()
        finished = False
        try:
            worker = await self._send(worker, packet)
            while True:
                with trio.move_on_after(timeout) as scope:
                    await trio.lowlevel.wait_readable(worker.socket)
                if scope.cancelled_caught:
                    raise errors.SourceTimeoutError(what, timeout)
                try:
                    size = worker.socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
                except ConnectionResetError:
                    size = 0
                if size == 0:
                    raise errors.WorkerDiedError(what)
                kind, *rest = decode(memoryview(self._buffer)[:size])
                if kind == PROGRESS:
                    if on_progress is not None:
                        on_progress(rest[0])
                    continue
                finished = True
                if kind == ERROR:
                    raise rebuild_error(*rest)
                if kind == BUG:
                    log.error("bug in worker job=%s\n%s", job[0], rest[0])
                    raise WorkerBugError(errno.EIO, "a bug of cachefs", what)
                return rest[0]
        finally:
            if not finished:
                await worker.kill()
            self._pass_on(worker if finished else None)

    def start_one(self) -> None:
        """Have a worker ready before the first job comes."""
        self._alive += 1
        self._idle.append(self._spawn())

    async def _send(self, worker: _Worker, job: bytes) -> _Worker:
        """Give the job to the worker, or to another one in its place if it ended while it was idle (killed, say)."""
        try:
            worker.socket.send(job, socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            fresh = self._fork()
            await worker.kill()
            fresh.socket.send(job, socket.MSG_DONTWAIT)
            return fresh
        return worker

    async def _take(self) -> _Worker:
        if self._idle:
            return self._idle.pop()
        if self._alive < self.size:
            self._alive += 1
            return self._spawn()
        turn = _Turn()
        self._waiting.append(turn)
        try:
            await turn.come.wait()
        except trio.Cancelled:
            if turn.come.is_set():
                self._pass_on(turn.worker)
            else:
                self._waiting.remove(turn)
            raise
        return turn.worker or self._spawn()

    def _spawn(self) -> _Worker:
        """A new worker for a place that the caller has counted already."""
        try:
            return self._fork()
        except BaseException:
            self._pass_on(None)
            raise

    def _fork(self) -> _Worker:
        try:
            return _Worker(*self._fork_server.spawn())
        except OSError as error:
            log.error("no worker could be started pool=%s error=%r", self.name, str(error))
            raise errors.WorkerDiedError("fork server") from error

    def _pass_on(self, worker: _Worker | None) -> None:
        """Give a worker, or the place of one that is gone, to whoever has waited longest."""
        if self._waiting:
            turn = self._waiting.popleft()
            turn.worker = worker
            turn.come.set()
        elif worker is not None:
            self._idle.append(worker)
        else:
            self._alive -= 1

    async def aclose(self) -> None:
        """End the idle workers (busy ones end with their jobs' cancellation)."""
        while self._idle:
            await self._idle.pop().kill()
            self._alive -= 1


def rebuild_error(class_name: str, number: int, text: str, path: str | bytes) -> OSError:
    """The exception that protocol.describe_error has described."""
    cls = _ERROR_CLASSES.get(class_name, OSError)
    if cls is errors.SourceChangedError:
        return errors.SourceChangedError(path if isinstance(path, bytes) else os.fsencode(path))
    rebuilt: OSError = cls(number, text, path) if path else cls(number, text)
    return rebuilt
