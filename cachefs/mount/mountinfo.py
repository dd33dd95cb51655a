"""What is mounted where, from /proc/self/mountinfo. Nothing here touches a mountpoint, so nothing here can hang.

What a mount of cachefs has promoted are mounts too, bound from a tree in its scratch over the mount itself. They are
part of it: `find_mount` and `containing_mount` look through them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

FSTYPE = "fuse.cachefs"
_OURS = re.compile(r"cachefs:([0-9a-f]+)@(.+)")
_TREE = re.compile(r"(?:.*/)?trees/([0-9a-f]+)(?:/.*)?", re.DOTALL)

NETWORK_FSTYPES = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "afs",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "fuse.sshfs",
        "fuse.rclone",
        "fuse.glusterfs",
        "fuse.juicefs",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.ceph-fuse",
        "fuse.slowsource",
        "ocfs2",
        "gfs2",
        "9p",
        "pvfs2",
        "orangefs",
    ]
)
MEMORY_FSTYPES = frozenset(("tmpfs", "ramfs"))


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. `device` is "major:minor", `name` what was mounted, `options` the file system's own.

    `root` is which directory of the file system shows, `id` tells mounts apart that are there at the same time.
    """

    path: Path
    device: str
    fstype: str
    name: str
    options: frozenset[str] = frozenset()
    root: str = "/"
    id: int = 0

    @property
    def lease(self) -> tuple[Path, str] | None:
        """(scratch, lease id) of a mount of cachefs."""
        match = _OURS.fullmatch(self.name) if self.fstype == FSTYPE else None
        return (Path(os.fsdecode(unquote_to_bytes(match[2]))), match[1]) if match else None

    @property
    def tree(self) -> str | None:
        """The lease in whose tree lies what shows here, if it looks like that."""
        match = _TREE.fullmatch(self.root)
        return match[1] if match else None


def mount_name(scratch: Path, lease: str) -> str:
    """What a mount of ours is called: it says where its control socket is. ASCII, without commas or spaces."""
    return f"cachefs:{lease}@{quote(os.fsencode(scratch))}"


def read_mounts() -> list[Mount]:
    """All mounts of this mount namespace, in the order in which they were mounted."""
    mounts = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file.read().split(b"\n")[:-1]:
            fields = line.split(b" ")  # alone: the kernel does not escape other white space
            end = fields.index(b"-")
            mounts.append(
                Mount(
                    Path(_unescape(fields[4])),
                    fields[2].decode(),
                    _unescape(fields[end + 1]),
                    _unescape(fields[end + 2]),
                    frozenset(fields[end + 3].decode(errors="replace").split(",")),
                    _unescape(fields[3]),
                    int(fields[0]),
                )
            )
    return mounts


def find_mount(path: Path) -> Mount | None:
    """The topmost mount whose mountpoint is exactly `path`."""
    return next((mount for mount in reversed(_all_but_promoted(read_mounts())) if mount.path == path), None)


def promoted_in(mount: Mount) -> list[Mount]:
    """What a mount of cachefs has promoted, in the order in which it was mounted."""
    lease = mount.lease
    return [other for other in read_mounts() if lease is not None and other.tree == lease[1]]


def _all_but_promoted(mounts: list[Mount]) -> list[Mount]:
    leases = {mount.lease[1] for mount in mounts if mount.lease is not None}
    return [mount for mount in mounts if mount.tree not in leases] if leases else mounts


def containing_mount(path: Path) -> Mount | None:
    """The mount that the absolute `path` lies in."""
    best: Mount | None = None
    for mount in _all_but_promoted(read_mounts()):
        within = mount.path == path or mount.path in path.parents
        if within and (best is None or len(mount.path.parts) >= len(best.path.parts)):
            best = mount
    return best


def resolve_mountpoint(path: Path) -> Path:
    """`path`, absolute and without links in its parents.

    Nothing is looked at where something is mounted at that very path, and never the mountpoint itself: what lies there
    may hang.
    """
    absolute = Path(os.path.abspath(path))
    if find_mount(absolute) is not None:
        return absolute
    return Path(os.path.realpath(absolute.parent)) / absolute.name


def mount_id_of(fd: int) -> int:
    """The id of the mount in which `fd` was opened: bind mounts of one file system differ in it."""
    fields = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    return int(fields[fields.index("mnt_id:") + 1])


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))
