"""cachefs purge"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import ConfiguredCommand, memory_path_option, scratch_option, scratch_path
from cachefs.cli.printing import complain, count, say
from cachefs.config import format_size
from cachefs.mount.memory import free_orphans
from cachefs.mount.purge import Purged
from cachefs.mount.purge import purge as purge_scratch


@click.command(cls=ConfiguredCommand)
@scratch_option
@memory_path_option
@click.option("--memory", is_flag=True, help="Free the memory tiers of this user's mounts that have died, nothing else")
def purge(scratch: Path | None, memory_path: Path, memory: bool) -> None:
    """Remove what cachefs stored in scratch.

    Refused while a mount uses it. Files of others in there stay.
    """
    if memory:
        say(f"freed {count(free_orphans(memory_path), 'memory tier')} in {memory_path}")
        return
    path = scratch_path(scratch)
    say_purged(path, purge_scratch(path))


def say_purged(path: Path, purged: Purged) -> None:
    say(f"purged {path}: {count(purged.files, 'file')}, {format_size(purged.bytes)}")
    if purged.kept:
        names = ", ".join(purged.kept[:5])
        complain(f"warning: {path} holds files that are not of cachefs and stay: {names}")
