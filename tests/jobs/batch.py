"""What the tests of batch systems share: a dataset that its readers do not own, their reports, and what a job left."""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cachefs.mount.mountinfo import FSTYPE
from tests.commands.places import User, can_run_this, ordinary_user
from tests.harness import clean_environment, detach, mount_lines, mounts_below, wait_until
from tests.jobs.read_all import digest

READER = Path(__file__).with_name("read_all.py")
PYTHON = sys.executable
COMMAND = Path(sysconfig.get_path("scripts"), "cachefs")
PATH = f"{COMMAND.parent}:/usr/bin:/bin"
"""The PATH of a user who has activated the environment of cachefs."""
FILES = 200
OWN_MOUNTS = (
    *("unshare", "--mount", "--propagation", "private", "bash", "-c"),
    """
    while read -r _ _ _ _ path _; do printf -v path %b "$path"; umount -l "$path"; done \\
        < <(grep ' - fuse.cachefs ' /proc/self/mountinfo)
    mount --make-rshared /
    exec "$@"
    """,
    "own-mounts",
)
"""Before a command: it and what it starts have mounts of their own, as a machine has them.

Else a mount would last as long as any namespace that another test makes while it is there: unmounting does not get
there where the root is not a shared mount, as it is on machines that systemd boots.
"""


class Dataset:
    """Files of root, which others may only read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        numbers = random.Random(6)
        for number in range(FILES):
            file = path / f"class{number % 8}" / f"{number}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(numbers.randbytes(numbers.randrange(20_000)))
        self.digest = digest(path)


class Report:
    """What a reader said: its file is written by read_all.py."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wait = path.with_name(f"{path.name}.wait")

    def hold(self) -> None:
        """Have the reader wait after its first pass."""
        self._wait.touch()

    def go_on(self) -> None:
        self._wait.unlink()

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def passes(self) -> list[dict[str, object]]:
        return [line for line in self.lines() if "digest" in line]

    def signals(self) -> list[object]:
        return [line["signal"] for line in self.lines() if "signal" in line]

    def wait_for_pass(self) -> dict[str, object]:
        wait_until(self.passes, f"a pass in {self._path}")
        return self.passes()[0]


@contextmanager
def job_user() -> Iterator[User]:
    """The ordinary user of the tests, or one who exists for as long as this lasts. Skips where nobody can be it."""
    user = ordinary_user()
    if user is not None:
        yield user
        return
    if not can_run_this(User("nobody", 65534, 65534)):
        pytest.skip(f"no ordinary user can run {PYTHON}")
    name = f"cachefs-job-{os.getpid()}"  # other test workers make theirs
    subprocess.run(["useradd", "--create-home", name], check=True, capture_output=True)
    try:
        entry = pwd.getpwnam(name)
        yield User(entry.pw_name, entry.pw_uid, entry.pw_gid)
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)


@contextmanager
def lab_folder(prefix: str) -> Iterator[tuple[Path, User]]:
    """A directory for a lab, in which everybody may go about, and the user of its jobs. In the end nothing is left."""
    with job_user() as user:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            folder.chmod(0o755)
            yield folder, user
        finally:
            clear_away(folder)


def changed(script: str, **lines: str) -> str:
    """A script with its lines `NAME=...` changed, as its user would do."""
    for name, value in lines.items():
        script, number = re.subn(rf"^{name}=.*$", lambda _, line=f"{name}={value}": line, script, flags=re.MULTILINE)
        assert number == 1, f"{name}= occurs {number} times"
    return script


def shows_cache(pid: int, folder: Path) -> bool:
    """Whether a process sees a mount of cachefs at `folder`."""
    return any(f" {folder} " in line and f" - {FSTYPE} " in line for line in mount_lines(pid))


def status_in(pid: int, mountpoint: Path) -> dict[str, object]:
    """`cachefs status` of a mount that root has made where process `pid` is."""
    command = ["nsenter", "--target", str(pid), "--mount", COMMAND, "status", mountpoint, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=clean_environment()).stdout)


def wait_for_nothing(left: Callable[[], list[object]]) -> list[object]:
    """What is left after a moment: a namespace that another test made may have a copy of a mount until it ends."""
    try:
        wait_until(lambda: not left(), "nothing is left", seconds=10)
    except AssertionError:
        return left()
    return []


def clear_what_is_left(left: Callable[[], list[object]]) -> list[object]:
    """The same, and what is left of files is removed, so that the next test does not find it."""
    found = wait_for_nothing(left)
    for path in (path for path in found if isinstance(path, Path)):
        shutil.rmtree(path, ignore_errors=True)
    return found


def call(command: object, *arguments: object, env: dict[str, str], cwd: Path, user: User | None = None) -> str:
    """Run a command of a batch system, as root or as `user`; what it printed."""
    done = subprocess.run(
        [command, *map(str, arguments)],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **(user.identity if user else {}),
    )
    assert done.returncode == 0, f"{command} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def node_settings(sources: Path, scratch: Path, state: Path) -> str:
    """What an administrator gives sge/node-mounts."""
    return f"SOURCES={sources}\nSCRATCH={scratch}\nSTATE={state}\nCACHEFS={COMMAND}\n"


def daemon_of(scratch: Path) -> psutil.Process:
    """The process that serves the only mount with this scratch."""
    (lease,) = [path for path in (scratch / "leases").iterdir() if not path.name.startswith("new-")]
    return psutil.Process(json.loads(lease.read_text())["pid"])


def processes_below(folder: Path) -> list[psutil.Process]:
    """The processes of cachefs that were told of `folder`, in their arguments or their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if not any(Path(word).name in ("cachefs", "node-mounts") for word in line):
            continue
        try:
            told = [*line, *process.environ().values()]
        except psutil.Error:
            continue  # it has ended
        if any(str(folder) in word for word in told):
            found.append(process)
    return found


def entries_of(*folders: Path) -> list[Path]:
    """What is in these directories, as far as they exist."""
    return [path for folder in folders if folder.exists() for path in sorted(folder.iterdir())]


def clear_away(folder: Path) -> None:
    """Remove a lab's directory, with whatever a test that failed has left in it."""
    end_processes(processes_below(folder))
    for path in reversed(mounts_below(folder)):
        detach(path)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """Ports of TCP that nobody listens at."""
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end_processes(processes: list[psutil.Process]) -> None:
    """SIGKILL for these and all that they have started."""
    everything = {}
    for process in processes:
        try:
            everything.update({each.pid: each for each in [process, *process.children(recursive=True)]})
        except psutil.NoSuchProcess:
            continue
    for process in everything.values():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everything.values(), timeout=10)
