"""cachefs purge"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import ConfiguredCommand, scratch_option, scratch_path
from cachefs.cli.printing import complain, count, say
from cachefs.config import format_size
from cachefs.mount.purge import Purged
from cachefs.mount.purge import purge as purge_scratch


@click.command(cls=ConfiguredCommand)
@scratch_option
def purge(scratch: Path | None) -> None:
    """Remove what cachefs stored in scratch.

    Refused while a mount uses it. Files of others in there stay.
    """
    path = scratch_path(scratch)
    say_purged(path, purge_scratch(path))


def say_purged(path: Path, purged: Purged) -> None:
    say(f"purged {path}: {count(purged.files, 'file')}, {format_size(purged.bytes)}")
    if purged.kept:
        names = ", ".join(purged.kept[:5])
        complain(f"warning: {path} holds files that are not of cachefs and stay: {names}")
