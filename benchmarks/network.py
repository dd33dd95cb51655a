"""A real network file system on one machine: sshfs over an sshd in a network namespace, behind a slow link.

The link's bandwidth is limited by the kernel (tbf), its latency by a proxy, because not every kernel can delay (netem).

Invariant: when the block ends, however it does, there is no mount, no process, no namespace and no file of it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.contenders import ROOT, START_SECONDS, BenchmarkError, detach_below
from cachefs.mount.mountinfo import find_mount

SSHD = "/usr/sbin/sshd"
PRIVILEGES = Path("/run/sshd")
"""Where sshd separates privileges; a service that was never started has not made it."""
RATE, ONE_WAY_MS = "1gbit", 10.0
_PORT = 2222


def missing_sshfs() -> str | None:
    """What it lacks on this machine, and how to get it."""
    if os.geteuid() != 0:
        return "sshfs over a link of its own needs root"
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"
    programs = [name for name in ("sshfs", "ssh-keygen", "ip", "tc") if shutil.which(name, path=path) is None]
    programs += [] if os.path.exists(SSHD) else ["sshd"]
    if programs:
        return f"{', '.join(programs)} is not installed: apt-get install sshfs openssh-server iproute2"
    return None


@contextmanager
def sshfs(export: Path, folder: Path, *, rate: str = RATE, one_way_ms: float = ONE_WAY_MS) -> Iterator[Path]:
    """Serve `export` and mount it in `folder`, which is empty. Raises BenchmarkError if that cannot be had."""
    name = f"cachefs{os.getpid() % 100_000}"
    server, client = (f"10.77.{os.getpid() % 250}.{host}" for host in (2, 1))
    mountpoint = folder / "mount"
    mountpoint.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder / "keys", ignore_errors=True)
        _make_keys(folder / "keys")
        if not PRIVILEGES.exists():
            PRIVILEGES.mkdir()
            stack.callback(PRIVILEGES.rmdir)
        stack.callback(_run, ["ip", "netns", "del", name], check=False)
        _make_link(name, server, client, rate)
        in_there = ["ip", "netns", "exec", name]
        _start(stack, [*in_there, SSHD, "-D", "-e", "-f", _configure_server(folder / "keys", server)], folder)
        _wait_for(lambda: _answers(server, _PORT), "sshd answers")
        port = _free_port()
        _start(stack, [sys.executable, "-m", "benchmarks.delay_proxy", port, server, _PORT, one_way_ms], folder)
        _wait_for(lambda: _answers("127.0.0.1", port), "the proxy answers")
        stack.callback(detach_below, folder)
        options = f"IdentityFile={folder}/keys/id,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,LogLevel=ERROR"
        command = ["sshfs", "-f", "-p", port, f"root@127.0.0.1:{export}", mountpoint, "-o", f"{options},ro,allow_other"]
        _start(stack, command, folder)
        _wait_for(lambda: find_mount(mountpoint) is not None, "sshfs is mounted")
        yield mountpoint


def _make_keys(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for key in "hostkey", "id":
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key])


def _configure_server(keys: Path, address: str) -> Path:
    path = keys / "sshd.conf"
    lines = [
        f"ListenAddress {address}:{_PORT}",
        f"HostKey {keys}/hostkey",
        f"AuthorizedKeysFile {keys}/id.pub",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "Subsystem sftp internal-sftp",
        "UseDNS no",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _make_link(name: str, server: str, client: str, rate: str) -> None:
    here, there = f"{name}a", f"{name}b"
    _run(["ip", "netns", "add", name])
    _run(["ip", "link", "add", here, "type", "veth", "peer", "name", there])
    _run(["ip", "link", "set", there, "netns", name])
    _run(["ip", "addr", "add", f"{client}/30", "dev", here])
    _run(["ip", "-n", name, "addr", "add", f"{server}/30", "dev", there])
    for command in (["link", "set", here, "up"], ["-n", name, "link", "set", there, "up"]):
        _run(["ip", *command])
    _run(["ip", "-n", name, "link", "set", "lo", "up"])
    # a burst below one offloaded packet (64 KiB) would let nothing pass
    limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
    _run(["tc", "qdisc", "add", "dev", here, *limit])
    _run(["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", there, *limit])


def _run(command: Sequence[object], *, check: bool = True) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise BenchmarkError(f"{' '.join(words)} failed: {done.stderr.strip()}")


def _start(stack: ExitStack, command: Sequence[object], folder: Path) -> None:
    """A process that ends with the block."""
    words = [str(word) for word in command]
    with open(folder / f"{Path(words[0]).name}.log", "ab") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
    stack.callback(process.wait)
    stack.callback(process.terminate)


def _wait_for(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {START_SECONDS:g} s: {what}")
        time.sleep(0.05)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
