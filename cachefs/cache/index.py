"""Residency in SQLite: which complete files are in scratch, of which version, with which checksum.

It is opened by one worker process of each mount (WAL: many mounts may share it), never by the event loop. The file
system under files/ says whether a copy is there; the index says what it should contain, whose it is and when it was
last used. So a lost or locked index costs time, never a wrong byte.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from cachefs.cache.storage import NAME_BYTES, Storage
from cachefs.errors import StorageError
from cachefs.workers.protocol import PACKET_BYTES, Handler

_before = {name: sys.modules.get(name) for name in ("numpy", "pandas")}
try:
    # sqlite_utils imports them where they are installed, as they are where people train, and makes no use of them here:
    # some 100 ms, 30 MB and OpenBLAS's threads for every daemon
    for _name in _before:
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]
    import sqlite_utils
    from sqlite_utils.migrations import Migrations
finally:
    for _name, _module in _before.items():
        if _module is None:
            del sys.modules[_name]

BUSY_SECONDS = 60.0
"""How long to wait for another mount's transaction."""
_ROWS_A_MESSAGE = 1000
_VICTIMS_A_MESSAGE = 500
_ROW_BYTES = 150  # in a message, without the path


class IndexDamagedError(StorageError):
    """What lies there is no database, or one with faults."""


class Recorded(NamedTuple):
    """What is recorded of one file: `checksum` and `path` (of the source) are b"" where they are not known."""

    size: int
    checksum: bytes
    boot: str
    path: bytes


_OF_ANOTHER_VERSION = "its tables are of another version of cachefs"
_COLUMNS = {"name", "dataset", "size", "checksum", "boot", "path", "last_used"}

_IS_SOUND = (
    f"typeof(name) = 'blob' AND length(name) = {NAME_BYTES} AND typeof(size) = 'integer' AND size BETWEEN 0 AND 1 << 60"
    " AND typeof(ifnull(checksum, x'')) = 'blob' AND length(ifnull(checksum, x'')) IN (0, 8)"
    " AND typeof(boot) = 'text' AND length(boot) = 32 AND boot NOT GLOB '*[^0-9a-f]*'"
    " AND typeof(ifnull(path, x'')) = 'blob' AND typeof(files.last_used) = 'integer'"
)
"""Of a row of files: SQLite holds values of any type in any column, and what a damaged page holds is anything."""

FileRow = tuple[bytes, int, bytes, str, bytes, int]
"""What is recorded of a file: (name, size in bytes, checksum, boot, path, last use in ns since the epoch)."""

migrations = Migrations("cachefs")


@migrations()
def create_tables(db: sqlite_utils.Database) -> None:
    db["datasets"].create(  # type: ignore[union-attr]
        {"id": bytes, "source": bytes, "last_used": int}, pk="id", not_null={"source", "last_used"}
    )
    files = db["files"].create(  # type: ignore[union-attr]
        {
            "name": bytes,  # key of the path (16 bytes), version (8 bytes)
            "dataset": bytes,  # of datasets, or NULL for a file that was found and never asked for since
            "size": int,
            "checksum": bytes,  # XXH3-64 of the content, or NULL
            "boot": str,
            "path": bytes,  # relative to the source
            "last_used": int,  # ns since the epoch
        },
        pk="name",
        not_null={"size", "boot", "last_used"},
    )
    files.create_index(["dataset", "last_used"])


class IndexReader:
    """The index at `path` for who only looks at it, while mounts write to it; nothing, without a path or an index.

    Raises IndexDamagedError, and StorageError for one that cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._connection: sqlite3.Connection | None = None
        if path is not None and _is_linked(path):
            raise IndexDamagedError(errno.ELOOP, "it is a symbolic link", "index.db")
        if path is None or not path.exists():
            return
        uri = f"file:{quote(os.fspath(path))}?mode=ro"
        with _index_errors(), ExitStack() as failing:
            connection = failing.enter_context(closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)))
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            if _columns(connection, "files") != _COLUMNS:
                raise sqlite3.DatabaseError(_OF_ANOTHER_VERSION)
            (unsound,) = connection.execute(f"SELECT count(*) FROM files WHERE NOT ({_IS_SOUND})").fetchone()
            if unsound:
                raise sqlite3.DatabaseError(f"{unsound} rows cannot be what was written")
            failing.pop_all()
            self._connection = connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def of(self, names: Sequence[bytes]) -> dict[bytes, Recorded]:
        """What is recorded of those of `names` that are known."""
        found: dict[bytes, Recorded] = {}
        for start in range(0, len(names), _ROWS_A_MESSAGE):
            part = names[start : start + _ROWS_A_MESSAGE]
            found.update(self._select(f"name IN ({','.join('?' * len(part))})", *part))
        return found

    def __iter__(self) -> Iterator[tuple[bytes, Recorded]]:
        """All that is recorded, by name. No transaction is held on to: the index would grow with each of a mount's."""
        last = b""
        while rows := self._select("name > ? ORDER BY name LIMIT ?", last, _ROWS_A_MESSAGE):
            yield from rows
            last = rows[-1][0]

    def _select(self, where: str, *values: object) -> list[tuple[bytes, Recorded]]:
        if self._connection is None:
            return []
        with _index_errors():
            rows = self._connection.execute(
                "SELECT name, size, ifnull(checksum, x''), boot, ifnull(path, x''),"
                " iif(typeof(source) = 'blob', source, x'')"
                f" FROM files LEFT JOIN datasets ON dataset = id WHERE {where}",
                values,
            ).fetchall()
        return [
            (name, Recorded(size, checksum, boot, os.path.join(source, path) if source else path))
            for name, size, checksum, boot, path, source in rows
        ]


