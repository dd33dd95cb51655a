"""Walk a directory and ask for the attributes of every file, as `ls -lR` and every dataset index do.

python walk.py DIRECTORY [--directories 10]       only the first ten of its directories
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib


def walk(directory: str, only: int | None) -> tuple[int, int, int]:
    """Files, the sum of their sizes, and a digest of names and sizes."""
    files = size = digest = 0
    with os.scandir(directory) as found:
        entries = list(found)
    if only is not None:
        entries = sorted(entries, key=lambda entry: entry.name)[:only]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            below = walk(entry.path, None)
            files, size, digest = files + below[0], size + below[1], digest + below[2]
        else:
            length = entry.stat(follow_symlinks=False).st_size
            files, size = files + 1, size + length
            digest += zlib.crc32(os.fsencode(entry.name), length)
    return files, size, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--directories", type=int)
    options = parser.parse_args()
    start = time.perf_counter()
    files, size, digest = walk(options.directory, options.directories)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "files": files, "bytes": size, "digest": f"{digest % 2**64:016x}"}))


if __name__ == "__main__":
    main()
