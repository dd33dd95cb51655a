"""cachefs whose clock is set: `python -m tests.faults.clocked FILE ARGUMENT...`; FILE holds how many seconds it is off.

The clock of the machine is everybody's; so the calls that ask for the time of day are wrapped in this process, which
daemon and workers are forked from. The monotonic clock goes on, as it does when a clock is set.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cachefs.cli import main

_file = Path(sys.argv[1])
_time, _time_ns = time.time, time.time_ns


def _offset() -> float:
    return float(_file.read_text())


if __name__ == "__main__":
    time.time = lambda: _time() + _offset()
    time.time_ns = lambda: _time_ns() + int(_offset() * 10**9)
    sys.exit(main(sys.argv[2:], prog_name="cachefs"))
