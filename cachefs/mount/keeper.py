"""The keeper of a job's mounts: a process that makes them, watches over them, and takes them away.

Every `cachefs run` with the same mounts on a node is a claim on one keeper (`rendezvous`). The first of them forks it;
it enters private namespaces where it can, forks a daemon for each mount, and lets the others join. When the last claim
has ended, however that was, it unmounts, ends the daemons, purges scratch unless it is to be kept, and ends.

Invariants:
- A mount whose daemon has died is detached at once, so that the source shows again.
- The keeper holds no descriptor of whoever forked it (`rendezvous.fork_keeper`), and has one thread. It never waits for
  a single peer.
- Its daemons end when it does, however it ends. Until then neither it nor they end by a signal that is meant for the
  job, whose command may go on reading: SIGTERM sent to every process of it, say.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from cachefs.config import Settings
from cachefs.errors import CachefsError, ShardError, describe
from cachefs.mount.checks import check_fuse, check_may_cover
from cachefs.mount.control_client import ask
from cachefs.mount.daemon import problem_of_start, start_daemon, warnings_of_start
from cachefs.mount.mountinfo import find_mount
from cachefs.mount.namespaces import (
    bind_read_only,
    enter_private_namespaces,
    open_namespaces,
    probe_private_namespaces,
)
from cachefs.mount.purge import ScratchInUseError, free_memory_of, purge
from cachefs.mount.rendezvous import Mounted, peer_uid, receive, send
from cachefs.mount.serve import KEEPER_SIGNAL, name_of_signal
from cachefs.mount.unmount import live_lease, scratch_of, uncover
from cachefs.workers.fork_server import JOB_SIGNALS, ignore

START_SECONDS = 60.0
"""How long a daemon may take until its mount answers, from when one was heard last: who lists the source to find a
shard says so. Then its source is most likely not there at all."""
END_SECONDS = 10.0
"""How long the daemons may take to write their index and go, all together. What is left is killed."""
KILL_SECONDS = 2.0
_STATUS_SECONDS = 3.0
_REPORT_BYTES = 1 << 16


class _Mount:
    """One mount, from the start of its daemon on. `problem` says why it is not there (any more)."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = 0
        self.pidfd = -1
        self.pipe = -1
        self.said = b""
        self.warnings: list[str] = []
        self.problem: CachefsError | None = None
        self.has_served = False
        self.last_status: dict[str, Any] = {}

    @property
    def is_starting(self) -> bool:
        return self.pipe >= 0

    @property
    def is_alive(self) -> bool:
        return self.pidfd >= 0

    def start(self, *, is_private: bool) -> None:
        self.pid, self.pipe = start_daemon(replace(self.settings, is_private=is_private), is_kept=True)
        self.pidfd = os.pidfd_open(self.pid)

    def hear(self) -> None:
        """Read what the daemon says of its start."""
        part = os.read(self.pipe, _REPORT_BYTES)
        self.said += part
        if not part:
            self._close_pipe()
            self.problem = problem_of_start(self.said, self.settings)
            self.has_served = self.problem is None
            if self.has_served:
                self.warnings = warnings_of_start(self.said)

    def give_up(self) -> None:
        """It takes too long."""
        self._close_pipe()
        self.problem = CachefsError(
            f"the mount does not answer within {START_SECONDS:g} s", "is the file system of the source reachable?"
        )
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        if self.is_alive:
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> str:
        """Take note that the daemon has ended; how it ended, in words."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pidfd = -1
        if os.WIFSIGNALED(status):
            return f"its daemon was killed by {name_of_signal(os.WTERMSIG(status))}"
        code = os.WEXITSTATUS(status)
        return f"its daemon ended with status {code}" if code else "it was unmounted"

    def read_status(self) -> dict[str, Any]:
        """What the daemon says of itself, or said last."""
        mount = find_mount(self.settings.mountpoint) if self.is_alive and self.problem is None else None
        if mount is not None and mount.lease is not None:
            with suppress(CachefsError):
                lease = live_lease(mount)
                scratch = scratch_of(mount)
                try:
                    if lease is not None:
                        self.last_status = ask(scratch, lease.id, "status", _STATUS_SECONDS)
                finally:
                    os.close(scratch.fd)
        return self.last_status

    def summary(self) -> dict[str, Any]:
        return {
            "source": str(self.settings.source),
            "mountpoint": str(self.settings.mountpoint),
            "scratch": str(self.settings.scratch),
            "problem": None if self.problem is None else str(self.problem),
        }

    def _close_pipe(self) -> None:
        os.close(self.pipe)
        self.pipe = -1


@dataclass
class _Claim:
    socket: socket.socket
    was_told: bool = False


class Keeper:
    def __init__(self, listener: socket.socket, settings: Sequence[Settings], *, keep: bool) -> None:
        self._listener = listener
        self._keep = keep
        self._mounts = [_Mount(one) for one in settings]
        self._claims: dict[int, _Claim] = {}
        self._is_private = False
        self._forbidden: CachefsError | None = None
        self._poll = select.poll()
        self._deadline = time.monotonic() + START_SECONDS
        self._is_awaited = True

    def run(self) -> None:
        """Serve until the last claim has ended."""
        ignore((*JOB_SIGNALS, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, nothing could be reaped
        self._poll.register(self._listener, select.POLLIN)
        try:
            self._start()
            while self._claims or self._is_awaited:
                self._wait()
                self._is_awaited &= not self._claims and time.monotonic() < self._deadline
        except Exception as error:
            words = traceback.format_exception_only(error)[-1].strip()
            for claim in self._claims.values():
                send(claim.socket, {"event": "failed", "reason": f"a bug of cachefs: {words}"})
        finally:
            self._end(None)

    def _start(self) -> None:
        self._forbidden = probe_private_namespaces()
        if self._forbidden is None:
            try:
                enter_private_namespaces()
            except CachefsError as error:  # somebody else took the last one in between
                for mount in self._mounts:
                    mount.problem = error
                return
            self._is_private = True
        for mount in self._mounts:
            settings = mount.settings
            try:
                check_fuse(allow_other=settings.allow_other, is_private=self._is_private)
                if self._is_private:
                    self._lay_source_beneath(settings)
                else:
                    check_may_cover(settings.mountpoint)
                mount.start(is_private=self._is_private)
            except CachefsError as error:
                mount.problem = self._in_full(error)
            except OSError as error:
                mount.problem = CachefsError(f"its daemon could not be started: {describe(error)}")
            else:
                self._poll.register(mount.pipe, select.POLLIN)
                self._poll.register(mount.pidfd, select.POLLIN)

    def _lay_source_beneath(self, settings: Settings) -> None:
        """What shows at the mountpoint when the mount is detached, or could not be made."""
        if settings.mountpoint != settings.source:
            with suppress(OSError):
                bind_read_only(settings.source, settings.mountpoint)

    def _wait(self) -> None:
        """Wait for the next thing to happen, and see to it."""
        is_starting = self._is_awaited or any(mount.is_starting for mount in self._mounts)
        patience = max(0.0, self._deadline - time.monotonic()) * 1000 + 1 if is_starting else None
        happened = {fd for fd, _ in self._poll.poll(patience)}
        if self._listener.fileno() in happened:
            self._accept()
        for mount in self._mounts:
            if mount.is_starting and mount.pipe in happened:
                self._hear(mount)
            if mount.is_starting and time.monotonic() > self._deadline:
                self._poll.unregister(mount.pipe)
                mount.give_up()
            if mount.is_alive and mount.pidfd in happened and not mount.is_starting:
                self._bury(mount)
        for fd in happened & self._claims.keys():
            self._answer(fd)
        if not any(mount.is_starting for mount in self._mounts):
            for claim in self._claims.values():
                self._tell_ready(claim)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if peer_uid(sock) != os.geteuid():
            sock.close()
            return
        sock.setblocking(False)
        self._claims[sock.fileno()] = _Claim(sock)
        self._poll.register(sock, select.POLLIN)

    def _hear(self, mount: _Mount) -> None:
        pipe = mount.pipe
        mount.hear()
        if mount.is_starting:
            self._deadline = time.monotonic() + START_SECONDS
            for claim in self._claims.values():
                send(claim.socket, {"event": "starting"})
        else:
            self._poll.unregister(pipe)
            mount.problem = mount.problem and self._in_full(mount.problem)

    def _in_full(self, error: CachefsError) -> CachefsError:
        """Why a mount could not be made: with what kept it from private namespaces, where it would have been easier."""
        if self._forbidden is None:
            return error
        return type(error)(f"{self._forbidden.args[0]}, and {error.args[0]}", error.hint)

    def _bury(self, mount: _Mount) -> None:
        """The daemon has ended: uncover the source, and say so where the mount was in use."""
        self._poll.unregister(mount.pidfd)
        how = mount.reap()
        self._detach(mount)
        if mount.problem is None:
            mount.problem = CachefsError(how)
            for claim in self._claims.values():
                send(claim.socket, {"event": "gone", "mountpoint": str(mount.settings.mountpoint), "reason": how})

    def _answer(self, fd: int) -> None:
        claim = self._claims[fd]
        request, _ = receive(claim.socket)
        command = request["command"] if request is not None else None
        if command == "report":
            send(claim.socket, {"event": "report", **self._report()})
            return
        is_last = len(self._claims) == 1
        if command == "leave" and not is_last:
            send(claim.socket, {"event": "left", "is_last": False, "problems": [], **self._report()})
        self._poll.unregister(fd)
        del self._claims[fd]
        if command == "leave" and is_last:
            self._end(claim)
        claim.socket.close()

    def _tell_ready(self, claim: _Claim) -> None:
        if claim.was_told:
            return
        claim.was_told = True
        descriptors = open_namespaces() if self._is_private else ()
        message = {
            "event": "ready",
            "mounts": [
                vars(
                    Mounted(
                        **mount.summary(),
                        is_shard_missing=isinstance(mount.problem, ShardError),
                        warnings=tuple(mount.warnings),
                    )
                )
                for mount in self._mounts
            ],
            "is_private": self._is_private,
        }
        send(claim.socket, message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _report(self) -> dict[str, Any]:
        return {"mounts": [{**mount.read_status(), **mount.summary()} for mount in self._mounts]}

    def _end(self, last: _Claim | None) -> None:
        """Take everything away; then tell the last claim how it was, if it asked."""
        if self._listener.fileno() < 0:
            return  # done already
        self._listener.close()  # whoever comes from now on starts a keeper of its own
        report = self._report()
        for mount in self._mounts:
            if mount.is_alive:
                self._detach(mount)
                mount.signal(KEEPER_SIGNAL)
        deadline = time.monotonic() + END_SECONDS
        for mount in self._mounts:
            if mount.is_alive:
                if not _has_ended(mount.pidfd, max(0.0, deadline - time.monotonic())):
                    mount.signal(signal.SIGKILL)
                if _has_ended(mount.pidfd, KILL_SECONDS):  # one that is stuck in the kernel goes when it can
                    mount.reap()
                self._detach(mount)
        problems = [] if self._keep else self._purge()
        for scratch in {mount.settings.scratch for mount in self._mounts if self._keep and mount.settings.memory}:
            with suppress(CachefsError):  # another run uses it
                free_memory_of(scratch)  # of a daemon that was killed
        if last is not None:
            send(last.socket, {"event": "left", "is_last": True, "problems": problems, **report})

    def _detach(self, mount: _Mount) -> None:
        uncover(mount.settings.mountpoint, mount.settings.scratch, is_private=self._is_private)

    def _purge(self) -> list[str]:
        """Purge each scratch; what could not be purged, in words. One in use is left to its last user.

        What is wrong with a scratch that no mount could use has been said already.
        """
        problems = []
        for scratch in {mount.settings.scratch for mount in self._mounts}:
            if not os.path.lexists(scratch):
                continue
            try:
                purge(scratch)
            except ScratchInUseError:
                continue
            except CachefsError as error:
                if any(mount.has_served and mount.settings.scratch == scratch for mount in self._mounts):
                    problems.append(str(error))
        return problems


def _has_ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
