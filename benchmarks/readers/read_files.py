"""Read, open or check every file below a directory, in a shuffled order, in several processes.

    python read_files.py DIRECTORY --processes 4 --seed 0 --do read

The time is from when all processes have started until the last has done its share; the listing before it is told
separately. With `--at-least SECONDS` epochs are repeated until they took so long together, and `seconds` is their mean:
one of them may be over in 60 ms, of which the scheduler's whims are a large part.

`read` takes of each file its size and one byte of every page into the digest, which costs next to nothing and finds a
page that is missing or another file's; `check` reads no faster than it can hash and takes every byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Callable
from typing import Any

PAGE = 4096


def read(path: bytes) -> tuple[int, int]:
    """Size and digest of one file."""
    with open(path, "rb") as file:
        data = file.read()
    return len(data), zlib.crc32(data[::PAGE], len(data))


def check(path: bytes) -> tuple[int, int]:
    with open(path, "rb") as file:
        data = file.read()
    return len(data), int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def open_only(path: bytes) -> tuple[int, int]:
    os.close(os.open(path, os.O_RDONLY))
    return 0, 0


ACTIONS: dict[str, Callable[[bytes], tuple[int, int]]] = {"read": read, "check": check, "open": open_only}


def list_files(directory: bytes) -> list[bytes]:
    """Paths relative to `directory`, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, _, names in os.walk(directory, onerror=fail):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def work(directory: bytes, paths: list[bytes], do: str, start_line: Any, answer: Any) -> None:
    action = ACTIONS[do]
    os.chdir(directory)
    start_line.wait()
    start = time.perf_counter()
    size = digest = 0
    for path in paths:
        file_size, file_digest = action(path)
        size += file_size
        digest += file_digest * (zlib.crc32(path) | 1)
    answer.send((start, time.perf_counter(), size, digest % 2**64))


def run_epoch(directory: bytes, paths: list[bytes], count: int, do: str) -> tuple[float, int, int]:
    """Seconds, bytes and digest of one epoch by `count` processes."""
    fork = multiprocessing.get_context("fork")
    start_line = fork.Barrier(count)
    answers, processes = [], []
    for number in range(count):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(directory, paths[number::count], do, start_line, theirs))
        process.start()
        theirs.close()
        answers.append(ours)
        processes.append(process)
    starts, ends, sizes, digests = zip(*(answer.recv() for answer in answers), strict=True)
    for process in processes:
        process.join()
    return max(ends) - min(starts), sum(sizes), sum(digests) % 2**64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=os.fsencode)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--do", choices=ACTIONS, default="read")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SECONDS")
    options = parser.parse_args()
    listing = time.perf_counter()
    paths = list_files(options.directory)
    listing = time.perf_counter() - listing
    random.Random(options.seed).shuffle(paths)
    taken = []
    while not taken or sum(taken) < options.at_least:
        seconds, size, digest = run_epoch(options.directory, paths, options.processes, options.do)
        taken.append(seconds)
    said = {
        "seconds": sum(taken) / len(taken),
        "epochs": len(taken),
        "listing_seconds": listing,
        "files": len(paths),
        "bytes": size,
        "digest": f"{digest:016x}",
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
