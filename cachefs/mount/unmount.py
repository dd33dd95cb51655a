"""Unmounting from outside: as whoever asks may, with the names of those who are in the way."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from cachefs.cache.scratch import Scratch, open_scratch
from cachefs.errors import CachefsError
from cachefs.mount.leases import LeaseRecord, live_leases
from cachefs.mount.mountinfo import FSTYPE, Mount, find_mount, resolve_mountpoint

_MNT_DETACH = 2
_DAEMON_END_SECONDS = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Holder:
    """A process that uses a mount, and how."""

    pid: int
    name: str
    use: str


def find_our_mount(path: Path) -> Mount:
    """The mount of cachefs at `path`. Raises CachefsError for anything else."""
    mountpoint = resolve_mountpoint(path)
    mount = find_mount(mountpoint)
    if mount is None:
        raise CachefsError(f"nothing is mounted at {mountpoint}", "cachefs status lists the mounts")
    if mount.fstype != FSTYPE or mount.lease is None:
        raise CachefsError(f"{mountpoint} is a mount of {mount.fstype}, not of cachefs", "unmount it with umount")
    return mount


def unmount(mount: Mount, *, lazy: bool) -> None:
    """Unmount and wait until the daemon has ended (not if `lazy`: it ends when the last user does).

    Raises CachefsError; for a mount in use it names the processes that hold it.
    """
    record = _lease_record(mount)
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mount.path), _MNT_DETACH if lazy else 0):
            number = ctypes.get_errno()
            if number == errno.EBUSY:
                raise _busy(mount)
            raise CachefsError(f"cannot unmount {mount.path}: {os.strerror(number)}")
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", os.fspath(mount.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip()
            if "busy" in reason.lower():
                raise _busy(mount)
            raise CachefsError(f"cannot unmount {mount.path}: {reason}")
    if record is not None and not lazy:
        _wait_for_end(record)


def _lease_record(mount: Mount) -> LeaseRecord | None:
    """The lease of a mount whose daemon lives."""
    lease = mount.lease
    if lease is None:
        return None
    try:
        scratch = open_scratch(lease[0])
    except CachefsError:
        return None
    try:
        return next((record for record in live_leases(scratch) if record.id == lease[1]), None)
    finally:
        os.close(scratch.fd)


def _wait_for_end(record: LeaseRecord) -> None:
    try:
        process = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if abs(psutil.Process(record.pid).create_time() - record.process_started) > 1:
            return  # the pid is somebody else's by now
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(_DAEMON_END_SECONDS * 1000):
            raise CachefsError(f"unmounted, but the daemon (pid {record.pid}) has not ended", "see its log")
    except psutil.NoSuchProcess:
        return
    finally:
        os.close(process)


def _busy(mount: Mount) -> CachefsError:
    holders = find_holders(mount.path)
    if not holders:
        return CachefsError(
            f"{mount.path} is busy: a process that is not visible holds it", "end it, or detach with --lazy"
        )
    names = ", ".join(f"{holder.name} (pid {holder.pid}, {holder.use})" for holder in holders[:8])
    more = f" and {len(holders) - 8} more" if len(holders) > 8 else ""
    return CachefsError(f"{mount.path} is busy: held by {names}{more}", "end them, or detach with --lazy")


def find_holders(mountpoint: Path) -> list[Holder]:
    """The processes that have their working directory, an open file or a mapping below `mountpoint`.

    Only links under /proc are read, never a path in the mount.
    """
    holders = []
    for process in psutil.process_iter(["name"]):
        use = _use(process.pid, mountpoint)
        if use:
            holders.append(Holder(process.pid, process.info["name"], use))
    return holders


def _use(pid: int, mountpoint: Path) -> str | None:
    def is_below(link: str) -> bool:
        try:
            target = Path(os.readlink(link))
        except OSError:
            return False
        return target == mountpoint or mountpoint in target.parents

    if is_below(f"/proc/{pid}/cwd"):
        return "working directory"
    for kind, use in ("fd", "open file"), ("map_files", "mapped file"):
        try:
            names = os.listdir(f"/proc/{pid}/{kind}")
        except OSError:
            continue
        if any(is_below(f"/proc/{pid}/{kind}/{name}") for name in names):
            return use
    return None


def scratch_of(mount: Mount) -> Scratch:
    """The scratch of one of our mounts. Raises CachefsError if it is gone or not safely ours."""
    lease = mount.lease
    assert lease is not None  # find_our_mount's promise
    return open_scratch(lease[0])
