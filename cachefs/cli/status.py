"""cachefs status"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cachefs.config import format_size
from cachefs.errors import CachefsError
from cachefs.mount.control import ask
from cachefs.mount.mountinfo import Mount, read_mounts
from cachefs.mount.unmount import find_our_mount, scratch_of

_ROWS = (
    ("source", "source", str),
    ("scratch", "scratch", str),
    ("policy", "policy", str),
    ("capacity", "capacity_bytes", format_size),
    ("resident files", "resident_files", "{:,}".format),
    ("resident bytes", "resident_bytes", format_size),
    ("hits", "hits", "{:,}".format),
    ("misses", "misses", "{:,}".format),
    ("bypasses", "bypasses", "{:,}".format),
    ("evictions", "evictions", "{:,}".format),
    ("fetches", "fetches", "{:,}".format),
    ("fetch errors", "fetch_errors", "{:,}".format),
    ("read from source", "source_bytes_read", format_size),
    ("served", "bytes_served", format_size),
    ("up for", "uptime_seconds", "{:,.0f} s".format),
    ("log", "log", str),
)


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a mount, each on a line")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Say how the mount at MOUNTPOINT does, or all mounts of this user."""
    mounts = [find_our_mount(mountpoint)] if mountpoint else [m for m in read_mounts() if m.lease is not None]
    failed: CachefsError | None = None
    for mount in mounts:
        try:
            report = _ask(mount)
        except CachefsError as error:
            if mountpoint is None and not _is_own(mount):
                continue
            failed = CachefsError(f"{mount.path}: {error.args[0]}", error.hint)
            click.echo(f"cachefs: {failed}", err=True)
            continue
        if as_json:
            click.echo(json.dumps(report))
        else:
            _print(report)
    if failed is not None:
        raise SystemExit(failed.exit_code)
    if not mounts and not as_json:
        click.echo("no mounts of cachefs")


def _ask(mount: Mount) -> dict[str, Any]:
    scratch = scratch_of(mount)
    assert mount.lease is not None
    try:
        return ask(scratch, mount.lease[1], "status")
    finally:
        os.close(scratch.fd)


def _is_own(mount: Mount) -> bool:
    """Whether a mount is this user's: other users' scratch directories cannot be looked into."""
    assert mount.lease is not None
    try:
        return mount.lease[0].stat().st_uid == os.geteuid()
    except OSError:
        return False


def _print(report: dict[str, Any]) -> None:
    table = Table(title=report["mountpoint"], title_justify="left", show_header=False)
    for label, key, form in _ROWS:
        table.add_row(label, form(report[key]))
    Console().print(table)
