"""Claiming a scratch directory: whenever a process ends meanwhile, what is left can be claimed and purged."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.cache.scratch import MARK, claim_scratch
from cachefs.errors import CachefsError
from cachefs.mount.purge import purge
from tests.conftest import needs_root


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


def test_a_mark_that_was_not_written(tmp_path: Path):
    """Whoever began it was killed: scratch is as good as any, and the directory itself may be somebody else's."""
    path = tmp_path / "scratch"
    path.mkdir(0o700)
    (path / MARK).touch()
    os.close(claim_scratch(path).fd)
    assert (path / MARK).stat().st_size, "it is written now"
    purge(path)
    assert os.listdir(path) == []
    (path / MARK).touch()
    purge(path)
    assert os.listdir(path) == []


@pytest.mark.parametrize("name", ["logs", "thesis"])
def test_an_empty_mark_beside_other_things(tmp_path: Path, name: str):
    """Nothing is ours there, whatever it is called."""
    path = tmp_path / "scratch"
    (path / name).mkdir(0o700, parents=True)
    path.chmod(0o700)
    (path / MARK).touch()
    with pytest.raises(CachefsError, match="holds files that are not of cachefs"):
        claim_scratch(path)
    with pytest.raises(CachefsError, match="is damaged"):
        purge(path)
    assert (path / name).exists()


def hard_link(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.hardlink_to(victim)


@pytest.mark.parametrize("name", ["ledger", "index.db", MARK])
def test_a_hard_link_to_somebody_elses_file(tmp_path: Path, name: str):
    victim = tmp_path / "victim"
    path = tmp_path / "scratch"
    os.close(claim_scratch(path).fd)
    victim.write_bytes((path / MARK).read_bytes())
    hard_link(path / name, victim)
    before = victim.read_bytes(), victim.stat().st_mtime_ns
    with pytest.raises(CachefsError, match=f"{name} in scratch .* has another name elsewhere"):
        claim_scratch(path)
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", ["files", "staging", "trees", "leases", "sockets", "logs", "ledger", MARK])
@pytest.mark.parametrize(
    "change",
    [pytest.param(lambda path: os.chown(path, 65534, 65534), marks=needs_root), lambda path: path.chmod(0o777)],
)
def test_what_others_can_write(tmp_path: Path, name: str, change: Callable[[Path], None]):
    path = tmp_path / "scratch"
    os.close(claim_scratch(path).fd)
    (path / "ledger").touch()
    change(path / name)
    with pytest.raises(CachefsError, match=f"{name} in scratch .* is (owned by uid 65534|writable by others)"):
        claim_scratch(path)
