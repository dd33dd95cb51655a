"""What a result must say of the machine on which it was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import psutil


def describe_machine() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "ordinary user",
        "load_average": os.getloadavg(),
        "packages": {name: version(name) for name in ("cachefs", "pyfuse3", "trio", "sqlite-utils", "xxhash")},
    }
