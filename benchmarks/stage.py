"""What every workload needs: a slow source, a mount over it, cold caches, and what the daemon costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cachefs.demo import loader


@dataclass(frozen=True)
class Result:
    """One figure, measured several times. `goal` is what it should be, in words."""

    name: str
    values: list[float]
    unit: str
    goal: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Mounted:
    """A mount of cachefs and its daemon."""

    path: Path
    process: psutil.Process

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def resident_bytes(self) -> int:
        return self.process.memory_info().rss

    def status(self) -> dict[str, Any]:
        return json.loads(_cachefs("status", self.path, "--json"))


@contextmanager
def remounted(source: Path, scratch: Path, *, crash: bool = False) -> Iterator[Mounted]:
    """A mount over `source` with scratch as it is, which stays; with `crash` the daemon is killed at the end."""
    _cachefs("mount", source, "--scratch", scratch)
    cache = Mounted(source, psutil.Process(json.loads(_cachefs("status", source, "--json"))["pid"]))
    try:
        yield cache
    finally:
        if crash:
            cache.process.kill()
            cache.process.wait()
        _cachefs("umount", source)


@contextmanager
def mounted(source: Path, scratch: Path, *options: object, at: Path | None = None) -> Iterator[Mounted]:
    """A mount over `source` (or at `at`) with empty scratch, which is purged at the end."""
    shutil.rmtree(scratch, ignore_errors=True)
    path = at or source
    _cachefs("mount", source, *([at] if at else []), "--scratch", scratch, *options)
    try:
        status = json.loads(_cachefs("status", path, "--json"))
        yield Mounted(path, psutil.Process(status["pid"]))
    finally:
        _cachefs("umount", path, "--purge")


def drop_caches() -> bool:
    """Empty the page cache, as root; False where that is not permitted, and then figures are of a warm cache."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except PermissionError:
        return False
    return True


def read_all(path: Path, workers: int, seed: int) -> dict[str, Any]:
    """One epoch of the ordinary loader over `path`: what it says."""
    command = [sys.executable, loader.__file__, path, "--workers", workers, "--seed", seed]
    return json.loads(_run([str(word) for word in command]))


def timed_python(code: str, *arguments: object) -> float:
    """Seconds that `code` prints, run in a new interpreter."""
    return float(_run([sys.executable, "-c", code, *map(str, arguments)]))


def _cachefs(*arguments: object) -> str:
    return _run([sys.executable, "-m", "cachefs", *map(str, arguments)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stderr}")
    return done.stdout
