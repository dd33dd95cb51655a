"""Unmounting from outside: as whoever asks may, with the names of those who are in the way."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cachefs.cache.scratch import Scratch, open_scratch
from cachefs.errors import CachefsError, describe
from cachefs.mount.leases import LeaseRecord, live_leases
from cachefs.mount.mountinfo import (
    FSTYPE,
    Mount,
    find_mount,
    mount_id_of,
    promoted_in,
    read_mounts,
    resolve_mountpoint,
)
from cachefs.mount.purge import free_memory_of
from cachefs.mount.system_calls import umount

_LINKS = 40
"""How many symbolic links may follow upon each other: the kernel's limit."""
_DAEMON_END_SECONDS = 60.0
_MOMENT = 0.01
_PROMOTING_SECONDS = 2.0
"""For how long the daemon itself may hold its mount: while it promotes a directory."""


@dataclass(frozen=True)
class Holder:
    """A process that uses a mount, and how."""

    pid: int
    name: str
    use: str


def find_our_mount(path: Path) -> Mount:
    """The mount of cachefs at `path`, or where the symbolic link `path` leads. Raises CachefsError if it is none."""
    mountpoint = resolve_mountpoint(path)
    mount = find_mount(mountpoint)
    for _ in range(_LINKS):
        if mount is not None or not mountpoint.is_symlink():  # what is mounted may hang: it is not looked at
            break
        mountpoint = resolve_mountpoint(mountpoint.parent / os.readlink(mountpoint))
        mount = find_mount(mountpoint)
    if mount is None:
        raise CachefsError(f"nothing is mounted at {mountpoint}", "cachefs status lists the mounts")
    if mount.fstype != FSTYPE or mount.lease is None:
        raise CachefsError(f"{mountpoint} is a mount of {mount.fstype}, not of cachefs", "unmount it with umount")
    return mount


def is_dead_mount(path: Path) -> bool:
    """Whether a mount of cachefs is at `path` that nobody serves any more."""
    try:
        return _is_dead(find_our_mount(path))
    except CachefsError:
        return False


