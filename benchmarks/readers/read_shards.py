"""Read the samples of all tar shards below a directory with WebDataset, without decoding them.

    python read_shards.py DIRECTORY

`files` counts samples. One byte of every page of a sample goes into the digest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from pathlib import Path

sys.modules["torch"] = None  # which it would import for seconds, and not use
import webdataset  # noqa: E402

PAGE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    shards = sorted(str(path) for path in options.directory.rglob("*.tar"))
    samples = total = digest = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        image = sample["jpg"]
        samples += 1
        total += len(image)
        digest = zlib.crc32(image[::PAGE], digest)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "files": samples, "bytes": total, "digest": f"{digest:08x}"}))


if __name__ == "__main__":
    main()
