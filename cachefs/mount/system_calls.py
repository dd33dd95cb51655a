"""System calls about mounts and namespaces that Python's os lacks (unshare and setns came with 3.12).

Each raises OSError with the errno of the call; see mount(2), umount2(2), unshare(2),
setns(2), open_tree(2), mount_setattr(2) and move_mount(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 32, 4096, 16384, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture that we know
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOVE_MOUNT_BOTH_EMPTY = 1, 0x1000, 0x44
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: Path | None, target: Path, flags: int) -> None:
    """Bind, remount or change the propagation of `target`."""
    name = None if source is None else os.fsencode(source)
    _check(_libc.mount(name, os.fsencode(target), None, ctypes.c_ulong(flags), None), target)


def attach_read_only(source: int, target: int) -> None:
    """Show the directory or file `source` at `target` too, both descriptors: read-only, nosuid and nodev at once.

    Raises OSError: with ENOSYS before Linux 5.12.
    """
    empty = ctypes.c_char_p(b"")
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC
    tree = _libc.syscall(_OPEN_TREE, source, empty, ctypes.c_uint(flags))
    if tree < 0:
        _check(tree)
    try:
        attributes = struct.pack("=4Q", _READ_ONLY_NOSUID_NODEV, 0, 0, 0)
        _check(_libc.syscall(_MOUNT_SETATTR, tree, empty, _AT_EMPTY_PATH, attributes, ctypes.c_size_t(32)))
        _check(_libc.syscall(_MOVE_MOUNT, tree, empty, target, empty, _MOVE_MOUNT_BOTH_EMPTY))
    finally:
        os.close(tree)


def umount(target: Path, *, detach: bool) -> None:
    """Unmount what lies uppermost at `target`; with `detach` also while it is in use."""
    _check(_libc.umount2(os.fsencode(target), UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)), target)


def unshare(flags: int) -> None:
    """Move this process, which must have one thread, into new namespaces."""
    _check(_libc.unshare(flags))


def setns(fd: int, flag: int) -> None:
    """Join the namespace of kind `flag` (CLONE_NEWNS, CLONE_NEWUSER) that `fd` refers to."""
    _check(_libc.setns(fd, flag))


def _check(result: int, path: Path | None = None) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else os.fspath(path))
