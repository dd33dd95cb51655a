"""Files whose every byte follows from their name and a version number, which stands at their beginning.

So whoever reads one knows which version it is of, and whether all of it is of that one.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

from tests.faults.readers import compare

_HEAD = struct.Struct("<8sQ")  # magic, version
HEAD_BYTES = _HEAD.size
_MAGIC = b"versions"
_SIZES = (0, 1, 3000, 20_000, 110_000, 110_000, 400_000, 3_000_000)


def content(name: str, version: int) -> bytes:
    """The bytes of a file; HEAD_BYTES or more. Its size varies with the version too, now and then."""
    dice = random.Random(f"{name}\0{version // 3}")
    body = random.Random(f"{name}\0{version}")
    return _HEAD.pack(_MAGIC, version) + body.randbytes(dice.choice(_SIZES))


def write(path: Path, name: str, version: int) -> None:
    """Put a version in place, at once."""
    new = path.with_name(f".new-{path.name}")
    new.write_bytes(content(name, version))
    os.rename(new, path)


def check(path: Path, name: str, dice: random.Random) -> tuple[int, str | None]:
    """Read a file, whole or a part of it: (bytes, what is wrong with them or None). Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(fd, HEAD_BYTES, 0)
        if len(head) != HEAD_BYTES or not head.startswith(_MAGIC):
            return len(head), f"{name}: it begins with {head!r}"
        version = _HEAD.unpack(head)[1]
        return compare(fd, content(name, version), dice, f"{name}, version {version}")
    finally:
        os.close(fd)
