"""The scratch directory: whose it is, how it is marked as ours, and what lies where in it.

    cachefs-scratch      the mark: this directory is ours and may be purged
    files/BOOT/xx/NAME   complete files, by the boot of the machine during which they were written
    staging/NAME         files on their way; locked (flock) by the worker that copies
    trees/LEASE/PATH     complete directories of the source, of hard links to the files, that a mount shows directly
    index.db             residency (SQLite)
    memory               where its memory tier lies, if it has one: a scratch directory too, without an index
    ledger               how much is stored and reserved, shared by all mounts
    leases/ID            one for each live mount, locked by it
    sockets/ID           its control socket
    logs/PID.log         the log of its daemon

Invariants: scratch belongs to its user alone (0700) and is never a symbolic link; it is reached through one
descriptor from the moment on at which this was checked, but for the index, and lies where no other user can rename it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cachefs.errors import CachefsError, describe

MARK = "cachefs-scratch"
MEMORY = "memory"
FORMAT = 1
DIRECTORIES = ("files", "staging", "trees", "leases", "sockets", "logs")
INDEX_FILES = ("index.db", "index.db-journal", "index.db-wal", "index.db-shm")
"""A link in their place is taken away by whoever opens the index."""
FILES = (*INDEX_FILES, "ledger", MEMORY, MARK)
_CHOOSE = "choose another with --scratch"


@dataclass(frozen=True)
class Scratch:
    """A claimed scratch directory. `fd` is its descriptor; `made` says whether the directory itself is our work,
    `is_new` whether it was marked just now."""

    path: Path
    fd: int
    made: bool
    is_new: bool = False

    def open_directory(self, name: str) -> int:
        """A descriptor of one of DIRECTORIES."""
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)

    def at(self, *names: str) -> Path:
        """A path below scratch that works however long scratch's own path is (sockets allow 108 bytes)."""
        return Path(f"/proc/self/fd/{self.fd}", *names)


def claim_scratch(path: Path) -> Scratch:
    """Take `path` as scratch, making and marking it if need be. Raises CachefsError for what is not safely ours.

    Scratch's lock is held on return, so that nobody purges it before this mount has joined, which releases it.
    """
    _refuse_unsafe_parents(path)
    with undisturbed() as before:
        return _claim(path, before)


