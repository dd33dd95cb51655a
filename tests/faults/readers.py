"""Reads the files below a mount over and over in random order, and compares every byte that it gets with the source's.

    python readers.py MOUNTPOINT BACKING [--seed N] [--processes N]

Errors are counted, and are no failure: faults are meant to happen. It ends on SIGTERM, and says as a line of JSON what
it has seen: files that were read whole, errors by name, and wrong ones, of which there must be none.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

PIECE = 64 * 1024


class Stopped(Exception):
    pass


def read_and_compare(path: Path, data: bytes, dice: random.Random) -> str | None:
    """What is wrong with a file: None if nothing is. Raises OSError. Sometimes only a part of it is read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if dice.random() < 0.3 and data:
            offset = dice.randrange(len(data))
            got = os.pread(fd, PIECE, offset)
            want = data[offset : offset + PIECE]
            return None if got == want else f"{path} at {offset}: {len(got)} bytes that are not the source's"
        offset = 0
        while got := os.pread(fd, dice.choice((4096, PIECE, 1 << 20)), offset):
            if got != data[offset : offset + len(got)]:
                return f"{path} at {offset}: {len(got)} bytes that are not the source's"
            offset += len(got)
        return None if offset == len(data) else f"{path}: {offset} bytes instead of {len(data)}"
    finally:
        os.close(fd)


def work(mountpoint: Path, backing: Path, seed: int, answer: Any) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    dice = random.Random(seed)
    read, wrong, errors = 0, [], Counter()
    try:
        content = {path.relative_to(backing): path.read_bytes() for path in backing.rglob("*") if path.is_file()}
        names = sorted(content)
        while True:
            dice.shuffle(names)
            for name in names:
                try:
                    problem = read_and_compare(mountpoint / name, content[name], dice)
                except OSError as error:
                    errors[errno.errorcode.get(error.errno or 0, str(error))] += 1
                    time.sleep(0.002)
                    continue
                read += 1
                if problem:
                    wrong.append(problem)
    except Stopped:
        answer.send((read, wrong[:20], dict(errors)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("backing", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    pipes, processes = [], []
    for number in range(arguments.processes):
        receiving, sending = multiprocessing.Pipe(duplex=False)
        seed = arguments.seed * 1000 + number
        processes.append(
            multiprocessing.Process(target=work, args=(arguments.mountpoint, arguments.backing, seed, sending))
        )
        processes[-1].start()
        sending.close()
        pipes.append(receiving)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    print("reading", flush=True)
    read, wrong, errors = 0, [], Counter()
    for pipe in pipes:
        with contextlib.suppress(EOFError):
            got = pipe.recv()
            read += got[0]
            wrong += got[1]
            errors.update(got[2])
    for process in processes:
        process.join()
    json.dump({"read": read, "wrong": wrong, "errors": dict(errors)}, sys.stdout)


if __name__ == "__main__":
    main()