def _is_dead(mount: Mount) -> bool:
    """A lease that lives is believed. Else the kernel says it: statvfs always asks the daemon, unlike stat, whose
    answer it may still know."""
    if live_lease(mount) is not None:
        return False
    if any(other.path == mount.path for other in promoted_in(mount)):  # it is not the daemon that would answer
        return _may_see_leases(mount)
    try:
        os.statvfs(mount.path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def unmount(mount: Mount, *, lazy: bool) -> bool:
    """Unmount and wait until the daemon has ended, and return True; False if it is only detached, because in use.

    With `lazy` a mount in use is detached, and its daemon ends when the last user does. Raises CachefsError; for a
    mount in use it names the processes that hold it.
    """
    record = live_lease(mount)
    is_detached = False
    if record is None and promoted_in(mount):
        detach(mount)  # nobody answers for the paths at which these are mounted, so they can only go together
    else:
        held = _unmount_all(mount, record)
        if held is not None and not lazy:
            raise _busy(mount, held)
        if held is not None:
            detach(mount)
            is_detached = True
    if record is None and mount.lease is not None:
        with suppress(CachefsError):  # scratch is gone, say
            free_memory_of(mount.lease[0])
    elif record is not None and not is_detached:
        _wait_for_end(record)
    return not is_detached


def _unmount_all(mount: Mount, record: LeaseRecord | None) -> Mount | None:
    """Unmount what the mount has promoted and then the mount: None, or the one of them that is in use."""
    deadline = time.monotonic() + _PROMOTING_SECONDS
    while True:
        all_of_it = (*reversed(promoted_in(mount)), mount)
        held = next((one for one in all_of_it if not _try_unmount(one, detach=False)), None)
        if held is None or record is None or time.monotonic() > deadline:
            return held
        has_promoted_more = held == mount and promoted_in(mount)
        if not has_promoted_more and {holder.pid for holder in find_holders(held)} != {record.pid}:
            return held
        time.sleep(_MOMENT)


def detach(mount: Mount) -> None:
    """Take a mount away from where it is, also while it is in use. Raises CachefsError."""
    try:
        uncover_whole(mount)
    except OSError as error:
        raise CachefsError(f"cannot unmount {mount.path}: {describe(error)}") from None
    _try_unmount(mount, detach=True)


def uncover_whole(mount: Mount) -> None:
    """Detach what the mount has promoted as a whole, so that it is uppermost itself. What was promoted within it goes
    with it, and can only do so: its paths are answered by the daemon. Raises OSError.
    """
    for other in promoted_in(mount):
        if other.path == mount.path:
            umount(mount.path, detach=True)


def uncover(mountpoint: Path, scratch: Path, *, is_private: bool) -> None:
    """Detach all that mounts of ours with this scratch put over `mountpoint`. Never raises.

    `is_private`: it is in namespaces of one's own, where this process may unmount without help.
    """
    with suppress(OSError, CachefsError):
        while True:
            mount = find_mount(mountpoint)
            if mount is None or mount.lease is None or mount.lease[0] != scratch:
                return
            if is_private:
                umount(mountpoint, detach=True)
            else:
                detach(mount)


def detach_dead_mounts(paths: Sequence[Path]) -> None:
    """Detach what daemons of this user that were killed have left at `paths` or above, so that the sources show again.

    Never raises.
    """
    above = {Path(os.path.abspath(path)) for path in paths}
    above |= {parent for path in above for parent in path.parents}
    for mount in read_mounts():
        if mount.path not in above:
            continue
        if mount.lease is not None and f"user_id={os.geteuid()}" in mount.options and _is_dead(mount):
            with suppress(CachefsError):
                detach(mount)
                free_memory_of(mount.lease[0])


def _try_unmount(mount: Mount, *, detach: bool) -> bool:
    """Whether it could be unmounted: False for one in use. Raises CachefsError for any other reason."""
    if os.geteuid() == 0:
        try:
            umount(mount.path, detach=detach)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise CachefsError(f"cannot unmount {mount.path}: {describe(error)}") from None
        return True
    command = ["fusermount3", "-u", *(["-z"] if detach else []), "--", os.fspath(mount.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CachefsError(
            f"cannot unmount {mount.path}: fusermount3: {describe(error)}", "install the package fuse3"
        ) from None
    if not done.returncode:
        return True
    reason = done.stderr.strip().rpartition(": ")[2]
    if "busy" in reason.lower():
        return False
    raise CachefsError(f"cannot unmount {mount.path}: {reason}", "only the user who mounted it can, or root")


def live_lease(mount: Mount) -> LeaseRecord | None:
    """The lease of a mount of ours whose daemon lives, if this user may look."""
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


def _may_see_leases(mount: Mount) -> bool:
    """Whether that no live lease was found means that there is none."""
    assert mount.lease is not None  # the caller's promise
    try:
        os.close(open_scratch(mount.lease[0]).fd)
    except CachefsError:
        return False
    return True


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
            raise CachefsError(
                f"unmounted here, but the daemon (pid {record.pid}) still serves",
                "another mount namespace (a container, say) has the mount too, or it waits for another mount's scratch",
            )
    except psutil.NoSuchProcess:
        return
    finally:
        os.close(process)


def _busy(mount: Mount, held: Mount) -> CachefsError:
    """Who is in the way of unmounting: `held` is the mount itself or something that it has promoted."""
    mounts = read_mounts()
    later = mounts[mounts.index(mount) + 1 :] if mount in mounts else []  # earlier ones lie beneath
    inside = [other.path for other in later if mount.path in other.path.parents and other.tree is None]
    if inside:
        return CachefsError(f"{mount.path} is busy: {inside[-1]} is mounted in it", "unmount that first")
    holders = find_holders(held)
    if not holders:
        return CachefsError(
            f"{mount.path} is busy: a process that this user cannot see holds it", "end it, or detach with --lazy"
        )
    names = ", ".join(f"{holder.name} (pid {holder.pid}, {holder.use})" for holder in holders[:8])
    more = f" and {len(holders) - 8} more" if len(holders) > 8 else ""
    return CachefsError(f"{mount.path} is busy: held by {names}{more}", "end them, or detach with --lazy")


def find_holders(mount: Mount) -> list[Holder]:
    """The processes that have their working directory, an open file or a mapping in `mount`, as far as visible.

    Descriptors are opened with O_PATH alone: nothing is asked of the mount's daemon, which may be dead or hang. What
    lies beneath the mount has the same path, and is told apart by the id of the mount that it was opened in: our own
    workers have the source open.
    """
    mount_id = _mount_id_at(mount.path)
    holders = []
    for process in psutil.process_iter(["name"]):
        use = _use(process.pid, mount, mount_id)
        if use:
            holders.append(Holder(process.pid, process.info["name"], use))
    return holders


def _use(pid: int, mount: Mount, mount_id: int | None) -> str | None:
    def is_in_mount(link: Path) -> bool:
        try:
            target = Path(os.readlink(link))
        except OSError:
            return False
        return (target == mount.path or mount.path in target.parents) and _mount_id_at(link) == mount_id

    process = Path("/proc", str(pid))
    try:
        if is_in_mount(process / "cwd"):
            return "working directory"
        if is_in_mount(process / "root"):
            return "root directory"
        if any(is_in_mount(link) for link in (process / "fd").iterdir()):
            return "open file"
        if _is_mapped(process / "maps", mount):
            return "mapped file"
    except OSError:
        pass  # it has ended, or is another user's
    return None


def _is_mapped(maps: Path, mount: Mount) -> bool:
    """Whether a file of the mount's device is mapped; only root may open /proc/PID/map_files."""
    major, minor = (int(number) for number in mount.device.split(":"))
    device = f"{major:02x}:{minor:02x}".encode()
    lines = [line.split(maxsplit=5) for line in maps.read_bytes().split(b"\n") if line]
    mapped = [fields[5] for fields in lines if fields[3] == device and len(fields) > 5]
    if mount.tree is None:
        return bool(mapped)
    below = os.fsencode(mount.path).replace(b"\n", rb"\012")  # the device is that of scratch, of which all have some
    return any(path == below or path.startswith(below + b"/") for path in mapped)


def _mount_id_at(path: Path) -> int | None:
    """The id of the mount that `path` leads into; None if it is gone or not to be seen."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mount_id_of(fd)
    finally:
        os.close(fd)


def scratch_of(mount: Mount) -> Scratch:
    """The scratch of one of our mounts. Raises CachefsError if it is gone or not safely ours."""
    lease = mount.lease
    assert lease is not None  # find_our_mount's promise
    return open_scratch(lease[0])
