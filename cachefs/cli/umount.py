"""cachefs umount"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.options import nonempty_path
from cachefs.cli.purge import say_purged
from cachefs.errors import CachefsError
from cachefs.mount.purge import purge
from cachefs.mount.unmount import find_our_mount, unmount


@click.command()
@click.argument("mountpoint", type=nonempty_path)
@click.option("--purge", "is_purging", is_flag=True, help="Remove what scratch holds, too")
@click.option("--lazy", is_flag=True, help="Detach now, though processes still use it; they go on undisturbed")
def umount(mountpoint: Path, is_purging: bool, lazy: bool) -> None:
    """Unmount what cachefs mounted at MOUNTPOINT.

    Works for a mount whose daemon has died, too. What is in scratch stays for the next mount, unless it is purged.
    """
    mount = find_our_mount(mountpoint)
    has_ended = unmount(mount, lazy=lazy)
    if not is_purging or mount.lease is None:
        return
    scratch = mount.lease[0]
    if not has_ended:
        raise CachefsError(
            f"{mount.path} is detached but still in use, so scratch {scratch} is not purged",
            f"purge it later with: cachefs purge --scratch {scratch}",
        )
    say_purged(scratch, purge(scratch))
