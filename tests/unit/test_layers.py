"""A layer imports only what is below it (design.md section 4). Read from the code's own imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import cachefs

PACKAGE = Path(cachefs.__file__).parent

ORDER = ("cli", "mount", "fs", "cache", "source", "workers")
"""The layers, the highest first. Below all of them: BASE."""
BASE = ("config", "errors", "metrics")
BESIDE = {"demo": ("config", "errors", "metrics", "demo"), "bench": ("config", "errors", "metrics", "bench")}
"""What stands beside the layers: who may be imported by it. By `cli` and by itself alone may it be imported."""

ONLY_IN = {
    "pyfuse3": ("fs/operations.py", "mount/*.py", "demo/slow_*.py"),
    "sqlite_utils": ("cache/index.py",),
    "sqlite3": ("cache/index.py",),
    "psutil": ("mount/*.py", "cli/*.py", "demo/*.py", "bench/*.py"),
    "click": ("cli/*.py", "__main__.py", "demo/*.py"),
    "rich": ("cli/*.py", "demo/*.py"),
}
MAY_PRINT = ("cli/*.py", "demo/*.py", "bench/reader.py", "__main__.py")
LONGEST_MODULE = 450
NAMES_TO_AVOID = frozenset(("utils", "util", "helpers", "helper", "manager", "misc", "common"))


def complaints(package: Path) -> list[str]:
    """Everything in the package at `package` that breaks a rule, each as "FILE:LINE: WHAT"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        name = path.relative_to(package).as_posix()
        found += [f"{name}:{line}: {what}" for line, what in _complaints_of(name, text)]
    return found


def _complaints_of(name: str, text: str) -> Iterator[tuple[int, str]]:
    lines = text.count("\n")
    if lines > LONGEST_MODULE:
        yield lines, f"{lines} lines: split it"
    for part in name.removesuffix(".py").split("/"):
        if NAMES_TO_AVOID & set(part.split("_")):
            yield 1, f"a name that says nothing: {part}"
    code = ast.parse(text)
    for node in ast.walk(code):
        for module in _imported(node, name):
            yield from ((node.lineno, what) for what in _wrong_import(name, module))
        if isinstance(node, ast.Name | ast.Attribute) and _last(node) == "TYPE_CHECKING":
            yield node.lineno, "TYPE_CHECKING: an import that is a cycle"
        if isinstance(node, ast.Call) and _prints(node.func) and not _is_one_of(name, MAY_PRINT):
            yield node.lineno, "only the command line prints"


def _imported(node: ast.AST, name: str) -> list[str]:
    """The modules that a statement may import, with their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # relative: from the package that the module is in, one up for each further dot
            here = ["cachefs", *name.split("/")[:-1]]
            base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]  # a name may be a module
    is_dynamic = isinstance(node, ast.Call) and _last(node.func) in ("import_module", "__import__")
    if is_dynamic and node.args:
        return [part for part in [_leading_text(node.args[0])] if part]
    return []


def _leading_text(node: ast.expr) -> str:
    """What an argument says for certain: a string, or the beginning of an f-string."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value.rstrip(".") if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _wrong_import(name: str, module: str) -> Iterator[str]:
    top, *below = module.split(".")
    if top in ONLY_IN and not _is_one_of(name, ONLY_IN[top]):
        yield f"{top} may be imported in {', '.join(ONLY_IN[top])} alone"
    if top != "cachefs" or not below:
        return
    ours, theirs = name.removesuffix(".py").split("/")[0], below[0]
    if ours in ("__init__", "__main__") or theirs not in (*ORDER, *BASE, *BESIDE):
        return  # the entry point; and names of the package itself, such as __version__
    if not _may_import(ours, theirs):
        yield f"{ours} may not import {theirs}"


