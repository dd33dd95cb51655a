"""A command run as if we were not there: its signals, streams, terminal, limits and environment are its own.

Invariants:
- The command is a child in the same process group and session, so job control and group signals work as before.
- A signal reaches it once. One that was sent to all of the group, or of the job, has reached it already; one that was
  sent to us alone is passed on. A sentinel tells the two apart: a child of ours that blocks all those signals, so that
  what is pending there was sent to more than us.
- If we are killed, so is the command: whoever kills `cachefs run` means it.
- Signals that were ignored when we started (nohup) stay ignored, in us and in it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from cachefs.errors import CachefsError, describe
from cachefs.workers.fork_server import drop_descriptors, end_with_parent

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGALRM,
    signal.SIGWINCH,
    signal.SIGCONT,
)
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)
"""Ignored by the interpreter for itself; a program that inherited that would not end with its pipe."""
_ALL_HAVE_IT_SECONDS = 0.1
"""A group's signal reaches its members within microseconds, one sent to each process of a job within this, on a busy
machine too. Who sends one to us alone waits so long for it."""
_ANSWER_MILLISECONDS = 1000
NOT_FOUND, NOT_EXECUTABLE, KILLED = 127, 126, 128
"""Exit statuses as the shell gives them; KILLED plus the number of the signal."""


class CommandError(CachefsError):
    """The command cannot be executed; `exit_code` is what the shell says then."""

    def __init__(self, command: str, error: OSError) -> None:
        is_missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        super().__init__(
            f"the command {command} was not found" if is_missing else f"{command} cannot be run: {describe(error)}",
            "check the spelling, and PATH" if is_missing else None,
        )
        self.exit_code = NOT_FOUND if is_missing else NOT_EXECUTABLE


class _NoProcessError(OSError):
    """There is no room for one more process (RLIMIT_NPROC, say)."""


@dataclass(frozen=True)
class Watched:
    """A descriptor to watch while the command runs, and what to do when it is readable: False to watch it no more."""

    fd: int
    on_readable: Callable[[], bool]


def find_command(command: str, environment: Mapping[str, str]) -> str:
    """The path of the program that `command` means, as execvp(3) looks for it. Raises CommandError."""
    if not command:
        raise CommandError("''", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if "/" in command:
        candidates = [command]
    else:
        candidates = [os.path.join(folder or ".", command) for folder in os.get_exec_path(environment)]
    found: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for candidate in candidates:
        try:
            mode = os.stat(candidate).st_mode
        except OSError as error:
            if "/" in command:
                found = error
            continue  # a folder of PATH that this user may not enter is passed over, as the shell does
        if stat.S_ISDIR(mode):
            found = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif os.access(candidate, os.X_OK, effective_ids=True):
            return candidate
        else:
            found = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    raise CommandError(command, found)


def run_command(command: Sequence[str], environment: Mapping[str, str], watched: Watched | None = None) -> int:
    """Run `command` until it ends; the exit status that a shell would give. Raises CommandError."""
    program = find_command(command[0], environment)
    try:
        with _Signals() as signals:
            pid = _start(program, command, environment, signals)
            return _wait(pid, signals, watched)
    except _NoProcessError:
        return _become(program, command, environment, watched)


class _Signals:
    """What arrives for us, from the start of its context to the end, and to whom else it was sent."""

    def __init__(self) -> None:
        self._caught = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[int, object] = {}
        self._sentinel = 0
        self.is_continued = False
        """Whether SIGCONT was among those that arrived last."""
        self.original_mask: set[int] = set()

    def __enter__(self) -> _Signals:
        self.original_mask = set(
            signal.pthread_sigmask(signal.SIG_BLOCK, self._caught)
        )  # none is lost while we get ready
        self._start_sentinel()
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*self._caught, signal.SIGCHLD):
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._sentinel, signal.SIGKILL)
        os.waitpid(self._sentinel, 0)  # before SIGCHLD may be ignored again: then there is nothing to wait for
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        for fd in self._reading, self._writing, self._question, self._answer:
            os.close(fd)

    def fileno(self) -> int:
        return self._reading

    @property
    def are_children_ignored(self) -> bool:
        """Whether SIGCHLD was ignored when we started, as some parents leave it."""
        return self._before[signal.SIGCHLD] is signal.SIG_IGN

    def unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.original_mask)

    def sent_to_us_alone(self) -> list[int]:
        """The signals that have arrived, but for those that the others of the group have too, and SIGCHLD."""
        arrived = self._arrived()
        self.is_continued = False
        if not arrived - {signal.SIGCHLD}:
            return []
        time.sleep(_ALL_HAVE_IT_SECONDS)
        arrived |= self._arrived()
        self.is_continued = signal.SIGCONT in arrived
        return sorted(arrived - self._sent_to_all() - {signal.SIGCHLD})

    def _arrived(self) -> set[int]:
        with suppress(BlockingIOError):
            return set(os.read(self._reading, 1 << 12))
        return set()

    def _sent_to_all(self) -> set[int]:
        poll = select.poll()
        poll.register(self._answer, select.POLLIN)
        with suppress(BrokenPipeError):
            os.write(self._question, b"?")
            if poll.poll(_ANSWER_MILLISECONDS):
                return set(os.read(self._answer, 1 << 12)) - {0}
        return set()  # it was killed or stopped: better twice than not at all

    def _start_sentinel(self) -> None:
        question, self._question = os.pipe()
        self._answer, answer = os.pipe()
        parent = os.getpid()
        try:
            self._sentinel = os.fork()
        except OSError as error:
            for fd in question, self._question, self._answer, answer:
                os.close(fd)
            self.unblock()
            raise _NoProcessError(*error.args) from error
        if self._sentinel == 0:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
                end_with_parent(parent, signal.SIGKILL)
                drop_descriptors({question, answer})
                while os.read(question, 1):
                    os.write(answer, bytes([0, *_take_pending(self._caught)]))
            finally:
                os._exit(0)
        os.close(question)
        os.close(answer)


def _take_pending(numbers: Sequence[int]) -> list[int]:
    taken = []
    while (information := signal.sigtimedwait(numbers, 0)) is not None:
        taken.append(information.si_signo)
    return taken


def _start(program: str, command: Sequence[str], environment: Mapping[str, str], signals: _Signals) -> int:
    """Fork and execute; the pid. Raises CommandError. Caught signals must be blocked, and are not when it returns."""
    reading, writing = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise _NoProcessError(*error.args) from error
    if pid == 0:
        try:
            end_with_parent(parent, signal.SIGKILL)
            _restore_dispositions()
            if signals.are_children_ignored:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signals.unblock()
            _execute(program, command, environment)
        except OSError as error:
            os.write(writing, str(error.errno or errno.EIO).encode())
        finally:
            os._exit(NOT_EXECUTABLE)
    os.close(writing)
    with open(reading) as pipe:
        failure = pipe.read()
    signals.unblock()
    if failure:
        os.waitpid(pid, 0)
        raise CommandError(command[0], OSError(int(failure), os.strerror(int(failure))))
    return pid


def _become(program: str, command: Sequence[str], environment: Mapping[str, str], watched: Watched | None) -> NoReturn:
    """Execute the command in this very process, as it would be without us. What is watched stays open until its end."""
    if watched is not None:
        os.set_inheritable(watched.fd, True)
    _restore_dispositions()
    try:
        _execute(program, command, environment)
    except OSError as error:
        raise CommandError(command[0], error) from None


def _restore_dispositions() -> None:
    """What the interpreter and we changed of the signals, as it was; execve(2) sees to those that are handled."""
    for number in (*FORWARDED, signal.SIGCHLD, *_PYTHON_IGNORES):
        if number in _PYTHON_IGNORES or callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _execute(program: str, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become the program; a script without an interpreter's line is the shell's, as in execvp(3). Raises OSError."""
    try:
        os.execve(program, list(command), environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        os.execve("/bin/sh", ["sh", program, *command[1:]], environment)


def _wait(pid: int, signals: _Signals, watched: Watched | None) -> int:
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    if watched is not None:
        poll.register(watched.fd, select.POLLIN)
    options = os.WNOHANG | (os.WUNTRACED if _has_terminal() else 0)
    while True:
        ended, status = os.waitpid(pid, options)
        if ended and os.WIFSTOPPED(status):
            _stop_with(pid, signals)
            continue
        if ended:
            return KILLED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        happened = {fd for fd, _ in poll.poll()}
        if signals.fileno() in happened:
            _pass_on(pid, signals)
        if watched is not None and watched.fd in happened and not watched.on_readable():
            poll.unregister(watched.fd)
            watched = None


def _has_terminal() -> bool:
    """Whether this session has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _pass_on(pid: int, signals: _Signals) -> None:
    for number in signals.sent_to_us_alone():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop_with(pid: int, signals: _Signals) -> None:
    """The command has stopped: so do we, that our shell sees it, until SIGCONT, which is passed on like the others.

    Only on a terminal, where somebody is who can continue us: a batch system that stops and continues the processes of
    a job one by one, at whatever pace, must not leave us stopped for ever. Nor if both were stopped and continued, and
    we hear of the stop only now: nobody would continue us again.
    """
    time.sleep(_ALL_HAVE_IT_SECONDS)
    _pass_on(pid, signals)
    has_gone_on = os.waitid(os.P_PID, pid, os.WCONTINUED | os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    if not signals.is_continued and not has_gone_on:
        os.kill(os.getpid(), signal.SIGSTOP)
