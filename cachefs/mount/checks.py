"""What must hold before a mount is tried, so that each failure has one clear line and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cachefs.config import Settings, format_size
from cachefs.errors import CachefsError, describe
from cachefs.mount.mountinfo import FSTYPE, MEMORY_FSTYPES, NETWORK_FSTYPES, containing_mount, find_mount

FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIGURATION = Path("/etc/fuse.conf")


def check_fuse(*, allow_other: bool) -> None:
    """Raise CachefsError if this user cannot make FUSE mounts on this machine."""
    if not FUSE_DEVICE.exists():
        raise CachefsError(f"there is no {FUSE_DEVICE}", "load the module with: modprobe fuse")
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise CachefsError(
            f"{FUSE_DEVICE} cannot be opened: {describe(error)}",
            "ask the administrator for mode 0666, which udev gives it by default",
        ) from None
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise CachefsError("there is no fusermount3", "install the package fuse3")
    if allow_other and not _is_user_allow_other():
        raise CachefsError(
            "--allow-other is not permitted to users here",
            f"the administrator permits it with the line user_allow_other in {FUSE_CONFIGURATION}",
        )


def check_paths(settings: Settings) -> None:
    """Raise CachefsError for a source, mountpoint or scratch that cannot work. `settings` has absolute paths."""
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
        if source in mountpoint.parents or mountpoint in source.parents:
            pass  # a mountpoint inside the source shows itself empty; over a parent of it, the source stays open
    if os.geteuid() != 0 and not (os.access(mountpoint, os.W_OK) and _may_cover(mountpoint)):
        raise CachefsError(
            f"mountpoint {mountpoint} is not this user's to mount on",
            "give a MOUNTPOINT that you own; an ordinary user cannot mount over other people's directories",
        )
    for name, path in ("source", source), ("mountpoint", mountpoint):
        if scratch == path or path in scratch.parents:
            raise CachefsError(f"scratch {scratch} is inside the {name} {path}", "choose another with --scratch")
        if scratch in path.parents:
            raise CachefsError(f"{name} {path} is inside scratch {scratch}", "choose another with --scratch")


def check_capacity(settings: Settings) -> None:
    """Raise CachefsError for a capacity that the file system of scratch cannot have."""
    size = settings.capacity.size
    if size is None:
        return
    status = os.statvfs(settings.scratch if settings.scratch.exists() else settings.scratch.parent)
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
        is_directory = path.is_dir()
        exists = is_directory or path.exists()
    except OSError as error:
        raise CachefsError(f"{name} {path} cannot be looked at: {describe(error)}") from None
    if not exists:
        raise CachefsError(f"there is no {name} {path}", "check the spelling, and that it is mounted on this node")
    if not is_directory:
        raise CachefsError(f"{name} {path} is not a directory", "name the directory that holds the dataset")


def _may_cover(mountpoint: Path) -> bool:
    """fusermount3's rule: in a sticky directory, such as /tmp itself, only the owner may mount."""
    status = mountpoint.stat()
    return not status.st_mode & 0o1000 or status.st_uid == os.geteuid()


def _is_user_allow_other() -> bool:
    try:
        lines = FUSE_CONFIGURATION.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
