"""How the commands of one job find the keeper of their mounts, and how both talk: one JSON object a packet.

An abstract Unix socket is the meeting point: binding its name is atomic, connecting to it is a claim on the mounts that
ends however its process ends, and it leaves no file behind. Its name is made from who asks, for what, and from which
namespaces, so that only those meet who mean the same; and from their batch job, so that only those meet who live as
long: a batch system kills what a job, a task of an array or a step leaves behind, and the keeper with it.

    run → keeper    {"command": "report"}, {"command": "leave"}
    keeper → run    {"event": "starting"}: again and again, while the source is listed to find a shard
                    {"event": "ready", "mounts": [...], "is_private": bool}, with the descriptors of its namespaces
                    {"event": "report", ...}, {"event": "left", ...}: the answers, see `keeper`
                    {"event": "gone", "mountpoint": ..., "reason": ...}: a mount that is not there any more

Invariant: neither side believes a peer of another user.
"""

from __future__ import annotations

import array
import errno
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cachefs.config import Settings
from cachefs.errors import CachefsError
from cachefs.mount.namespaces import namespaces_of_this_process
from cachefs.workers.fork_server import detach

PACKET_BYTES = 200_000
READY_SECONDS = 90.0
"""How long to wait for the keeper's word: more than it gives its daemons for theirs, so only for one that hangs."""
_BACKLOG = 1024
_JOB_VARIABLES = (
    *("JOB_ID", "SGE_TASK_ID"),  # Grid Engine
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
    *("LSB_JOBID", "LSB_JOBINDEX", "PBS_JOBID"),
)
_MOMENT = 0.002
_DESCRIPTORS = 3
_CREDENTIALS = struct.Struct("3i")

StartKeeper = Callable[[socket.socket], None]
"""Forks the keeper that serves at a listening socket."""


@dataclass(frozen=True)
class Mounted:
    """One mount of a job, or why there is none: then the command reads the source directly.

    Unless that is because its shard cannot be had.
    """

    source: str
    mountpoint: str
    scratch: str
    problem: str | None = None
    is_shard_missing: bool = False
    warnings: Sequence[str] = ()


class Attendance:
    """A run's claim on its mounts, from `attend` until `leave` or the end of the process."""

    def __init__(self, sock: socket.socket, ready: dict[str, Any], namespaces: Sequence[int]) -> None:
        self._socket = sock
        self.mounts = [Mounted(**fields) for fields in ready["mounts"]]
        self.is_private = bool(ready["is_private"])
        self.namespaces = tuple(namespaces)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> dict[str, Any] | None:
        """The next event, which is waited for; None when the keeper is gone."""
        return receive(self._socket)[0]

    def ask(self, command: str, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """The answer to a command, None if the keeper is gone; events that come before it go to `on_event`."""
        answer = {"report": "report", "leave": "left"}[command]
        if not send(self._socket, {"command": command}):
            return None
        while (event := self.receive()) is not None:
            if event["event"] == answer:
                return event
            on_event(event)
        return None

    def close(self) -> None:
        self._socket.close()


def attend(settings: Sequence[Settings], keep: bool, start_keeper: StartKeeper) -> Attendance:
    """Join the keeper of these mounts, or become the one who starts it; wait until the mounts are there or are not.

    Raises CachefsError and OSError. An interrupt while it waits ends the claim.
    """
    name = _name_of(settings, keep)
    while True:
        is_first = False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            try:
                sock.connect(name)
            except ConnectionRefusedError:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                    try:
                        listener.bind(name)
                    except OSError as error:
                        if error.errno != errno.EADDRINUSE:
                            raise
                        sock.close()  # somebody else was first, and listens in a moment
                        time.sleep(_MOMENT)
                        continue
                    listener.listen(_BACKLOG)
                    sock.connect(name)  # before there is a keeper: however we end, it will hear of it
                    start_keeper(listener)
                    is_first = True
            if peer_uid(sock) != os.geteuid():
                raise CachefsError("another user holds the name of this job's mounts", "this may be an attack on you")
            sock.settimeout(READY_SECONDS)
            ready, descriptors = receive(sock, _DESCRIPTORS)
            while ready is not None and ready["event"] == "starting":
                ready, descriptors = receive(sock, _DESCRIPTORS)
            sock.settimeout(None)
            if ready is not None:
                return Attendance(sock, ready, descriptors)
        except BaseException:
            sock.close()
            raise
        sock.close()
        if is_first:
            raise CachefsError("the keeper of the mounts died before they were there", "this is a bug of cachefs")
        # that keeper was ending, or has died: whoever comes first starts another


def fork_keeper(listener: socket.socket, settings: Sequence[Settings], *, keep: bool) -> None:
    """Fork a keeper that serves claims at `listener`. The caller must have one thread, and keeps it.

    What a keeper needs is loaded in it alone: it is much, libraries in it start threads, and a fault of theirs is not
    to be one of the run, which waits for its command all the time.
    """
    if os.fork() == 0:
        try:
            detach({listener.fileno()})
            os.umask(0o077)
            from cachefs.mount.keeper import Keeper

            Keeper(listener, settings, keep=keep).run()
        finally:
            os._exit(0)


def send(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
    """Whether the packet could be sent: False if the peer is gone or does not read."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def receive(sock: socket.socket, descriptors: int = 0) -> tuple[dict[str, Any] | None, list[int]]:
    """The next packet and its descriptors; None where the peer is gone. Blocks, if the socket does."""
    try:
        packet, fds, _, _ = socket.recv_fds(sock, PACKET_BYTES, descriptors)
    except ConnectionResetError:
        return None, []
    for fd in fds:
        os.set_inheritable(fd, False)
    return (json.loads(packet) if packet else None), fds


def peer_uid(sock: socket.socket) -> int:
    """Whose process is at the other end."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def _name_of(settings: Sequence[Settings], keep: bool) -> str:
    job = [os.environ.get(variable) for variable in _JOB_VARIABLES]
    meant = [os.geteuid(), namespaces_of_this_process(), job, keep, *sorted(map(repr, settings))]
    return "\0cachefs-" + hashlib.blake2b(repr(meant).encode(), digest_size=16).hexdigest()
