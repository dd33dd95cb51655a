"""Mounts, kills the daemon at a random time, takes the mount away, again and again, with one scratch.

    python kills.py SOURCE MOUNTPOINT SCRATCH CAPACITY TIMES [--checked] [--memory BYTES --memory-path DIR]

In this process without exec, which takes a tenth of the time that as many commands would.

With `--checked` it has readers of its own, and no other mount may use the scratch: after each kill it is looked whether
every complete file is the source's, byte by byte, and no process is left; and, while nothing reads, whether the next
mount counts what is there, and scratch holds nothing of the dead one. A quarter of the kills come before that, for the
next mount may die while it counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from cachefs.cache.scratch import open_scratch
from cachefs.config import DEFAULT_MEMORY_PATH, Capacity, Settings
from cachefs.mount.control_client import ask
from cachefs.mount.daemon import serve_in_background
from cachefs.mount.memory import memory_path
from cachefs.mount.unmount import find_our_mount, unmount
from tests.faults.readers import Crowd, reads_of
from tests.harness import lives, wait_until

LONGEST_LIFE = 0.25
CHECKED_SHARE = 0.75
READERS = 2


class Checks:
    """What must hold after each kill."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = [settings.scratch, *([memory_path(settings)] if settings.memory else [])]
        self._digests = {hashlib.sha256(p.read_bytes()).digest() for p in settings.source.rglob("*") if p.is_file()}
        self.crowd = Crowd(reads_of(settings.mountpoint, settings.source), range(READERS))
        self.crowd.pause()
        self._scratch = open_scratch(settings.scratch)
        self.mounts = self.copies = 0

    def of_the_dead(self, processes: list[psutil.Process]) -> None:
        wait_until(lambda: not any(map(lives, processes)), "all processes of the mount end")
        for path in (path for place in self._places for path in (place / "files").rglob("*")):
            if path.is_file():
                assert hashlib.sha256(path.read_bytes()).digest() in self._digests, f"{path} is not of the source"
                self.copies += 1

    def of_the_next(self) -> None:
        """The mount that serves now, which nobody reads."""
        (lease,) = os.listdir(self._settings.scratch / "leases")

        def is_accounted() -> bool:
            said = ask(self._scratch, lease, "status")
            counted = [(tier["files"], tier["bytes"]) for tier in said["tiers"]]
            return counted == [_count(Path(tier["path"])) for tier in said["tiers"]]

        wait_until(is_accounted, "status says what is on disk")
        its = {"sockets": [lease], "staging": [], "trees": []}
        wait_until(
            lambda: {folder: os.listdir(self._settings.scratch / folder) for folder in its} == its,
            "scratch holds nothing of the dead one",
        )
        self.mounts += 1

    def end(self) -> dict[str, object]:
        self.crowd.terminate()
        self.crowd.resume()
        seen = self.crowd.join()
        return {"read": seen.read, "wrong": seen.wrong, "mounts": self.mounts, "copies": self.copies}


def _count(place: Path) -> tuple[int, int]:
    copies = [path.stat().st_size for path in (place / "files").rglob("*") if path.is_file()]
    return len(copies), sum(copies)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("source", "mountpoint", "scratch"):
        parser.add_argument(name, type=Path)
    parser.add_argument("capacity", type=Capacity.parse)
    parser.add_argument("times", type=int)
    parser.add_argument("--checked", action="store_true")
    parser.add_argument("--memory", type=Capacity.parse)
    parser.add_argument("--memory-path", type=Path)
    arguments = parser.parse_args()
    settings = Settings(
        arguments.source,
        arguments.mountpoint,
        arguments.scratch,
        arguments.capacity,
        memory=arguments.memory,
        memory_path=arguments.memory_path or DEFAULT_MEMORY_PATH,
        policy="lru",
        no_promote=True,
    )
    dice, checks = random.Random(7), None
    with ExitStack() as ending:
        for _ in range(arguments.times):
            pid = serve_in_background(settings)
            with ExitStack() as failing:
                failing.callback(kill, pid, settings)
                if arguments.checked and checks is None:
                    checks = Checks(settings)
                    ending.callback(checks.end)
                if checks is not None:
                    if dice.random() < CHECKED_SHARE:
                        checks.of_the_next()
                    checks.crowd.resume()
                time.sleep(dice.uniform(0, LONGEST_LIFE))
                failing.pop_all()
            processes = kill(pid, settings)
            if checks is not None:
                checks.crowd.pause()
                checks.of_the_dead(processes)
        json.dump({"kills": arguments.times, **(checks.end() if checks is not None else {})}, sys.stdout)


def kill(pid: int, settings: Settings) -> list[psutil.Process]:
    """SIGKILL of a daemon, whose mount is taken away then: it and the processes that it had."""
    daemon = psutil.Process(pid)
    processes = [daemon, *daemon.children(recursive=True)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    unmount(find_our_mount(settings.mountpoint), lazy=True)
    return processes


if __name__ == "__main__":
    main()
