"""System calls about mounts and namespaces that Python's os lacks (unshare and setns came with 3.12).

Each raises OSError with the errno of the call; see mount(2), umount2(2), unshare(2) and setns(2).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 32, 4096, 16384, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: Path | None, target: Path, flags: int) -> None:
    """Bind, remount or change the propagation of `target`."""
    name = None if source is None else os.fsencode(source)
    _check(_libc.mount(name, os.fsencode(target), None, ctypes.c_ulong(flags), None), target)


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
