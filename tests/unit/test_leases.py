"""A lease says one thing or another, is locked whenever it is there, and a renewal that fails leaves it as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cachefs.cache.scratch import Scratch
from cachefs.mount.leases import Lease, LeaseRecord, live_leases

RECORD = LeaseRecord(
    "1" * 12, os.getpid(), 1.0, "b" * 32, "/source", "/mountpoint", "d" * 32, "0/2 by rank", "2 seed 0"
)
DECLARED = replace(RECORD, fingerprint="f" * 16)


@pytest.fixture
def lease(scratch: Scratch) -> Iterator[Lease]:
    lease = Lease(scratch, RECORD)
    yield lease
    lease.release()
    assert not os.listdir(scratch.at("leases"))


def test_it_is_renewed(scratch: Scratch, lease: Lease):
    assert live_leases(scratch) == [RECORD]
    for record in (DECLARED, RECORD, DECLARED):
        lease.renew(record)
        assert live_leases(scratch, drop_dead=True) == [record]
    assert os.listdir(scratch.at("leases")) == [RECORD.id]


@pytest.mark.parametrize("fault", ["a short write", "no rename"])
def test_a_renewal_that_fails(scratch: Scratch, lease: Lease, monkeypatch: pytest.MonkeyPatch, fault: str):
    def fail(*_: object, **__: object) -> int:
        if fault == "no rename":
            raise OSError(5, "Input/output error")
        return 10

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename" if fault == "no rename" else "write", fail)
        with pytest.raises(OSError, match=r"Input/output|No space"):
            lease.renew(DECLARED)
    assert live_leases(scratch, drop_dead=True) == [RECORD]
    lease.renew(DECLARED)
    assert live_leases(scratch) == [DECLARED]


def test_one_that_knows_nothing_of_shards_is_understood(scratch: Scratch, lease: Lease):
    fields = {name: value for name, value in vars(RECORD).items() if name not in ("shard", "division", "fingerprint")}
    assert LeaseRecord(**json.loads(json.dumps(fields))) == replace(RECORD, shard="", division="")
