"""The options that commands share, and where their values come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from cachefs import config
from cachefs.errors import CachefsError, UsageError, describe
from cachefs.mount.launchers import find_part

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

F = TypeVar("F", bound=Callable[..., Any])

_SOURCE_VARIABLE = "CACHEFS_SOURCE"
_MOUNTPOINT_VARIABLE = "CACHEFS_MOUNTPOINT"
_PLACES = ("mountpoint", "source")
"""Keys of the file that are arguments: where to mount; without the first, over the second."""


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


def place_arguments(function: F) -> F:
    """SOURCE and MOUNTPOINT, which may come from the environment or the file too."""
    function = click.argument("mountpoint", type=nonempty_path, required=False, envvar=_MOUNTPOINT_VARIABLE)(function)
    return click.argument("source", type=nonempty_path, envvar=_SOURCE_VARIABLE)(function)


def scratch_option(function: F) -> F:
    return option(
        "--scratch",
        type=nonempty_path,
        metavar="DIR",
        help="Node-local directory that holds everything we store "
        "[default: the job's $TMPDIR/cachefs, else one for each user in the temporary directory]",
    )(function)


capacity_option = option(
    "--capacity",
    type=_parsed(config.Capacity.parse),
    default="80%",
    metavar="300G|80%",
    help="How much scratch may hold; a share is of the space free at mount [default: 80%]",
)

memory_path_option = option(
    "--memory-path",
    type=lambda text: Path(os.path.realpath(nonempty_path(text))),  # what is compared with scratch and the source
    default=str(config.DEFAULT_MEMORY_PATH),
    metavar="DIR",
    help="A tmpfs for the memory tier [default: /dev/shm]",
)

_MOUNT_OPTIONS = (
    capacity_option,
    option(
        "--memory",
        type=_parsed(config.Capacity.parse),
        metavar="8G|25%",
        help="A tier in memory above scratch, of this size or share of the memory that the job may have; what is least "
        "used moves down [default: none]",
    ),
    memory_path_option,
    option(
        "--policy",
        type=click.Choice(config.POLICIES),
        default="auto",
        help="When scratch is full: keep what is there, evict the least recently used, or whichever of the two would "
        "hit more [default: auto]",
    ),
    option(
        "--prefetch",
        type=click.Choice(config.PREFETCH_MODES),
        default="auto",
        help="Fetch ahead of use: what is being read through, everything at once, or nothing [default: auto]",
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
    option("--no-promote", is_flag=True, help="Do not mount what is completely resident directly from scratch"),
    option("--allow-other", is_flag=True, help="Let other users read, as the source's modes permit"),
    option(
        "--log-level",
        type=click.Choice(config.LOG_LEVELS, case_sensitive=False),
        default="info",
        metavar="LEVEL",
        help="debug, info, warning or error [default: info]",
    ),
)

_SHARD_OPTIONS = (
    option(
        "--shard",
        type=_parsed(config.parse_shard),
        metavar="R/N|auto",
        help="Keep shard R of N, from 0, of the source's files, or that of this rank as its launcher says",
    ),
    option(
        "--shard-by",
        type=click.Choice(config.SHARD_UNITS),
        default="rank",
        help="What has a shard each: what auto counts [default: rank]",
    ),
    option(
        "--shard-mode",
        type=click.Choice(config.SHARD_MODES),
        default="keep",
        help="Show everything and keep the shard alone, or show nothing else [default: keep]",
    ),
    option(
        "--shard-seed",
        type=click.IntRange(0, (1 << 63) - 1),
        default=0,
        metavar="N",
        help="Another seed divides otherwise; the same for all ranks [default: 0]",
    ),
    option("--shard-fill", is_flag=True, help="Take in files of other shards, as many as there is room for"),
    option("--shard-cut", is_flag=True, help="Keep what there is room for of a shard that is too large: else an error"),
)


def mount_options(function: F) -> F:
    """All options of a mount."""
    for decorate in reversed(_MOUNT_OPTIONS + _SHARD_OPTIONS):
        function = decorate(function)
    return scratch_option(function)


def take_sharding(ctx: click.Context, options: dict[str, Any]) -> config.Sharding | None:
    """What the options of shards say; they are taken out of `options`. Raises UsageError."""
    shard = options.pop("shard")
    names = [name for name in options if name.startswith("shard_")]
    values = {name.removeprefix("shard_"): options.pop(name) for name in names}
    if shard is None:
        for name in names:  # in the environment or the file they may be for those that have a shard
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(f"--{name.replace('_', '-')} without --shard", "add --shard auto or --shard R/N")
        return None
    number, count = find_part(os.environ, values["by"]) if shard == config.AUTO_SHARD else shard
    return config.Sharding(number, count, **values)


def scratch_path(scratch: Path | None) -> Path:
    """The scratch directory that is meant, absolute; its parents' links resolved, so that it can be compared."""
    path = Path(os.path.abspath(scratch or config.default_scratch()))
    return Path(os.path.realpath(path.parent)) / path.name


