"""The command "warm" of a mount's control socket: fetches named files and trees now, and says how far it is.

The reply is a stream of JSON lines, each with the counts so far; the last one has "finished". When whoever asked goes
away, the warming ends; what was fetched stays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import trio

from cachefs.cache.prefetch import FAILED, FULL
from cachefs.errors import describe
from cachefs.fs.read_through import ReadThrough
from cachefs.mount.control import Send

PROGRESS_SECONDS = 0.2


@dataclass
class Progress:
    """Counts of one warming; sizes in bytes. `found` grows until `is_counted`."""

    found_files: int = 0
    found_bytes: int = 0
    is_counted: bool = False
    done_files: int = 0
    done_bytes: int = 0
    failed_files: int = 0
    without_room: int = 0
    """Files for which scratch had no room, of those that were tried: the first ends the warming."""

    def find(self, size: int) -> None:
        self.found_files += 1
        self.found_bytes += size

    def note(self, path: bytes, size: int, outcome: str) -> None:
        if outcome == FULL:
            self.without_room += 1
            return
        self.failed_files += outcome == FAILED
        self.done_files += 1
        self.done_bytes += size if outcome != FAILED else 0


class Warming:
    """Answers "warm" requests: {"paths": [...]}, each relative to the source, "" for all of it."""

    def __init__(self, read_through: ReadThrough) -> None:
        self._read_through = read_through

    async def answer(self, request: Mapping[str, Any], send: Send) -> None:
        paths = [os.fsencode(path) for path in request["paths"]]
        progress = Progress()
        errors: list[str] = []
        async with trio.open_nursery() as nursery:

            async def say() -> None:
                while True:
                    await trio.sleep(PROGRESS_SECONDS)
                    await send(asdict(progress))

            async def count() -> None:
                for path in paths:
                    try:
                        await self._read_through.count(path, progress.find)
                    except OSError:
                        continue  # said by the fetching
                progress.is_counted = True

            nursery.start_soon(say)
            nursery.start_soon(count)
            for path in paths:
                try:
                    await self._read_through.warm(path, progress.note)
                except OSError as error:
                    errors.append(f"{os.fsdecode(path) or '.'}: {describe(error)}")
            nursery.cancel_scope.cancel()
        await send({**asdict(progress), "finished": True, "errors": errors})
