"""Commands under `cachefs run`: started, told what to do, looked at from outside, and ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.commands.places import Place
from tests.harness import CACHEFS, mounts_everywhere, wait_until

ACTOR = Path(__file__).with_name("actor.py")
SECONDS = 60.0
"""What a machine under load may take for anything; not one test waits that long when all is well."""
_MARK = "TEST_PLACE"
_SETTLED_SECONDS = 0.2


class CommandFailedError(AssertionError):
    """An expression failed in the command."""


class Command:
    """The other end of an actor: a command that does what it is told."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        self._connection = connection
        self._stream = connection.makefile("rwb")
        greeting = self.hear()
        self.pid: int = greeting["pid"]
        self.mounts: list[dict[str, str]] | None = greeting["mounts"]

    def ask(self, expression: str) -> Any:
        """The value of an expression in the command; an OSError there is the same here."""
        self._stream.write(expression.encode() + b"\n")
        self._stream.flush()
        answer = self.hear()
        if "errno" in answer:
            raise OSError(answer["errno"])
        if "problem" in answer:
            raise CommandFailedError(f"{expression}: {answer['problem']}")
        return answer["value"]

    def read(self, path: Path | str) -> bytes:
        return self.ask(f"read({os.fspath(path)!r})").encode("latin1")

    def error_of(self, expression: str) -> str | None:
        """The name of the errno with which an expression fails, None if it does not."""
        try:
            self.ask(expression)
        except OSError as error:
            return str(error)
        return None

    def catch(self, *numbers: int) -> None:
        """Have it count these signals from now on, in `got`."""
        self.ask(f"catch({', '.join(str(int(number)) for number in numbers)})")

    @property
    def got(self) -> list[str]:
        return self.ask("got")

    def got_exactly(self, *names: str) -> None:
        """Wait for signals, and see that none comes twice."""
        wait_until(lambda: len(self.got) >= len(names), f"{names} arrive")
        time.sleep(_SETTLED_SECONDS)
        assert sorted(self.got) == sorted(names)

    def say(self, expression: str) -> None:
        """Have it do something that it cannot answer."""
        with suppress(BrokenPipeError):
            self._stream.write(expression.encode() + b"\n")
            self._stream.flush()

    def exit(self, status: int = 0) -> None:
        self.say(f"sys.exit({status})")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._stream.close()
        self._connection.close()

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        line = self._stream.readline()
        if not line:
            raise EOFError("the command has ended")
        return json.loads(line)


class Stage:
    """Where actors report: `command` is what to run, `join` waits for the next of them."""

    def __init__(self) -> None:
        name = f"cachefs-test-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + name)
        self._listener.listen()
        self._listener.settimeout(0.05)
        self.command = (sys.executable, "-I", "-S", str(ACTOR), name)
        self._commands: list[Command] = []

    def join(self, process: subprocess.Popen[Any] | None = None) -> Command:
        """The next command that starts; fails if `process`, which was to start it, has ended before."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self._commands.append(Command(connection))
                return self._commands[-1]
            assert process is None or process.poll() is None, f"it ended with {process.returncode} before its command"
        raise AssertionError("no command starts")

    def close(self) -> None:
        self._listener.close()
        for command in self._commands:
            command.close()


class Job:
    """One `cachefs run` with an actor as its command, which has started."""

    def __init__(self, process: subprocess.Popen[Any], errors: Any, stage: Stage) -> None:
        self.process = process
        self._errors = errors
        self._stage = stage
        try:
            self.command = stage.join(process)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.stderr}") from None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="surrogateescape")

    def wait(self) -> int:
        """Wait for the end of run; its exit status, negative for a signal."""
        return self.process.wait(SECONDS)

    def end(self, status: int = 0) -> str:
        """Have the command exit, and see run exit likewise; what run said."""
        self.command.exit(status)
        assert self.wait() == status, self.stderr
        return self.stderr

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)


def kill_together(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for all of them, while none can see another one die."""
    processes = list(processes)
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()


