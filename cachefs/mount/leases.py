"""Leases: a live mount's claim on scratch. A lease is a file that its mount keeps locked, so a crash ends it.

Invariants:
- A lease is taken and dead ones are dropped under scratch's lock only.
- Its lock is taken after the fork server was forked, so no worker holds on to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, fields

import psutil

from cachefs.cache.scratch import Scratch

_NEW = "new-"
"""Begins the name of a lease that is not one yet."""


@dataclass(frozen=True)
class LeaseRecord:
    """Who holds a lease. `process_started` is in seconds since the epoch, as psutil tells it.

    `shard` and `division` are those of config.Sharding; `fingerprint` that of the division, and `shard_bytes` what the
    shard has, once they are known.
    """

    id: str
    pid: int
    process_started: float
    boot: str
    source: str
    mountpoint: str
    dataset: str
    shard: str = ""
    division: str = ""
    fingerprint: str = ""
    shard_bytes: int = 0


class Lease:
    """This mount's lease, held until `release` or the end of the process."""

    def __init__(self, scratch: Scratch, record: LeaseRecord) -> None:
        self.record = record
        self._scratch = scratch
        self._fd = self._write(record)

    def renew(self, record: LeaseRecord) -> None:
        """Let it say something else: a reader finds the one or the other, and always locked."""
        before, self._fd = self._fd, self._write(record)
        os.close(before)
        self.record = record

    def _write(self, record: LeaseRecord) -> int:
        scratch, new = self._scratch, f"leases/{_NEW}{record.id}"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=scratch.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = json.dumps(asdict(record)).encode()
            if os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), new)
            os.rename(new, f"leases/{record.id}", src_dir_fd=scratch.fd, dst_dir_fd=scratch.fd)  # locked and complete
        except BaseException:
            os.close(fd)
            os.unlink(new, dir_fd=scratch.fd)
            raise
        return fd

    def release(self) -> None:
        os.unlink(f"leases/{self.record.id}", dir_fd=self._scratch.fd)
        os.close(self._fd)


def new_lease_id() -> str:
    return secrets.token_hex(6)


def boot_id() -> str:
    """What tells this boot of the machine from others: 32 hexadecimal digits."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip().replace("-", "")


def process_started(pid: int) -> float:
    """When a process began, to tell it from another one with the same pid. Raises psutil.Error."""
    return float(psutil.Process(pid).create_time())


def live_leases(scratch: Scratch, *, drop_dead: bool = False) -> list[LeaseRecord]:
    """The leases whose mounts live. `drop_dead` removes what the others left; only under scratch's lock."""
    records = []
    for name in sorted(os.listdir(scratch.at("leases"))):
        if name.startswith(_NEW) and not drop_dead:
            continue
        try:
            fd = os.open(f"leases/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=scratch.fd)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            records.append(_read_record(os.read(fd, 1 << 16)))
        else:
            if drop_dead:
                for folder in ("leases", "sockets"):
                    scratch.at(folder, name).unlink(missing_ok=True)
        finally:
            os.close(fd)
    return records


def _read_record(text: bytes) -> LeaseRecord:
    """A lease, also of a mount of a later version, which may say more."""
    known = {field.name for field in fields(LeaseRecord)}
    return LeaseRecord(**{name: value for name, value in json.loads(text).items() if name in known})
