"""cachefs warm"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from cachefs.cli.options import nonempty_path
from cachefs.cli.printing import complain, count, say
from cachefs.cli.progress import INTERRUPTED, progress_shown
from cachefs.config import format_size
from cachefs.errors import CachefsError, UsageError
from cachefs.mount.control_client import ask_for_all
from cachefs.mount.mountinfo import Mount
from cachefs.mount.unmount import find_our_mount, live_lease, scratch_of


@click.command()
@click.argument("mountpoint", type=nonempty_path)
@click.argument("paths", type=nonempty_path, nargs=-1, metavar="[PATH]...")
def warm(mountpoint: Path, paths: tuple[Path, ...]) -> None:
    """Fetch PATHs of the mount at MOUNTPOINT now, or all of it.

    A PATH is a file or a directory, relative to MOUNTPOINT or inside it. Interrupt it when you like: what was fetched
    stays, and the next time it goes on with the rest. Exits with 1 if something could not be fetched or had no room.
    """
    mount = find_our_mount(mountpoint)
    wanted = [_relative(mount.path, path) for path in paths] or [""]
    scratch = scratch_of(mount)
    try:
        lease = live_lease(mount)
        if lease is None:
            raise CachefsError("the daemon of this mount has died", f"unmount it with: cachefs umount {mount.path}")
        with closing(ask_for_all(scratch, lease.id, {"command": "warm", "paths": wanted})) as replies:
            last = _follow(replies)
    except KeyboardInterrupt:
        complain("interrupted: what was fetched stays")
        raise SystemExit(INTERRUPTED) from None
    finally:
        os.close(scratch.fd)
    _conclude(mount, last)


def _relative(mountpoint: Path, path: Path) -> str:
    """`path` relative to the mount. Raises UsageError for one outside. Looks at nothing: links are not followed."""
    absolute = Path(os.path.normpath(mountpoint / path))
    if absolute != mountpoint and mountpoint not in absolute.parents:
        raise UsageError(f"{path} is not inside {mountpoint}", "name files and directories of the mount")
    inside = os.fspath(absolute.relative_to(mountpoint))
    return "" if inside == "." else inside


def _follow(replies: Generator[dict[str, Any], None, None]) -> dict[str, Any]:
    """Show how far it is; the last reply."""
    with progress_shown() as show:
        for reply in replies:
            if reply.get("finished"):
                return reply
            done, found = ((reply[f"{which}_files"], reply[f"{which}_bytes"]) for which in ("done", "found"))
            show(*done, *found, reply["is_counted"])
    raise AssertionError("unreachable: without a last reply ask_for_all raises")


def _conclude(mount: Mount, last: dict[str, Any]) -> None:
    problems: Sequence[str] = last["errors"]
    for problem in problems:
        complain(problem)
    resident = last["done_files"] - last["failed_files"]
    if resident or not problems:
        say(f"{mount.path}: {count(resident, 'file')} resident, {format_size(last['done_bytes'])}")
    if last["failed_files"]:
        complain(f"{count(last['failed_files'], 'file')} could not be fetched: see the log that cachefs status names")
    if last["without_room"]:
        complain("scratch is full: the rest is read from the source; a larger --capacity makes room")
    if problems or last["failed_files"] or last["without_room"]:
        raise SystemExit(1)