@dataclass
class JobPlace(Place):
    """Directories and jobs of one test. Whatever it starts carries a mark in its environment, and is found by that."""

    stages: list[Stage] = field(default_factory=list)
    files: list[Any] = field(default_factory=list)
    processes_made: list[subprocess.Popen[Any]] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment[_MARK] = str(self.path)

    def line(self, *options: object, data: object = None) -> list[str]:
        """The command line of a run with our scratch, but for the command: `--` is its end."""
        sources = data if isinstance(data, list | tuple) else [self.source if data is None else data]
        named = [word for source in sources for word in ("--data", str(source))]
        scratch = [] if "--scratch" in options else ["--scratch", str(self.scratch)]
        return [*CACHEFS, "run", *named, *scratch, *map(str, options), "--"]

    def cached(self, *command: object, options: tuple[object, ...] = (), data: object = None, **keywords: Any):
        """Run a command with its data cached until it ends; the caller looks at how."""
        keywords.setdefault("cwd", self.path)
        keywords["env"] = self.environ(keywords.get("env"))
        keywords.setdefault("text", True)
        line = [*keywords.pop("before", ()), *self.line(*options, data=data), *map(str, command)]
        if "stdout" not in keywords and "stderr" not in keywords:
            keywords["capture_output"] = True
        return subprocess.run(line, check=False, timeout=SECONDS, **{**self.user.identity, **keywords})

    def cached_by_shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line of the shell to its end."""
        command = ["sh", "-c", line]
        keywords = {"cwd": self.path, "env": self.environ(), "capture_output": True, "text": True}
        return subprocess.run(command, check=False, timeout=SECONDS, **keywords, **self.user.identity)

    def job(self, *options: object, data: object = None, stage: Stage | None = None, **keywords: Any) -> Job:
        """Start a run whose command does what it is told, and wait until that has started."""
        stage = stage or self.stage()
        process, errors = self.launch(*options, data=data, command=stage.command, **keywords)
        return Job(process, errors, stage)

    def launch(
        self,
        *options: object,
        command: tuple[object, ...],
        data: object = None,
        before: tuple[str, ...] = (),
        **keywords: Any,
    ) -> tuple[subprocess.Popen[Any], Any]:
        """Start a run and wait for nothing; the process, and the file that its stderr goes to."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.files.append(errors)
        keywords.setdefault("cwd", self.path)
        keywords.setdefault("stdin", subprocess.DEVNULL)
        keywords.setdefault("stderr", errors)
        keywords["env"] = self.environ(keywords.get("env"))
        line = [*before, *self.line(*options, data=data), *map(str, command)]
        process = subprocess.Popen(line, **{**self.user.identity, **keywords})
        self.processes_made.append(process)
        return process, errors

    def machine(self, setup: str) -> Machine:
        """Root's, made by a shell script."""
        self.machines.append(Machine(self, setup))
        return self.machines[-1]

    def stage(self) -> Stage:
        self.stages.append(Stage())
        return self.stages[-1]

    def marked(self) -> list[psutil.Process]:
        """The processes that live and were started, at whatever remove, by this test."""
        mark = f"{_MARK}={self.path}".encode()
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
        return found

    def daemons(self, scratch: Path | None = None) -> list[psutil.Process]:
        """The daemons of the mounts that use scratch, as the leases name them."""
        leases = (scratch or self.scratch) / "leases"
        with suppress(FileNotFoundError):
            pids = [
                json.loads(lease.read_text())["pid"] for lease in leases.iterdir() if not lease.name.startswith("new-")
            ]
            return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        return []

    def daemon(self, scratch: Path | None = None) -> psutil.Process:
        """The only daemon there is."""
        (daemon,) = self.daemons(scratch)
        return daemon

    def keeper(self) -> psutil.Process:
        """The keeper of the only daemon there is."""
        keeper = self.daemon().parent()
        assert keeper is not None
        assert os.getsid(keeper.pid) == keeper.pid
        return keeper

    def wait_for_the_end(self) -> None:
        """Nothing of ours may run any more, and nothing be mounted, wherever."""
        wait_until(lambda: not self.marked(), "the processes of the test end", SECONDS)
        wait_until(lambda: not mounts_everywhere(self.path), "its mounts go with the last process", SECONDS)

    def close(self) -> None:
        """Whatever happened: leave no process and no mount; fail if the test has left some."""
        for stage in self.stages:
            stage.close()
        try:
            wait_until(lambda: not self.marked(), "the processes of the test end")
        finally:
            left = self.marked()
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for process in self.processes_made:
                process.wait()
            for machine in self.machines:
                machine.close()
            for file in self.files:
                file.close()
            assert not left, f"left behind: {left}"


def assert_no_mounts(folder: Path) -> None:
    left = mounts_everywhere(folder)
    assert not left, left


def guarded(place: Place) -> Iterator[JobPlace]:
    """A place for jobs, for a fixture; at its end nothing may be left of them."""
    jobs = JobPlace(place.user, place.path, place.environment)
    try:
        yield jobs
    finally:
        jobs.close()
    assert_no_mounts(place.path)


def warnings_of(errors: str) -> list[str]:
    """The lines of stderr that are not the summary at the end."""
    return [line for line in errors.splitlines() if " from the source, " not in line]


def namespace_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


class Machine:
    """A mount namespace of root's in which things are mounted and unmounted while jobs run inside."""

    def __init__(self, place: JobPlace, setup: str) -> None:
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{setup} && echo ready && exec cat"]
        self._place = place
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._enter = ["nsenter", "--mount", "--target", str(self._process.pid)]
        assert self._process.stdout.readline() == "ready\n", "the setup has failed"

    def job(self, *options: object) -> Job:
        """A job of the place's user there."""
        before = (*self._enter, *self._place.user.become)
        return self._place.job(*options, before=before, user=0, group=0)

    def do(self, script: str) -> None:
        """Have root's shell do something there."""
        subprocess.run([*self._enter, "sh", "-c", script], check=True, capture_output=True)

    def close(self) -> None:
        self._process.communicate()
