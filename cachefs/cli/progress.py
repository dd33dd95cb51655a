"""How far something is that takes long: a bar on a terminal, else a line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachefs.cli.printing import complain
from cachefs.config import format_size

INTERRUPTED = 130
"""Exit status of a command that was interrupted."""
_LINE_SECONDS = 5.0

Show = Callable[[int, int, int, int, bool], None]
"""Called with files and bytes done, files and bytes in all, and whether these are all indeed."""


@contextmanager
def progress_shown() -> Iterator[Show]:
    """Within the block, call what it gives."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def tell(done_files: int, done_bytes: int, all_files: int, all_bytes: int, is_all: bool) -> None:
            nonlocal said
            if time.monotonic() - said >= _LINE_SECONDS:
                said = time.monotonic()
                of = f"of {all_files:,}" if is_all else f"of {all_files:,} and more"
                complain(f"{done_files:,} {of} files, {format_size(done_bytes)}")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.fields[files]}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, files="")

        def show(done_files: int, done_bytes: int, all_files: int, all_bytes: int, is_all: bool) -> None:
            files = f"{done_files:,} of {all_files:,} files"
            bar.update(task, total=all_bytes if is_all else None, completed=done_bytes, files=files)

        yield show
