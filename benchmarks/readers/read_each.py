"""Read every file below a directory, one after the other in a shuffled order, and tell what each took.

    python read_each.py DIRECTORY --seed 0

`latencies` are seconds from open to the last byte, of every file, in increasing order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import zlib

from read_files import list_files, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=os.fsencode)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = list_files(options.directory)
    random.Random(options.seed).shuffle(paths)
    os.chdir(options.directory)
    latencies, size, digest = [], 0, 0
    for path in paths:
        start = time.perf_counter()
        file_size, file_digest = read(path)
        latencies.append(time.perf_counter() - start)
        size += file_size
        digest += file_digest * (zlib.crc32(path) | 1)
    said = {"seconds": sum(latencies), "files": len(paths), "bytes": size, "digest": f"{digest % 2**64:016x}"}
    print(json.dumps({**said, "latencies": sorted(latencies)}))


if __name__ == "__main__":
    main()
