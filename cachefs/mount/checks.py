"""What must hold before a mount is tried, so that each failure has one clear line and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from cachefs.config import Settings, format_size
from cachefs.errors import CachefsError, describe
from cachefs.mount.mountinfo import FSTYPE, MEMORY_FSTYPES, NETWORK_FSTYPES, containing_mount, find_mount

FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIGURATION = Path("/etc/fuse.conf")
_LOAD = "load the kernel module as root with: modprobe fuse, or start the container with --device /dev/fuse"
_SCRATCH = "choose another with --scratch"


def check_fuse(*, allow_other: bool, is_private: bool = False) -> None:
    """Raise CachefsError if this user cannot make FUSE mounts on this machine.

    `is_private`: in namespaces of one's own, where no setuid helper is needed, and its rules do not hold.
    """
    if not FUSE_DEVICE.exists():
        raise CachefsError(f"there is no {FUSE_DEVICE}", _LOAD)
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise CachefsError(
            f"{FUSE_DEVICE} cannot be opened: {describe(error)}",
            "ask the administrator to give it mode 0666, which is its usual one",
        ) from None
    except OSError as error:
        raise CachefsError(f"{FUSE_DEVICE} cannot be opened: {describe(error)}", _LOAD) from None
    if os.geteuid() == 0 or is_private:
        return
    if shutil.which("fusermount3") is None:
        raise CachefsError("there is no fusermount3, which mounts for ordinary users", "install the package fuse3")
    if allow_other and not _is_user_allow_other():
        raise CachefsError(
            "--allow-other is not permitted to users here",
            f"the administrator permits it with the line user_allow_other in {FUSE_CONFIGURATION}",
        )


def check_paths(settings: Settings, *, is_private: bool = False) -> None:
    """Raise CachefsError for a source, mountpoint or scratch that cannot work. `settings` has absolute paths.

    `is_private`: it will be mounted in namespaces of one's own, where this user may mount anywhere.
    """
    source, mountpoint, scratch = settings.source, settings.mountpoint, settings.scratch
    mounted = find_mount(mountpoint)
    if mounted is not None and mounted.fstype == FSTYPE:  # before anything looks at it: it may be dead
        raise CachefsError(
            f"{mountpoint} is a mount of cachefs already", f"unmount it with: cachefs umount {mountpoint}"
        )
    _check_directory(source, "source")
    if not os.access(source, os.R_OK | os.X_OK, effective_ids=True):
        raise CachefsError(f"source {source} is not readable by this user", "check its permissions")
    if mountpoint != source:
        _check_directory(mountpoint, "mountpoint")
    if source in mountpoint.parents:
        raise CachefsError(
            f"mountpoint {mountpoint} is inside the source {source}, so the mount would show itself",
            "leave the mountpoint out to mount over the source, or give one outside",
        )
    below = containing_mount(source)
    if below is not None and below.path == source and below.lease is not None and below.lease[0] == scratch:
        raise CachefsError(  # two mounts of one dataset, of which one is the other's source: each waits for the other
            f"source {source} is a mount of cachefs with the same scratch", "choose another with --scratch"
        )
    if not is_private:
        check_may_cover(mountpoint)
    for name, path in ("source", source), ("mountpoint", mountpoint):
        if scratch == path:
            raise CachefsError(f"scratch {scratch} is the {name} itself", _SCRATCH)
        if path in scratch.parents:
            raise CachefsError(f"scratch {scratch} is inside the {name} {path}", _SCRATCH)
        if scratch in path.parents:
            raise CachefsError(f"{name} {path} is inside scratch {scratch}", _SCRATCH)


def check_capacity(settings: Settings) -> None:
    """Raise CachefsError for a capacity that the file system of scratch cannot have."""
    size = settings.capacity.size
    if size is None:
        return
    try:
        status = os.statvfs(settings.scratch if os.path.lexists(settings.scratch) else settings.scratch.parent)
    except OSError:
        return  # claiming scratch says what is wrong with it
    total = status.f_blocks * status.f_frsize
    if size > total:
        raise CachefsError(
            f"capacity {format_size(size)} is larger than the disk of scratch {settings.scratch} "
            f"({format_size(total)})",
            "choose a smaller --capacity or another --scratch",
        )


def warnings(settings: Settings) -> Iterator[str]:
    """What works but costs something."""
    mount = containing_mount(settings.scratch)
    if mount is None:
        return
    if mount.fstype in NETWORK_FSTYPES:
        yield (
            f"scratch {settings.scratch} is on a network file system ({mount.fstype}): hits cost its latency; "
            "choose a local disk with --scratch"
        )
    elif mount.fstype in MEMORY_FSTYPES:
        yield (
            f"scratch {settings.scratch} is in memory ({mount.fstype}): what it holds is taken from the memory of "
            "the job and counts against its limit; choose a local disk with --scratch, or set --capacity"
        )


def _check_directory(path: Path, name: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        hint = "make it, or check the spelling"
        if name == "source":
            hint = "check the spelling, and that its file system is mounted on this machine"
        raise CachefsError(f"there is no {name} {path}", hint) from None
    except OSError as error:
        raise CachefsError(f"{name} {path} cannot be reached: {describe(error)}") from None
    if not stat.S_ISDIR(mode):
        raise CachefsError(f"{name} {path} is not a directory", f"the {name} must be one")


def check_may_cover(mountpoint: Path) -> None:
    """Raise CachefsError where this user may not mount.

    For ordinary users fusermount3's rules hold: the directory must be writable, and in a sticky one, such as /tmp, the
    user's own.
    """
    if os.geteuid() == 0:
        return
    try:
        is_read_only = os.statvfs(mountpoint).f_flag & os.ST_RDONLY
        status = mountpoint.stat()
    except OSError as error:
        raise CachefsError(f"mountpoint {mountpoint} cannot be reached: {describe(error)}") from None
    if is_read_only:
        raise CachefsError(
            f"mountpoint {mountpoint} is on a read-only file system, where only root can mount",
            "give a MOUNTPOINT elsewhere",
        )
    around = containing_mount(mountpoint)
    if around is not None and around.fstype.startswith("fuse.") and "allow_other" not in around.options:
        raise CachefsError(  # not even root may look into it, and fusermount3 is root
            f"mountpoint {mountpoint} is in a FUSE file system ({around.fstype}), which fusermount3 may not enter",
            "give a MOUNTPOINT elsewhere, or mount that file system with allow_other",
        )
    is_sticky = status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid()
    if is_sticky or not os.access(mountpoint, os.W_OK):
        raise CachefsError(
            f"this user may not mount at {mountpoint}",
            "give a MOUNTPOINT that you can write to; only root can mount over other people's directories",
        )


def _is_user_allow_other() -> bool:
    try:
        lines = FUSE_CONFIGURATION.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
