"""An ordinary program that reads a dataset: read_all.py DIRECTORY REPORT [STATUS]

It knows nothing of cachefs. Each pass over all files is a line of JSON in REPORT: the digest of what was read, and
whether something was mounted on DIRECTORY. After the first pass it waits while the file REPORT.wait exists, with a file
open; if that was so there is a second pass. Then it exits with STATUS. SIGTERM, SIGUSR1 and SIGUSR2 are lines in REPORT
too. Upon SIGTERM and SIGUSR2 it does not wait any longer, as a training that finishes its step and saves its state: it
reads on in the open file and once more everything, and exits with 75.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

ENDING = {signal.SIGTERM, signal.SIGUSR2}


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def is_mounted(folder: Path) -> bool:
    """Whether something is mounted on this very directory."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split()[4] == str(folder) for line in lines)


def main(directory: str, report: str, status: str = "0") -> int:
    folder, wait = Path(directory).resolve(), Path(f"{report}.wait")
    signals: list[int] = []

    def say(**words: object) -> None:
        with open(report, "a") as file:
            file.write(json.dumps(words) + "\n")

    def handle(number: int, _frame: object) -> None:
        signals.append(number)
        say(signal=signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handle)
    whole = digest(folder)
    with open(next(path for path in folder.rglob("*") if path.is_file()), "rb", buffering=0) as file:
        is_held = wait.exists()
        say(digest=whole, mounted=is_mounted(folder), pid=os.getpid())
        while wait.exists() and not ENDING.intersection(signals):
            time.sleep(0.02)
        if ENDING.intersection(signals):
            file.read()
    if is_held:
        say(digest=digest(folder), mounted=is_mounted(folder), pid=os.getpid())
    return 75 if ENDING.intersection(signals) else int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
