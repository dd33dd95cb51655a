"""Notices that a directory or a tree is being read through, and has the rest of it fetched ahead.

What is read through: a directory, once some of its files were opened that were not resident; a tree, once that happened
in several of the directories below one. Nothing is concluded from hits, so a warm cache costs nothing here.

Invariant: each directory and each tree is walked once: what was not resident then, and was not fetched, had no room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from cachefs.cache.prefetch import File, Prefetch
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.inodes import Node
from cachefs.source.attributes import size_of

log = logging.getLogger(__name__)

DIRECTORY_MISSES = 4
"""So many files of one directory that had to be fetched make it one that is read through."""
TREE_MISSES, TREE_DIRECTORIES = 8, 3
"""So many below a directory, in so many different ones of its entries, make all of it a tree that is read through."""
_FILES_AHEAD = 256
_WALKS = 4


class ReadThrough:
    """Watches the misses of `filesystem`. Walks run in `nursery`."""

    def __init__(self, filesystem: FileSystem, prefetch: Prefetch, nursery: trio.Nursery) -> None:
        self._filesystem = filesystem
        self._prefetch = prefetch
        self._nursery = nursery
        self._walks = trio.CapacityLimiter(_WALKS)
        self.wants: Callable[[bytes], bool] | None = None
        """Which files, by path, are worth fetching ahead; None for all."""
        self._misses: dict[int, tuple[int, set[int]]] = {}
        self._walked: set[tuple[int, bool]] = set()

    def note_miss(self, file: Node) -> None:
        """A file was opened that was not resident."""
        below, node = file, file.parent
        while node is not None:
            if (node.inode, True) in self._walked:
                return
            misses, entries = self._misses.get(node.inode, (0, set()))
            misses += 1
            if len(entries) < TREE_DIRECTORIES and below is not file:
                entries.add(below.inode)
            self._misses[node.inode] = misses, entries
            if below is file and misses >= DIRECTORY_MISSES:
                self._start(node, is_tree=False)
            if misses >= TREE_MISSES and len(entries) >= TREE_DIRECTORIES:
                self._start(node, is_tree=True)
            below, node = node, node.parent

    def fetch_everything(self) -> None:
        """Fetch the whole source ahead."""
        self._start(self._filesystem.inodes.root, is_tree=True)

    async def warm(self, path: bytes, on_done: Callable[[bytes, int, str], None]) -> None:
        """Fetch the file or the tree `path`, relative to the source, now; ends where scratch is full.

        `on_done` is called with the path, the size and what became of each file. Raises OSError if there is no such
        path, or it cannot be listed.
        """
        await self._fetch(await self._filesystem.find(path), is_tree=True, on_done=on_done)

    async def count(self, path: bytes, on_found: Callable[[int], None]) -> None:
        """Call `on_found` with the size of each file that `warm` fetches. Raises OSError as that does."""

        async def find(path: bytes, attributes: bytes) -> None:
            if self.wants is None or self.wants(path):
                on_found(size_of(attributes))

        await self._filesystem.walk(await self._filesystem.find(path), is_tree=True, on_file=find)

    def _start(self, node: Node, *, is_tree: bool) -> None:
        if (node.inode, is_tree) not in self._walked:
            self._walked.add((node.inode, is_tree))
            log.info("prefetching path=%r tree=%s", node.path, is_tree)
            self._nursery.start_soon(self._walk_in_turn, node, is_tree)

    async def _walk_in_turn(self, node: Node, is_tree: bool) -> None:
        async with self._walks:
            try:
                await self._fetch(node, is_tree=is_tree)
            except OSError as error:
                log.info("prefetching ends path=%r error=%r", node.path, error.strerror)

    async def _fetch(
        self,
        node: Node,
        *,
        is_tree: bool,
        on_done: Callable[[bytes, int, str], None] | None = None,
    ) -> None:
        sending, receiving = trio.open_memory_channel[File](_FILES_AHEAD)
        failures: list[OSError] = []

        async def hand_on(path: bytes, attributes: bytes) -> None:
            if self.wants is None or self.wants(path):
                await sending.send((path, attributes))

        async def find() -> None:
            async with sending:
                try:
                    await self._filesystem.walk(node, is_tree=is_tree, on_file=hand_on)
                except OSError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(find)
            await self._prefetch.fetch_all(receiving, on_done)
            nursery.cancel_scope.cancel()  # scratch is full: no more need be found
        if failures:
            raise failures[0]
