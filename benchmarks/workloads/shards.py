"""4 tar shards of 500 JPEG files each, 220 MB in all, read sample by sample with WebDataset in one process.

The first epoch has 50 files a shard. WebDataset reads some 8 KB a call, for each of which the kernel asks the slow
source for the attributes again: reading the whole dataset from it directly takes two minutes.
"""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path

from benchmarks.contenders import FIRST, LATER
from benchmarks.phases import compare_first, compare_later, read_first, read_later
from benchmarks.results import Result
from benchmarks.stage import Conditions, Reader, Stage

SHARDS, SAMPLES, FIRST_SAMPLES = 4, 500, 50
CONDITIONS = (Conditions(2.0, 1000.0), Conditions(2.0, 100.0))


def run(stage: Stage) -> list[Result]:
    if importlib.util.find_spec("webdataset") is None:
        reason = "webdataset is not installed: pip install -e '.[bench]'"
        stage.skipped.update(dict.fromkeys((*FIRST, *LATER), reason))
        return []
    data = make_shards(stage, stage.size(FIRST_SAMPLES, 20))
    for conditions in stage.conditions(*CONDITIONS):
        read_first(stage, data, reader, conditions)
    data = make_shards(stage, stage.size(SAMPLES, 20))
    read_later(stage, data, Reader("read_files.py", ("--do", "check")), [(reader, {})])
    compare_first(stage)
    compare_later(stage)
    return stage.records.results()


def reader(_: int) -> Reader:
    return Reader("read_shards.py")


def make_shards(stage: Stage, samples: int) -> Path:
    """A new dataset of shards of `samples` files each."""
    data = stage.new_folder()
    paths = sorted(stage.photographs(SHARDS * samples).rglob("*.jpg"))
    (data / "shards").mkdir()
    for number in range(SHARDS):
        with tarfile.open(data / "shards" / f"shard-{number:03}.tar", "w") as shard:
            for path in paths[number::SHARDS]:
                shard.add(path, arcname=f"{path.parent.name}_{path.name}")
    return data
