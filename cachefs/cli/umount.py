"""cachefs umount"""

from __future__ import annotations

from pathlib import Path

import click

from cachefs.cli.purge import say_purged
from cachefs.mount.mountinfo import Mount
from cachefs.mount.purge import purge
from cachefs.mount.unmount import find_our_mount, unmount


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--purge", "is_purging", is_flag=True, help="Remove what scratch holds, too")
@click.option("--lazy", is_flag=True, help="Detach now, though processes still use it")
def umount(mountpoint: Path, is_purging: bool, lazy: bool) -> None:
    """Unmount what cachefs mounted at MOUNTPOINT."""
    mount: Mount = find_our_mount(mountpoint)
    unmount(mount, lazy=lazy)
    if is_purging and mount.lease is not None:
        say_purged(mount.lease[0], purge(mount.lease[0]))
