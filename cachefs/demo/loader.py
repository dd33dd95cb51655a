"""An ordinary loader script that knows of no cache: reads a directory of JPEG files as training does.

    python loader.py DATA_DIR --epochs 2 --workers 4 --seed 0

Lists `DATA_DIR/CLASS/*.jpg` once, shuffles it in each epoch, reads every file in fresh worker processes,
checks that it is a whole JPEG, and prints a line of JSON an epoch. Its digest does not depend on the order:
two runs that read the same bytes under the same names print the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time


def list_files(directory: bytes) -> list[bytes]:
    """Paths of the JPEG files, relative to `directory`, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, _, names in os.walk(directory, onerror=fail):
        found += [os.path.join(folder, name) for name in names if name.lower().endswith((b".jpg", b".jpeg"))]
    return sorted(os.path.relpath(path, directory) for path in found)


def read_file(task: tuple[bytes, bytes]) -> tuple[int, int]:
    """Size and digest of one file."""
    directory, path = task
    with open(os.path.join(directory, path), "rb") as file:
        content = file.read()
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        raise ValueError(f"{os.fsdecode(path)} is not a whole JPEG ({len(content)} bytes)")
    digest = hashlib.blake2b(content, digest_size=16)
    named = hashlib.blake2b(path + b"\0" + digest.digest(), digest_size=16)
    return len(content), int.from_bytes(named.digest(), "big")


def run_epoch(directory: bytes, files: list[bytes], workers: int, seed: int, epoch: int) -> dict[str, object]:
    order = list(files)
    random.Random(f"{seed} {epoch}").shuffle(order)
    start = time.perf_counter()
    size = digest = 0
    with multiprocessing.Pool(workers) as pool:
        for file_size, file_digest in pool.imap_unordered(read_file, [(directory, path) for path in order], 8):
            size += file_size
            digest = (digest + file_digest) % 2**128
    seconds = round(time.perf_counter() - start, 4)
    return {
        "epoch": epoch,
        "seconds": seconds,
        "files": len(order),
        "bytes": size,
        "digest": f"{digest:032x}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Read a dataset as a training script does.")
    parser.add_argument("directory", metavar="DATA_DIR")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    directory = os.fsencode(options.directory)
    try:
        files = list_files(directory)
        for epoch in range(1, options.epochs + 1):
            print(json.dumps(run_epoch(directory, files, options.workers, options.seed, epoch)), flush=True)
    except (OSError, ValueError) as error:
        print(f"loader: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
