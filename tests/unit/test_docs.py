"""The documents say what the code does: each command, option and variable is named, each folder says what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cachefs.cli import main

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LONGEST_FOLDER_README = 100


def commands() -> Iterator[tuple[str, click.Command]]:
    """The group itself and each of its commands, by name."""
    context = click.Context(main)
    yield "cachefs", main
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield f"cachefs {name}", command


def options() -> list[tuple[str, click.Option]]:
    return [(name, p) for name, command in commands() for p in command.params if isinstance(p, click.Option)]


def variables() -> list[str]:
    """The environment variables: those of options, and those that the code names itself."""
    found: set[str] = set()
    for _, option in options():
        envvar = option.envvar
        found.update([envvar] if isinstance(envvar, str) else envvar or [])
    for path in (ROOT / "cachefs").rglob("*.py"):
        found.update(re.findall(r"""["'](CACHEFS_[A-Z][A-Z_]*[A-Z])["']""", path.read_text()))
    return sorted(found)


def is_named(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


def test_there_are_commands_options_and_variables_to_look_for():
    assert len(list(commands())) >= 6
    assert {"--scratch", "--capacity"} <= {flag for _, option in options() for flag in option.opts}
    assert {"CACHEFS_SCRATCH", "CACHEFS_CAPACITY", "CACHEFS_CONFIG"} <= set(variables())
    assert not is_named("--scratch-dir --no-scratch", "--scratch")
    assert is_named("use `--scratch DIR`", "--scratch")


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_is_in_the_readme(readme, name):
    assert is_named(readme, name)


@pytest.mark.parametrize(
    ("name", "flag"), sorted({(name, flag) for name, option in options() for flag in option.opts if flag[:2] == "--"})
)
def test_every_option_is_in_the_readme(readme, name, flag):
    assert is_named(readme, flag), f"{flag} of {name}"


@pytest.mark.parametrize("variable", variables())
def test_every_variable_is_in_the_readme(readme, variable):
    assert is_named(readme, variable)


def test_the_readme_names_no_option_or_command_that_is_not_there(readme):
    known = {flag for _, option in options() for flag in (*option.opts, *option.secondary_opts)}
    named = set(re.findall(r"cachefs (?:[a-z]+ )[^`\n]*?(--[a-z][a-z-]+)", readme.partition("-- ")[0]))
    assert named <= known | {"--help"}
    assert set(re.findall(r"(?<![\w-])CACHEFS_[A-Z_]+[A-Z]", readme)) <= {*variables()}


@pytest.mark.parametrize("folder", ["cachefs", "tests", "benchmarks", "sge", "systemd"])
def test_each_folder_says_in_a_page_what_is_in_it(folder):
    lines = (ROOT / folder / "README.md").read_text().splitlines()
    assert 5 <= len(lines) <= LONGEST_FOLDER_README


@pytest.mark.parametrize("command", [command for _, command in commands()], ids=[name for name, _ in commands()])
def test_every_command_and_option_says_what_it_is_for(command):
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter
