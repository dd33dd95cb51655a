"""How much of scratch is taken: one small file that all mounts of a scratch map and change under a lock.

Invariants:
- stored + reserved bytes never exceed the capacity of the mount that reserves; space is reserved before the first
  byte is written and becomes stored when the file is complete.
- A crash at any point leaves a count that is too high, never one that is too low: a dead mount's reservations count
  as stored until the next mount without company counts afresh.
- The lock is held for some microseconds, and the kernel releases it when its holder dies. SQLite is not involved,
  so a locked index does not hold up a reader.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from cachefs.errors import CachefsError

_HEADER = struct.Struct("<8sqq32sBB")  # magic, stored bytes, stored files, boot of the clean end, clean?, too high?
_MAGIC = b"cfsledg1"
_SLOTS_AT = 64
_SLOT = struct.Struct("<16sq")  # lease id, reserved bytes
_SLOTS = 64
_RESERVED = struct.Struct("<" + "16xq" * _SLOTS)  # of all slots
_BYTES = _SLOTS_AT + _SLOTS * _SLOT.size


class LedgerFullError(CachefsError):
    """All slots belong to live mounts."""


class Ledger:
    """One mount's view of the ledger in `scratch_fd`. `lease` is the mount's id (up to 16 ASCII characters)."""

    def __init__(self, scratch_fd: int, lease: str, boot: str) -> None:
        self._fd = os.open("ledger", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=scratch_fd)
        self._lease = lease.encode()
        self._boot = boot.encode()
        self._slot = -1
        with self._locked():
            if os.fstat(self._fd).st_size != _BYTES:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, _BYTES)
            self._map = mmap.mmap(self._fd, _BYTES)
            if self._map[: len(_MAGIC)] != _MAGIC:
                self._map[:] = bytes(_BYTES)
                self._write_header(0, 0)

    def join(self, live: Collection[str]) -> bool:
        """Take a slot. `live` are the ids of the other live mounts. True if the stored count may be trusted.

        It may not where this mount is alone and the last one before it did not end in order during this boot.
        """
        known = {lease.encode() for lease in live}
        with self._locked():
            _, stored, files, boot, clean, too_high = _HEADER.unpack_from(self._map)
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
            self._write_slot(self._slot, b"", 0)
            _, stored, files, _, _, too_high = _HEADER.unpack_from(self._map)
            clean = clean and not too_high and not any(lease for lease, _ in self._slots())
            self._write_header(stored, files, boot=self._boot if clean else b"", clean=clean, too_high=too_high)
        self.close()

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)

    @property
    def is_doubted(self) -> bool:
        """Whether the count may be too high, so that the next mount without company counts afresh."""
        return bool(_HEADER.unpack_from(self._map)[-1])

    def doubt(self) -> None:
        """The count may be wrong: have the next mount without company count afresh."""
        with self._locked():
            stored, files = self.stored()
            self._write_header(stored, files, too_high=1)

    def set_stored(self, size: int, files: int) -> None:
        """The count, freshly made while no other mount is there."""
        with self._locked():
            self._write_header(size, files)

    def reset(self, size: int, files: int) -> None:
        """The count, freshly made while no mount is there at all: nothing is reserved."""
        with self._locked():
            for number, _ in enumerate(self._slots()):
                self._write_slot(number, b"", 0)
            self._write_header(size, files)

    def stored(self) -> tuple[int, int]:
        """(bytes, files) that are complete in scratch."""
        _, size, files, *_ = _HEADER.unpack_from(self._map)
        return size, files

    def reserved(self) -> int:
        """Bytes reserved by all mounts."""
        return sum(_RESERVED.unpack_from(self._map, _SLOTS_AT))

    def reserve(self, size: int, capacity: int, room: float = math.inf) -> bool:
        """Reserve `size` bytes if everything together stays within `capacity`, and what is reserved within `room`."""
        with self._locked():
            stored, _ = self.stored()
            reserved = self.reserved() + size
            if stored + reserved > capacity or reserved > room:
                return False
            self._add_reserved(size)
        return True

    def release(self, size: int) -> None:
        """Give a reservation back: nothing of it was kept."""
        with self._locked():
            self._add_reserved(-size)

    def settle(self, size: int) -> None:
        """Turn a reservation into a stored file."""
        with self._locked():
            self._add_stored(size, 1)
            self._add_reserved(-size)

    def remove(self, size: int, files: int = 1) -> None:
        """Stored files are gone."""
        with self._locked():
            self._add_stored(-size, -files)

    def _slots(self) -> Iterator[tuple[bytes, int]]:
        for lease, reserved in _SLOT.iter_unpack(self._map[_SLOTS_AT:]):
            yield lease.rstrip(b"\0"), reserved

    def _write_header(
        self, stored: int, files: int, *, boot: bytes = b"", clean: bool = False, too_high: int = 0
    ) -> None:
        _HEADER.pack_into(self._map, 0, _MAGIC, stored, files, boot, clean, too_high)

    def _write_slot(self, number: int, lease: bytes, reserved: int) -> None:
        _SLOT.pack_into(self._map, _SLOTS_AT + number * _SLOT.size, lease, reserved)

    def _add_reserved(self, size: int) -> None:
        at = _SLOTS_AT + self._slot * _SLOT.size
        lease, reserved = _SLOT.unpack_from(self._map, at)
        _SLOT.pack_into(self._map, at, lease, reserved + size)

    def _add_stored(self, size: int, files: int) -> None:
        stored, count = self.stored()
        struct.pack_into("<qq", self._map, len(_MAGIC), stored + size, count + files)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