def forget_files(path: Path, names: Sequence[bytes]) -> None:
    """Take files out of the index at `path`, if there is one. Raises as IndexReader does."""
    if path.exists():
        with _index_errors(), closing(Index(path)) as index:
            index.forget(names)


@contextmanager
def _index_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(errno.EIO, str(error), "index.db") from error
    except sqlite3.DatabaseError as error:
        raise IndexDamagedError(errno.EIO, str(error), "index.db") from error


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}


class Index:
    """The open index of a scratch directory."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.OperationalError for one that cannot be used now, DatabaseError for one that never can."""
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        self._connection = connection
        if _columns(connection, "files") and not _columns(connection, "_sqlite_migrations"):
            raise sqlite3.DatabaseError("its tables were not made by cachefs")
        migrations.apply(sqlite_utils.Database(connection))
        if _columns(connection, "files") != _COLUMNS:
            raise sqlite3.DatabaseError(_OF_ANOTHER_VERSION)

    def close(self) -> None:
        self._connection.close()

    def use_dataset(self, dataset: bytes, source: bytes) -> None:
        with self._transaction() as run:
            run(
                "INSERT INTO datasets (id, source, last_used) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET last_used = excluded.last_used",
                (dataset, source, time.time_ns()),
            )

    def files_of(self, dataset: bytes) -> Iterator[list[tuple[bytes, int, bytes, str]]]:
        """(name, size, checksum, boot) of a dataset's files, least recently used first, in batches."""
        rows = self._connection.execute(
            f"SELECT name, size, ifnull(checksum, x''), boot FROM files WHERE dataset = ? AND {_IS_SOUND}"
            " ORDER BY last_used",
            (dataset,),
        )
        while batch := rows.fetchmany(_ROWS_A_MESSAGE):
            yield batch

    def record(self, dataset: bytes, added: Sequence[FileRow], used: Sequence[tuple[int, bytes]]) -> None:
        """Write what has come since the last time: files that were `added`, and (last use, name) of those `used`."""
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO files (name, size, checksum, boot, path, last_used, dataset) VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET dataset = excluded.dataset, boot = excluded.boot,"
                " size = excluded.size, path = excluded.path, last_used = excluded.last_used,"
                " checksum = ifnull(nullif(excluded.checksum, x''), checksum)",
                [(*row, dataset) for row in added],
            )
            self._connection.executemany("UPDATE files SET last_used = ? WHERE name = ?", used)

    def forget(self, names: Sequence[bytes]) -> None:
        with self._transaction():
            self._connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in names])

    def unused(self, live: Sequence[bytes], after: int, limit: int) -> list[tuple[bytes, str, int, int]]:
        """(name, boot, size, last use) of files that belong to no `live` dataset, the least recently used first.

        `after` (a last use) continues where the last call ended.
        """
        marks = ",".join("?" * len(live))
        return self._connection.execute(
            f"SELECT name, boot, size, last_used FROM files WHERE (dataset IS NULL OR dataset NOT IN ({marks}))"
            f" AND {_IS_SOUND} AND last_used > ? ORDER BY last_used LIMIT ?",
            (*live, after, limit),
        ).fetchall()

    def oldest(self, dataset: bytes, after: int, limit: int) -> list[tuple[bytes, str, int, int, bytes]]:
        """(name, boot, size, last use, path) of a dataset's files, the least recently used first, as `unused`."""
        return self._connection.execute(
            "SELECT name, boot, size, last_used, path FROM files WHERE dataset = ? AND path IS NOT NULL"
            f" AND {_IS_SOUND} AND last_used > ? ORDER BY last_used LIMIT ?",
            (dataset, after, limit),
        ).fetchall()

    def bytes_of(self, datasets: Sequence[bytes]) -> int:
        """What the files of all these take together."""
        marks = ",".join("?" * len(datasets))
        (total,) = self._connection.execute(
            f"SELECT ifnull(sum(size), 0) FROM files WHERE dataset IN ({marks}) AND {_IS_SOUND}", datasets
        ).fetchone()
        return int(total)

    def reconcile(self, storage: Storage) -> tuple[int, int]:
        """Make the index agree with what lies in scratch, when no mount uses it; (bytes, files) that are stored.

        A file that the index does not know is kept only if it was written during this boot (it was renamed into
        place by a mount that died before it could record it, so it is whole); a half-copied one is dropped.
        """
        storage.discard_abandoned()
        known = {
            (name, boot): size
            for name, boot, size in self._connection.execute(f"SELECT name, boot, size FROM files WHERE {_IS_SOUND}")
        }
        found: list[tuple[bytes, int, str, int]] = []
        total = files = 0
        for name, boot, size in storage.scan():
            recorded = known.pop((name, boot), None)
            if recorded == size or (recorded is None and boot == storage.boot):
                total, files = total + size, files + 1
                if recorded is None:
                    found.append((name, size, boot, time.time_ns()))
            else:
                storage.remove(name, boot, is_alone=True)
                if recorded is not None:
                    known[name, boot] = size
        with self._transaction():
            self._connection.execute(f"DELETE FROM files WHERE NOT ({_IS_SOUND})")
            self._connection.executemany("DELETE FROM files WHERE name = ? AND boot = ?", list(known))
            self._connection.executemany(
                "INSERT INTO files (name, size, boot, last_used) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET boot = excluded.boot, size = excluded.size",
                found,
            )
        return total, files

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


