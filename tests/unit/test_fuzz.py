"""Configuration files and command lines that nobody means: a line that says so, and no traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cli import COMMANDS, main
from tests.unit.profile import FIXED

KEYS = st.sampled_from(["capacity", "policy", "scratch", "metadata-ttl", "data", "source", "mountpoint", "no-promote"])
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters='\0"\\\n\r'), max_size=15)
TOML_VALUES = (
    st.integers().map(str)
    | st.booleans().map(lambda value: str(value).lower())
    | TEXTS.map(lambda text: f'"{text}"')
    | st.lists(TEXTS.map(lambda text: f'"{text}"'), max_size=3).map(lambda texts: f"[{', '.join(texts)}]")
    | st.just("{ a = 1 }")
    | st.just("1979-05-27")
)
FILES = st.lists(st.tuples(KEYS | TEXTS, TOML_VALUES), max_size=3).map(
    lambda items: "\n".join(f"{key} = {value}" for key, value in items).encode()
) | st.binary(max_size=60)
OPTIONS = ["--capacity", "--scratch", "--policy", "lru", "--", "-", "--data", "--purge", "--json", "1G"]
WORDS = st.sampled_from(OPTIONS) | TEXTS.filter(lambda text: not set(text) & set("./~"))  # nothing that exists
HARMLESS = tuple(name for name in COMMANDS if name not in ("run", "demo", "doctor"))  # these start processes


def run(*arguments: str) -> None:
    result = CliRunner().invoke(main, arguments, prog_name="cachefs")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2), result.output
    if result.exit_code:
        assert result.output.strip()


@settings(FIXED)
@given(content=FILES)
def test_configuration_files(content: bytes, tmp_path):
    (tmp_path / "config.toml").write_bytes(content)
    run("--config", str(tmp_path / "config.toml"), "mount", str(tmp_path / "nothing"), "--capacity", "1%")
    run("--config", str(tmp_path / "config.toml"), "verify", "--scratch", str(tmp_path / "nothing"))


PLACES = ("file", "folder", "dangling", "link", "fifo", "nothing", "file/below", "folder/..", "/dev/null", "/proc/mem")
OF_PATHS = st.sampled_from(("umount", "status", "warm", "verify", "purge"))


@settings(FIXED)
@given(command=OF_PATHS, words=st.lists(st.sampled_from([*OPTIONS, *PLACES]), max_size=4))
def test_paths(command: str, words: list[str], tmp_path, monkeypatch):
    """Of whatever kind, none of them a mount or scratch of ours: they are named, and are what they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if not os.path.lexists("fifo"):
        Path("file").write_text("important")
        Path("folder").mkdir()
        Path("dangling").symlink_to("nowhere")
        Path("link").symlink_to("folder")
        os.mkfifo("fifo")
    run(command, *words)
    assert sorted(os.listdir()) == ["dangling", "fifo", "file", "folder", "link"]
    assert Path("file").read_text() == "important"


@settings(FIXED)
@given(command=st.sampled_from(HARMLESS), words=st.lists(WORDS, max_size=5))
def test_command_lines(command: str, words: list[str], tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        run(command, *words)
