"""cachefs mount"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cachefs.cli.options import (
    ConfiguredCommand,
    mount_options,
    mountpoint_of_source,
    place_arguments,
    scratch_path,
    take_sharding,
)
from cachefs.cli.printing import complain
from cachefs.config import Settings
from cachefs.mount.checks import check_capacity, check_fuse, check_paths, warnings
from cachefs.mount.memory import check_memory
from cachefs.mount.mountinfo import find_mount, resolve_mountpoint


@click.command(cls=ConfiguredCommand)
@place_arguments
@mount_options
@click.option("--foreground", is_flag=True, help="Serve in this process until it is unmounted or interrupted")
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    source: Path,
    mountpoint: Path | None,
    scratch: Path | None,
    foreground: bool,
    **options: Any,
) -> None:
    """Mount SOURCE over itself, or at MOUNTPOINT.

    SOURCE is a directory on slow storage. It appears unchanged, read-only; each file is copied to scratch when it is
    first opened, and read from there from then on. The command returns when the mount serves; "cachefs umount" ends
    it. Without arguments both come from CACHEFS_SOURCE and CACHEFS_MOUNTPOINT, or from the configuration file.
    """
    sharding = take_sharding(ctx, options)
    mountpoint = mountpoint_of_source(ctx, mountpoint)
    target = resolve_mountpoint(mountpoint or source)
    if find_mount(target) is None:  # nothing there that could hang: follow a link to the directory itself
        target = Path(os.path.realpath(target))
    settings = Settings(
        source=target if mountpoint is None else Path(os.path.realpath(source)),
        mountpoint=target,
        scratch=scratch_path(scratch),
        sharding=sharding,
        **options,
    )
    check_paths(settings)
    check_fuse(allow_other=settings.allow_other)
    check_capacity(settings)
    check_memory(settings)

    from cachefs.mount.daemon import serve_in_background, serve_in_foreground  # slow: help and refusals need none

    if foreground:
        serve_in_foreground(settings, lambda said: _announce(settings, said))
    else:
        serve_in_background(settings, lambda said: _warn(settings, said))


def _announce(settings: Settings, said: Sequence[str]) -> None:
    _warn(settings, said)
    complain(f"serving {settings.mountpoint}")


def _warn(settings: Settings, said: Sequence[str]) -> None:
    for warning in (*warnings(settings), *said):
        complain(f"warning: {warning}")
