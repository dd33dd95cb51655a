"""Limits of the process and the machine: fewer descriptors than open files, a limit of file size, many mounts."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.conftest import assert_sound
from tests.harness import clean_environment, wait_until
from tests.mount.observing import counters

KILLS = Path(__file__).with_name("kills.py")


@pytest.fixture
def limited(monkeypatch):
    """`limited(resource.RLIMIT_X, value)`: what is started from now on has that limit, and cannot raise it."""
    import tests.harness

    def limit(which: int, value: int) -> None:
        real = tests.harness.subprocess.run

        def run(*arguments, **keywords):
            keywords.setdefault("preexec_fn", lambda: resource.setrlimit(which, (value, value)))
            return real(*arguments, **keywords)

        monkeypatch.setattr(tests.harness.subprocess, "run", run)

    yield limit
    monkeypatch.undo()


def test_more_open_files_than_descriptors(source, mounted, mountpoint, limited, monkeypatch):
    """2,000 files are open at once, and the daemon may have 256 descriptors: the rest is served by the source."""
    for number in range(2000):
        (source / str(number)).write_bytes(str(number).encode() * 1000)
    limited(resource.RLIMIT_NOFILE, 256)
    cache = mounted(source, at=mountpoint)
    monkeypatch.undo()
    cache.expect_log("scratch failed|fetch failed|Too many open files")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(mountpoint / str(number), "rb")) for number in range(2000)]
            for number, file in enumerate(files):
                assert file.read() == str(number).encode() * 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for number in range(2000):
        assert (mountpoint / str(number)).read_bytes() == str(number).encode() * 1000
    assert_sound(cache)


def test_a_limit_of_file_size(dataset, mounted, mountpoint, limited, monkeypatch, readers):
    """RLIMIT_FSIZE: what may not be written to scratch is served by the source."""
    limited(resource.RLIMIT_FSIZE, 1 << 20)
    cache = mounted(dataset.path, at=mountpoint)
    monkeypatch.undo()
    cache.expect_log("fetch failed path=b'large'")
    reading = readers(mountpoint)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    assert not reading.stop()["errors"]
    wait_until(lambda: counters(cache)["resident_files"] == len(dataset.content) - 1, "all but the large one")
    assert_sound(cache)


@pytest.mark.slow
def test_100_mounts_in_a_row(dataset, mountpoint, tmp_path, mounted):
    """Nothing grows in the process that starts them, nor in scratch."""
    scratch = tmp_path / "scratch"
    script = """
import json, os, sys, psutil
from pathlib import Path
from cachefs.config import Settings
from cachefs.mount.daemon import serve_in_background
from cachefs.mount.unmount import find_our_mount, unmount
source, mountpoint, scratch = map(Path, sys.argv[1:])
me, seen = psutil.Process(), []
for _ in range(100):
    pid = serve_in_background(Settings(source, mountpoint, scratch, no_promote=True))
    (mountpoint / "middle").read_bytes()
    unmount(find_our_mount(mountpoint), lazy=False)
    os.waitpid(pid, 0)
    seen.append((me.num_fds(), me.num_threads(), me.memory_info().rss, sum(1 for _ in scratch.rglob("*"))))
print(json.dumps([seen[19], seen[-1], len(me.children(recursive=True))]))
"""
    command = [sys.executable, "-c", script, dataset.path, mountpoint, scratch]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    early, late, children = json.loads(done.stdout)
    assert early[:2] == late[:2]
    assert late[2] < early[2] + (4 << 20)
    assert late[3] <= early[3]
    assert children == 0
    cache = mounted(dataset.path, at=mountpoint, scratch=scratch)
    dataset.check(mountpoint)
    assert_sound(cache)
    assert os.listdir(mountpoint) == []
