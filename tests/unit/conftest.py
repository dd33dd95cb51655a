"""Fixtures of the unit tests: a real scratch directory and its storage, as seen from one boot or another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.cache.scratch import Scratch, claim_scratch, unlock_scratch
from cachefs.cache.storage import Storage

BOOT = "1" * 32
EARLIER_BOOT = "0" * 32


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    """A claimed scratch directory of the test's own."""
    claimed = claim_scratch(tmp_path / "scratch")
    unlock_scratch(claimed.fd)
    yield claimed
    os.close(claimed.fd)


@pytest.fixture
def storage_of(scratch: Scratch) -> Iterator[Callable[[str], Storage]]:
    """`storage_of(boot)`: the storage of `scratch` as a mount sees it during that boot."""
    made: list[Storage] = []

    def make(boot: str = BOOT) -> Storage:
        made.append(Storage(scratch.fd, boot))
        return made[-1]

    yield make
    for storage in made:
        for fd in storage.fds:
            os.close(fd)


@pytest.fixture
def storage(storage_of: Callable[[str], Storage]) -> Storage:
    """The storage during the current boot."""
    return storage_of(BOOT)


def put(storage: Storage, name: bytes, content: bytes) -> None:
    """Make `name` a complete file of `storage`, as a worker does."""
    fd = storage.stage(name)
    assert fd is not None
    try:
        os.pwrite(fd, content, 0)
        storage.commit(name)
    finally:
        os.close(fd)