@contextmanager
def undisturbed() -> Iterator[set[int | signal.Signals]]:
    """Signals wait until the block has ended. It is given those that were blocked before.

    A process that they end in between could leave a directory that we made and that has no mark, which would stay.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:  # blocking them may still call a handler of Python's, which raises
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _claim(path: Path, waiting_mask: set[int | signal.Signals]) -> Scratch:
    made, fd = _make_and_lock(path, waiting_mask)
    is_just_made = made
    try:
        names = os.listdir(fd)
        is_new = MARK not in names or _is_unwritten(fd)
        if not is_new:
            made = _read_mark(fd, path)
        elif set(names) - {MARK}:
            raise CachefsError(
                f"scratch {path} holds files that are not of cachefs",
                f"choose an empty or a new directory, such as --scratch {path / 'cachefs'}",
            )
        else:
            _write_mark(fd, made)
        os.fchmod(fd, 0o700)
        for name in DIRECTORIES:
            if name not in names:
                os.mkdir(name, 0o700, dir_fd=fd)
        _refuse_foreign(fd, path)
    except OSError as error:
        if is_just_made:
            _unmake(path, fd)
        os.close(fd)
        raise CachefsError(f"scratch {path} is not usable: {describe(error)}", _CHOOSE) from None
    except BaseException:
        os.close(fd)
        raise
    return Scratch(path, fd, made, is_new=is_new)


def _unmake(path: Path, fd: int) -> None:
    """Remove a directory that could not be made scratch; its lock is held, so it is as it was made."""
    with suppress(OSError):
        os.unlink(MARK, dir_fd=fd)
    for name in DIRECTORIES:
        with suppress(OSError):
            os.rmdir(name, dir_fd=fd)
    with suppress(OSError):
        os.rmdir(path)


def _refuse_unsafe_parents(path: Path) -> None:
    """SQLite reaches the index by its path, for it knows no descriptors: nobody else may put another in its place."""
    for parent in path.parents:
        try:
            mode = parent.stat().st_mode
        except OSError:
            continue  # what is wrong with it is said when scratch is opened
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise CachefsError(
                f"scratch {path} is not safe: in {parent} any user may put something else in its place",
                "choose another with --scratch, or set the sticky bit there (chmod +t)",
            )


def _make_and_lock(path: Path, waiting_mask: set[int | signal.Signals]) -> tuple[bool, int]:
    """(Whether it was made just now, a descriptor that holds scratch's lock) of the directory `path`.

    While somebody else has the lock, and so has marked it, `waiting_mask` holds for signals.
    """
    while True:
        made = False
        try:
            os.mkdir(path, 0o700)
            made = True
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise CachefsError(
                f"scratch {path} cannot be made: {path.parent} does not exist", "make that first, or " + _CHOOSE
            ) from None
        except OSError as error:
            raise CachefsError(f"scratch {path} cannot be made: {describe(error)}", _CHOOSE) from None
        try:
            fd = _open_own_directory(path)
        except FileNotFoundError:  # purged since
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                mask = signal.pthread_sigmask(signal.SIG_SETMASK, waiting_mask)
                fcntl.flock(fd, fcntl.LOCK_EX)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            except BaseException:
                os.close(fd)
                raise
        if is_still_at(fd, path):
            return made, fd
        os.close(fd)  # the last mount's purge removed it while we waited: make it anew


def open_scratch(path: Path) -> Scratch:
    """Scratch that exists and is ours. Raises CachefsError for a directory that does not carry our mark."""
    try:
        fd = _open_own_directory(path)
    except FileNotFoundError:
        raise CachefsError(
            f"there is no scratch directory {path}", "name the one that was used with --scratch"
        ) from None
    try:
        return Scratch(path, fd, _read_mark(fd, path))
    except OSError as error:
        os.close(fd)
        raise CachefsError(f"scratch {path} is not usable: {describe(error)}", _CHOOSE) from None
    except BaseException:
        os.close(fd)
        raise


def is_still_at(fd: int, path: Path) -> bool:
    """Whether the directory `fd` is what `path` names: a purge, and whoever came after it, may have replaced it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _open_own_directory(path: Path) -> int:
    """A descriptor of a directory that is safely this user's. Raises FileNotFoundError, and CachefsError otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP or os.path.islink(path):
            reason = "is a symbolic link"
        elif error.errno == errno.ENOTDIR:
            reason = "is not a directory"
        elif (owner := _owner(path)) not in (None, os.geteuid()):
            reason = f"is owned by uid {owner}, not {os.geteuid()}"
        else:
            reason = f"cannot be opened: {describe(error)}"
        raise CachefsError(f"scratch {path} {reason}", _CHOOSE) from None
    problem = _what_others_may(os.fstat(fd))
    if problem is None and not os.access(path, os.W_OK | os.X_OK):
        problem = "is not writable"
    if problem:
        os.close(fd)
        raise CachefsError(f"scratch {path} {problem}", _CHOOSE)
    return fd


def _what_others_may(status: os.stat_result) -> str | None:
    """Why something is not this user's alone, None if it is."""
    if status.st_uid != os.geteuid():
        return f"is owned by uid {status.st_uid}, not {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
        return f"is writable by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def unlock_scratch(fd: int) -> None:
    """Give back what claim_scratch locked, where no mount came of it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


@contextmanager
def scratch_lock(fd: int) -> Iterator[None]:
    """Keeps other mounts from claiming, joining or leaving, and purge from starting. `fd` is scratch's. Blocks."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _refuse_foreign(fd: int, path: Path) -> None:
    """Who could write here once may have left what he still can write, or what leads elsewhere. Raises CachefsError."""
    for name in (*DIRECTORIES, *FILES):
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        problem = _what_others_may(status)
        if name in DIRECTORIES and not stat.S_ISDIR(status.st_mode):
            problem = "is not a directory"
        elif name in FILES and name not in INDEX_FILES and not stat.S_ISREG(status.st_mode):
            problem = "is not a file"
        elif problem is None and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            problem = "has another name elsewhere"
        if problem:
            raise CachefsError(f"{name} in scratch {path} {problem}", _CHOOSE)


def _is_unwritten(fd: int) -> bool:
    """Whether whoever made the mark was killed at that moment."""
    status = os.stat(MARK, dir_fd=fd, follow_symlinks=False)
    return stat.S_ISREG(status.st_mode) and not status.st_size


def _write_mark(fd: int, made: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(MARK, flags, 0o600, dir_fd=fd), "wb") as file:
        file.write(json.dumps({"format": FORMAT, "directory_made_by_cachefs": made}).encode())


def _read_mark(fd: int, path: Path) -> bool:
    """Whether we made the directory itself."""
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        raise CachefsError(
            f"{path} is not a scratch directory of cachefs: it has no {MARK} file",
            "name the one that was used with --scratch",
        ) from None
    with open(mark) as file:
        if _is_unwritten(fd) and os.listdir(fd) == [MARK]:
            return False
        try:
            content = json.load(file)
            version, made = content["format"], bool(content["directory_made_by_cachefs"])
        except (ValueError, KeyError, TypeError):
            raise CachefsError(f"the file {MARK} in scratch {path} is damaged", _CHOOSE) from None
    if version != FORMAT:
        raise CachefsError(
            f"scratch {path} is of format {version}, this cachefs uses {FORMAT}", "purge it or " + _CHOOSE
        )
    return made
