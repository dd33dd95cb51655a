"""The places of the tests of `cachefs run`: as everywhere, but no process and no mount may be left in any namespace."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.commands.places import Place
from tests.run.running import JobPlace, guarded

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, say, had it ignored: then so would run and its command


@pytest.fixture
def place(place: Place) -> Iterator[JobPlace]:
    yield from guarded(place)


@pytest.fixture
def own_place(own_place: Place) -> Iterator[JobPlace]:
    yield from guarded(own_place)


@pytest.fixture
def ordinary_place(ordinary_place: Place) -> Iterator[JobPlace]:
    yield from guarded(ordinary_place)
