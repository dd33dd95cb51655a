"""A real Slurm of one node on this machine: with a munge, ports and directories of its own, gone with its last file.

The node has mounts of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.commands.places import User
from tests.harness import wait_until
from tests.jobs.batch import OWN_MOUNTS, PATH, Report, call, clear_away, end_processes, free_ports

_DAEMONS = ("/usr/sbin/munged", "/usr/sbin/slurmctld", "/usr/sbin/slurmd")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_END_SECONDS = 60.0
"""The controller looks every half minute for jobs that are out of time."""
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=slurm
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
KillWait=2
FirstJobId={first_job}
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
Prolog={folder}/prolog
Epilog={folder}/epilog
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why this machine cannot have a Slurm, if it cannot."""
    if os.geteuid() != 0:
        return "needs root"
    for path in (*_DAEMONS, "/usr/bin/sbatch"):
        if not Path(path).exists():
            return f"Slurm is not installed: there is no {path}"
    return None


@dataclass(frozen=True)
class Ended:
    """How Slurm says that a job ended."""

    state: str
    exit_status: int
    signal: int


@dataclass(frozen=True)
class Job:
    """A submitted job. `folder` is its working directory."""

    slurm: Slurm
    id: int
    folder: Path

    def report(self, rank: int = 0) -> Report:
        return Report(self.folder / f"report.{rank}")

    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    def cancel(self, *options: str) -> None:
        """scancel, by its user."""
        self.slurm.run("scancel", *options, self.id, user=self.slurm.user)

    def wait(self) -> Ended:
        """Wait until the epilog has run, too."""
        wait_until(lambda: not self._states() - _ENDED, f"the end of job {self.id}", seconds=_END_SECONDS)
        return self._how()

    def _states(self) -> set[str]:
        return set(self.slurm.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", self.id).split())

    def _how(self) -> Ended:
        said = self.slurm.run("scontrol", "show", "job", self.id)
        status, signal = re.search(r" ExitCode=(\d+):(\d+)", said).groups()
        return Ended(re.search(r"JobState=(\w+)", said)[1], int(status), int(signal))


class Slurm:
    """A controller and a node. `folder` is an existing directory in which `user` may go about."""

    def __init__(self, folder: Path, user: User, prolog: str, epilog: str) -> None:
        self.folder = folder
        self.user = user
        self._environment = {**_ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        self.jobs: list[Job] = []
        for name in ("jobs", "state", "spool", "munge"):
            (folder / name).mkdir()
        for name, text in ("prolog", prolog), ("epilog", epilog):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        try:
            self._start()
        except BaseException:
            self.end()
            raise

    def _start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(2)
        first_job = ports[0] * 100  # the jobs of labs that run at once differ
        configuration = _CONFIGURATION.format(folder=self.folder, host=host, ports=ports, first_job=first_job)
        (self.folder / "slurm.conf").write_text(configuration)
        shutil.chown(self.folder / "state", "slurm")
        pid_file = self.folder / "slurmctld.pid"
        pid_file.touch()
        shutil.chown(pid_file, "slurm")
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self.run("/usr/sbin/munged", "--force", f"--pid-file={self.folder / 'munged.pid'}", *options)
        self.run("/usr/sbin/slurmctld")
        self.run(OWN_MOUNTS[0], *OWN_MOUNTS[1:], "/usr/sbin/slurmd")
        wait_until(lambda: self.node_state() == "idle", "the node is ready")

    def run(self, command: str, *arguments: object, user: User | None = None, cwd: Path | None = None) -> str:
        """One of Slurm's commands, as root or as `user`; what it printed."""
        return call(command, *arguments, env=self._environment, cwd=cwd or self.folder, user=user)

    def node_state(self) -> str:
        """As sinfo has it: "drain" after a prolog or an epilog that failed."""
        return self.run("sinfo", "-h", "-o", "%t").strip()

    def submit(self, script: str, *options: object, held: tuple[int, ...] = ()) -> Job:
        """sbatch a script by the user. `held` are the ranks whose readers wait after the first pass."""
        folder = self.folder / "jobs" / str(len(self.jobs))
        folder.mkdir()
        os.chown(folder, self.user.uid, self.user.gid)
        for rank in held:
            Report(folder / f"report.{rank}").hold()
        path = folder / "job.sh"
        path.write_text(script)
        common = ["--parsable", "--output", folder / "output", f"--export=PATH={PATH}"]
        said = self.run("sbatch", *common, *options, path, user=self.user, cwd=folder)
        self.jobs.append(Job(self, int(said.split(";")[0]), folder))
        return self.jobs[-1]

    def cancel_jobs(self) -> bool:
        """End the jobs that are there; whether there were any."""
        if not self.run("squeue", "-h"):
            return False
        self.run("scancel", "--user", self.user.name)
        wait_until(lambda: not self.run("squeue", "-h"), "all jobs end")
        return True

    @property
    def pid(self) -> int:
        """A process that sees the mounts of the node."""
        return int((self.folder / "slurmd.pid").read_text())

    def end(self) -> None:
        """End the daemons with all their jobs, and remove everything."""
        pids = [path.read_text().strip() for path in self.folder.glob("*.pid")]
        end_processes([psutil.Process(int(pid)) for pid in pids if pid and psutil.pid_exists(int(pid))])
        clear_away(self.folder)
