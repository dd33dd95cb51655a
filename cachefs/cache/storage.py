"""Complete and half-copied files in one scratch directory, by name. It knows nothing of sources and readers.

Invariants:
- A file appears under files/ by rename from staging/, complete; a name there never changes its content.
- Whoever copies holds an exclusive lock on the staged file; whoever has a complete file open holds a shared lock on
  it; whoever removes one takes an exclusive lock first. So nothing that is open is removed, by any mount.
- Nothing is reached through a link: each way to a file begins at a descriptor and stays beneath it.
- The size of a staged file is the frontier: bytes below it are there and are of the right version.
- A file of this boot that has a second name is in a tree (see `trees`), and is not removed either.
- A complete file has the mtime that it was given, its source's. Whoever writes to it changes that, and is found out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator

from cachefs.cache.beneath import open_beneath
from cachefs.errors import ChangedCopyError, StorageError

KEY_BYTES = 16
NAME_BYTES = 24
"""A name is the file's key (which path of which dataset) and 8 bytes for its version."""

_NAME, _PREFIX, _BOOT = re.compile(r"[0-9a-f]{48}"), re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{32}")
IN_USE, GONE = -1, -2
"""Why nothing was removed: somebody uses it; there was nothing."""
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO)
"""Errors of opening what is a symbolic link or a socket."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME  # a FIFO would block


class Storage:
    """The files of a scratch directory. `boot` names the machine's current boot: new files are kept under it."""

    def __init__(self, scratch_fd: int, boot: str) -> None:
        self.boot = boot
        self._files = os.open("files", _DIRECTORY, dir_fd=scratch_fd)
        self._staging = os.open("staging", _DIRECTORY, dir_fd=scratch_fd)
        with contextlib.suppress(FileExistsError):
            os.mkdir(boot, 0o700, dir_fd=self._files)
        self._current = os.open(boot, _DIRECTORY, dir_fd=self._files)

    @property
    def fds(self) -> tuple[int, ...]:
        return self._files, self._staging, self._current

    def open(self, name: bytes) -> int | None:
        """A descriptor of a complete file that was written during this boot, or None.

        Raises StorageError.
        """
        opened = self._open_locked(name, self._current)
        return opened and opened[0]

    def open_unchanged(self, name: bytes, size: int, mtime_ns: int) -> int | None:
        """The same. Raises ChangedCopyError if it has not this size (bytes) and mtime."""
        opened = self._open_locked(name, self._current)
        if opened is None:
            return None
        fd, status = opened
        if status.st_size != size or not is_same_time(status.st_mtime_ns, mtime_ns):
            os.close(fd)
            raise ChangedCopyError(0, "it is not as it was left", name.hex())
        return fd

    def open_earlier(self, name: bytes, boot: str) -> int | None:
        """A descriptor of a file that was written before the machine's last boot, or None."""
        opened = self._open_locked(name, self._files, f"{boot}/")
        return opened and opened[0]

    def adopt(self, name: bytes, boot: str) -> None:
        """Take a file, whose content was checked, as one of this boot."""
        if boot != self.boot:
            with storage_errors(name), self._folder(name, boot) as folder:
                self._into_current(folder, name)

    def link(
        self,
        name: bytes,
        directory: int,
        new_name: bytes,
        size: int,
        mtime_ns: int,
        on_folder: Callable[[int], None] = lambda _: None,
    ) -> int | None:
        """Give a complete file a second name. Its locked descriptor, or None if there is no such file.

        `on_folder` is called with a descriptor of the directory that it is in, before the file is looked at.
        """
        with storage_errors(name):
            try:
                opened = self._folder(name)
            except FileNotFoundError:
                return None
            with opened as folder:
                on_folder(folder)
                try:
                    fd = self.open_unchanged(name, size, mtime_ns)
                except ChangedCopyError:  # whoever opens it next has it mended
                    return None
                if fd is None:
                    return None
                try:  # whoever removes it needs the lock, so it is still the same file
                    os.link(_text(name), new_name, src_dir_fd=folder, dst_dir_fd=directory, follow_symlinks=False)
                except OSError:
                    os.close(fd)
                    raise
                return fd

    def remove(self, name: bytes, boot: str | None = None, *, is_alone: bool = False) -> int:
        """Remove a complete file unless it is in use: open, or in a tree. The bytes that this freed, or IN_USE or GONE.
        `is_alone`: no mount uses this scratch, so trees are left over and do not count.
        """
        text = _text(name)
        try:
            with self._folder(name, boot) as folder, _opened(os.open(text, _OPEN, dir_fd=folder)) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(fd)
                if not os.path.samestat(status, os.stat(text, dir_fd=folder, follow_symlinks=False)):
                    return GONE  # removed by another mount, and here again since
                if status.st_nlink > 1 and boot in (None, self.boot) and not is_alone:
                    return IN_USE
                os.unlink(text, dir_fd=folder)
                return status.st_size
        except BlockingIOError:
            return IN_USE
        except FileNotFoundError:
            return GONE
        except OSError as error:
            raise _storage_error(error, name) from error

    def drop(self, name: bytes, boot: str) -> bool:
        """Take away what bears the name of a complete file and is not what it should be, also while it is in use.

        Whether it was there. A directory is not ours: it is set aside in staging, where a purge finds it.
        """
        try:
            with self._folder(name, boot) as folder:
                try:
                    os.unlink(_text(name), dir_fd=folder)
                except IsADirectoryError:
                    aside = f"strange-{secrets.token_hex(8)}"
                    os.rename(_text(name), aside, src_dir_fd=folder, dst_dir_fd=self._staging)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _storage_error(error, name) from error
        return True

    def is_shown(self, name: bytes, boot: str) -> bool:
        """Whether a complete file is in a tree too."""
        try:
            with self._folder(name, boot) as folder:
                status = os.stat(_text(name), dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_nlink > 1

    def stage(self, name: bytes) -> int | None:
        """A descriptor of an empty staged file, locked; None while somebody else copies it."""
        text = _text(name)
        while True:
            try:
                fd = os.open(text, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._staging)
            except OSError as error:
                raise _storage_error(error, name) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(fd)
                if status.st_nlink > 1:  # not ours: it would be written to under its other name as well
                    os.unlink(text, dir_fd=self._staging)
                elif os.path.samestat(status, os.stat(text, dir_fd=self._staging, follow_symlinks=False)):
                    os.ftruncate(fd, 0)
                    return fd
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass  # renamed into place between open and lock: look again
            except OSError as error:
                os.close(fd)
                raise _storage_error(error, name) from error
            os.close(fd)

    def open_staged(self, name: bytes) -> int | None:
        """A descriptor for reading below the frontier, or None if the file is not staged (any more)."""
        try:
            return os.open(_text(name), _OPEN, dir_fd=self._staging)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage_error(error, name) from error

    def share(self, fd: int) -> None:
        """Hold on to a file that was opened while it was staged and is complete now."""
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # its worker has not closed it yet, or another mount is removing it: the descriptor stays good

    def frontier(self, name: bytes) -> int:
        """How far the copy of a staged file has got, in bytes."""
        try:
            return os.stat(_text(name), dir_fd=self._staging, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def has(self, name: bytes, boot: str | None = None) -> bool:
        way, directory = ("", self._current) if boot in (None, self.boot) else (f"{boot}/", self._files)
        try:
            fd = open_beneath(way + _relative(name), os.O_PATH | os.O_NOFOLLOW, directory)
        except OSError:
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def commit(self, name: bytes) -> None:
        """Make a staged file a complete one."""
        with storage_errors(name):
            self._into_current(self._staging, name)

    def discard_held(self, name: bytes) -> None:
        """Drop a staged file whose lock the caller holds."""
        try:
            os.unlink(_text(name), dir_fd=self._staging)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _storage_error(error, name) from error

    def discard_staged(self, name: bytes) -> bool:
        """Drop a staged file that nobody copies (any more). False if somebody does, so that it stays."""
        fd = self.open_staged(name)
        if fd is None:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(_text(name), dir_fd=self._staging)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _storage_error(error, name) from error
        finally:
            os.close(fd)
        return True

    def staged(self) -> list[bytes]:
        """The names of all staged files."""
        return [bytes.fromhex(text) for text in os.listdir(self._staging) if _NAME.fullmatch(text)]

    def discard_abandoned(self) -> None:
        """Drop every staged file that nobody copies."""
        for name in self.staged():
            self.discard_staged(name)

    def scan(self) -> Iterator[tuple[bytes, str, int]]:
        """(name, boot, size in bytes) of every complete file; some 3 us each."""
        for name, boot, size in self.scan_all():
            if size is not None:
                yield name, boot, size

    def scan_all(self) -> Iterator[tuple[bytes, str, int | None]]:
        """The same of whatever bears the name of a file; the size of what is none, and was not made by us, is None."""
        for boot, folders in _directories(self._files, _BOOT):
            for _, folder in _directories(folders, _PREFIX):
                with os.scandir(folder) as files:
                    for file in files:
                        if _NAME.fullmatch(file.name):
                            is_file = file.is_file(follow_symlinks=False)
                            size = file.stat(follow_symlinks=False).st_size if is_file else None
                            yield bytes.fromhex(file.name), boot, size

    def space(self) -> tuple[int, int]:
        """(bytes available to us, bytes in all) of the file system."""
        status = os.fstatvfs(self._files)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    def _open_locked(self, name: bytes, directory: int, way: str = "") -> tuple[int, os.stat_result] | None:
        """A locked descriptor of a complete file, and its status. Raises ChangedCopyError for what is no file."""
        try:
            fd = open_beneath(way + _relative(name), _OPEN, directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise ChangedCopyError(error.errno, "it is not a file", name.hex()) from error
            raise _storage_error(error, name) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # being removed
            os.close(fd)
            return None
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink:
            return fd, status
        os.close(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ChangedCopyError(0, "it is not a file", name.hex())
        return None

    def _into_current(self, directory: int, name: bytes) -> None:
        """Move a file from a directory to where it belongs."""
        text = _text(name)
        try:
            folder = open_beneath(text[:2], _FOLDER, self._current)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(text[:2], 0o700, dir_fd=self._current)
            folder = open_beneath(text[:2], _FOLDER, self._current)
        try:
            os.rename(text, text, src_dir_fd=directory, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def _folder(self, name: bytes, boot: str | None = None) -> contextlib.AbstractContextManager[int]:
        """A descriptor of the directory that a complete file is in, for a block. Raises OSError."""
        return _opened(open_beneath(f"{boot or self.boot}/{_text(name)[:2]}", _FOLDER, self._files))


def _directories(parent: int, pattern: re.Pattern[str]) -> Iterator[tuple[str, int]]:
    """(name, descriptor) of the directories in `parent` whose names match. What is none is not ours."""
    for name in filter(pattern.fullmatch, os.listdir(parent)):
        try:
            fd = open_beneath(name, _DIRECTORY, parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
                continue
            raise
        with _opened(fd):
            yield name, fd


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def is_same_time(stored: int, given: int) -> bool:
    """Whether a file system that was given a time, in ns, has `stored` it: some keep 100 ns, some 2 s."""
    if stored == given:
        return True
    for coarse, step in (10**9, 2 * 10**9), (10**6, 10**6), (1000, 1000), (100, 100):
        if stored % coarse == 0:
            return abs(stored - given) < step
    return False


def _text(name: bytes) -> str:
    return name.hex()


def _relative(name: bytes) -> str:
    text = name.hex()
    return f"{text[:2]}/{text}"


@contextlib.contextmanager
def storage_errors(name: bytes) -> Iterator[None]:
    """Turn an OSError of a call on scratch into a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _storage_error(error, name) from error


def _storage_error(error: OSError, name: bytes) -> StorageError:
    return StorageError(error.errno or errno.EIO, error.strerror or str(error), name.hex())
