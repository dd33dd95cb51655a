"""Reads past the cache: right bytes in any order, large blocks for sequential readers, little memory."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.read_ahead import BLOCK_BYTES, ReadAhead
from cachefs.errors import SourceError
from tests.unit.profile import FEW

REQUEST = 128 * 1024


class FakeSource:
    """A file whose reads are counted; `fails` makes the next ones raise, `gate` holds them up."""

    def __init__(self, size):
        self.content = random.Random(size).randbytes(size)
        self.reads = []
        self.fails = 0
        self.gate = trio.Event()
        self.gate.set()

    async def read(self, offset, size):
        assert 0 <= offset <= offset + size <= len(self.content), "a read beyond the file"
        self.reads.append((offset, size))
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.fails:
            self.fails -= 1
            raise SourceError(5, "Input/output error", b"file")
        return self.content[offset : offset + size]


def test_a_sequential_reader_asks_for_blocks():
    async def main():
        source = FakeSource(8 * BLOCK_BYTES + 1234)
        ahead = ReadAhead(source.read, len(source.content))
        got = bytearray()
        while len(got) < len(source.content):
            got += await ahead.read(len(got), min(REQUEST, len(source.content) - len(got)))
        assert got == source.content
        assert len(source.reads) <= 3 + 9
        assert sum(size for _, size in source.reads) <= len(source.content) + 3 * REQUEST

    trio.run(main)


def test_a_random_reader_gets_what_it_asks_for_and_no_more():
    async def main():
        source = FakeSource(64 * BLOCK_BYTES)
        ahead = ReadAhead(source.read, len(source.content))
        asked = [((n * 37 % 60 + 2) * BLOCK_BYTES + n, 4096) for n in range(1, 30)]
        for offset, size in asked:
            assert await ahead.read(offset, size) == source.content[offset : offset + size]
        assert source.reads == asked

    trio.run(main)


def test_memory_is_bounded_to_a_few_blocks():
    async def main():
        source = FakeSource(12 * BLOCK_BYTES)
        ahead = ReadAhead(source.read, len(source.content))
        for offset in range(0, len(source.content), REQUEST):
            await ahead.read(offset, REQUEST)
            assert len(ahead._blocks) <= 3

    trio.run(main)


def test_a_block_that_several_readers_want_is_read_once():
    async def main():
        source = FakeSource(2 * BLOCK_BYTES)
        ahead = ReadAhead(source.read, len(source.content))
        for offset in range(2):
            await ahead.read(offset, 1)
        source.reads.clear()
        source.gate = trio.Event()

        async def read(offset):
            assert await ahead.read(offset, 10) == source.content[offset : offset + 10]

        async with trio.open_nursery() as nursery:
            for offset in range(100, 600, 50):
                nursery.start_soon(read, offset)
            await trio.testing.wait_all_tasks_blocked()
            source.gate.set()
        assert source.reads == [(0, BLOCK_BYTES)]

    trio.run(main)


def test_each_reader_of_a_block_that_fails_gets_an_error_of_its_own_and_the_next_one_the_bytes():
    async def main():
        source = FakeSource(2 * BLOCK_BYTES)
        ahead = ReadAhead(source.read, len(source.content))
        for offset in range(2):
            await ahead.read(offset, 1)
        source.reads.clear()
        source.gate = trio.Event()
        source.fails = 2
        outcomes = []

        async def read(offset):
            try:
                outcomes.append(await ahead.read(offset, 10) == source.content[offset : offset + 10])
            except SourceError:
                outcomes.append("error")

        async with trio.open_nursery() as nursery:
            for offset in range(100, 500, 100):
                nursery.start_soon(read, offset)
            await trio.testing.wait_all_tasks_blocked()
            source.gate.set()
        assert sorted(map(str, outcomes)) == ["True", "True", "error", "error"]
        assert await ahead.read(700, 10) == source.content[700:710]

    trio.run(main)


def test_a_reader_that_is_cancelled_does_not_hold_up_the_others():
    async def main():
        source = FakeSource(2 * BLOCK_BYTES)
        ahead = ReadAhead(source.read, len(source.content))
        for offset in range(2):
            await ahead.read(offset, 1)
        source.gate = trio.Event()

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:

                async def read_other():
                    assert await ahead.read(100, 10) == source.content[100:110]

                async def cancel():
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
                    source.gate.set()

                nursery.start_soon(cancel)
                nursery.start_soon(read_other)
                await ahead.read(50, 10)
        assert await ahead.read(50, 10) == source.content[50:60]

    trio.run(main)


@FEW
@given(
    size=st.sampled_from([1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 77]),
    data=st.data(),
)
def test_bytes_are_right_in_any_order(size, data):
    source = FakeSource(size)
    near = st.integers(0, size - 1)
    reads = data.draw(st.lists(st.tuples(near, st.integers(1, 300_000)), min_size=1, max_size=12))

    async def main():
        ahead = ReadAhead(source.read, size)
        position = 0
        for offset, length in reads:
            if data.draw(st.booleans()):
                offset = position % size
            length = min(length, size - offset)
            assert await ahead.read(offset, length) == source.content[offset : offset + length]
            position = offset + length

    trio.run(main)


def test_an_error_reaches_the_reader():
    async def main():
        source = FakeSource(100)
        source.fails = 1
        ahead = ReadAhead(source.read, 100)
        with pytest.raises(SourceError):
            await ahead.read(0, 10)
        assert await ahead.read(0, 10) == source.content[:10]

    trio.run(main)
