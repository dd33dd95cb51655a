"""The counters of one mount. They are exact: each is changed in one place, in the event loop's thread alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Counts since the mount began. Sizes are in bytes.

    Every open of a file is one of three: `hits` (a resident copy serves it), `misses` (it was fetched first, or
    joined a fetch on its way), `bypasses` (the source serves it, because it cannot be cached).
    """

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    evictions: int = 0
    fetches: int = 0
    """Files copied completely from the source by this mount."""
    prefetches: int = 0
    """Of `fetches`, those of files that nobody had asked for until they were complete."""
    fetch_errors: int = 0
    source_bytes_read: int = 0
    """File contents read from the source: by fetches, also failed ones, and for bypasses and far reads."""
    hit_bytes: int = 0
    """Sizes of the files that were opened as hits: what reading them whole would have cost the source."""
    wait_seconds: float = 0.0
    """Time that opens and reads have waited for the source, be it a fetch or a direct read; requests that wait at the
    same time count each."""
    requests: int = 0
    """Requests of the kernel that were answered. Those that need no answer (FORGET) are not counted."""
    bytes_served: int = 0
    """Bytes given to the kernel in answer to reads. What the kernel's page cache serves is not seen here."""
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of its block as waiting for the source."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.wait_seconds += time.monotonic() - start

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self.started
