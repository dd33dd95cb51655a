"""The jobs that a worker process does on scratch: copy a file from the source, check an earlier copy, remove files.

Invariants:
- The version of the source file is checked after each chunk is read and before it is written. So what lies below the
  frontier is of one version, and so is the complete file.
- A staged file becomes a complete one by rename, after everything else.
- A chunk is read by a second thread while the one before it is checked, written and summed: the source never waits
  for scratch. For one small file a thread costs more than it gives; such a file is one chunk.

The kernel's own copy is not used. Every copy needs its checksum, and that costs 1.1 us of a file of 110 KB while it is
in memory; a kernel's copy would have to be read again. From the page cache to tmpfs, us a file (medians of
benchmarks/results/fetching.json): read, sum, write 56.8; copy_file_range and sum 66.2; copy_file_range or sendfile
alone 56.1 and 56.4. For 4 KB: 11.7; 13.2; 11.2 and 11.4. So the kernel would win 1% of a copy that is never checked (4%
of a small one), and loses 16% with its checksum (14%).
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import xxhash

from cachefs.cache.storage import IN_USE, Storage, storage_errors
from cachefs.cache.tiers import SCRATCH
from cachefs.errors import ChangedCopyError, SourceChangedError, StorageError
from cachefs.source.attributes import is_same_content, mtime_of, pack_stat, size_of, version_of
from cachefs.source.handlers import file_errors, open_version, read_exactly
from cachefs.source.tree import SourceTree
from cachefs.workers.protocol import Handler, describe_error

SMALL_FILE_BYTES = 256 * 1024
"""Up to this size a file is one chunk."""
_PIECE_BYTES = 512 * 1024  # of a read; chunks are of one piece at first
_LARGEST_CHUNK_BYTES = 4 * 1024 * 1024
_CHUNK_SECONDS = 0.1  # chunks grow while they take less than this, so that a slow source still shows progress
_CHUNKS_AHEAD = 2
_AHEAD_SECONDS = 0.05
_MOST_AHEAD_BYTES = 1024 * 1024
"""8 windows: from 9 requests under way on, FUSE in the kernel skips read-ahead, and reads parts of it twice then."""
_WINDOW_BYTES = 128 * 1024  # the kernel's read-ahead on FUSE; on other file systems it is this or more
_PROGRESS_SECONDS = 0.002
_STANDSTILL_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  # seconds between looks at a copy that another mount makes

COPIED, FOUND, REVIVED, DROPPED = "copied", "found", "revived", "dropped"
"""How a fetch ended: copied from the source; another mount had it; a copy that was doubted proved whole; or did not,
so that it was dropped and nothing was copied."""

MOVED = "moved"

FetchResult = tuple[str, bytes, int]
"""(how it ended; checksum, or b"" where it is not known; bytes read from the source, or of the dropped copy; where it
was found, the number of the tier)."""
MoveResult = tuple[str, int]
"""(MOVED, or why it was not; what Storage.remove said of it where it was)."""


class _NotWhole(Exception):
    """A copy is not what was written."""


def checksum_of(fd: int) -> bytes:
    """XXH3-64 of a whole file, 8 bytes."""
    digest = xxhash.xxh3_64()
    offset = 0
    while chunk := os.pread(fd, _LARGEST_CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.digest()


class CopyHandlers:
    """The handlers of one worker process."""

    def __init__(
        self, tree: SourceTree, storages: Sequence[Storage], memory_room: Callable[[], int] = lambda: 1
    ) -> None:
        """`storages` are scratch's and those of other tiers, by their numbers; `memory_room` is below 0 where memory is
        needed otherwise."""
        self._memory_room = memory_room
        self._tree = tree
        self._storages = storages
        self._storage = storages[SCRATCH]

    def table(self) -> Mapping[str, Handler]:
        return {"fetch": self._fetch, "fetch_many": self._fetch_many, "remove": self._remove, "move": self._move}

    def _fetch(
        self, name: bytes, path: bytes, version: bytes, earlier_boot: str, earlier_checksum: bytes, tier: int = SCRATCH
    ) -> Generator[int, None, FetchResult]:
        """Bring `path` of `version` into a tier as `name`; yield the frontier (0 once the source file is open).

        Whatever the tier, the name's lock in scratch's staging is held. With an `earlier_boot` it is only looked if
        the copy of that boot is good (this one's: one that changed).
        """
        pause = _FIRST_PAUSE
        frontier, moved_at = -1, time.monotonic()
        while (lock := self._storage.stage(name)) is None:
            reached = max(storage.frontier(name) for storage in self._storages)  # whatever tier it goes to
            if reached > frontier:
                frontier, moved_at = reached, time.monotonic()
                yield frontier
            elif time.monotonic() - moved_at > _STANDSTILL_SECONDS:  # the other mount is stopped, say
                raise StorageError(errno.EBUSY, "another mount's copy stands still", name.hex())
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        try:
            if earlier_boot != self._storage.boot:
                for number, storage in enumerate(self._storages):
                    if storage.has(name):
                        self._storage.discard_held(name)
                        return FOUND, b"", number
            if earlier_boot:
                try:
                    return self._revive(name, version, earlier_boot, earlier_checksum)
                finally:
                    self._storage.discard_held(name)
            with self._staged(name, lock, tier) as staged:
                checksum = yield from self._copy(staged, name, path, version, tier)
                _mark(staged, version)
            return COPIED, checksum, size_of(version)
        finally:
            os.close(lock)

    @contextmanager
    def _staged(self, name: bytes, lock: int, tier: int) -> Iterator[int]:
        """The staged file of a tier for a block, at whose end it is complete. `lock` is that of scratch, staged."""
        storage = self._storages[tier]
        try:
            staged = lock if tier == SCRATCH else storage.stage(name)
            if staged is None:
                raise StorageError(errno.EBUSY, "another mount's copy is on its way", name.hex())
            try:
                yield staged
                storage.commit(name)
            except BaseException:
                storage.discard_held(name)
                raise
            finally:
                if staged != lock:
                    os.close(staged)
        finally:
            if tier != SCRATCH:
                self._storage.discard_held(name)

    def _fetch_many(
        self, files: list[tuple[bytes, bytes, bytes, int]]
    ) -> Generator[tuple[int, FetchResult | None, tuple[str, int, str, str | bytes] | None], None, None]:
        """Bring small files, each (name, path, version, tier), into scratch; yield of each (number, result, error)."""
        for number, (name, path, version, tier) in enumerate(files):
            fetch = self._fetch(name, path, version, "", b"", tier)
            try:
                while True:
                    next(fetch)
            except StopIteration as end:
                yield number, end.value, None
            except OSError as error:
                yield number, None, describe_error(error)

    def _revive(self, name: bytes, version: bytes, boot: str, checksum: bytes) -> FetchResult:
        """Take over a copy from before the last boot, or one that changed, if its content is what was written.

        Else it is dropped.
        """
        if self._is_whole(name, version, boot, checksum):
            self._storage.adopt(name, boot)
            return REVIVED, checksum, 0
        return DROPPED, b"", size_of(version) if self._storage.drop(name, boot) else 0

    def _is_whole(self, name: bytes, version: bytes, boot: str, checksum: bytes) -> bool:
        try:
            fd = self._storage.open_earlier(name, boot)
        except ChangedCopyError:
            return False
        if fd is None:
            return False
        try:
            with storage_errors(name):
                if os.fstat(fd).st_size != size_of(version) or checksum_of(fd) != checksum:
                    return False
                _mark(fd, version)
                return True
        finally:
            os.close(fd)

    def _copy(self, staged: int, name: bytes, path: bytes, version: bytes, tier: int) -> Generator[int, None, bytes]:
        size = size_of(version)
        if size <= SMALL_FILE_BYTES:
            return self._copy_small(staged, name, path, version, size)
        with file_errors(path):
            source, before = open_version(self._tree, path, version)
        try:
            return (yield from self._copy_large(source, before, staged, name, path, size, tier))
        finally:
            os.close(source)

    def _copy_small(self, staged: int, name: bytes, path: bytes, version: bytes, size: int) -> bytes:
        """One chunk. The version is asked for once, after reading: each question costs a round trip to the source."""
        with file_errors(path):
            source = self._tree.open(path)
            try:
                data = read_exactly(source, 0, size)
                if version_of(pack_stat(os.fstat(source))) != version or len(data) != size:
                    raise SourceChangedError(path)
            finally:
                os.close(source)
        with storage_errors(name):
            _write_all(staged, data, 0)
        return xxhash.xxh3_64_digest(data)

    def _copy_large(
        self, source: int, before: bytes, staged: int, name: bytes, path: bytes, size: int, tier: int
    ) -> Generator[int, None, bytes]:
        yield 0
        digest = xxhash.xxh3_64()
        frontier = 0
        said_at = time.monotonic()
        with _Reader(source, size) as chunks:
            for chunk, length in chunks:
                with file_errors(path):
                    if isinstance(chunk, OSError):
                        raise chunk
                    self._check_unchanged(source, before, path, chunk is None or len(chunk) == length)
                with storage_errors(name):
                    if tier != SCRATCH and self._memory_room() < 0:
                        raise OSError(errno.ENOSPC, "the memory is needed otherwise")
                    if chunk is None:
                        os.ftruncate(staged, frontier + length)
                        for start in range(0, length, len(_ZEROS)):
                            digest.update(_ZEROS[: min(len(_ZEROS), length - start)])
                    else:
                        _write_all(staged, chunk, frontier)
                        digest.update(chunk)
                frontier += length
                if time.monotonic() - said_at > _PROGRESS_SECONDS:
                    yield frontier
                    said_at = time.monotonic()
        return digest.digest()

    @staticmethod
    def _check_unchanged(source: int, before: bytes, path: bytes, is_complete: bool) -> None:
        if not (is_complete and is_same_content(before, pack_stat(os.fstat(source)))):
            raise SourceChangedError(path)

    def _remove(self, files: list[tuple[bytes, str]]) -> Generator[int, None, list[int]]:
        """Remove complete files, each (name, boot); what Storage.remove says of each."""
        yield from ()
        return [_remove_one(self._storage, name, boot) for name, boot in files]

    def _move(
        self, files: list[tuple[bytes, bytes, bytes]], origin: int, target: int
    ) -> Generator[MoveResult, None, None]:
        """Move complete files, each (name, version, checksum or b""), from one tier to another; yield of each."""
        for name, version, checksum in files:
            try:
                how = self._copy_over(name, version, checksum, self._storages[origin], target)
            except StorageError as error:
                how = str(error)
            is_to_go = how in (MOVED, FOUND, DROPPED)
            yield how, _remove_one(self._storages[origin], name) if is_to_go else IN_USE

    def _copy_over(self, name: bytes, version: bytes, checksum: bytes, origin: Storage, target: int) -> str:
        """Make a complete file one of another tier as well: MOVED; FOUND if it is; DROPPED if it is not whole."""
        if origin.is_shown(name, origin.boot):
            return "promoted"
        lock = self._storage.stage(name)
        if lock is None:
            return "on its way"
        try:
            source = origin.open(name)
            try:
                if source is None or self._storages[target].has(name):
                    self._storage.discard_held(name)
                    return FOUND
                with storage_errors(name), suppress(_NotWhole), self._staged(name, lock, target) as staged:
                    offset, digest = 0, xxhash.xxh3_64()
                    while chunk := os.pread(source, _LARGEST_CHUNK_BYTES, offset):
                        _write_all(staged, chunk, offset)
                        digest.update(chunk)
                        offset += len(chunk)
                    if offset != size_of(version) or (checksum and digest.digest() != checksum):
                        raise _NotWhole
                    _mark(staged, version)
                    return MOVED
                return DROPPED
            finally:
                if source is not None:  # with it goes its lock, which would keep the file from being removed for ever
                    os.close(source)
        finally:
            os.close(lock)


def _remove_one(storage: Storage, name: bytes, boot: str | None = None) -> int:
    """What Storage.remove says."""
    try:
        return storage.remove(name, boot)
    except StorageError:
        return IN_USE  # it stays, and stays counted


_ZEROS = bytes(1024 * 1024)


def _mark(fd: int, version: bytes) -> None:
    """Give a copy its source's mtime, by which it is known as unchanged."""
    mtime_ns = mtime_of(version)
    with suppress(OSError):  # a file system that cannot have it: then each open has the checksum compared
        os.utime(fd, ns=(mtime_ns, mtime_ns))


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


class _Reader:
    """Reads a large file ahead in a thread. Iterating gives (its bytes, length), or (None, length) for a hole."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._chunks: queue.Queue[tuple[memoryview | OSError | None, int] | None] = queue.Queue(_CHUNKS_AHEAD)
        self._stopped = False
        self._asked = self._got = 0
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._read_all, name="source reader")

    def __enter__(self) -> Iterator[tuple[memoryview | OSError | None, int]]:
        self._thread.start()
        return iter(self._chunks.get, None)

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._chunks.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _read_all(self) -> None:
        try:
            for start, end, is_hole in _extents(self._fd, self._size):
                if is_hole:
                    self._chunks.put((None, end - start))
                    continue
                offset, length = start, _PIECE_BYTES
                while offset < end and not self._stopped:
                    length = min(length, end - offset)
                    began = time.monotonic()
                    self._chunks.put((self._read_chunk(offset, length), length))
                    # the staged copy has these pages as well
                    _advise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
                    offset += length
                    if time.monotonic() - began < _CHUNK_SECONDS:
                        length = min(2 * length, _LARGEST_CHUNK_BYTES)
        except OSError as error:
            self._chunks.put((error, 0))
        finally:
            self._chunks.put(None)

    def _read_chunk(self, offset: int, length: int) -> memoryview:
        """`length` bytes, or fewer where the file ends before them."""
        chunk = memoryview(bytearray(length))
        got = 0
        while got < length:
            self._ask_ahead(offset + got)
            count = os.preadv(self._fd, [chunk[got : got + _PIECE_BYTES]], offset + got)
            if not count:
                break
            got += count
            self._got += count
        return chunk[:got]

    def _ask_ahead(self, offset: int) -> None:
        """Have the kernel ask for more at once than its own read-ahead would: what keeps a source with latency busy.

        As much as has come in 50 ms on the average: enough to fill the source's pipe, and what a reader of another
        part of the file has to wait behind. The kernel takes one read-ahead window of each advice at the most.
        """
        rate = self._got / max(time.monotonic() - self._started, 1e-3)
        ahead = min(max(_PIECE_BYTES, int(rate * _AHEAD_SECONDS)), _MOST_AHEAD_BYTES)
        for start in range(max(offset, self._asked), min(offset + ahead, self._size), _WINDOW_BYTES):
            _advise(self._fd, start, _WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
            self._asked = start + _WINDOW_BYTES


def _advise(fd: int, offset: int, length: int, advice: int) -> None:
    with suppress(OSError):  # it is advice: a file system may not know it
        os.posix_fadvise(fd, offset, length, advice)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is it a hole) over a whole file; one extent where the source cannot tell."""
    offset = 0
    while offset < size:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), size)
        except OSError as error:
            data = size if error.errno == errno.ENXIO else offset
        if data > offset:
            yield offset, data, True
        if data >= size:
            return
        try:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), size)
        except OSError:
            hole = size
        if hole <= data:
            hole = size
        yield data, hole, False
        offset = hole
