"""Fixtures of the tests on real mounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.demo.slow_source import SlowSource
from tests.harness import MountedCache
from tests.mount.observing import Reader


@pytest.fixture
def slow_source(reader: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SlowSource]]:
    """As for all tests, but outside tmp_path, which must be without mounts when `mounted` ends; ends before readers."""
    made: list[SlowSource] = []

    def make(backing: Path, **settings: float) -> SlowSource:
        made.append(SlowSource(backing, tmp_path_factory.mktemp("remote"), **settings))
        return made[-1]

    yield make
    for slow in reversed(made):
        slow.close()


@pytest.fixture
def mounted(slow_source: object, mounted: Callable[..., MountedCache]) -> Callable[..., MountedCache]:
    """As for all tests; ends before the slow source does."""
    return mounted


@pytest.fixture
def reader() -> Iterator[Callable[..., Reader]]:
    """`reader(path, offset=..., size=...)` reads in a process of its own, which ends with the test, hung or not."""
    made: list[Reader] = []

    def make(path: Path, offset: int = 0, size: int = -1) -> Reader:
        made.append(Reader(path, offset, size))
        return made[-1]

    yield make
    for process in made:
        process.reap()
