"""The command line: one module a command. The only place that prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cachefs import __version__
from cachefs.cli.demo import demo
from cachefs.cli.mount import mount
from cachefs.cli.options import load_configuration
from cachefs.cli.purge import purge
from cachefs.cli.status import status
from cachefs.cli.umount import umount
from cachefs.errors import CachefsError

CONFIG_VARIABLE = "CACHEFS_CONFIG"


class _Commands(click.Group):
    """Reports a CachefsError as one line on stderr, with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CachefsError as error:
            click.echo(f"cachefs: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cachefs")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar=CONFIG_VARIABLE,
    help="TOML file with options as keys [default: cachefs/config.toml in $XDG_CONFIG_HOME or ~/.config]",
)
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """A read-through cache for datasets on slow storage: mount it over the data path and train.

    Every option is also an environment variable (--capacity is CACHEFS_CAPACITY) and a key of the configuration
    file; the command line wins, then the environment, then the file.
    """
    ctx.default_map = load_configuration(config, main.commands)


for _command in (mount, umount, status, purge, demo):
    main.add_command(_command)
