"""A real Grid Engine on this machine: with a root, ports and queues of its own, and gone with its last file.

Its daemons and its jobs get none of this process's environment, and mounts of their own.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.commands.places import User
from tests.harness import wait_until
from tests.jobs.batch import OWN_MOUNTS, PATH, Report, call, clear_away, end_processes, free_ports

BINARIES = Path("/usr/lib/gridengine")
_START = Path(__file__).with_name("sge-up.sh")
_START_SECONDS = 60
_END_SECONDS = 90.0  # a busy machine takes long for prolog, job and epilog
_ENVIRONMENT = {"PATH": f"{BINARIES}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def why_not() -> str | None:
    """Why this machine cannot have a Grid Engine, if it cannot."""
    if os.geteuid() != 0:
        return "needs root"
    for name in ("sge_qmaster", "sge_execd", "qsub"):
        if not (BINARIES / name).exists():
            return f"Grid Engine is not installed: there is no {BINARIES / name}"
    return None


@dataclass(frozen=True)
class Ended:
    """What Grid Engine's accounting says of a task: `failed` is a code of sge_status(5)."""

    failed: int
    exit_status: int


@dataclass(frozen=True)
class Job:
    """A submitted job. `folder` is its working directory."""

    engine: GridEngine
    id: int
    folder: Path

    def report(self, task: int | None = None) -> Report:
        return self.engine.report(self.folder, task)

    def output(self) -> str:
        """What the job and its prolog and epilog wrote; of an array, all tasks."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("output*")))

    def temporary_directory(self, task: int = 1) -> Path:
        """Its $TMPDIR."""
        (path,) = self.engine.temporary.glob(f"{self.id}.{task}.*")
        return path

    def delete(self) -> None:
        """qdel, by its user."""
        self.engine.run("qdel", self.id, user=self.engine.user)

    def wait(self, task: int = 1) -> Ended:
        """Wait until it is in the accounting, which is after the epilog."""
        found: list[Ended] = []

        def is_there() -> bool:
            found[:] = self._accounting(task)
            return bool(found)

        wait_until(is_there, f"the end of job {self.id}", _END_SECONDS)
        wait_until(lambda: not list(self.engine.temporary.glob(f"{self.id}.{task}.*")), "its $TMPDIR is removed")
        return found[-1]

    def _accounting(self, task: int) -> list[Ended]:
        """Its line in the accounting file, when that is there."""
        try:
            lines = (self.engine.root / "default/common/accounting").read_text().splitlines()
        except FileNotFoundError:
            return []
        records = [line.split(":") for line in lines if not line.startswith("#")]
        mine = [r for r in records if r[5] == str(self.id) and (r[35] == str(task) or (task == 1 and r[35] == "0"))]
        return [Ended(int(r[11]), int(r[12])) for r in mine]


class GridEngine:
    """A qmaster and an execd. `folder` is an existing directory in which `user` may go about."""

    def __init__(self, folder: Path, user: User) -> None:
        self.folder = folder
        self.user = user
        self.root = folder / "sge"
        self.temporary = folder / "tmp"
        self._jobs = folder / "jobs"
        self._daemons: list[psutil.Process] = []
        self.temporary.mkdir()
        self.temporary.chmod(0o1777)
        self._jobs.mkdir()
        ports = [str(port) for port in free_ports(2)]
        try:
            subprocess.run(
                [*OWN_MOUNTS, _START, self.root, *ports],
                env=_ENVIRONMENT,
                check=True,
                timeout=_START_SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._environment = {**_ENVIRONMENT, **_read_environment(self.root / "env.sh")}
            self._daemons = self._find_daemons()
        except BaseException:
            self.end()
            raise

    def run(self, command: str, *arguments: object, user: User | None = None, cwd: Path | None = None) -> str:
        """One of Grid Engine's commands, as root or as `user`; what it printed."""
        return call(BINARIES / command, *arguments, env=self._environment, cwd=cwd or self.folder, user=user)

    def add_complex(self, line: str) -> None:
        """A resource that jobs can request, as a line of complex(5)."""
        self._load("-Mc", f"{self.run('qconf', '-sc')}\n{line}\n")

    def add_queue(self, name: str, **attributes: object) -> None:
        """A queue with four slots, and attributes of queue_conf(5)."""
        values = {
            "qname": name,
            "hostlist": "@allhosts",
            "slots": 4,
            "pe_list": "NONE",
            "shell": "/bin/bash",
            "shell_start_mode": "unix_behavior",
            "load_thresholds": "NONE",
            "notify": "00:00:02",
            "tmpdir": self.temporary,
            **attributes,
        }
        template = self.run("qconf", "-sq")  # without a name: the defaults
        lines = [
            f"{line.split()[0]} {values.get(line.split()[0], line.split(maxsplit=1)[1])}" for line in _joined(template)
        ]
        self._load("-Aq", "\n".join(lines) + "\n")
        wait_until(lambda: self._is_ready(name), f"queue {name} is ready")

    def queue_states(self) -> set[str]:
        """The states of all queue instances: "E" in one is an error, as of a prolog that failed."""
        return {fields[5] for fields in self._queue_lines() if len(fields) > 5}

    def new_folder(self) -> Path:
        """A working directory for one job."""
        folder = self._jobs / str(len(list(self._jobs.iterdir())))
        folder.mkdir()
        os.chown(folder, self.user.uid, self.user.gid)
        return folder

    def report(self, folder: Path, task: int | None = None) -> Report:
        """Where the reader of a job in `folder` says what it read, if its name is report.$SGE_TASK_ID."""
        return Report(folder / f"report.{task or 'undefined'}")

    def submit(self, folder: Path, script: str, queue: str, *options: object) -> Job:
        """qsub a script by the user, in `folder`. Options win over those in the script."""
        path = folder / "job.sh"
        path.write_text(script)
        path.chmod(0o755)
        common = ["-terse", "-cwd", "-N", "job", "-q", queue, "-j", "y", "-o", folder / "output", "-v", f"PATH={PATH}"]
        said = self.run("qsub", *common, *options, path, user=self.user, cwd=folder)
        return Job(self, int(said.split(".")[0]), folder)

    def delete_jobs(self) -> bool:
        """End the jobs that are there; whether there were any."""
        if not self.run("qstat", "-u", "*"):
            return False
        self.run("qdel", "-u", self.user.name)
        wait_until(lambda: not self.run("qstat", "-u", "*"), "all jobs end")
        return True

    def end(self) -> None:
        """End the daemons with all their jobs, and remove everything."""
        end_processes(self._daemons or self._find_daemons())
        clear_away(self.folder)

    @property
    def pid(self) -> int:
        """A process that sees the mounts of this machine."""
        return self._daemons[0].pid

    def _find_daemons(self) -> list[psutil.Process]:
        """qmaster and execd, by the files in which they say who they are."""
        files = [self.root / "spool/qmaster/qmaster.pid", *(self.root / "spool/execd").glob("*/execd.pid")]
        return [psutil.Process(int(path.read_text())) for path in files if path.exists()]

    def _load(self, option: str, text: str) -> None:
        """Give qconf a file."""
        path = self.folder / "qconf"
        path.write_text(text)
        self.run("qconf", option, path)

    def _queue_lines(self) -> list[list[str]]:
        lines = self.run("qstat", "-f").splitlines()
        return [line.split() for line in lines if "@" in line.split(" ")[0]]

    def _is_ready(self, name: str) -> bool:
        return any(f[0].startswith(f"{name}@") and f[3] != "-NA-" and len(f) == 5 for f in self._queue_lines())


def _read_environment(path: Path) -> dict[str, str]:
    return dict(word.split("=", 1) for word in path.read_text().split()[1:])


def _joined(text: str) -> list[str]:
    """The lines of a configuration, those that go on after a backslash made one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if len(line.split()) > 1]
