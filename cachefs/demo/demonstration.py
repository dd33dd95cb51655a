"""The main job on made-up data: a slow source, a mount over it, and an ordinary loader that knows nothing of either.

Invariant: whatever happens, an interrupt included, no mount, process or file of it is left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefs.demo import loader
from cachefs.demo.dataset import make_dataset
from cachefs.demo.slow_source import SlowSource
from cachefs.errors import CachefsError


@dataclass(frozen=True)
class Scale:
    """How large the demonstration is. Latency in seconds an operation, bandwidth in bytes a second."""

    files: int = 600
    classes: int = 20
    mean_bytes: int = 110_000
    latency: float = 0.005
    bandwidth: float = 200e6
    workers: int = 4
    epochs: int = 3


@dataclass(frozen=True)
class Measurement:
    """One epoch of the loader. `source_bytes` is what the source itself counted meanwhile."""

    name: str
    seconds: float
    files: int
    bytes: int
    source_bytes: int


class Demonstration:
    """Run it with `measurements`; use it as a context, which makes the dataset and cleans up.

    `beside`: mount beside the source. The source is a FUSE mount of the user itself here, which fusermount3, being
    setuid root, may not look at: so where it has to mount, it cannot mount over that.
    """

    def __init__(self, scale: Scale, seed: int = 0, *, beside: bool = False) -> None:
        self.scale = scale
        self._is_beside = beside
        self._seed = seed
        self._stack = ExitStack()

    def __enter__(self) -> Demonstration:
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="cachefs-demo-"))
            stack.callback(shutil.rmtree, folder)
            self._scratch = folder / "scratch"
            self.dataset = make_dataset(
                folder / "remote",
                files=self.scale.files,
                classes=self.scale.classes,
                mean_bytes=self.scale.mean_bytes,
                seed=self._seed,
            )
            mountpoint = folder / "dataset"
            mountpoint.mkdir()
            self._source = stack.enter_context(
                SlowSource(folder / "remote", mountpoint, latency=self.scale.latency, bandwidth=self.scale.bandwidth)
            )
            self._path = self._source.path
            if self._is_beside:
                self._path = folder / "mount"
                self._path.mkdir()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measurements(self) -> Iterator[Measurement]:
        """The loader directly on the source, then its epochs through the mount. Raises CachefsError."""
        measuring = self._measure()
        self._stack.callback(measuring.close)  # an interrupted caller does not, and the loader is to end first
        return measuring

    def _measure(self) -> Generator[Measurement, None, None]:
        digests = set()
        source = self._source.path
        data = f"{source}:{self._path}" if self._is_beside else source
        run = [sys.executable, "-m", "cachefs", "run", "--strict", "--data", data, "--scratch", self._scratch, "--"]
        for name, around, path, epochs in ("direct", [], source, 1), (None, run, self._path, self.scale.epochs):
            with closing(self._run_loader(around, path, epochs)) as results:
                for epoch, result, source_bytes in results:
                    digests.add(result["digest"])
                    yield Measurement(name or epoch, result["seconds"], result["files"], result["bytes"], source_bytes)
        if len(digests) != 1:
            raise CachefsError("the mount gave other bytes than the source: this is a bug of cachefs")

    def _run_loader(
        self, around: list[str | Path], path: Path, epochs: int
    ) -> Generator[tuple[str, dict[str, Any], int], None, None]:
        """(name, what the loader says, bytes that the source gave) of each epoch as it ends.

        `around` is what a user writes before the command that they always ran.
        """
        options = ["--epochs", str(epochs), "--workers", str(self.scale.workers), "--seed", str(self._seed)]
        before = self._source.statistics().bytes_read
        with subprocess.Popen(
            [*around, sys.executable, loader.__file__, path, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                for line in process.stdout:
                    result = json.loads(line)
                    after = self._source.statistics().bytes_read
                    yield f"epoch {result['epoch']}", result, after - before
                    before = after
                if process.wait():
                    raise CachefsError(f"the loader failed: {process.stderr.read().strip()}")
            finally:
                process.terminate()
                process.wait()  # leaving the block does not, after an interrupt, and its data must not go before it
