"""Reads the files below a mount over and over in random order, and compares every byte that it gets with the source's.

    python readers.py MOUNTPOINT BACKING [--seed N] [--processes N]

Errors are counted, and are no failure: faults are meant to happen. It ends on SIGTERM, and says as a line of JSON what
it has seen: files that were read whole, errors by name, and wrong ones, of which there must be none.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PIECE = 64 * 1024
MOST_WRONG = 20


class Stopped(Exception):
    pass


Read = Callable[[random.Random], "tuple[int, str | None]"]
"""Reads something: how many bytes, and what is wrong with them, None if nothing is. Raises OSError."""


@dataclass
class Seen:
    """What readers have seen: operations, and those of them without an error; errors by name."""

    operations: int = 0
    read: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.operations += other.operations
        self.read += other.read
        self.bytes += other.bytes
        self.errors += other.errors
        self.wrong += other.wrong


def read_and_compare(path: Path, data: bytes, dice: random.Random) -> tuple[int, str | None]:
    """Read a file that holds `data`, sometimes only a part of it: a Read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return compare(fd, data, dice, str(path))
    finally:
        os.close(fd)


def compare(fd: int, data: bytes, dice: random.Random, what: str) -> tuple[int, str | None]:
    """Read an open file that holds `data`, sometimes only a part of it: a Read.

    A read may give less than was asked for, as where the daemon dies in the middle; then the rest is asked for.
    """
    start, end = 0, len(data)
    if dice.random() < 0.3 and data:
        start = dice.randrange(len(data))
        end = min(len(data), start + PIECE)
    at = start
    while at < end:
        got = os.pread(fd, dice.choice((4096, PIECE, 1 << 20)), at)
        if not got:
            return at - start, f"{what}: {at} bytes instead of {len(data)}"
        if got != data[at : at + len(got)]:
            return at - start, f"{what} at {at}: {len(got)} bytes that are not the source's"
        at += len(got)
    if at >= len(data) and os.pread(fd, 1, len(data)):
        return at - start, f"{what}: more than {len(data)} bytes"
    return at - start, None


def read_until_stopped(read: Read, seed: int, answer: Any) -> None:
    """Call `read` until SIGTERM, and answer with what was seen."""

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    dice = random.Random(seed)
    seen = Seen()
    try:
        while True:
            seen.operations += 1
            try:
                size, problem = read(dice)
            except OSError as error:
                seen.errors[errno.errorcode.get(error.errno or 0, str(error))] += 1
                time.sleep(0.002)
                continue
            seen.read += 1
            seen.bytes += size
            if problem and len(seen.wrong) < MOST_WRONG:
                seen.wrong.append(problem)
    except Stopped:
        answer.send(seen)


class Crowd:
    """Processes, one for each of `seeds`, that call `read` all the time."""

    def __init__(self, read: Read, seeds: Iterable[int]) -> None:
        fork = multiprocessing.get_context("fork")
        self._processes, self._pipes = [], []
        for seed in seeds:
            receiving, sending = fork.Pipe(duplex=False)
            self._processes.append(fork.Process(target=read_until_stopped, args=(read, seed, sending)))
            self._processes[-1].start()
            sending.close()
            self._pipes.append(receiving)

    def pause(self) -> None:
        """Stop them, each once the system call is over that it is in."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def join(self) -> Seen:
        """What all of them have seen, once they were terminated; nothing the second time."""
        seen = Seen()
        while self._pipes:
            pipe = self._pipes.pop()
            try:
                seen.add(pipe.recv())
            except EOFError:
                seen.wrong.append("a reader died before it could say what it has seen")
        for process in self._processes:
            process.join()
        return seen


def reads_of(mountpoint: Path, backing: Path) -> Read:
    """Reads the files of `backing` at the mount, one after the other in an order that changes."""
    content = {path.relative_to(backing): path.read_bytes() for path in backing.rglob("*") if path.is_file()}
    left: list[Path] = []

    def read(dice: random.Random) -> tuple[int, str | None]:
        if not left:
            left.extend(dice.sample(sorted(content), len(content)))
        name = left.pop()
        return read_and_compare(mountpoint / name, content[name], dice)

    return read


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("backing", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = [arguments.seed * 1000 + number for number in range(arguments.processes)]
    crowd = Crowd(reads_of(arguments.mountpoint, arguments.backing), seeds)
    signal.signal(signal.SIGTERM, lambda *_: crowd.terminate())
    print("reading", flush=True)
    json.dump(vars(crowd.join()), sys.stdout)


if __name__ == "__main__":
    main()
