"""A user and the directories of one test: run commands as that user, and see that a refused one left nothing behind."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cachefs.mount.mountinfo import FSTYPE, find_mount, read_mounts
from tests.harness import CACHEFS, clean_environment, run_cachefs, wait_until


@dataclass(frozen=True)
class User:
    """Someone who types commands."""

    name: str
    uid: int
    gid: int

    @property
    def identity(self) -> dict[str, object]:
        """What makes subprocess run as this user."""
        return {} if self.uid == os.geteuid() else {"user": self.uid, "group": self.gid, "extra_groups": []}

    @property
    def become(self) -> list[str]:
        """What root puts before a command so that it runs as this user."""
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--"]


def current_user() -> User:
    entry = pwd.getpwuid(os.geteuid())
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def ordinary_user() -> User | None:
    """The user named by CACHEFS_TEST_USER (alice), if we are root and it exists and can run this interpreter."""
    try:
        entry = pwd.getpwnam(os.environ.get("CACHEFS_TEST_USER", "alice"))
    except KeyError:
        return None
    user = User(entry.pw_name, entry.pw_uid, entry.pw_gid)
    return user if can_run_this(user) else None


def can_run_this(user: User) -> bool:
    """Whether it can run this interpreter, which another one's home may hide, and finds cachefs.

    setpriv could not tell: it has root's capabilities until it has found the program.
    """
    command = [sys.executable, "-c", "import cachefs"]
    try:
        return not subprocess.run(command, cwd="/", capture_output=True, check=False, **user.identity).returncode
    except PermissionError:
        return False


PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
"""Before a script of a shell: what it mounts and unmounts is seen by what it starts alone."""


@dataclass
class Place:
    """Directories of one test, owned by its user. `scratch` does not exist yet; `source` has files."""

    user: User
    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        return self.path / "source"

    @property
    def mountpoint(self) -> Path:
        return self.path / "mountpoint"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def on_own_mounts(self, setup: str) -> list[str]:
        """What root puts before a command that runs as the user, on mounts of its own, on which root's shell has done
        `setup` first."""
        script = f'{setup} || exit 99; exec {" ".join(self.user.become)} "$@"'
        return [*PRIVATE_MOUNTS, script, "sh"]

    def run_with_namespaces_limited(
        self, *command: object, limit: int = 0, unshare: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the user in a user namespace of root's, in which not more than `limit` can be made."""
        line = shlex.join([*self.user.become, *map(str, command)])
        script = f"echo {limit} > /proc/sys/user/max_user_namespaces && exec {line}"
        process = subprocess.Popen(
            ["unshare", "--user", *unshare, "sh", "-c", 'read _ && exec sh -c "$1"', "sh", script],
            cwd=self.path, env=self.environ(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        # root there is powerless until it executes something with its ids mapped
        proc = Path("/proc", str(process.pid))
        wait_until(lambda: os.readlink(proc / "ns/user") != os.readlink("/proc/self/ns/user"), "it has its namespace")
        for name in "uid_map", "gid_map":
            (proc / name).write_text("0 0 65536")
        said, errors = process.communicate("go\n", timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, said, errors)

    def make(self, *names: str, mode: int = 0o755) -> Path:
        """A directory of the user."""
        path = self.path
        for name in names:
            path = path / name
            if not path.exists():
                path.mkdir()
                os.chown(path, self.user.uid, self.user.gid)
        path.chmod(mode)
        return path

    def write(self, path: Path, content: str | bytes) -> Path:
        """A file of the user."""
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.chown(path, self.user.uid, self.user.gid)
        return path

    def environ(self, env: dict[str, str] | None = None) -> dict[str, str]:
        """The environment without settings, with a home that holds no configuration."""
        home = {"HOME": str(self.path), "XDG_CONFIG_HOME": str(self.path / "no-configuration")}
        return {**clean_environment(), **home, **self.environment, **(env or {})}

    def run(self, *arguments: object, env: dict[str, str] | None = None, **keywords: object):
        """Run the command line as the user; the caller looks at how it ended."""
        keywords.setdefault("cwd", self.path)
        return run_cachefs(*arguments, check=False, env=self.environ(env), **self.user.identity, **keywords)

    def do(self, *arguments: object, **keywords: object) -> str:
        """Run a command that must work, without a word on stderr; what it printed."""
        done = self.run(*arguments, **keywords)
        assert (done.returncode, done.stderr) == (0, ""), f"cachefs {arguments}: {done.returncode} {done.stderr}"
        return done.stdout

    def start(self, *arguments: object, **keywords: object) -> subprocess.Popen[str]:
        """Start a command and do not wait for it."""
        return subprocess.Popen(
            [*CACHEFS, *map(str, arguments)],
            env=self.environ(),
            cwd=self.path,
            text=True,
            **self.user.identity,
            **keywords,
        )

    def mount(self, *arguments: object, **keywords: object) -> Path:
        """Mount the source (or what the arguments say) with our scratch; where it appears."""
        places = arguments or (self.source,)
        assert self.do("mount", *places, "--scratch", self.scratch, **keywords) == ""
        paths = [argument for argument in places if isinstance(argument, Path)]
        return paths[-1]

    def status(self, mountpoint: Path) -> dict[str, object]:
        return json.loads(self.do("status", "--json", mountpoint))

    def kill_daemon(self, mountpoint: Path) -> None:
        """SIGKILL, and wait until its workers have gone."""
        os.kill(int(self.status(mountpoint)["pid"]), signal.SIGKILL)
        wait_until(lambda: not processes_of(self.path), "the daemon's processes end")

    def read_as_user(self, path: Path) -> bytes:
        """What the user reads there: root may not look into an ordinary user's mount."""
        return subprocess.run(["cat", "--", path], check=True, capture_output=True, **self.user.identity).stdout

    def refused(self, *arguments: object, code: int = 1, says: tuple[str, ...] | str, **keywords: object) -> str:
        """Run a command that must be refused in one clear line and leave everything as it was; the line."""
        before = self.snapshot()
        done = self.run(*arguments, **keywords)
        wait_until(lambda: self.snapshot()["processes"] == before["processes"], "no new process")
        assert done.returncode == code, (done.returncode, done.stderr, done.stdout)
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        if code == 2 and lines[0].startswith("Usage: "):
            assert lines[-1].startswith("Error: "), done.stderr
            assert len(lines) <= 5, done.stderr
        else:
            assert len(lines) == 1, done.stderr
            assert lines[0].startswith("cachefs: "), done.stderr
        for words in (says,) if isinstance(says, str) else says:
            assert words in lines[-1], done.stderr
        assert self.snapshot() == before
        return lines[-1]

    def snapshot(self) -> dict[str, object]:
        """Mounts, processes, and every name with its mode, owner, size and time, but for the scratch of live mounts."""
        mounts = [mount for mount in read_mounts() if self.path in mount.path.parents]
        unsteady = {mount.path for mount in mounts} | {mount.lease[0] for mount in mounts if mount.lease}
        entries = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if Path(folder, name) not in unsteady]
            for name in [*folders, *files]:
                status = Path(folder, name).lstat()
                times = status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0
                entries[Path(folder, name)] = (status.st_mode, status.st_uid, status.st_size * bool(times), times)
        return {
            "mounts": [(mount.path, mount.name) for mount in mounts],
            "entries": entries,
            "processes": processes_of(self.path),
        }


def processes_of(folder: Path) -> set[int]:
    """The processes of cachefs that were told of `folder` or of something in it."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "cachefs" in line and any(str(folder) in word for word in line) and process.pid != os.getpid():
            found.add(process.pid)
    return found


def is_ours(path: Path) -> bool:
    mount = find_mount(path)
    return mount is not None and mount.fstype == FSTYPE
