"""Reads past the cache: a sequential reader gets the source in large blocks, a random one just what it asks for.

Each direct read costs a message to a worker, an open or a look at an open descriptor, and a check of the version:
some three operations of the source. In blocks of 1 MiB a sequential reader pays this for every eighth of its 128 KiB
requests. Blocks live in memory until two newer ones replace them, and are dropped with the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

BLOCK_BYTES = 1024 * 1024
_BLOCKS = 3
_SEQUENTIAL_READS = 3
_REACH_BYTES = 512 * 1024  # the kernel's read-ahead asks out of order within this


class _Block:
    def __init__(self) -> None:
        self.come = trio.Event()
        self.data: bytes | None = None


class ReadAhead:
    """Over one file of `size` bytes; `read_source(offset, size)` gives exactly these bytes or raises."""

    def __init__(self, read_source: Callable[[int, int], Awaitable[bytes]], size: int) -> None:
        self._read_source = read_source
        self._size = size
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._next = 0
        self._in_sequence = 0

    async def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset`; the range lies within the file."""
        if abs(offset - self._next) <= _REACH_BYTES:
            self._in_sequence += 1
        else:
            self._in_sequence = 0
        self._next = offset + size
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        if self._in_sequence < _SEQUENTIAL_READS and not all(n in self._blocks for n in range(first, last + 1)):
            return await self._read_source(offset, size)
        parts = [await self._block(number) for number in range(first, last + 1)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * BLOCK_BYTES
        return data[start : start + size]

    async def _block(self, number: int) -> bytes:
        while True:
            block = self._blocks.get(number)
            if block is None:
                break
            await block.come.wait()
            if block.data is not None:
                return block.data
            # whoever read it failed: try it ourselves, so that the error is this reader's own
        block = self._blocks[number] = _Block()
        if len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        start = number * BLOCK_BYTES
        try:
            block.data = await self._read_source(start, min(BLOCK_BYTES, self._size - start))
            return block.data
        finally:
            if block.data is None and self._blocks.get(number) is block:
                del self._blocks[number]
            block.come.set()
