"""What a POSIX access control list leaves of a mode.

With --allow-other the kernel lets other users in by mode alone, for FUSE tells it nothing of lists unless the daemon
speaks for them, which pyfuse3 does not. So a mode is shown in which nobody has more than the list grants him; some have
less. The format of the attribute is that of linux/posix_acl_xattr.h, who gets what is said in acl(5).
"""

from __future__ import annotations

import errno
import os
import struct

ATTRIBUTE = "system.posix_acl_access"
_ABSENT = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS)
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")  # version; tag, permissions, uid or gid
_USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 2, 4, 8, 16, 32


def read_acl(path: bytes) -> bytes:
    """The list of an entry itself (links are not followed), b"" if it has none. Raises OSError."""
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno in _ABSENT:
            return b""
        raise


def restricted_mode(mode: int, acl: bytes) -> int:
    """The mode in which the kernel, which knows no list, grants nobody more than `acl` does. `mode` is stat's."""
    named_users, named_groups, mask = 0o7, 0o7, 0o7
    group, other = mode >> 3 & 7, mode & 7
    is_naming = False
    for tag, permissions, _ in _ENTRY.iter_unpack(acl[_HEADER.size :]):
        if tag == _USER:
            named_users, is_naming = named_users & permissions, True
        elif tag == _GROUP:
            named_groups, is_naming = named_groups & permissions, True
        elif tag == _GROUP_OBJ:
            group = permissions
        elif tag == _OTHER:
            other = permissions
        elif tag == _MASK:
            mask = permissions
    # to the kernel whoever is named is one of the file's group, or one of the others
    group &= mask & named_users
    if is_naming:
        other &= mask & named_users & named_groups
    return mode & ~0o77 | group << 3 | other
