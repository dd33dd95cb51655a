"""Several ranks of torchrun: on one node's mount with DistributedSampler, and each on a view of its own shard."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cachefs.cache.shards import Division, Listing, Share
from cachefs.demo.slow_source import SlowSource
from tests.harness import CACHEFS, clean_environment

SCRIPT = Path(__file__).with_name("train_ranks.py")
CLASSES, FILES = 4, 60


def make_dataset(folder: Path) -> dict[str, int]:
    """Sizes by relative path."""
    numbers = random.Random(2)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    sizes = {}
    for number in range(FILES):
        label = numbers.randrange(CLASSES)
        name = f"class{label}/{number:03}.bin"
        content = bytes(min(255, 64 * label + numbers.randrange(64)) for _ in range(numbers.randrange(256, 4000)))
        (folder / name).write_bytes(content)
        sizes[name] = len(content)
    return sizes


def make_parts(dataset: Path, sizes: dict[str, int], ranks: int, folder: Path) -> None:
    """What each rank is to see, as a directory: divided here, from a listing that no mount has seen."""
    listing = Listing(seed=0)
    for name, size in sizes.items():
        listing.add(name.encode(), size)
    division = Division(listing, ranks)
    for rank in range(ranks):
        share = Share(division, rank)
        for label in range(CLASSES):
            (folder / str(rank) / f"class{label}").mkdir(parents=True)
        for name in sizes:
            if share.has(name.encode()):
                (folder / str(rank) / name).symlink_to(dataset / name)


def train(ranks: int, folder: Path, *command: object) -> list[dict[str, object]]:
    """What the script says of each rank, which are started as `command`."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "--no-python")
    env = {**clean_environment(), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    line = list(map(str, (*torchrun, *command)))
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=150, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("first", ["own", "shared"])
def test_ranks_train_as_on_the_source_and_each_file_is_fetched_once(
    ranks: int, first: str, tmp_path: Path, mounted, mountpoint
):
    """What comes first has nothing in scratch: views, or the one mount that DistributedSampler's ranks share."""
    if importlib.util.find_spec("torch") is None:
        assert not os.environ.get("CI"), "CI installs torch"
        pytest.skip("torch is not installed: pip install torch==2.13.0")
    dataset, remote, temporary = (tmp_path / name for name in ("dataset", "remote", "temporary"))
    sizes = make_dataset(dataset)
    make_parts(dataset, sizes, ranks, tmp_path / "parts")
    remote.mkdir()
    temporary.mkdir()
    python = (sys.executable, "-W", "ignore", SCRIPT)
    with SlowSource(dataset, remote) as source:
        direct = train(ranks, temporary, *python, f"{tmp_path}/parts/{{rank}}", remote, first)
        source.reset()
        node = mounted(remote, at=mountpoint)
        shard = ("--shard", "auto", "--shard-mode", "view")
        run = (*CACHEFS, "run", "--data", remote, "--scratch", node.scratch, *shard, "--")
        cached = train(ranks, temporary, *run, *python, remote, mountpoint, first)
        assert cached == direct, "files, classes and losses, to the bit"
        assert sum(int(str(rank["files"])) for rank in cached) == FILES
        assert {tuple(rank["classes"]) for rank in cached} == {tuple(f"class{label}" for label in range(CLASSES))}
        files = source.statistics().files
        assert {name: files[name.encode()].bytes_read for name in sizes} == sizes, "each file was fetched once"
        node.unmount("--purge")
