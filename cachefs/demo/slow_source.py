"""A slow network file system on one machine: a read-only FUSE view of a backing directory whose latency,
bandwidth and faults are set while it runs, and which counts what it was asked, per file.

    with SlowSource(backing, mountpoint, latency=0.02) as source: ...        # or as a process of its own:
    python -m cachefs.demo.slow_source BACKING MOUNTPOINT --latency 0.02 --control SOCKET

What a request costs and how it is counted says `slow_conditions`; this module is the life of the process and
the way to talk to it: JSON lines on a Unix socket, `{"command": COMMAND, ...}` with set, add_fault,
clear_faults, statistics, reset or ping, each answered by one line, `{"error": ...}` if it was refused.

Invariants:

- The process says that it serves only when a request has gone through the mount.
- The mount does not outlive its process, nor the process its `SlowSource`: it ends when its input does.
  Ending detaches the mount, even while requests hang, and whatever lies over it: that cannot work without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import pyfuse3
import trio

from cachefs.demo.slow_conditions import Conditions, Fault
from cachefs.demo.slow_operations import SlowOperations

MODULE = "cachefs.demo.slow_source"
FILE_SYSTEM = "slowsource"
START_SECONDS = 30.0
END_SECONDS = 10.0
ANSWER_SECONDS = 60.0
LAYERS = 16
TASKS_KEPT = 256
TASKS = 100_000


class SlowSourceError(RuntimeError):
    """The slow source did not start, did not answer, refused a command or ended by itself."""


@dataclass(frozen=True)
class FileStatistics:
    lookups: int = 0
    getattrs: int = 0
    opens: int = 0
    reads: int = 0
    bytes_read: int = 0


@dataclass(frozen=True)
class SourceStatistics:
    """What the source saw since its start or the last reset; `operations` also counts those without latency.

    `files` is by path relative to the source, for whatever was asked about, directories included."""

    operations: Mapping[str, int]
    files: Mapping[bytes, FileStatistics]
    bytes_read: int
    cpu_seconds: float

    @property
    def requests(self) -> int:
        return sum(self.operations.values())

    def file(self, path: bytes | str) -> FileStatistics:
        """Of one path relative to the source, all zero if the source was never asked about it."""
        return self.files.get(os.fsencode(path), FileStatistics())


class SlowSource:
    """A slow source in a process of its own, until it is closed. Any thread may use it."""

    def __init__(
        self,
        backing: str | os.PathLike[str],
        mountpoint: str | os.PathLike[str],
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        allow_other: bool = False,
    ) -> None:
        """Return when the mount serves; `latency` in s an operation, `bandwidth` in bytes/s or unlimited."""
        self.path = Path(mountpoint).resolve()
        self._closed = False
        self._earlier = mounted_at(self.path)
        command = [sys.executable, "-m", MODULE, os.path.abspath(backing), str(self.path)]
        command += ["--latency", str(latency), "--end-with-input"]
        command += ["--bandwidth", str(bandwidth)] if bandwidth is not None else []
        command += ["--allow-other"] if allow_other else []
        modules = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._socket = Path(tempfile.gettempdir(), f"slowsource-{secrets.token_hex(8)}")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, "--control", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, modules))},
            start_new_session=True,
        )
        try:
            self._wait_until_serving()
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait_until_serving(self) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        if not ready:
            raise SlowSourceError(f"the slow source on {self.path} does not serve after {START_SECONDS:g} s")
        if not self._process.stdout.readline():
            raise SlowSourceError(f"the slow source on {self.path} did not start: {self._error_output()}")

    def __enter__(self) -> SlowSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set(self, *, latency: float | None = None, bandwidth: float | EllipsisType | None = ...) -> None:
        """For requests that arrive from now on; what is not given stays, a bandwidth of None is unlimited."""
        changes = {} if latency is None else {"latency": latency}
        self._ask("set", **changes, **({} if bandwidth is ... else {"bandwidth": bandwidth}))

    def fail(
        self,
        path: str | bytes = "*",
        op: str = "*",
        errno: str | None = None,
        *,
        hang: bool = False,
        delay: float = 0.0,
        count: int | None = None,
        after_bytes: int = 0,
    ) -> None:
        """Add a fault for operations `op` on paths that match `path`; the first fault that matches applies.

        It answers `errno` (EIO if neither `hang` nor `delay` is given), hangs until `clear_faults`, or takes
        `delay` seconds more; it applies `count` times (None: always), to reads from offset `after_bytes`."""
        if errno is None and not hang and not delay:
            errno = "EIO"
        pattern = os.fsencode(path).decode(errors="surrogateescape")
        rule = {"path": pattern, "op": op, "errno": errno, "hang": hang, "delay": delay}
        self._ask("add_fault", **rule, count=count, after_bytes=after_bytes)

    def clear_faults(self) -> None:
        """Remove all faults; what hangs goes on."""
        self._ask("clear_faults")

    def reset(self) -> None:
        """Count from zero again; faults, latency and bandwidth stay."""
        self._ask("reset")

    def statistics(self) -> SourceStatistics:
        answer = self._ask("statistics")
        files = {
            path.encode(errors="surrogateescape"): FileStatistics(
                lookups=counts.get("lookup", 0),
                getattrs=counts.get("getattr", 0),
                opens=counts.get("open", 0),
                reads=counts.get("read", 0),
                bytes_read=counts.get("bytes", 0),
            )
            for path, counts in answer["files"].items()
        }
        total = sum(file.bytes_read for file in files.values())
        return SourceStatistics(answer["operations"], files, total, answer["cpu_seconds"])

    def close(self) -> None:
        """Unmount and end the process, whatever hangs; SlowSourceError if it had failed by itself."""
        if self._closed:
            return
        failed = (self._process.poll() or 0) > 0
        problem = f"the slow source on {self.path} failed: {self._error_output()}"
        self._end()
        if failed:
            raise SlowSourceError(problem)

    def _end(self) -> None:
        self._closed = True
        with self._process:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._errors.close()
        self._socket.unlink(missing_ok=True)
        detach(self.path, self._earlier)

    def _error_output(self) -> str:
        # Not seek and read: the offset is that of the process, which writes there.
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace").strip() or "it said nothing"

    def _ask(self, command: str, **arguments: object) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.connect(str(self._socket))
                connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
                with connection.makefile("rb") as answers:
                    answer: dict[str, Any] = json.loads(answers.readline())
        except (OSError, ValueError) as error:
            raise SlowSourceError(f"the slow source on {self.path} does not answer: {error}") from error
        if "error" in answer:
            raise SlowSourceError(f"the slow source on {self.path} refuses {command}: {answer['error']}")
        return answer


def mounted_at(mountpoint: Path) -> frozenset[str]:
    """Devices of the slow sources mounted at this resolved path, on top or below; asks no file system."""
    path = os.fsencode(mountpoint)
    for byte in (b"\\", b" ", b"\t", b"\n"):
        path = path.replace(byte, b"\\%03o" % ord(byte))
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    ours = [line.split(b" ") for line in lines if f" - fuse.{FILE_SYSTEM} ".encode() in line]
    return frozenset(fields[2].decode() for fields in ours if fields[4] == path)


def detach(mountpoint: Path, earlier: frozenset[str]) -> None:
    """Detach what lies at `mountpoint`, from the top, until only slow sources that were there earlier are left."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    problem = ""
    for _ in range(LAYERS):
        if mounted_at(mountpoint) <= earlier:
            return
        result = subprocess.run([*command, "--", mountpoint], capture_output=True, text=True, check=False)
        problem = result.stderr.strip()
    raise SlowSourceError(f"cannot detach the slow source from {mountpoint}: {problem}")


