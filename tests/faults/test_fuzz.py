"""What nobody means to send: to a live mount's control socket, and into its index. It serves on."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachefs.mount.mountinfo import find_mount
from tests.harness import MountedCache, mounts_below, run_cachefs
from tests.mount.observing import counters
from tests.unit.profile import FIXED

NAMES = st.sampled_from(["status", "warm", "stop", "", "x"]) | st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
PATHS = st.lists(
    st.text(max_size=40) | st.sampled_from(["", ".", "..", "0/0", "/", "0/../..", "\0", "a" * 300]), max_size=4
)
REQUESTS = (
    st.fixed_dictionaries({"command": st.just("warm"), "paths": PATHS | VALUES})
    | st.dictionaries(st.sampled_from(["command", "paths", "x"]), NAMES | VALUES, max_size=3)
    | VALUES
).map(lambda request: json.dumps(request).encode())
LINES = REQUESTS | st.binary(max_size=200)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount for all examples."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("source/0", "mount"):
        (folder / name).mkdir(parents=True)
    (folder / "source/0/0").write_bytes(b"content")
    cache = MountedCache(folder / "source", folder / "mount", folder / "scratch")
    yield cache
    cache.end()


def ask(cache: MountedCache, line: bytes) -> list[bytes]:
    """The lines that come back."""
    mount = find_mount(cache.path)
    assert mount is not None
    assert mount.lease is not None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        scratch = os.open(cache.scratch, os.O_RDONLY)  # paths of sockets are short
        try:
            sock.connect(f"/proc/self/fd/{scratch}/sockets/{mount.lease[1]}")
        finally:
            os.close(scratch)
        sock.sendall(line + b"\n")
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as answers:
            return answers.readlines()


@settings(FIXED)
@example(b"[" * 100_000)
@example(b'{"command": ["status"]}')
@example(b'{"command": "warm"}')
@example(b'{"command": "warm", "paths": ["\\u0000"]}')
@example(b'{"command": "warm", "paths": ["\\ud800"]}')
@example(b"x" * (1 << 21))
@given(line=LINES)
def test_the_control_socket(shared, line: bytes):
    """Each request has an answer, which is JSON."""
    try:
        answers = ask(shared, line.replace(b"\n", b" "))
    except (BrokenPipeError, ConnectionResetError):
        assert len(line) > 1 << 20, "it may stop listening to what is too long, and to nothing else"
        answers = []
    else:
        assert answers
    for answer in answers:
        assert isinstance(json.loads(answer), dict)
    assert (shared.path / "0/0").read_bytes() == b"content"


WORDS = [
    "--capacity",
    "--scratch",
    "--policy",
    "lru",
    "1G",
    "--data",
    "--keep",
    "--strict",
    "--report",
    "source",
    "x",
    "-",
]


@settings(FIXED, max_examples=20)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=4))
def test_the_command_line_of_a_run(words: list[str], tmp_path_factory):
    """The command is run, or it is said why not."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "source").mkdir()
    (folder / "source/file").write_text("content")
    words = [word.replace("\0", "").replace("/", "") for word in words]
    if "--" in words:  # what follows would be the command
        words.remove("--")
    done = run_cachefs("run", *words, "--", "echo", "it ran", check=False, cwd=folder, env={"TMPDIR": str(folder)})
    assert done.returncode in (0, 1, 2), done
    assert (done.stdout == "it ran\n") == (done.returncode == 0) or "Usage" in done.stdout
    assert done.returncode == 0 or done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "source/file").read_text() == "content"
    assert mounts_below(folder) == []


@pytest.mark.parametrize("seed", range(6))
def test_bytes_of_the_index(seed, dataset, mounted, mountpoint):
    """Whatever is in it, a mount serves right bytes, and ends in order."""
    dice = random.Random(seed)
    first = mounted(dataset.path, at=mountpoint)
    dataset.check(mountpoint)
    first.unmount()
    damage(first.scratch / "index.db", dice)
    second = mounted(dataset.path, at=mountpoint)
    second.expect_log("index|changed copy|damaged copy")
    dataset.check(mountpoint)
    assert counters(second)["bypasses"] == 0
    second.unmount()


def damage(index: Path, dice: random.Random) -> None:
    data = bytearray(index.read_bytes())
    for _ in range(dice.choice((1, 10, 300))):
        data[dice.randrange(len(data))] = dice.randrange(256)
    if dice.random() < 0.3:
        del data[dice.randrange(len(data)) :]
    index.write_bytes(data)
