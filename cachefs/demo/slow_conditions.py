"""When and whether the slow source answers, and what it counts.

Invariants:

- A request takes the latency, from its arrival. A READ also books its bytes on the link that all readers
  share, after whatever was booked before it, and is due when its booking is over.
- A request is counted when it arrives, its bytes when they are answered: what a client has an answer to is in
  the statistics. A file counts under the name by which it was last looked up, the root as `.`.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import trio

DELAYED = ("lookup", "getattr", "open", "read", "readdir", "readlink", "statfs")


@dataclass(slots=True)
class Fault:
    """A rule, of which the first that matches a request applies: it takes `delay` seconds more, hangs, fails.

    `path` is a pattern of fnmatch; `after_bytes` is the lowest offset of a read that matches."""

    path: str = "*"
    op: str = "*"
    errno: str | None = None
    hang: bool = False
    delay: float = 0.0
    count: int | None = None
    after_bytes: int = 0
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.op not in (*DELAYED, "*"):
            raise ValueError(f"op {self.op!r} is none of {', '.join(DELAYED)} or *")
        if self.errno is not None and not isinstance(getattr(errno, self.errno, None), int):
            raise ValueError(f"errno {self.errno!r} is not the name of an error, such as EIO")
        self.pattern = re.compile(fnmatch.translate(self.path))

    def matches(self, op: str, path: bytes, offset: int) -> bool:
        return (
            self.op in (op, "*")
            and (op != "read" or offset >= self.after_bytes)
            and self.pattern.match(path.decode(errors="surrogateescape")) is not None
        )


class Conditions:
    """Latency, bandwidth and faults, all of which can be set at any time, and the counters."""

    def __init__(self, *, latency: float, bandwidth: float | None) -> None:
        self._link_free_at = 0.0
        self._faults: list[Fault] = []
        self._faults_cleared = trio.Event()
        self.set(latency=latency, bandwidth=bandwidth)
        self.reset()

    def set(self, *, latency: float | None = None, bandwidth: float | EllipsisType | None = ...) -> None:
        """What is not given stays; a bandwidth of None is unlimited."""
        if latency is not None:
            if latency < 0:
                raise ValueError(f"latency is {latency}, not 0 or more seconds")
            self.latency = latency
        if bandwidth is not ...:
            if bandwidth is not None and bandwidth <= 0:
                raise ValueError(f"bandwidth is {bandwidth}, not more than 0 bytes a second")
            self.bandwidth = bandwidth
            self._link_free_at = 0.0

    def add_fault(self, fault: Fault) -> None:
        self._faults.append(fault)

    def clear_faults(self) -> None:
        self._faults.clear()
        self._faults_cleared.set()
        self._faults_cleared = trio.Event()

    def count(self, op: str) -> None:
        """Count an operation that costs nothing and belongs to no file."""
        self._operations[op] += 1

    def count_bytes(self, path: bytes, size: int) -> None:
        self._files[path]["bytes"] += size

    def reset(self) -> None:
        self._operations: Counter[str] = Counter()
        self._files: defaultdict[bytes, Counter[str]] = defaultdict(Counter)
        self._cpu_start = time.process_time()

    def statistics(self) -> dict[str, Any]:
        return {
            "operations": self._operations,
            "files": {path.decode(errors="surrogateescape"): counts for path, counts in self._files.items()},
            "cpu_seconds": time.process_time() - self._cpu_start,
        }

    async def arrive(self, op: str, path: bytes, *, offset: int = 0, size: int = 0) -> None:
        """Count the request and return when its answer is due, or raise the error that a fault asks for."""
        self._operations[op] += 1
        self._files[path][op] += 1
        arrival = trio.current_time()
        due = arrival + self.latency
        fault = self._fault(op, path, offset) if self._faults else None
        if fault is not None:
            due += fault.delay
            if fault.hang:
                await self._faults_cleared.wait()
        failing = fault is not None and fault.errno is not None
        if self.bandwidth is not None and size and not failing:
            self._link_free_at = max(self._link_free_at, arrival) + size / self.bandwidth
            due = max(due, self._link_free_at)
        if due > arrival:
            await trio.sleep_until(due)
        if fault is not None and fault.errno is not None:
            number = getattr(errno, fault.errno)
            raise OSError(number, os.strerror(number), path)

    def _fault(self, op: str, path: bytes, offset: int) -> Fault | None:
        for fault in self._faults:
            if fault.matches(op, path, offset):
                if fault.count is not None:
                    fault.count -= 1
                    if fault.count <= 0:
                        self._faults.remove(fault)
                return fault
        return None
