"""Read one large file: from end to end, at random places, or its end alone.

    python read_large.py DIRECTORY --do sequential          1 MiB a call
    python read_large.py DIRECTORY --do random --reads 1000 --seed 0          64 KiB each
    python read_large.py DIRECTORY --do tail                the last 4 KiB

With `--at-least SECONDS` that is repeated until it took so long in all, and `seconds` is the mean.
The file is the only one below the directory. One byte of every page goes into the digest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

PAGE, RANDOM, SEQUENTIAL = 4096, 64 << 10, 1 << 20


def ranges(do: str, size: int, reads: int, seed: int) -> Iterator[tuple[int, int]]:
    if do == "sequential":
        yield from ((offset, SEQUENTIAL) for offset in range(0, size, SEQUENTIAL))
    elif do == "random":
        choice = random.Random(seed)
        yield from ((choice.randrange(size // RANDOM) * RANDOM, RANDOM) for _ in range(reads))
    else:
        yield size - PAGE, PAGE


def read(path: Path, do: str, reads: int, seed: int) -> tuple[float, int, int]:
    """Seconds, bytes and digest of one reading, opening the file included."""
    buffer = memoryview(bytearray(SEQUENTIAL))
    total = digest = 0
    start = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    for offset, length in ranges(do, os.fstat(descriptor).st_size, reads, seed):
        count = os.preadv(descriptor, [buffer[:length]], offset)
        total += count
        digest = zlib.crc32(bytes(buffer[:count:PAGE]), digest)
    os.close(descriptor)
    return time.perf_counter() - start, total, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--do", choices=("sequential", "random", "tail"), default="sequential")
    parser.add_argument("--reads", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SECONDS")
    options = parser.parse_args()
    (path,) = (entry for entry in options.directory.rglob("*") if entry.is_file())
    taken = []
    while not taken or sum(taken) < options.at_least:
        seconds, size, digest = read(path, options.do, options.reads, options.seed)
        taken.append(seconds)
    said = {
        "seconds": sum(taken) / len(taken),
        "epochs": len(taken),
        "files": 1,
        "bytes": size,
        "digest": f"{digest:08x}",
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
