"""cachefs with one measure less, or one more, for the workload `requests`.

python -m benchmarks.variants VARIANT COMMAND [ARGUMENT]...          as python -m cachefs
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pyfuse3

from cachefs.cache.scratch_reader import ScratchReader
from cachefs.cli import main
from cachefs.fs.operations import Operations

PUSHED_BYTES = 128 * 1024


def _answer_flush() -> None:
    async def flush(self: Operations, _: int) -> None:
        self.metrics.requests += 1

    Operations.flush = flush  # type: ignore[assignment,method-assign]


def _forget_pages() -> None:
    kept = Operations.open

    async def open_afresh(self: Operations, *arguments: Any) -> pyfuse3.FileInfo:
        opened = await kept(self, *arguments)
        opened.keep_cache = False
        return opened

    Operations.open = open_afresh  # type: ignore[method-assign]


def _read_in_threads() -> None:
    made = ScratchReader.__init__

    def without_attempt(self: ScratchReader, *arguments: Any, **keywords: Any) -> None:
        made(self, *arguments, **keywords)
        self._flags = None

    ScratchReader.__init__ = without_attempt  # type: ignore[method-assign]


def _expect_nothing() -> None:
    ScratchReader.expect = lambda self, fd, size: None  # type: ignore[method-assign]


def _push_content() -> None:
    """Of each small resident file once, when it is opened the first time and scratch's page cache has it."""
    opened = Operations.open
    pushed: set[int] = set()
    buffer = memoryview(bytearray(PUSHED_BYTES))

    async def open_and_push(self: Operations, inode: Any, *arguments: Any) -> pyfuse3.FileInfo:
        info = await opened(self, inode, *arguments)
        file, handles = self._fs._files[inode]
        is_small = file.kind == "hit" and file.size <= PUSHED_BYTES and file._fd is not None
        if handles == 1 and is_small and inode not in pushed:
            pushed.add(inode)
            try:
                size = os.preadv(file._fd, [buffer[: file.size]], 0, os.RWF_NOWAIT)  # type: ignore[list-item,arg-type]
            except BlockingIOError:
                return info
            if size == file.size:
                pyfuse3.notify_store(inode, 0, bytes(buffer[:size]))
        return info

    Operations.open = open_and_push  # type: ignore[method-assign]


VARIANTS: dict[str, Callable[[], None]] = {
    "FLUSH answered": _answer_flush,
    "pages not kept": _forget_pages,
    "reads in threads": _read_in_threads,
    "not asked at open": _expect_nothing,
    "content pushed": _push_content,
}

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    main(prog_name="cachefs")
