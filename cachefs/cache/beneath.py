"""Opening what lies beneath a directory without following a link anywhere on the way: openat2(2), of Linux 5.6."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_OPENAT2 = 437  # the same on every architecture
_RESOLVE = 0x02 | 0x04 | 0x08  # NO_MAGICLINKS, NO_SYMLINKS, BENEATH: linux/openat2.h
_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_has_openat2 = True


def open_beneath(path: str, flags: int, directory: int) -> int:
    """A descriptor of `path`, relative to the descriptor `directory`.

    Raises OSError: with ELOOP for a symbolic link, also on the way; with EXDEV for "..".
    """
    global _has_openat2
    if _has_openat2:
        how = _HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE)
        fd: int = _syscall(_OPENAT2, directory, os.fsencode(path), how, _HOW.size)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EPERM):
            raise OSError(number, os.strerror(number), path)
        _has_openat2 = False  # an older kernel, or a sandbox that does not know the call
    return _open_in_steps(path, flags, directory)


def _open_in_steps(path: str, flags: int, directory: int) -> int:
    *folders, name = path.split("/")
    if ".." in (*folders, name):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    fd = directory
    try:
        for folder in folders:
            below = os.open(folder, _STEP, dir_fd=fd)
            if fd != directory:
                os.close(fd)
            fd = below
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except NotADirectoryError as error:  # what O_DIRECTORY says of a link
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from error
    finally:
        if fd != directory:
            os.close(fd)
