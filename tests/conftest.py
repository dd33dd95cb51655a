"""Fixtures of all tests: `mounted` makes mounts with the real command and proves at the end that nothing is left;
`place` has directories of a user in which commands are tried."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest

from cachefs.demo.slow_source import SlowSource
from tests.commands.places import Place, User, current_user, ordinary_user, processes_of
from tests.harness import MountedCache, cachefs_mounts_below, detach, mounts_below, wait_until


def pytest_configure() -> None:
    """A shell starts a background job with these signals ignored, and all that the tests start would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each worker has its share of the slow ones early: else one is left with the longest when all others are done.

    Not all at once, for many of them are slow because they keep a processor busy. pytest-xdist's worksteal gives each
    worker as many tests at first, in the order in which they are here.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = iter([item for item in items if not item.get_closest_marker("slow")])
    size = -(-len(items) // workers)
    items.clear()
    for number in range(workers):
        share = slow[number::workers]
        others = list(islice(quick, max(0, size - len(share))))
        before = len(others) * number // (2 * workers)
        items += [*others[:before], *share, *others[before:]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Detach what a test that was killed (its worker crashed, its time was up) could not: its daemons then end."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and not hasattr(session.config, "workerinput"):
        for path in mounts_below(factory.getbasetemp()):
            print(f"left mounted by a test that was killed: {path}")
            detach(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty directory that is not the source."""
    path = tmp_path / "mount"
    path.mkdir()
    return path


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs of this test's own: whoever mounts frees what others have left. At the end it is empty."""
    place = Path(tempfile.mkdtemp(prefix="tiers-", dir="/dev/shm"))
    yield place
    place.rmdir()


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

ORDINARY = ordinary_user() if os.geteuid() == 0 else current_user()
USERS = [current_user()] + ([ORDINARY] if os.geteuid() == 0 and ORDINARY else [])


@pytest.fixture(params=USERS, ids=lambda user: user.name)
def user(request: pytest.FixtureRequest) -> User:
    """Who types the commands: root and an ordinary user, or whoever runs the tests."""
    return request.param


@pytest.fixture
def place(user: User, tmp_path: Path) -> Iterator[Place]:
    """Directories of `user` with a source in them; at the end nothing may be mounted or run there."""
    yield from _place(user, tmp_path)


@pytest.fixture
def own_place(tmp_path: Path) -> Iterator[Place]:
    """The same, of whoever runs the tests, for what is the same for all users."""
    yield from _place(current_user(), tmp_path)


@pytest.fixture
def ordinary_place(tmp_path: Path) -> Iterator[Place]:
    """The same, for what only an ordinary user can run into."""
    if ORDINARY is None:
        pytest.skip("no ordinary user (CACHEFS_TEST_USER, alice) who can run this interpreter")
    yield from _place(ORDINARY, tmp_path)


def _place(user: User, tmp_path: Path) -> Iterator[Place]:
    if user.uid != os.geteuid():  # pytest's directories are for its own user alone
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    path = tmp_path / user.name
    path.mkdir()
    os.chown(path, user.uid, user.gid)
    place = Place(user, path)
    place.make("source", "sub")
    place.make("mountpoint")
    place.write(place.source / "one", "1" * 1000)
    place.write(place.source / "sub" / "two", "2" * 2000)
    yield place
    left = mounts_below(tmp_path)
    for mountpoint in reversed(left):
        detach(mountpoint)
    try:
        wait_until(lambda: not processes_of(tmp_path), "the processes of the test end", seconds=10)
    finally:
        for pid in processes_of(tmp_path):
            psutil.Process(pid).kill()
        for mountpoint in reversed(mounts_below(tmp_path)):
            detach(mountpoint)
    assert not left, f"mounts left behind: {left}"
