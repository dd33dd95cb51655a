"""Fixtures of the tests with faults: a dataset that nothing may change, readers that check every byte, and proof at
the end that scratch holds what it says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MountedCache, clean_environment, verify, wait_until
from tests.mount.conftest import mounted, reader, slow_source  # noqa: F401 - fixtures
from tests.mount.observing import counters, describe_tree

READERS = Path(__file__).with_name("readers.py")
KIB, MIB = 1 << 10, 1 << 20


class Dataset:
    """Files of known content below `path`, of 1 byte to 6 MiB in 3 directories."""

    def __init__(self, path: Path, files: int = 40) -> None:
        self.path = path
        dice = random.Random(5)
        self.content = {"large": dice.randbytes(6 * MIB), "empty": b"", "middle": dice.randbytes(700 * KIB)}
        for number in range(files):
            self.content[f"{number % 3}/{number}"] = dice.randbytes(dice.choice((1, 4000, 30_000, 110_000)))
        for name, data in self.content.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        self.bytes = sum(map(len, self.content.values()))
        self._before = describe_tree(path)

    def check(self, root: Path, seed: int = 0) -> None:
        """Every file is there, with every byte, read in an order that `seed` gives."""
        for name in random.Random(seed).sample(list(self.content), len(self.content)):
            assert (root / name).read_bytes() == self.content[name], name

    def assert_unharmed(self) -> None:
        assert describe_tree(self.path) == self._before


@pytest.fixture
def dataset(source: Path) -> Iterator[Dataset]:
    """At the end it is what it was: nothing of ours may write to a source, whatever happens."""
    made = Dataset(source)
    yield made
    made.assert_unharmed()


class Readers:
    """Processes that read all the time. `stop` says what they have seen, after a wrong byte never."""

    def __init__(self, where: Path, backing: Path, seed: int) -> None:
        command = [sys.executable, READERS, where, backing, "--seed", str(seed)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "reading\n"

    def stop(self) -> dict[str, object]:
        self._process.send_signal(signal.SIGTERM)
        said, _ = self._process.communicate(timeout=60)
        seen = json.loads(said)
        assert not seen["wrong"], seen["wrong"]
        return seen

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        with self._process:
            pass


@pytest.fixture
def readers(dataset: Dataset, mounted: object) -> Iterator[Callable[..., Readers]]:  # noqa: F811
    """`readers(mountpoint)` reads the dataset there until it is stopped, before mounts are taken away."""
    made: list[Readers] = []

    def make(path: Path, seed: int = 1) -> Readers:
        made.append(Readers(path, dataset.path, seed))
        return made[-1]

    yield make
    for process in made:
        process.end()


def run_armed(point: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command of cachefs with a fault point."""
    command = [sys.executable, "-m", "tests.faults.armed", point, *map(str, arguments)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)


def assert_undisturbed(dataset: Dataset, mountpoint: Path, readers: Callable[..., Readers]) -> None:
    """Everything is read twice, beside readers, with every byte and without an error."""
    reading = readers(mountpoint)
    dataset.check(mountpoint)
    dataset.check(mountpoint)
    seen = reading.stop()
    assert seen["read"]
    assert not seen["errors"]


def copies_of(said: dict[str, Any]) -> list[Path]:
    """The complete copies in all tiers of a mount."""
    return [path for tier in said["tiers"] for path in Path(tier["path"], "files").rglob("*") if path.is_file()]


def assert_sound(cache: MountedCache) -> None:
    """What a mount counts is what is on disk; unmounted, `cachefs verify` finds nothing to complain of."""

    def is_accounted() -> bool:
        said = counters(cache)
        copies = copies_of(said)
        return (said["resident_files"], said["resident_bytes"]) == (len(copies), sum(c.stat().st_size for c in copies))

    try:
        wait_until(is_accounted, "status says what is on disk")
    except AssertionError as error:
        said = counters(cache)
        copies = copies_of(said)
        counted = f"{said['resident_files']} files, {said['resident_bytes']} bytes"
        there = f"{len(copies)}, {sum(copy.stat().st_size for copy in copies)}"
        raise AssertionError(f"{counted} are counted, and there are {there}") from error
    cache.unmount()
    status, said = verify(cache.scratch)
    assert status == 0, said
    assert os.listdir(cache.scratch / "staging") == os.listdir(cache.scratch / "trees") == []
    assert os.listdir(cache.scratch / "leases") == os.listdir(cache.scratch / "sockets") == []
