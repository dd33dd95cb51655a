"""cachefs umount"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import configured_mountpoint, nonempty_path
from cachefs.cli.purge import say_purged
from cachefs.errors import CachefsError, UsageError
from cachefs.mount.purge import purge
from cachefs.mount.unmount import find_our_mount, is_dead_mount, unmount


@click.command()
@click.argument("mountpoint", type=nonempty_path, required=False)
@click.option("--purge", "is_purging", is_flag=True, help="Remove what scratch holds, too")
@click.option("--lazy", is_flag=True, help="Detach now, though processes still use it; they go on undisturbed")
@click.option("--if-dead", is_flag=True, help="Detach a mount whose daemon has died; else do nothing, and say nothing")
@click.pass_context
def umount(ctx: click.Context, /, mountpoint: Path | None, is_purging: bool, lazy: bool, if_dead: bool) -> None:
    """Unmount what cachefs mounted at MOUNTPOINT.

    Works for a mount whose daemon has died, too. What is in scratch stays for the next mount, unless it is purged.
    Without MOUNTPOINT it ends what "cachefs mount" without arguments mounts.
    """
    try:
        place = mountpoint or configured_mountpoint(ctx)
    except (UsageError, click.MissingParameter):
        if if_dead:
            return  # "cachefs mount" says what is wrong
        raise
    if if_dead and not is_dead_mount(place):
        return
    mount = find_our_mount(place)
    has_ended = unmount(mount, lazy=lazy or if_dead)
    if not is_purging or mount.lease is None:
        return
    scratch = mount.lease[0]
    if not has_ended:
        raise CachefsError(
            f"{mount.path} is detached but still in use, so scratch {scratch} is not purged",
            f"purge it later with: cachefs purge --scratch {scratch}",
        )
    say_purged(scratch, purge(scratch))
