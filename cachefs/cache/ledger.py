"""How much of scratch is taken: one small file that all mounts of a scratch read and change under a lock.

Invariants:
- stored + reserved bytes never exceed the capacity of the mount that reserves; space is reserved before the first
  byte is written and becomes stored when the file is complete.
- A crash at any point leaves a count that is too high, never one that is too low: a dead mount's reservations count
  as stored until the next mount without company counts afresh.
- The lock is held for some microseconds, and the kernel releases it when its holder dies. SQLite is not involved,
  so a locked index does not hold up a reader.
- A ledger that cannot be read, or is not what was written, counts as full until a mount without company counts afresh.
  It is not mapped: what a failing disk cannot bring, or somebody has cut off, would end the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import struct
from collections.abc import Collection, Iterator

from cachefs.errors import CachefsError

_HEADER = struct.Struct("<8sqq32sBB")  # magic, stored bytes, stored files, boot of the clean end, clean?, too high?
_MAGIC = b"cfsledg1"
_SLOTS_AT = 64
_SLOT = struct.Struct("<16sq")  # lease id, reserved bytes
_SLOTS = 64
_RESERVED = struct.Struct("<" + "16xq" * _SLOTS)  # of all slots
_BYTES = _SLOTS_AT + _SLOTS * _SLOT.size
_FULL = 1 << 62
_EMPTY = _MAGIC.ljust(_BYTES, b"\0")
_UNREADABLE = _HEADER.pack(_MAGIC, _FULL, 0, b"", 0, 1).ljust(_BYTES, b"\0")


class LedgerFullError(CachefsError):
    """All slots belong to live mounts."""


class Ledger:
    """One mount's view of the ledger in `scratch_fd`. `lease` is the mount's id (up to 16 ASCII characters)."""

    def __init__(self, scratch_fd: int, lease: str, boot: str) -> None:
        self._fd = os.open("ledger", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=scratch_fd)
        self._lease = lease.encode()
        self._boot = boot.encode()
        self._slot = -1

    def join(self, live: Collection[str]) -> bool:
        """Take a slot. `live` are the ids of the other live mounts. True if the stored count may be trusted.

        It may not where this mount is alone and the last one before it did not end in order during this boot.
        """
        known = {lease.encode() for lease in live}
        with self._locked():
            content = self._content()
            if content is _UNREADABLE:  # or new: alone it is counted afresh, with company it stays full
                content = _UNREADABLE if known else _EMPTY
                self._renew(content)
            _, stored, files, boot, clean, too_high = _HEADER.unpack_from(content)
            trusted = bool(known) or (bool(clean) and boot.rstrip(b"\0") == self._boot)
            for number, (lease, reserved) in enumerate(self._slots()):
                if lease and lease not in known:
                    stored += reserved
                    too_high |= 1
                    self._write_slot(number, b"", 0)
                    lease = b""
                if not lease and self._slot < 0:
                    self._slot = number
            if self._slot < 0:
                raise LedgerFullError(f"{_SLOTS} mounts use this scratch already", "choose another with --scratch")
            self._write_header(stored, files, too_high=too_high)
            self._write_slot(self._slot, self._lease, 0)
        return trusted

    def leave(self, *, clean: bool) -> None:
        """Give the slot back. `clean` says that no other mount is left and that this one has counted right."""
        with self._locked():
            if (content := self._content()) is not _UNREADABLE:
                self._write_slot(self._slot, b"", 0)
                _, stored, files, _, _, too_high = _HEADER.unpack_from(content)
                clean = clean and not too_high and not any(lease for lease, _ in self._slots())
                self._write_header(stored, files, boot=self._boot if clean else b"", clean=clean, too_high=too_high)
        self.close()

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    @property
    def is_doubted(self) -> bool:
        """Whether the count may be too high, so that the next mount without company counts afresh."""
        return bool(_HEADER.unpack_from(self._content())[-1])

    def doubt(self) -> None:
        """The count may be wrong: have the next mount without company count afresh."""
        with self._locked():
            if (content := self._content()) is not _UNREADABLE:
                _, stored, files, *_ = _HEADER.unpack_from(content)
                self._write_header(stored, files, too_high=1)

    def set_stored(self, size: int, files: int) -> None:
        """The count, freshly made while no other mount is there."""
        with self._locked():
            self._write_header(size, files)

    def reset(self, size: int, files: int) -> None:
        """The count, freshly made while no mount is there at all: nothing is reserved."""
        with self._locked():
            self._renew(_EMPTY)
            self._write_header(size, files)

    def stored(self) -> tuple[int, int]:
        """(bytes, files) that are complete in scratch."""
        _, size, files, *_ = _HEADER.unpack_from(self._content())
        return size, files

    def reserved(self) -> int:
        """Bytes reserved by all mounts."""
        return sum(_RESERVED.unpack_from(self._content(), _SLOTS_AT))

    def reserve(self, size: int, capacity: int, room: float = math.inf) -> bool:
        """Reserve `size` bytes if everything together stays within `capacity`, and what is reserved within `room`."""
        with self._locked():
            content = self._content()
            stored = _HEADER.unpack_from(content)[1]
            reserved = sum(_RESERVED.unpack_from(content, _SLOTS_AT)) + size
            if stored + reserved > capacity or reserved > room:
                return False
            self._change(content, reserved=size)
        return True

    def release(self, size: int) -> None:
        """Give a reservation back: nothing of it was kept."""
        with self._locked():
            self._change(self._content(), reserved=-size)

    def settle(self, size: int) -> None:
        """Turn a reservation into a stored file."""
        with self._locked():
            self._change(self._content(), stored=size, files=1, reserved=-size)

    def remove(self, size: int, files: int = 1) -> None:
        """Stored files are gone."""
        with self._locked():
            self._change(self._content(), stored=-size, files=-files)

    def _slots(self) -> Iterator[tuple[bytes, int]]:
        for lease, reserved in _SLOT.iter_unpack(self._content()[_SLOTS_AT:]):
            yield lease.rstrip(b"\0"), reserved

    def _write_header(
        self, stored: int, files: int, *, boot: bytes = b"", clean: bool = False, too_high: int = 0
    ) -> None:
        self._write(_HEADER.pack(_MAGIC, stored, files, boot, clean, too_high), 0)

    def _write_slot(self, number: int, lease: bytes, reserved: int) -> None:
        self._write(_SLOT.pack(lease, reserved), _SLOTS_AT + number * _SLOT.size)

    def _change(self, content: bytes, *, stored: int = 0, files: int = 0, reserved: int = 0) -> None:
        """Add to what `content` says, first to what is stored: a crash in between leaves too high a count."""
        if content is _UNREADABLE:
            return
        if files:
            _, size, count, *_ = _HEADER.unpack_from(content)
            self._write(struct.pack("<qq", max(0, size + stored), max(0, count + files)), len(_MAGIC))
        if reserved:
            lease, before = _SLOT.unpack_from(content, _SLOTS_AT + self._slot * _SLOT.size)
            self._write_slot(self._slot, lease, before + reserved)

    def _content(self) -> bytes:
        """All of it; _UNREADABLE for what is not what was written."""
        try:
            content = os.pread(self._fd, _BYTES, 0)
        except OSError:
            return _UNREADABLE
        return content if len(content) == _BYTES and content.startswith(_MAGIC) else _UNREADABLE

    def _renew(self, content: bytes) -> None:
        """Make it anew. Raises OSError."""
        os.ftruncate(self._fd, 0)
        if os.pwrite(self._fd, content, 0) != _BYTES:  # a limit of file sizes, say
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "ledger")

    def _write(self, data: bytes, at: int) -> None:
        with contextlib.suppress(OSError):  # a disk that does not take it cannot be believed later either
            os.pwrite(self._fd, data, at)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
