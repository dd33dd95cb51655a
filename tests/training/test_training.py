"""The main job on real input: an unmodified PyTorch script over a mount, against the same script on the source."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from cachefs.demo.slow_source import SlowSource
from tests.training.photographs import make_photographs

SCRIPT = Path(__file__).with_name("train.py")
FILES, CLASSES, EPOCHS = 2000, 20, 2


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder, files=FILES, classes=CLASSES)
    return folder


def training(data: Path) -> Iterator[dict[str, object]]:
    """What the script prints, an epoch at a time."""
    arguments = [data, "--epochs", EPOCHS, "--workers", 4, "--seed", 7]
    command = [sys.executable, "-W", "ignore", SCRIPT, *arguments]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(data.parent / "inductor")}  # else in the temporary directory
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    assert process.returncode == 0


def fingerprint(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a job could change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_through_the_mount_equals_training_on_the_source(photographs: Path, tmp_path: Path, mounted):
    if importlib.util.find_spec("torch") is None:
        assert not os.environ.get("CI"), "CI installs torch"
        pytest.skip("torch is not installed: pip install torch==2.13.0")
    remote = tmp_path / "remote"
    remote.mkdir()
    before = fingerprint(photographs)
    with SlowSource(photographs, remote, latency=0.0005) as source:
        direct = list(training(remote))
        at = None
        if os.geteuid() != 0:  # whose fusermount3 may not enter the slow source's mount
            at = tmp_path / "mount"
            at.mkdir()
        cache = mounted(remote, at=at)
        source.reset()

        epochs = []
        read_at_epoch_end = []
        for epoch in training(cache.path):
            epochs.append(epoch)
            statistics = source.statistics()
            read_at_epoch_end.append((statistics.operations["open"], statistics.operations["read"]))

        # every file's bytes came from the source exactly once
        sizes = {os.fsencode(name): facts[1] for name, facts in before.items() if facts[3]}
        assert len(sizes) == FILES
        files = source.statistics().files
        assert {path: files[path].bytes_read for path in sizes} == sizes
        assert {files[path].opens for path in sizes} == {1}
        # the second epoch made no data request
        assert read_at_epoch_end[0] == read_at_epoch_end[1]
        status = cache.status()
        assert (status["misses"], status["hits"], status["bypasses"]) == (FILES, FILES * (EPOCHS - 1), 0)
        # the losses are the same, to the bit
        facts = ("epoch", "loss_hex", "batch_losses_hex", "accuracy")
        assert [[e[f] for f in facts] for e in epochs] == [[e[f] for f in facts] for e in direct]
        assert float(str(epochs[1]["loss"])) < float(str(epochs[0]["loss"]))

        cache.unmount("--purge")
        assert not cache.scratch.exists()
        assert fingerprint(remote) == before
    assert fingerprint(photographs) == before
