"""cachefs purge"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import scratch_option, scratch_path
from cachefs.config import format_size
from cachefs.mount.purge import Purged
from cachefs.mount.purge import purge as purge_scratch


@click.command()
@scratch_option
def purge(scratch: Path | None) -> None:
    """Remove everything that cachefs stored in scratch, when no mount uses it."""
    path = scratch_path(scratch)
    say_purged(path, purge_scratch(path))


def say_purged(path: Path, purged: Purged) -> None:
    click.echo(f"purged {path}: {purged.files} files, {format_size(purged.bytes)}")
    if purged.kept:
        names = ", ".join(purged.kept[:5])
        click.echo(f"cachefs: warning: {path} holds files that are not of cachefs and stay: {names}", err=True)
