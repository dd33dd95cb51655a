"""Private namespaces: mounts that nobody else sees, made without root and gone with the last process in them.

An ordinary user gets a user and a mount namespace. The ids in it are the same as outside, and whoever entered or
joined has the capability to mount there until it executes a program: so a job's command has no more rights than
before. Root gets a mount namespace alone. Mounts that appear outside later (automounts) appear inside too.

Invariant: a process that enters or joins has one thread.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cachefs.errors import CachefsError, describe
from cachefs.mount.system_calls import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MS_BIND,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SLAVE,
    mount,
    setns,
    unshare,
)

_ROOT = Path("/")
_LOCKED_FLAGS = 2 | 4 | 8 | 1024 | 2048
"""nosuid, nodev, noexec, noatime, nodiratime of mount(2): a remount in a user namespace must not drop them."""
_POLICIES = (
    (Path("/proc/sys/user/max_user_namespaces"), "0"),
    (Path("/proc/sys/kernel/unprivileged_userns_clone"), "0"),
    (Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"), "1"),
)
"""What forbids user namespaces where it has this value: the kernel's own limit, Debian's switch, Ubuntu's policy."""


def enter_private_namespaces() -> None:
    """Move this process into new namespaces in which it may mount. Raises CachefsError that says what forbids it.

    After an error the process may be in a namespace in which it can do nothing: call it in a child.
    """
    if os.geteuid() == 0:
        try:
            unshare(CLONE_NEWNS)
        except OSError:
            pass  # root of a container without the capability: as any other user
        else:
            return _become_slave()
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            Path("/proc/self", name).write_text(text)
    except OSError as error:
        raise _forbidden(error) from None
    return _become_slave()


def probe_private_namespaces() -> CachefsError | None:
    """Whether this user can have private namespaces here: None, or what forbids it. Tries it in a child process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            enter_private_namespaces()
        except CachefsError as error:
            os.write(writing, json.dumps([error.args[0], error.hint]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return CachefsError(*json.loads(said)) if said else None


def open_namespaces() -> tuple[int, ...]:
    """Descriptors with which another process of this user joins: user namespace, mount namespace, root directory."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    return tuple(os.open(f"/proc/self/{name}", flags) for name in ("ns/user", "ns/mnt", "root"))


def join_namespaces(descriptors: Sequence[int]) -> None:
    """Join what `open_namespaces` opened. The working directory keeps its path. Raises OSError.

    The path, not the directory: where a mount covers it in there, the working directory is in that mount.
    """
    user, mounts, root = descriptors
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        path = os.getcwd()
    except FileNotFoundError:  # it was removed
        path = ""
    try:
        if not os.path.samestat(os.fstat(user), os.stat("/proc/self/ns/user")):
            setns(user, CLONE_NEWUSER)
        setns(mounts, CLONE_NEWNS)
        os.chdir(root)
        os.chroot(".")  # where the process was in a chroot, setns has led out of it
        try:
            os.chdir(path)
        except OSError:
            os.chdir(here)
    finally:
        os.close(here)


def namespaces_of_this_process() -> str:
    """What tells the namespaces of this process from others: paths mean the same to processes that share them."""
    return " ".join(os.readlink(f"/proc/self/ns/{name}") for name in ("user", "mnt"))


def bind_read_only(source: Path, target: Path) -> None:
    """Show the directory `source` at `target` too, read-only. Raises OSError."""
    mount(source, target, MS_BIND | MS_REC)
    remount_read_only(target)


def remount_read_only(target: Path, flags: int = 0) -> None:
    """Make what is bound at `target` read-only, with more `flags` of mount(2). Raises OSError."""
    locked = os.statvfs(target).f_flag & _LOCKED_FLAGS
    mount(None, target, MS_BIND | MS_REMOUNT | MS_RDONLY | flags | locked)


def _become_slave() -> None:
    """Receive mounts from outside, and let none of ours out."""
    try:
        mount(None, _ROOT, MS_REC | MS_SLAVE)
    except OSError as error:
        raise _forbidden(error) from None


def _forbidden(error: OSError) -> CachefsError:
    for path, value in _POLICIES:
        try:
            now = path.read_text().strip()
        except OSError:
            continue
        if now == value:
            return CachefsError(
                f"user namespaces are switched off on this machine: {path} is {now}", "ask the administrator"
            )
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return CachefsError(
            f"no more user namespaces can be made: the limit in {_POLICIES[0][0]} is reached",
            "end other programs that use them, or ask the administrator to raise it",
        )
    return CachefsError(
        f"user namespaces are forbidden on this machine: {describe(error)}",
        "a container's seccomp profile or a security module may be the cause: ask the administrator",
    )
