"""cachefs verify"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import ConfiguredCommand, scratch_option, scratch_path
from cachefs.cli.printing import complain, count, say
from cachefs.cli.progress import INTERRUPTED, progress_shown
from cachefs.config import format_size
from cachefs.mount.verify import verify as verify_scratch

_MOST_LINES = 100


@click.command(cls=ConfiguredCommand)
@scratch_option
@click.option("--repair", is_flag=True, help="Drop what is wrong; it is fetched again when it is read")
def verify(scratch: Path | None, repair: bool) -> None:
    """Check every copy in scratch against its checksum.

    And what the index says against what is there. Works while mounts use it. Exits with 0 if all is well, 1 if
    something was wrong, repaired or not.
    """
    path = scratch_path(scratch)
    faults: list[str] = []
    try:
        with progress_shown() as show:
            verified = verify_scratch(
                path,
                repair=repair,
                on_progress=lambda checked, files, size: show(checked.files, checked.bytes, files, size, True),
                on_fault=faults.append,
            )
    except KeyboardInterrupt:
        complain("interrupted: not everything was checked")
        raise SystemExit(INTERRUPTED) from None
    for line in faults[:_MOST_LINES]:
        complain(line)
    if len(faults) > _MOST_LINES:
        complain(f"and {len(faults) - _MOST_LINES:,} more")
    checked = verified.checked
    without = f", {count(checked.unchecked, 'file')} without a checksum" if checked.unchecked else ""
    what = f"{count(checked.files, 'file')}, {format_size(checked.bytes)} checked{without}"
    if not faults:
        say(f"{path}: {what}: all is well")
        return
    if not repair:
        say(f"{path}: {what}: {count(len(faults), 'fault')}, to be repaired with --repair")
    else:
        say(f"{path}: {what}: {count(len(faults) - verified.left, 'fault')} repaired")
        if verified.left:
            complain(f"{count(verified.left, 'fault')} left: unmount what shows it, and verify again")
    raise SystemExit(1)