_SUFFIXES = ("", "-wal", "-shm", "-journal")


def _is_linked(path: Path) -> bool:
    """Whether SQLite would follow a symbolic link: we have made none."""
    return any(path.with_name(path.name + suffix).is_symlink() for suffix in _SUFFIXES)


def remove_index(path: Path) -> None:
    """Drop a damaged index: it is made anew, and the files on disk tell what they are, but for their checksums."""
    for suffix in _SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class IndexHandlers:
    """The jobs of the index's worker process. The index is opened with the first of them.

    What SQLite cannot do is a StorageError: the mount goes on without its index.
    """

    def __init__(self, path: Path, storage: Storage) -> None:
        self._path = path
        self._storage = storage
        self._opened: Index | None = None

    def table(self) -> Mapping[str, Handler]:
        return {
            "reconcile": self._guarded(self._reconcile),
            "count": self._count,
            "load": self._guarded(self._load),
            "record": self._guarded(self._record),
            "unused": self._guarded(self._unused),
            "oldest": self._guarded(self._oldest),
            "bytes_of": self._guarded(self._bytes_of),
        }

    @property
    def _index(self) -> Index:
        if self._opened is None:
            if _is_linked(self._path):
                self._remove()
            try:
                self._opened = Index(self._path)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._remove()
                self._opened = Index(self._path)
        return self._opened

    def _remove(self) -> None:
        self.close()
        remove_index(self._path)

    def _reconcile(self) -> Generator[Any, None, tuple[int, int]]:
        """Only while no other mount uses the scratch."""
        yield from ()
        return self._index.reconcile(self._storage)

    def _count(self) -> Generator[Any, None, tuple[int, int]]:
        """(bytes, files) in scratch, without the index."""
        yield from ()
        sizes = [size for _, _, size in self._storage.scan()]
        return sum(sizes), len(sizes)

    def _load(self, dataset: bytes, source: bytes) -> Generator[Any, None, None]:
        self._index.use_dataset(dataset, source)
        yield from self._index.files_of(dataset)

    def _record(
        self, dataset: bytes, added: list[FileRow], used: list[tuple[int, bytes]], forgotten: list[bytes]
    ) -> Generator[Any, None, None]:
        yield from ()
        if forgotten:
            self._index.forget(forgotten)
        self._index.record(dataset, added, used)

    def _unused(self, live: list[bytes], after: int) -> Generator[Any, None, list[tuple[bytes, str, int, int]]]:
        yield from ()
        return self._index.unused(live, after, _VICTIMS_A_MESSAGE)

    def _oldest(self, dataset: bytes, after: int) -> Generator[Any, None, list[tuple[bytes, str, int, int, bytes]]]:
        yield from ()
        rows, room = self._index.oldest(dataset, after, _VICTIMS_A_MESSAGE), PACKET_BYTES // 2
        for number, row in enumerate(rows):
            room -= len(row[4]) + _ROW_BYTES
            if room < 0:
                return rows[: max(1, number)]
        return rows

    def _bytes_of(self, datasets: list[bytes]) -> Generator[Any, None, int]:
        yield from ()
        return self._index.bytes_of(datasets)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _guarded(self, handler: Handler) -> Handler:
        def run(*arguments: Any) -> Generator[Any, None, Any]:
            try:
                return (yield from handler(*arguments))
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, _NOT_DAMAGE):
                    self._remove()
                raise StorageError(errno.EIO, str(error), "index.db") from error

        return run


_NOT_DAMAGE = (sqlite3.OperationalError, sqlite3.IntegrityError, sqlite3.ProgrammingError)
