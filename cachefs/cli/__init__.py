"""The command line: one module a command. The only place that prints.

A command's module is imported when the command is called, so that `status` and `umount` start without what only a
mount needs.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cachefs import __version__
from cachefs.cli.options import nonempty_path
from cachefs.cli.printing import complain
from cachefs.errors import CachefsError

CONFIG_VARIABLE = "CACHEFS_CONFIG"
COMMANDS = ("run", "mount", "umount", "status", "warm", "verify", "purge", "doctor", "bench", "demo")
"""Each is a function of the module of the same name, here in the order of the help."""


class _Commands(click.Group):
    """Finds COMMANDS, and reports a CachefsError as one line on stderr, with its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"cachefs.cli.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CachefsError as error:
            complain(str(error))
            ctx.exit(error.exit_code)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option of a command is also an environment variable (--capacity is CACHEFS_CAPACITY) and a key of "
    "the configuration file; the command line wins, then the environment, then the file.",
)
@click.version_option(__version__, prog_name="cachefs")
@click.option(
    "--config",
    type=nonempty_path,
    envvar=CONFIG_VARIABLE,
    show_envvar=True,
    metavar="FILE",
    help='TOML file with options, such as capacity = "300G" [default: cachefs/config.toml in $XDG_CONFIG_HOME or '
    "~/.config]",
)
def main(config: Path | None) -> None:
    """A read-through cache for datasets on slow storage.

    \b
    cachefs mount /net/nas/imagenet            # mount over the data path,
    python train.py                            # run what you always ran:
                                               # what it opens is copied to
                                               # scratch, and local from then on
    cachefs umount /net/nas/imagenet --purge   # unmount and empty scratch
    """
    _open_standard_streams()


def _open_standard_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr are closed, so that nothing else gets their numbers."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - for as long as we run; it gets the lowest free number
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
