"""The options that commands share, and where their values come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from cachefs import config
from cachefs.errors import CachefsError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

F = TypeVar("F", bound=Callable[..., Any])


class Parsed(click.ParamType[Any]):
    """A value that one of cachefs.config's functions understands."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            return value
        try:
            return self._parse(str(value))
        except CachefsError as error:
            self.fail(str(error), param, ctx)


def option(flag: str, **keywords: Any) -> Callable[[F], F]:
    """A click option that is an environment variable too."""
    variable = "CACHEFS_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, envvar=variable, show_envvar=True, **keywords)


def scratch_option(function: F) -> F:
    return option(
        "--scratch",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Node-local directory that holds everything we store "
        "[default: the job's $TMPDIR/cachefs, else one for each user in the temporary directory]",
    )(function)


_MOUNT_OPTIONS = (
    option(
        "--capacity",
        type=Parsed("size", config.Capacity.parse),
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
        help="Fetch ahead of use [default: off, the only mode so far]",
    ),
    option(
        "--metadata-ttl",
        type=Parsed("seconds", config.parse_seconds),
        default="3600",
        metavar="SECONDS",
        help="How long attributes, listings and absence are believed [default: 3600]",
    ),
    option(
        "--source-timeout",
        type=Parsed("seconds", config.parse_seconds),
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


def load_configuration(path: Path | None, commands: Mapping[str, click.Command]) -> dict[str, Any]:
    """click's default_map from the TOML file. Raises UsageError for a file or a key that is not understood."""
    explicit = path is not None
    if path is None:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = Path(home, "cachefs", "config.toml")
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        if not explicit:
            return {}
        raise UsageError(f"there is no configuration file {path}") from None
    except PermissionError:
        if not explicit:
            return {}
        raise UsageError(f"configuration file {path} is not readable") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"configuration file {path} cannot be understood: {error}") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {
        name: {p.name for p in command.params if isinstance(p, click.Option)} for name, command in commands.items()
    }
    unknown = sorted(set(values) - set().union(*known.values()))
    if unknown:
        raise UsageError(f"configuration file {path} has an unknown key {unknown[0]!r}", "see cachefs mount --help")
    return {name: {key: value for key, value in values.items() if key in options} for name, options in known.items()}
