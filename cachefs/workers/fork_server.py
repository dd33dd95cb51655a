"""A small process that forks workers, so that the event loop's process never has to.

Invariants:
- It is forked before the event loop starts and before anything large is loaded: one thread, little memory.
- It and every worker end when the daemon ends, however that happens: the server at the end of its socket's
  stream, a worker by PR_SET_PDEATHSIG when the server ends.
- No descriptor of the daemon survives in it, except those that it was told to keep.
"""

from __future__ import annotations

import array
import ctypes
import gc
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterable

JOB_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What batch systems send to every process of a job, that it may save its state: not meant for us."""

_PR_SET_PDEATHSIG = 1
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)

Serve = Callable[[socket.socket], None]
"""What a worker does: answer the jobs that come over its socket until the stream ends."""


class ForkServer:
    """The daemon's side. `spawn` gives a new worker as its socket and its pidfd."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket = sock
        self.pid = pid

    @classmethod
    def start(cls, serve: Serve, keep_fds: Iterable[int]) -> ForkServer:
        """Fork the server. Call it while the process has one thread. `keep_fds` stay open in it and its workers."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                _become_server(theirs, serve, {theirs.fileno(), *keep_fds})
            finally:
                os._exit(1)
        theirs.close()
        return cls(ours, pid)

    def spawn(self) -> tuple[socket.socket, int]:
        """A new worker's (socket, pidfd). Blocks for the time of a fork of a small process (some 1-3 ms).

        Raises OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self._socket, [b"fork"], [theirs.fileno()])
            answer, fds, _, _ = socket.recv_fds(self._socket, 256, 1)
            if not fds:
                raise ChildProcessError(answer.decode() or "the fork server is gone")
        except BaseException:
            ours.close()
            raise
        return ours, fds[0]

    def close(self) -> None:
        """End the server and with it every worker; wait for the server."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _become_server(sock: socket.socket, serve: Serve, keep: set[int]) -> None:
    ignore((*JOB_SIGNALS, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are reaped by the kernel
    if os.geteuid() != 0:
        _drop_capabilities()
    detach(keep)
    gc.collect()
    gc.freeze()
    server = os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(sock, 16, 1)
        if not message:
            os._exit(0)
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, say: this one request fails
            sock.send(str(error).encode())
            os.close(fds[0])
            continue
        if pid == 0:
            try:
                end_with_parent(server, signal.SIGKILL)
                sock.close()
                serve(socket.socket(fileno=fds[0]))
            finally:
                os._exit(0)
        os.close(fds[0])
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # gone already
            sock.send(b"the worker died at once")
            continue
        sock.sendmsg([b"ok"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
        os.close(pidfd)


def _drop_capabilities() -> None:
    """In a user namespace of its own a daemon may mount, and read what its user has closed to himself. Workers may not.

    capset(2); without effect where there are none.
    """
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(2 * 3 * 4)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def ignore(signals: Iterable[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(parent: int, number: int) -> None:
    """Have the kernel send this process the signal `number` when its parent, process `parent`, ends (or now)."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def detach(keep: set[int]) -> None:
    """Make this process one of the background: a session of its own, in the root directory, with no other descriptors
    than those to `keep`."""
    os.setsid()
    os.chdir("/")
    drop_descriptors(keep)


def drop_descriptors(keep: set[int]) -> None:
    """Connect the standard streams to the null device, and close every other descriptor but those to `keep`."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                continue  # the descriptor of the listing itself