# The process.


async def serve(options: argparse.Namespace, mountpoint: Path) -> None:
    mount_options = {f"fsname={FILE_SYSTEM}", f"subtype={FILE_SYSTEM}"}
    mount_options |= {"allow_other"} if options.allow_other else set()
    conditions = Conditions(latency=options.latency, bandwidth=options.bandwidth)
    operations = SlowOperations(options.backing, conditions)
    with (
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
        _control_socket(options.control) as listener,
    ):
        earlier = mounted_at(mountpoint)
        pyfuse3.init(operations, str(mountpoint), mount_options)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_end_after, signals.__anext__, nursery)
                if options.end_with_input:
                    nursery.start_soon(_end_after, trio.lowlevel.FdStream(os.dup(0)).receive_some, nursery)
                nursery.start_soon(_control, listener, conditions, mountpoint)
                await pyfuse3.main(min_tasks=TASKS_KEPT, max_tasks=TASKS)
                nursery.cancel_scope.cancel()
        finally:
            # First the connection, and with it all that hangs: then nothing can wait for us any more.
            pyfuse3.close(unmount=False)
            detach(mountpoint, earlier)


async def _end_after(event: Callable[[], Awaitable[object]], nursery: trio.Nursery) -> None:
    await event()
    nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _control_socket(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        previous = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(previous)
        try:
            yield listener
        finally:
            os.unlink(path)


async def _control(listener: socket.socket, conditions: Conditions, mountpoint: Path) -> None:
    await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
    conditions.reset()
    listener.listen()
    print(json.dumps({"serving": str(mountpoint)}), flush=True)
    commands: dict[str, Callable[..., dict[str, Any] | None]] = {
        "set": conditions.set,
        "add_fault": lambda **rule: conditions.add_fault(Fault(**rule)),
        "clear_faults": conditions.clear_faults,
        "statistics": conditions.statistics,
        "reset": conditions.reset,
        "ping": lambda: None,
    }

    def answer(line: bytes) -> dict[str, Any]:
        try:
            arguments = json.loads(line)
            return commands[arguments.pop("command")](**arguments) or {}
        except KeyError as error:
            return {"error": f"no such command: {error}"}
        except (ValueError, TypeError, AttributeError) as error:
            return {"error": str(error)}

    async def converse(stream: trio.SocketStream) -> None:
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in stream:
                *lines, received = (received + chunk).split(b"\n")
                for line in lines:
                    await stream.send_all(json.dumps(answer(line)).encode() + b"\n")

    await trio.serve_listeners(converse, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="A slow network file system.")
    parser.add_argument("backing", help="the directory that it shows")
    parser.add_argument("mountpoint")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="of each operation")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES_PER_S", help="of all readers together")
    parser.add_argument("--control", required=True, metavar="SOCKET", help="Unix socket to create, JSON lines")
    parser.add_argument("--allow-other", action="store_true", help="let other users in")
    parser.add_argument("--end-with-input", action="store_true", help="end when the standard input does")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        trio.run(serve, options, Path(options.mountpoint).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        print(f"slow source: {options.backing} on {options.mountpoint}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
