"""On a terminal: its keys, its size, its foreground; a shell's job control works as without us."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.harness import wait_until
from tests.run.running import SECONDS, Command, JobPlace

CTRL_C, CTRL_BACKSLASH, CTRL_Z, CTRL_D = b"\x03", b"\x1c", b"\x1a", b"\x04"


class Terminal:
    """A terminal that somebody types at; what is shown is kept in `shown` as far as it was looked at."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.shown = b""
        os.set_blocking(descriptor, False)

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def shows(self, text: bytes) -> bool:
        try:
            self.shown += os.read(self._descriptor, 1 << 16)
        except OSError:  # nothing new, or nobody writes there any more
            pass
        return text in self.shown

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextmanager
def on_terminal(place: JobPlace, line: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """Run a command as the leader of a session with a terminal of its own."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        line, stdin=theirs, stdout=theirs, stderr=theirs, cwd=place.path, env=place.environ({"PS1": "$ "}),
        preexec_fn=take_terminal, **place.user.identity,
    )  # fmt: skip
    place.processes_made.append(process)
    os.close(theirs)
    try:
        yield process, Terminal(ours)
    finally:
        os.close(ours)


@contextmanager
def job_on_terminal(place: JobPlace) -> Iterator[tuple[subprocess.Popen[bytes], Terminal, Command]]:
    stage = place.stage()
    with on_terminal(place, [*place.line(), *stage.command]) as (process, terminal):
        yield process, terminal, stage.join(process)


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize(("key", "name"), [(CTRL_C, "SIGINT"), (CTRL_BACKSLASH, "SIGQUIT")])
def test_a_key_reaches_the_command_once(place: JobPlace, key: bytes, name: str):
    with job_on_terminal(place) as (process, terminal, command):
        command.catch(signal.Signals[name])
        terminal.type(key)
        command.got_exactly(name)
        terminal.type(key)
        command.got_exactly(name, name)
        command.exit(4)
        wait_until(lambda: terminal.shows(b"from the source"), "the summary is shown")
        assert process.wait(SECONDS) == 4
    place.wait_for_the_end()


def test_ctrl_c_ends_a_command_that_does_not_catch_it(own_place: JobPlace):
    line = [*own_place.line(), "sh", "-c", "echo ready; read line; echo not here"]
    with on_terminal(own_place, line) as (process, terminal):
        wait_until(lambda: terminal.shows(b"ready"), "the command runs")
        terminal.type(CTRL_C)
        assert process.wait(SECONDS) == 128 + signal.SIGINT
        wait_until(lambda: terminal.shows(b"from the source"), "the summary is shown")
        assert b"Traceback" not in terminal.shown
        assert b"Aborted" not in terminal.shown
        assert b"not here" not in terminal.shown
    own_place.wait_for_the_end()


def test_the_terminal_is_the_command_s(place: JobPlace):
    with job_on_terminal(place) as (process, terminal, command):
        assert command.ask("[os.isatty(n) for n in (0, 1, 2)]") == [True] * 3
        assert command.ask("os.tcgetpgrp(0) == os.getpgid(0)")
        terminal.type(b"typed\n")
        assert command.ask("sys.stdin.readline()") == "typed\n"
        command.ask("os.write(1, b'written')")
        wait_until(lambda: terminal.shows(b"written"), "it is shown")
        command.catch(signal.SIGWINCH)
        terminal.resize(33, 77)
        command.got_exactly("SIGWINCH")
        assert command.ask("list(os.get_terminal_size(0))") == [77, 33]
        command.exit()
        assert process.wait(SECONDS) == 0


def test_the_end_of_input(own_place: JobPlace):
    with on_terminal(own_place, [*own_place.line(), "cat"]) as (process, terminal):
        terminal.type(b"a line\n" + CTRL_D)
        assert process.wait(SECONDS) == 0
        wait_until(lambda: terminal.shows(b"a line\r\na line\r\n"), "cat has written it")


def test_a_terminal_that_is_closed(own_place: JobPlace):
    """The kernel hangs up the leader of the session, which is run, and the foreground group: it is heard of once."""
    stage = own_place.stage()
    with on_terminal(own_place, [*own_place.line(), *stage.command]) as (process, _):
        command = stage.join(process)
        command.catch(signal.SIGHUP)
    command.got_exactly("SIGHUP")
    command.exit(6)
    assert process.wait(SECONDS) == 6
    own_place.wait_for_the_end()


@contextmanager
def job_in_shell(place: JobPlace) -> Iterator[tuple[subprocess.Popen[bytes], Terminal, Command, int]]:
    """A job that somebody starts in an interactive shell; the last is the pid of its run."""
    stage = place.stage()
    with on_terminal(place, ["bash", "--norc", "--noprofile", "-i"]) as (shell, terminal):
        terminal.type(shlex.join([*place.line(), *stage.command]).encode() + b"\n")
        command = stage.join(shell)
        yield shell, terminal, command, psutil.Process(command.pid).ppid()


def wait_for_stop(terminal: Terminal, command: Command, run: int, times: int) -> None:
    """Until command and run are stopped, and the shell has said so so often."""
    wait_until(lambda: is_stopped(run) and is_stopped(command.pid), "both are stopped")
    wait_until(lambda: terminal.shows(b"Stopped") and terminal.shown.count(b"Stopped") >= times, "the shell says so")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_job_control_of_a_shell(place: JobPlace):
    """Ctrl-Z, bg and fg, as often as one likes; Ctrl-C in the end."""
    with job_in_shell(place) as (shell, terminal, command, run):
        command.catch(signal.SIGINT, signal.SIGCONT)
        for turn in 1, 2, 3:
            terminal.type(CTRL_Z)
            wait_for_stop(terminal, command, run, turn)
            terminal.type(b"fg\n")
            wait_until(lambda: not is_stopped(run) and not is_stopped(command.pid), "both go on")
            command.got_exactly(*["SIGCONT"] * turn)
        assert command.read(place.source / "one") == b"1" * 1000
        terminal.type(CTRL_C)
        command.got_exactly("SIGCONT", "SIGCONT", "SIGCONT", "SIGINT")
        command.exit(5)
        wait_until(lambda: not psutil.pid_exists(run), "run ends")
        terminal.type(b"echo status $?; exit\n")
        wait_until(lambda: terminal.shows(b"status 5\r\n"), "the shell has its status")
        assert shell.wait(SECONDS) == 0
    place.wait_for_the_end()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_command_that_suspends_itself_in_a_shell(own_place: JobPlace):
    """As editors do on Ctrl-Z."""
    with job_in_shell(own_place) as (shell, terminal, command, run):
        for number in signal.SIGSTOP, signal.SIGTSTP:
            shown = terminal.shown.count(b"Stopped")
            command.say(f"os.kill(os.getpid(), {int(number)})")
            wait_for_stop(terminal, command, run, shown + 1)
            terminal.type(b"fg\n")
            command.hear()
            wait_until(lambda: not is_stopped(run), "run goes on")
        command.exit()
        wait_until(lambda: not psutil.pid_exists(run), "run ends")
        terminal.type(b"exit\n")
        assert shell.wait(SECONDS) == 0
    own_place.wait_for_the_end()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_in_the_background_of_a_shell(own_place: JobPlace):
    """A command that reads the terminal from the background is stopped, as without us, and goes on in front."""
    with on_terminal(own_place, ["bash", "--norc", "--noprofile", "-i"]) as (shell, terminal):
        line = shlex.join([*own_place.line(), "sh", "-c", "echo ready; read word; echo got-$word"])
        terminal.type(line.encode() + b" &\n")
        wait_until(lambda: terminal.shows(b"ready\r\n"), "the command runs")
        wait_until(lambda: all(is_stopped(child.pid) for child in psutil.Process(shell.pid).children()), "it stops")
        terminal.type(b"fg\n")
        wait_until(lambda: not is_stopped(psutil.Process(shell.pid).children()[0].pid), "it goes on")
        terminal.type(b"word\n")
        wait_until(lambda: terminal.shows(b"got-word\r\n"), "it has read")
        wait_until(lambda: not psutil.Process(shell.pid).children(), "run ends")
        terminal.type(b"exit\n")
        assert shell.wait(SECONDS) == 0
    own_place.wait_for_the_end()
