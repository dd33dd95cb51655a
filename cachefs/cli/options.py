"""The options that commands share, and where their values come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import click

from cachefs import config
from cachefs.errors import CachefsError, UsageError, describe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

F = TypeVar("F", bound=Callable[..., Any])


def nonempty_path(text: Any) -> Path:
    """click's type for a path. An empty one is most likely a variable that is not set, and not meant as "here"."""
    if not isinstance(text, str | os.PathLike):
        raise click.BadParameter(f"{text!r} is not a path")
    if not os.fspath(text):
        raise click.BadParameter("the path is empty")
    return Path(text)


def _parsed(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """click's type for a value that one of cachefs.config's functions understands."""

    def convert(value: Any) -> Any:
        try:
            return parse(str(value))
        except CachefsError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def option(flag: str, **keywords: Any) -> Callable[[F], F]:
    """A click option that is an environment variable too."""
    variable = "CACHEFS_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, envvar=variable, show_envvar=True, **keywords)


def scratch_option(function: F) -> F:
    return option(
        "--scratch",
        type=nonempty_path,
        metavar="DIR",
        help="Node-local directory that holds everything we store "
        "[default: the job's $TMPDIR/cachefs, else one for each user in the temporary directory]",
    )(function)


_MOUNT_OPTIONS = (
    option(
        "--capacity",
        type=_parsed(config.Capacity.parse),
        default="80%",
        metavar="300G|80%",
        help="How much scratch may hold; a share is of the space free at mount [default: 80%]",
    ),
    option(
        "--policy",
        type=click.Choice(config.POLICIES),
        default="hold",
        help="When scratch is full: keep what is there, or evict the least recently used [default: hold]",
    ),
    option(
        "--prefetch",
        type=click.Choice(config.PREFETCH_MODES),
        default="off",
        help="Fetch ahead of use [default: off, the only one so far]",
    ),
    option(
        "--metadata-ttl",
        type=_parsed(config.parse_seconds),
        default="3600",
        metavar="SECONDS",
        help="How long attributes, listings and absence are believed [default: 3600]",
    ),
    option(
        "--source-timeout",
        type=_parsed(config.parse_seconds),
        default="120",
        metavar="SECONDS",
        help="After which a source without an answer is an error for the reader; 0 is never [default: 120]",
    ),
    option("--allow-other", is_flag=True, help="Let other users read, as the source's modes permit"),
    option(
        "--log-level",
        type=click.Choice(config.LOG_LEVELS, case_sensitive=False),
        default="info",
        metavar="LEVEL",
        help="debug, info, warning or error [default: info]",
    ),
)


def mount_options(function: F) -> F:
    """All options of a mount."""
    for decorate in reversed(_MOUNT_OPTIONS):
        function = decorate(function)
    return scratch_option(function)


def scratch_path(scratch: Path | None) -> Path:
    """The scratch directory that is meant, absolute; its parents' links resolved, so that it can be compared."""
    path = Path(os.path.abspath(scratch or config.default_scratch()))
    return Path(os.path.realpath(path.parent)) / path.name


class ConfiguredCommand(click.Command):
    """A command whose options may come from the configuration file. Its --help works whatever the file holds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = list(takewhile(lambda argument: argument != "--", args))
        if not set(own).intersection(self.get_help_option_names(ctx)):
            ctx.default_map = self._load(ctx, ctx.find_root().params.get("config"))
        return super().parse_args(ctx, args)

    def _load(self, ctx: click.Context, path: Path | None) -> dict[str, Any]:
        """This command's part of the file. Raises UsageError for a file, a key or a value that is not understood."""
        path, values = _read_configuration(path)
        known = _options_of(mount_options(lambda: None))
        mine = _options_of(self)
        defaults = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise UsageError(
                    f"configuration file {path} has an unknown key {key!r}",
                    "the keys are the long options that cachefs mount --help lists",
                )
            if name in mine:
                try:
                    defaults[name] = _convert(mine[name], value, ctx)
                except click.BadParameter as error:
                    raise UsageError(f"configuration file {path}, key {key}: {error.message}") from None
        return defaults


def _read_configuration(path: Path | None) -> tuple[Path, dict[str, Any]]:
    """The TOML file that is meant and what it holds: nothing, if it was not asked for and cannot be reached."""
    explicit = path is not None
    if path is None:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = Path(home, "cachefs", "config.toml")
    try:
        with open(path, "rb") as file:
            return path, tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not explicit:
            return path, {}
        raise UsageError(f"configuration file {path} cannot be read: {describe(error)}") from None
    except OSError as error:
        raise UsageError(f"configuration file {path} cannot be read: {describe(error)}") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise UsageError(f"configuration file {path} is not TOML: {error}") from None


def _options_of(command: Any) -> dict[str, click.Option]:
    """The options with an environment variable, which may be in the file too."""
    params = command.params if isinstance(command, click.Command) else command.__click_params__
    return {param.name: param for param in params if isinstance(param, click.Option) and param.envvar and param.name}


def _convert(option: click.Option, value: Any, ctx: click.Context) -> Any:
    """Check a value of the file; return it as click wants a default. Raises click.BadParameter."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter(f"{value!r} is neither true nor false")
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        raise click.BadParameter(f"{value!r} is not a string in quotes")
    else:
        option.type.convert(value, option, ctx)
    return value