def _may_import(ours: str, theirs: str) -> bool:
    if ours in BESIDE:
        return theirs in BESIDE[ours]
    if theirs in BESIDE:
        return ours == "cli"
    if ours in BASE:
        return theirs == "errors" and ours != "errors"
    if theirs in BASE or ours == theirs:
        return True
    return ours in ORDER and theirs in ORDER and ORDER.index(ours) < ORDER.index(theirs)


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _prints(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in ("print", "echo", "secho")
    if isinstance(function, ast.Attribute):
        is_stream = isinstance(function.value, ast.Attribute) and function.value.attr in ("stdout", "stderr")
        return function.attr in ("echo", "secho") or (is_stream and function.attr in ("write", "writelines"))
    return False


def test_the_code_keeps_to_its_layers():
    assert complaints(PACKAGE) == []


def test_every_folder_and_module_has_its_place():
    """A layer that is not in ORDER would not be checked at all."""
    places = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert places == {*ORDER, *BESIDE}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__", "__main__", *BASE}


VIOLATIONS = {
    "fs over mount": ("fs/a.py", "from cachefs.mount.leases import boot_id\n", "fs may not import mount"),
    "import of a layer": ("source/a.py", "import cachefs.cache.storage\n", "source may not import cache"),
    "a layer by name": ("source/a.py", "from cachefs import cache\n", "source may not import cache"),
    "within a function": ("workers/a.py", "def f():\n    from cachefs.source import tree\n", "workers may not import"),
    "relative": ("cache/a.py", "from ..fs import inodes\n", "cache may not import fs"),
    "relative by name": ("cache/a.py", "from .. import fs\n", "cache may not import fs"),
    "by a string": ("cache/a.py", "import importlib\nimportlib.import_module('cachefs.fs.inodes')\n", "cache may not"),
    "by half a string": ("cache/a.py", "import_module(f'cachefs.mount.{x}')\n", "cache may not import mount"),
    "up from the base": ("errors.py", "from cachefs.workers import pool\n", "errors may not import workers"),
    "cli from mount": ("mount/a.py", "from cachefs.cli.options import option\n", "mount may not import cli"),
    "demo from mount": ("mount/a.py", "from cachefs.demo.dataset import x\n", "mount may not import demo"),
    "fs from demo": ("demo/a.py", "from cachefs.fs.inodes import Node\n", "demo may not import fs"),
    "pyfuse3 in filesystem": ("fs/filesystem.py", "import pyfuse3\n", "pyfuse3 may be imported in"),
    "pyfuse3 in cli": ("cli/a.py", "from pyfuse3 import Operations\n", "pyfuse3 may be imported in"),
    "sqlite_utils": ("cache/ledger.py", "import sqlite_utils.db\n", "sqlite_utils may be imported in"),
    "psutil": ("cache/a.py", "import psutil as p\n", "psutil may be imported in"),
    "print": ("mount/a.py", "print('x')\n", "only the command line prints"),
    "echo": ("mount/a.py", "import x\nx.echo('x')\n", "only the command line prints"),
    "stdout": ("cache/a.py", "sys.stdout.write('x')\n", "only the command line prints"),
    "type checking": ("cache/a.py", "if TYPE_CHECKING:\n    pass\n", "TYPE_CHECKING"),
    "typing.type checking": ("cache/a.py", "import typing\nif typing.TYPE_CHECKING:\n    pass\n", "TYPE_CHECKING"),
    "long": ("cache/a.py", "x = 1\n" * (LONGEST_MODULE + 1), "split it"),
    "utils": ("cache/utils.py", "", "a name that says nothing"),
    "inode_manager": ("fs/inode_manager.py", "", "a name that says nothing"),
    "helpers folder": ("helpers/a.py", "", "a name that says nothing"),
}


@pytest.mark.parametrize(("file", "text", "what"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_the_checker_finds_what_is_planted(tmp_path, file, text, what):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = complaints(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert what in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cli/a.py", "from cachefs.mount.serve import serve\nfrom cachefs.demo import dataset\nprint('x')\n"),
        ("fs/operations.py", "import pyfuse3\nfrom cachefs.fs.filesystem import FileSystem\n"),
        ("mount/a.py", "import pyfuse3, psutil, trio\nfrom cachefs import config\nfrom cachefs.cache import index\n"),
        ("source/a.py", "from cachefs.workers import pool\nfrom cachefs.errors import SourceError\n"),
        ("workers/a.py", "from cachefs import errors\nfrom .pool import WorkerPool\n"),
        ("demo/slow_a.py", "import pyfuse3\nfrom cachefs.demo.slow_b import x\nprint('x')\n"),
        ("config.py", "from cachefs.errors import UsageError\n"),
        ("__main__.py", "from cachefs.cli import main\n"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert complaints(tmp_path) == []


@pytest.mark.parametrize("command", ["mount", "purge", "run", "status", "umount", "warm"])
def test_a_command_starts_without_the_event_loop(command):
    """Only a daemon needs it: help, refusals and what asks a daemon are not to wait for its import."""
    code = f"import sys, cachefs.cli.{command}; sys.exit('trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
