"""cachefs mount"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cachefs.cli.options import mount_options, scratch_path
from cachefs.config import Settings
from cachefs.mount.checks import check_capacity, check_fuse, check_paths, warnings
from cachefs.mount.daemon import serve_in_background, serve_in_foreground
from cachefs.mount.mountinfo import find_mount, resolve_mountpoint


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@mount_options
@click.option("--foreground", is_flag=True, help="Serve in this process until it is unmounted or interrupted")
def mount(source: Path, mountpoint: Path | None, scratch: Path | None, foreground: bool, **options: Any) -> None:
    """Mount SOURCE over itself, or at MOUNTPOINT, with every file cached in scratch when it is first opened."""
    target = resolve_mountpoint(mountpoint or source)
    if find_mount(target) is None:  # nothing there that could hang: follow a link to the directory itself
        target = Path(os.path.realpath(target))
    settings = Settings(
        source=target if mountpoint is None else Path(os.path.realpath(source)),
        mountpoint=target,
        scratch=scratch_path(scratch),
        **options,
    )
    check_paths(settings)
    check_fuse(allow_other=settings.allow_other)
    check_capacity(settings)
    for warning in warnings(settings):
        click.echo(f"cachefs: warning: {warning}", err=True)
    if foreground:
        serve_in_foreground(settings, lambda: click.echo(f"cachefs: serving {settings.mountpoint}", err=True))
    else:
        serve_in_background(settings)
