"""cachefs status"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from cachefs.cli.options import nonempty_path
from cachefs.cli.printing import complain, printable, say
from cachefs.config import format_size
from cachefs.errors import CachefsError
from cachefs.mount.control_client import ask
from cachefs.mount.mountinfo import Mount, read_mounts
from cachefs.mount.unmount import find_our_mount, live_lease, scratch_of

_LISTED = 10


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(paths[:_LISTED]) + more or "nothing"


def _expected_hits(rates: dict[str, float] | None) -> str:
    return ", ".join(f"{way} {rate:.0%}" for way, rate in rates.items()) if rates else "not known yet"


def _expected_wait(seconds: float | None) -> str:
    return "not known yet" if seconds is None else f"{seconds:,.1f} s"


def _tiers(tiers: list[dict[str, Any]]) -> str:
    return "; ".join(map(_tier, tiers))


def _tier(tier: dict[str, Any]) -> str:
    moves = [(key, tier[key]) for key in ("moved_down", "moved_up", "dropped") if tier.get(key)]
    moved = "".join(f", {count:,} {key.replace('_', ' ')}" for key, count in moves)
    size = f"{format_size(tier['bytes'])} of {format_size(tier['capacity_bytes'])}"
    return f"{tier['path']}: {tier['files']:,} files, {size}, {tier['hits']:,} hits{moved}"


_ROWS = (
    ("source", "source", str),
    ("scratch", "scratch", str),
    ("policy", "policy", str),
    ("policy now", "policy_now", str),
    ("capacity", "capacity_bytes", format_size),
    ("resident files", "resident_files", "{:,}".format),
    ("resident bytes", "resident_bytes", format_size),
    ("tiers", "tiers", _tiers),
    ("promoted files", "promoted_files", "{:,}".format),
    ("promoted bytes", "promoted_bytes", format_size),
    ("promoted", "promoted_directories", _listed),
    ("promotion", "promotion", str),
    ("hits", "hits", "{:,}".format),
    ("misses", "misses", "{:,}".format),
    ("bypasses", "bypasses", "{:,}".format),
    ("evictions", "evictions", "{:,}".format),
    ("fetches", "fetches", "{:,}".format),
    ("of these ahead", "prefetches", "{:,}".format),
    ("fetch errors", "fetch_errors", "{:,}".format),
    ("read from source", "source_bytes_read", format_size),
    ("requests", "requests", "{:,}".format),
    ("served", "bytes_served", format_size),
    ("saved", "hit_bytes", format_size),
    ("waited", "wait_seconds", "{:,.1f} s".format),
    ("expected hits", "expected_hit_rates", _expected_hits),
    ("expected wait, an epoch", "expected_wait_seconds", _expected_wait),
    ("up for", "uptime_seconds", "{:,.0f} s".format),
    ("log", "log", str),
)
_SHARD_ROWS = (
    ("shard", "shard", str),
    ("shard by", "shard_by", str),
    ("shard mode", "shard_mode", str),
    ("shard seed", "shard_seed", str),
    ("shard files", "shard_files", "{:,}".format),
    ("shard bytes", "shard_bytes", format_size),
    ("of files", "shard_listed_files", "{:,}".format),
    ("of bytes", "shard_listed_bytes", format_size),
    ("shard fingerprint", "shard_fingerprint", str),
    ("shard warnings", "shard_warnings", lambda warnings: "; ".join(warnings) or "none"),
)
"""Of a mount with a shard."""


@click.command()
@click.argument("mountpoint", type=nonempty_path, required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a mount, each on a line")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Say how the mount at MOUNTPOINT does, or all mounts of this user.

    Exits with 1 if one of them does not answer.
    """
    mounts = [find_our_mount(mountpoint)] if mountpoint else [mount for mount in read_mounts() if _is_own(mount)]
    has_failed = False
    for mount in mounts:
        try:
            report = _ask(mount)
        except CachefsError as error:
            has_failed = True
            complain(f"{mount.path}: {error}")
            continue
        if as_json:
            click.echo(json.dumps(report))
        else:
            _print(report)
    if has_failed:
        raise SystemExit(1)
    if not mounts and not as_json:
        say("no mounts of cachefs")


def _ask(mount: Mount) -> dict[str, Any]:
    """What the daemon of `mount` says. Raises CachefsError."""
    if not _is_own(mount):
        raise CachefsError("this is another user's mount", "only that user can ask its daemon")
    scratch = scratch_of(mount)
    try:
        lease = live_lease(mount)
        if lease is None:
            raise CachefsError("the daemon of this mount has died", f"unmount it with: cachefs umount {mount.path}")
        return ask(scratch, lease.id, "status")
    finally:
        os.close(scratch.fd)


def _is_own(mount: Mount) -> bool:
    """Whether it is a mount of ours, of this user: other users' scratch directories cannot be looked into."""
    if mount.lease is None:
        return False
    try:
        return mount.lease[0].stat().st_uid == os.geteuid()
    except PermissionError:
        return False
    except OSError:
        return True  # scratch is gone, which its user should hear about


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console  # takes longer to import than the rest of this command
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(report["mountpoint"])), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, key, form in (*_ROWS, *(_SHARD_ROWS if report.get("shard") else ())):
        if key not in report:  # a daemon of another version
            continue
        table.add_row(label, Text(printable(form(report[key]))))
    # where nothing has to fit a screen no path is folded, so that it can be copied
    (Console() if sys.stdout.isatty() else Console(width=10_000)).print(table)
