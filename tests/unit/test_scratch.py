"""Claiming a scratch directory: whenever a process ends meanwhile, what is left can be claimed and purged."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from cachefs.cache.scratch import DIRECTORIES, MARK, claim_scratch
from cachefs.mount.purge import purge


def claim_until_ended(path: Path) -> int:
    """A process that claims and purges `path` again and again: its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while True:
                os.close(claim_scratch(path).fd)
                purge(path)
        finally:
            os._exit(1)
    return pid


def end_at_a_random_time(pid: int, number: int) -> None:
    time.sleep(random.uniform(0.001, 0.004))
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == number


def test_ended_in_order_at_any_time(tmp_path: Path):
    """SIGTERM leaves a directory that a purge removes, or none."""
    path = tmp_path / "scratch"
    for _ in range(100):
        end_at_a_random_time(claim_until_ended(path), signal.SIGTERM)
        if path.exists():
            purge(path)
        assert not path.exists()


def test_killed_at_any_time(tmp_path: Path):
    """SIGKILL may leave the directory itself, and what can be claimed."""
    path = tmp_path / "scratch"
    for _ in range(100):
        end_at_a_random_time(claim_until_ended(path), signal.SIGKILL)
        os.close(claim_scratch(path).fd)
        purge(path)
        assert not path.exists() or os.listdir(path) == []


@pytest.mark.parametrize("others", [(), DIRECTORIES], ids=["alone", "with directories"])
def test_a_mark_that_was_not_written(tmp_path: Path, others: tuple[str, ...]):
    """Whoever began it was killed: scratch is as good as any, and the directory itself may be somebody else's."""
    path = tmp_path / "scratch"
    path.mkdir(0o700)
    (path / MARK).touch()
    for name in others:
        (path / name).mkdir()
    os.close(claim_scratch(path).fd)
    purge(path)
    assert os.listdir(path) == []
