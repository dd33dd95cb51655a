"""The demonstration: what it measures, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from cachefs.demo.demonstration import Demonstration, Scale
from cachefs.mount.mountinfo import read_mounts
from tests.harness import CACHEFS, clean_environment, run_cachefs, wait_until

SMALL = Scale(files=40, classes=2, mean_bytes=20_000, latency=0.001, workers=2, epochs=2)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory in which the demonstration makes its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def is_clean(folder: Path) -> bool:
    return os.listdir(folder) == [] and not [mount for mount in read_mounts() if folder in mount.path.parents]


@pytest.mark.parametrize("beside", [False, True], ids=["over the source", "beside it"])
def test_what_it_measures(temporary: Path, beside: bool):
    with Demonstration(SMALL, seed=1, beside=beside) as demonstration:
        results = list(demonstration.measurements())
    assert [result.name for result in results] == ["direct", "epoch 1", "epoch 2"]
    assert {result.files for result in results} == {SMALL.files}
    size = results[0].bytes
    assert [result.source_bytes for result in results] == [size, size, 0]
    assert is_clean(temporary)


@pytest.mark.slow
def test_the_command(tmp_path: Path):
    done = run_cachefs("demo", env={"TMPDIR": str(tmp_path)})
    assert "The same loader, the same path" in done.stdout
    assert done.stderr == ""
    assert is_clean(tmp_path)


def test_who_stops_in_the_middle_leaves_nothing(temporary: Path):
    """Also where the measurements are not closed, as by an interrupt: the loader ends before its data goes."""
    with Demonstration(SMALL, seed=1) as demonstration:
        results = demonstration.measurements()
        assert [next(results).name for _ in range(2)] == ["direct", "epoch 1"]
    assert is_clean(temporary)
    assert list(results) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path):
    environment = {**clean_environment(), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*CACHEFS, "demo"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while b"epoch 1" not in (line := process.stdout.readline()):
            assert line, "it ended before its first epoch"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        process.stderr.read()
        assert process.wait() != 0
    wait_until(lambda: is_clean(tmp_path), "the demonstration has cleaned up")
