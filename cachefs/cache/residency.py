"""The in-memory view of a dataset's resident files, and what is to be written to the index behind it.

Invariants:
- The event loop reads and changes the view alone and never waits for SQLite: changes are written in batches, by the
  index's worker, some time later.
- The view may lack a file (another mount fetched it, or the index is still being read) or have one too many (another
  mount evicted it): Storage.open has the last word.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import trio

from cachefs.cache.index import FileRow
from cachefs.cache.storage import KEY_BYTES
from cachefs.source.attributes import size_of
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

_RECORD = struct.Struct("<8sq8sH")  # version digest, size, checksum, number of the boot: 64 bytes a file in memory
FLUSH_SECONDS = 2.0
_ROWS_A_JOB = 200
_BYTES_A_JOB = 64 * 1024


class Resident(NamedTuple):
    """A file that the view knows: its name in storage, size, checksum, and the boot during which it was written."""

    name: bytes
    size: int
    checksum: bytes
    boot: str


class Residency:
    """The view of one dataset. `recency` keeps the order of use, which only an evicting policy needs."""

    def __init__(self, dataset: bytes, boot: str, pool: WorkerPool, *, recency: bool) -> None:
        self.dataset = dataset
        self.loaded = trio.Event()
        self._pool = pool
        self._recency = recency
        self._boots = [boot]
        self._files: dict[bytes, bytes] = OrderedDict() if recency else {}
        self._used_while_loading: dict[bytes, None] | None = {}  # keys; None once the index is read
        self._added: dict[bytes, FileRow] = {}
        self._used: dict[bytes, int] = {}
        self._forgotten: dict[bytes, None] = {}
        self._superseded: list[tuple[bytes, str, int]] = []
        self._unopened: dict[bytes, int] = {}
        self._flushing = trio.Lock()
        self._has_dropped = False
        self.bytes = 0
        """What the files of the view take together."""
        self.has_lost = False
        """Whether the index lacks something for good."""
        self.on_add: Callable[[bytes], None] | None = None
        """Called with the name of each file that has become resident."""

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, path: bytes, version: bytes) -> bytes:
        """The name in storage of the content that `path` has in `version`."""
        key = hashlib.blake2b(path, digest_size=KEY_BYTES, key=self.dataset).digest()
        return key + hashlib.blake2b(version, digest_size=8).digest()

    def get(self, name: bytes) -> Resident | None:
        """What is known of this very version."""
        record = self._files.get(name[:KEY_BYTES])
        if record is None or record[:8] != name[KEY_BYTES:]:
            return None
        return self._resident(name, record)

    def has_any_version(self, path: bytes) -> bool:
        """Whether a copy of `path` is known, of whatever version."""
        return self.name_of(path, b"")[:KEY_BYTES] in self._files

    def touch(self, name: bytes) -> None:
        """`name` was used now."""
        self._unopened.pop(name, None)
        if self._recency:
            self._used[name] = time.time_ns()
            self._make_latest(name[:KEY_BYTES])
        self._note_while_loading(name)

    def add(self, name: bytes, path: bytes, version: bytes, checksum: bytes) -> None:
        """`name` is resident now (written, found or revived during this boot)."""
        size = size_of(version)
        self._replace(name, size, checksum, 0)
        self._forgotten.pop(name, None)
        self._added[name] = name, size, checksum, self._boots[0], path, time.time_ns()
        self._note_while_loading(name)
        if self.on_add is not None:
            self.on_add(name)

    def supersede(self, name: bytes) -> None:
        """The source has `name` now: a copy of another version of that file is the first to go."""
        record = self._files.get(name[:KEY_BYTES])
        if record is not None and record[:8] != name[KEY_BYTES:]:
            self._take_out(name[:KEY_BYTES])
            self._note_superseded(name[:KEY_BYTES], record)

    def discard(self, name: bytes) -> None:
        """`name` is resident no more."""
        record = self._files.get(name[:KEY_BYTES])
        if record is not None and record[:8] == name[KEY_BYTES:]:
            self._take_out(name[:KEY_BYTES])
        self._added.pop(name, None)
        self._used.pop(name, None)
        self._unopened.pop(name, None)
        self._forgotten[name] = None

    def note_ahead(self, name: bytes, size: int) -> None:
        """`name` was fetched ahead of use: until it is opened, it gives way to what is asked for."""
        self._unopened[name] = size

    def take_unopened(self, size: int) -> list[tuple[bytes, str, int]]:
        """(name, boot, size) of what was fetched ahead last and not opened yet, `size` bytes of it or a little more."""
        taken: list[tuple[bytes, str, int]] = []
        while self._unopened and size > 0:
            name, length = self._unopened.popitem()
            taken.append((name, self._boots[0], length))
            size -= length
        return taken

    def take_superseded(self) -> list[tuple[bytes, str, int]]:
        """(name, boot, size) of copies whose file has a newer version by now: the first to evict."""
        taken, self._superseded = self._superseded, []
        return taken

    def put_back_superseded(self, files: list[tuple[bytes, str, int]]) -> None:
        self._superseded.extend(files)

    def oldest(self) -> Iterator[Resident]:
        """All files, the least recently used first. Do not change the view meanwhile."""
        for key, record in self._files.items():
            yield self._resident(key + record[:8], record)

    async def load(self, source: bytes) -> None:
        """Read the dataset's files from the index."""
        try:
            await self._pool.run(("load", self.dataset, source), what="index", on_progress=self._load_batch)
        finally:
            for key in self._used_while_loading or ():
                self._make_latest(key)
            self._used_while_loading = None
            self.loaded.set()

    async def write_behind(self) -> None:
        """Write changes to the index, for ever, in batches."""
        while True:
            await trio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what is not written yet. What cannot be written is logged and dropped: the file itself is there."""
        async with self._flushing:
            self.has_lost = True  # until all of it is written: this may be cancelled
            self.has_lost = not await self._flush()

    async def _flush(self) -> bool:
        """Whether everything could be written."""
        is_complete = not self._has_dropped
        added, self._added = list(self._added.values())[::-1], {}
        used, self._used = [(at, name) for name, at in self._used.items()], {}
        forgotten, self._forgotten = list(self._forgotten), {}
        while added or used or forgotten:
            gone, forgotten = forgotten[:_ROWS_A_JOB], forgotten[_ROWS_A_JOB:]
            rows: list[FileRow] = []
            uses: list[tuple[int, bytes]] = []
            if not forgotten:  # what is forgotten goes first: a file may have come back since
                taken = 0
                while added and len(rows) < _ROWS_A_JOB and taken < _BYTES_A_JOB:
                    rows.append(added.pop())
                    taken += len(rows[-1][4]) + 100
                if not added:
                    uses, used = used[:_ROWS_A_JOB], used[_ROWS_A_JOB:]
            try:
                await self._pool.run(("record", self.dataset, rows, uses, gone), what="index")
            except OSError as error:
                log.warning("index not written files=%d error=%s", len(rows), error)
                self._has_dropped = True
                is_complete = False
        return is_complete

    def _load_batch(self, batch: list[tuple[bytes, int, bytes, str]]) -> None:
        for name, size, checksum, boot in batch:
            key = name[:KEY_BYTES]
            if self._used_while_loading and key in self._used_while_loading:  # what has come since is newer
                if self.get(name) is None:
                    self._superseded.append((name, boot, size))
                continue
            if boot not in self._boots:
                self._boots.append(boot)
            self._replace(name, size, checksum, self._boots.index(boot))

    def _note_while_loading(self, name: bytes) -> None:
        if self._used_while_loading is not None:
            self._used_while_loading.pop(name[:KEY_BYTES], None)
            self._used_while_loading[name[:KEY_BYTES]] = None

    def _make_latest(self, key: bytes) -> None:
        if isinstance(self._files, OrderedDict) and key in self._files:
            self._files.move_to_end(key)

    def _note_superseded(self, key: bytes, record: bytes) -> None:
        old = self._resident(key + record[:8], record)
        self._superseded.append((old.name, old.boot, old.size))

    def _replace(self, name: bytes, size: int, checksum: bytes, boot: int) -> None:
        key = name[:KEY_BYTES]
        before = self._take_out(key)
        if before is not None and before[:8] != name[KEY_BYTES:]:
            self._note_superseded(key, before)
        self._files[key] = _RECORD.pack(name[KEY_BYTES:], size, checksum.ljust(8, b"\0"), boot)
        self.bytes += size

    def _take_out(self, key: bytes) -> bytes | None:
        record = self._files.pop(key, None)
        if record is not None:
            self.bytes -= int(_RECORD.unpack(record)[1])
        return record

    def _resident(self, name: bytes, record: bytes) -> Resident:
        _, size, checksum, boot = _RECORD.unpack(record)
        return Resident(name, size, checksum if any(checksum) else b"", self._boots[boot])
