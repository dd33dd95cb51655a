"""Whether what lies in scratch is what the index says: every complete file is read and its checksum compared.

It works while mounts use the scratch: a file that comes or goes meanwhile is no fault, and what a mount has not
recorded yet is counted as unchecked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Event

from cachefs.cache.copying import checksum_of
from cachefs.cache.index import IndexReader, Recorded
from cachefs.cache.storage import Storage
from cachefs.errors import StorageError, describe

_FILES_A_JOB = 64
_BYTES_A_JOB = 64 * 1024 * 1024
_THREADS = max(4, os.cpu_count() or 1)
"""Reading a file and summing it up hold no lock of the interpreter's, and disks like several readers."""

DAMAGED = "its content is not what was fetched"
WRONG_SIZE = "its size is not what was fetched"
STALE = "it is from before the machine's last boot, and nothing says what it should hold"
MISSING = "the index knows it, and it is not there"
STRANGE = "it is not a regular file"


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a file in scratch. `size` is what it counts as at least, in bytes, None if it was
    never counted; `path` is that of the source, or where in scratch it lies."""

    name: bytes
    boot: str
    size: int | None
    path: bytes
    what: str


@dataclass
class Checked:
    """Counts of one verification; sizes in bytes. `unchecked` are files without a recorded checksum."""

    files: int = 0
    bytes: int = 0
    unchecked: int = 0


Found = tuple[bytes, str, int | None]
"""(name, boot, size in bytes) of a file in scratch; the size of what is none is None."""


class Verification:
    """Compares `storage` with what the `index` says of it. Of a dataset of any size a few batches are in memory."""

    def __init__(self, storage: Storage, index: IndexReader) -> None:
        self._storage = storage
        self._index = index
        self._stopped = Event()
        self._faulty: set[bytes] = set()
        self.checked = Checked()

    def run(self, on_progress: Callable[[Checked], None]) -> Iterator[Fault]:
        """What is wrong, as it is found, but for what is missing. `on_progress` is called now and then."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
            try:
                batches = _batches(self._storage.scan_all())

                def submit(most: int) -> list[Future[tuple[list[Fault], Checked]]]:
                    return [
                        pool.submit(self._check_all, batch, self._recorded(batch)) for batch in islice(batches, most)
                    ]

                waiting = submit(2 * _THREADS)
                while waiting:
                    faults, checked = waiting.pop(0).result()
                    waiting += submit(1)
                    self.checked.files += checked.files
                    self.checked.bytes += checked.bytes
                    self.checked.unchecked += checked.unchecked
                    yield from faults
                    on_progress(self.checked)
            finally:
                self._stopped.set()

    def missing(self) -> list[Fault]:
        """What is recorded and not there."""
        return [
            _fault(name, record.boot, None, MISSING, record)
            for name, record in self._index
            if name not in self._faulty and not (self._storage.has(name, record.boot) or self._storage.has(name))
        ]

    def _recorded(self, files: list[Found]) -> dict[bytes, Recorded]:
        return self._index.of([name for name, _, _ in files])

    def _check_all(self, files: list[Found], recorded: Mapping[bytes, Recorded]) -> tuple[list[Fault], Checked]:
        faults, checked = [], Checked()
        for name, boot, size in files:
            if self._stopped.is_set():
                break
            record = known = recorded.get(name)
            if record is not None and record.boot != boot and boot != self._storage.boot:
                record = None  # left over: another copy has taken its place
            what = STRANGE if size is None else self._check(name, boot, size, record)
            if what is not None:
                self._faulty.add(name)
                faults.append(_fault(name, boot, size, what, known))
            if size is None:
                continue
            checked.files += 1
            checked.bytes += size
            checked.unchecked += what is None and (record is None or not record.checksum)
        return faults, checked

    def _check(self, name: bytes, boot: str, size: int, record: Recorded | None) -> str | None:
        """What is wrong with a file, None if nothing is."""
        if record is None:
            return None if boot == self._storage.boot else STALE
        if size != record.size:
            return WRONG_SIZE
        if not record.checksum:
            return None
        try:
            fd = self._storage.open_earlier(name, boot)
        except StorageError as error:
            return f"it cannot be opened: {describe(error)}"
        if fd is None:
            return None  # evicted since
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NOREUSE)
            return None if checksum_of(fd) == record.checksum else DAMAGED
        except OSError as error:
            return f"it cannot be read: {describe(error)}"
        finally:
            os.close(fd)


def _fault(name: bytes, boot: str, size: int | None, what: str, record: Recorded | None) -> Fault:
    if record is None:
        return Fault(name, boot, size, f"files/{boot}/{name.hex()[:2]}/{name.hex()}".encode(), what)
    return Fault(name, boot, min(record.size, size or 0), record.path, what)


def _batches(files: Iterable[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file[2] or 0
        if len(batch) >= _FILES_A_JOB or size >= _BYTES_A_JOB:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
