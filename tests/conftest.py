"""Fixtures of all tests: `mounted` makes mounts with the real command and proves at the end that nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.demo.slow_source import SlowSource
from tests.harness import MountedCache, cachefs_mounts_below, detach


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., MountedCache]]:
    """`mounted(source, *options, at=mountpoint, scratch=directory, env={...})`; each ends with the test, checked."""
    made: list[MountedCache] = []

    def make(
        source: Path,
        *options: object,
        at: Path | None = None,
        scratch: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> MountedCache:
        cache = MountedCache(source, at, scratch or tmp_path / "scratch", *options, **(env or {}))
        made.append(cache)
        return cache

    yield make
    errors = []
    for cache in reversed(made):
        try:
            cache.end()
        except AssertionError as error:
            errors.append(str(error))
    left = cachefs_mounts_below(tmp_path)
    for path in left:
        detach(path)
    assert not errors, errors
    assert not left, f"mounts left behind: {left}"


@pytest.fixture
def slow_source(tmp_path: Path) -> Iterator[Callable[..., SlowSource]]:
    """`slow_source(backing, latency=..., bandwidth=...)` serves `backing` slowly at a directory of its own."""
    made: list[SlowSource] = []

    def make(backing: Path, **settings: float) -> SlowSource:
        mountpoint = tmp_path / f"remote{len(made)}"
        mountpoint.mkdir()
        made.append(SlowSource(backing, mountpoint, **settings))
        return made[-1]

    yield make
    for slow in reversed(made):
        slow.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