def mountpoint_of_source(ctx: click.Context, mountpoint: Path | None) -> Path | None:
    """`mountpoint`, unless it was named further away than the source: then it belongs to another source.

    So `cachefs mount X` mounts over X, whatever environment and file say.
    """
    nearest = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    for origin in nearest:
        if ctx.get_parameter_source("mountpoint") is origin:
            return mountpoint
        if ctx.get_parameter_source("source") is origin:
            return None
    return mountpoint


def configured_mountpoint(ctx: click.Context) -> Path:
    """Where `cachefs mount` without arguments mounts. Raises UsageError, or MissingParameter if nothing says it.

    The file is read only where it is needed, and its other keys are not looked at: its faults must not keep a mount.
    """
    place = os.environ.get(_MOUNTPOINT_VARIABLE) or os.environ.get(_SOURCE_VARIABLE)
    if place:
        return Path(place)
    path, values = _read_configuration(ctx.find_root().params.get("config"))
    for key in _PLACES:
        if key in values:
            try:
                return nonempty_path(values[key])
            except click.BadParameter as error:
                raise UsageError(f"configuration file {path}, key {key}: {error.message}") from None
    raise click.MissingParameter(ctx=ctx, param_hint="'MOUNTPOINT'", param_type="argument")


class _DataPaths(click.ParamType[str]):
    """A --data. In the environment there may be several, one a line: paths may have spaces and colons in them."""

    name = "path"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [line for line in rv.splitlines() if line]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str):
            raise click.BadParameter(f"{value!r} is not a path")
        if not value:
            raise click.BadParameter("the path is empty")
        return value


_RUN_OPTIONS = (
    option(
        "--data",
        type=_DataPaths(),
        multiple=True,
        metavar="SOURCE[:MOUNTPOINT]",
        help="What to cache; may be given several times",
    ),
    option("--keep", is_flag=True, help="Leave in scratch what was fetched, for the next run on this node"),
    option("--strict", is_flag=True, help="Fail where something cannot be cached; else the source is read directly"),
    option("--report", type=nonempty_path, metavar="FILE", help="Write to FILE, as JSON, how it was"),
)


def run_options(function: F) -> F:
    """The options of a run that a mount has not."""
    for decorate in reversed(_RUN_OPTIONS):
        function = decorate(function)
    return function


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
        known = _configurable(place_arguments(run_options(mount_options(lambda: None))))
        mine = _configurable(self)
        defaults = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise UsageError(
                    f"configuration file {path} has an unknown key {key!r}",
                    "the keys are options in cachefs mount --help and cachefs run --help, source and mountpoint",
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


def _configurable(command: Any) -> dict[str, click.Parameter]:
    """The options and arguments with an environment variable, which may be in the file too."""
    params = command.params if isinstance(command, click.Command) else command.__click_params__
    return {param.name: param for param in params if param.envvar and param.name}


def _convert(param: click.Parameter, value: Any, ctx: click.Context) -> Any:
    """Check a value of the file; return it as click wants a default. Raises click.BadParameter."""
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter(f"{value!r} is neither true nor false")
    elif isinstance(param, click.Option) and param.multiple:
        return [param.type.convert(one, param, ctx) for one in (value if isinstance(value, list) else [value])]
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        raise click.BadParameter(f"{value!r} is not a string in quotes")
    else:
        param.type.convert(value, param, ctx)
    return value
