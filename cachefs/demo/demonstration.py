"""The main job on made-up data: a slow source, a mount over it, and an ordinary loader that knows nothing of either.

Invariant: whatever happens, an interrupt included, no mount, process or file of it is left.
"""

from __future__ import annotations

import json
import os
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
    """Run it with `measurements`; use it as a context, which makes the dataset and cleans up."""

    def __init__(self, scale: Scale, seed: int = 0) -> None:
        self.scale = scale
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
            # The source is a FUSE mount itself here, which fusermount3, being setuid root, may not look at: so an
            # ordinary user mounts beside it. Over any other directory of theirs they can mount as root does.
            self._elsewhere = [] if os.geteuid() == 0 else [folder / "mount"]
            for path in self._elsewhere:
                path.mkdir()
            self.mountpoint = self._elsewhere[0] if self._elsewhere else mountpoint
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measurements(self) -> Iterator[Measurement]:
        """The loader directly on the source, then its epochs through the mount. Raises CachefsError."""
        source = self._source.path
        digests = set()
        with closing(self._run_loader(source, 1)) as epochs:
            for _, result, source_bytes in epochs:
                digests.add(result["digest"])
                yield Measurement("direct", result["seconds"], result["files"], result["bytes"], source_bytes)
        _run_cachefs("mount", source, *self._elsewhere, "--scratch", self._scratch)
        try:
            with closing(self._run_loader(self.mountpoint, self.scale.epochs)) as epochs:
                for name, result, source_bytes in epochs:
                    digests.add(result["digest"])
                    yield Measurement(name, result["seconds"], result["files"], result["bytes"], source_bytes)
        finally:
            _run_cachefs("umount", self.mountpoint, "--purge")
        if len(digests) != 1:
            raise CachefsError("the mount gave other bytes than the source: this is a bug of cachefs")

    def _run_loader(self, path: Path, epochs: int) -> Generator[tuple[str, dict[str, Any], int], None, None]:
        """(name, what the loader says, bytes that the source gave) of each epoch as it ends."""
        options = ["--epochs", str(epochs), "--workers", str(self.scale.workers), "--seed", str(self._seed)]
        before = self._source.statistics().bytes_read
        with subprocess.Popen(
            [sys.executable, loader.__file__, path, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


def _run_cachefs(*arguments: object) -> None:
    """Run the command as a user would, in a process of its own."""
    command = [sys.executable, "-m", "cachefs", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CachefsError(done.stderr.strip().removeprefix("cachefs: "))
