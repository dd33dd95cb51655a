"""The exceptions of cachefs, each with what a caller needs to report it: an exit code, a hint, or an errno."""

from __future__ import annotations

import errno
import os


class CachefsError(Exception):
    """Something the user can act on. Its message is one line: what happened, to what; `hint` says what to do.

    `exit_code` is the status of the command that reports it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}: {self.hint}" if self.hint else message


class UsageError(CachefsError):
    """The command line, the environment or the configuration file cannot be understood."""

    exit_code = 2


class ShardError(CachefsError):
    """A mount cannot have its shard. Without it a command would train on other data, or fetch what others keep."""


class SourceError(OSError):
    """The source answered with an error; its errno is what the reader gets."""


class SourceChangedError(SourceError):
    """A source file is no longer of the version that was asked for. Its errno is ESTALE.

    The kernel answers ESTALE to open(2) by looking the name up afresh and trying once more, so that an
    application sees the new version and no error.
    """

    def __init__(self, path: bytes) -> None:
        super().__init__(errno.ESTALE, "changed on the source", path)


class SourceTimeoutError(SourceError):
    """The source did not answer within --source-timeout. Its errno is EIO."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(errno.EIO, f"no answer from the source within {seconds:g} s", what)


class StorageError(OSError):
    """Scratch failed (full, read-only, damaged). A reader never sees it: the source serves instead."""


class ChangedCopyError(StorageError):
    """A copy in scratch is not as we left it: of another size or time, or not a regular file."""


class WorkerDiedError(OSError):
    """A worker process ended while it worked. Its errno is EIO."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, "the worker process died", what)


def describe(error: OSError) -> str:
    """`error` in words without Python's decoration: "Permission denied"."""
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
