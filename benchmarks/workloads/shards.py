"""4 tar shards of 500 JPEG files each, 220 MB in all, read sample by sample with WebDataset in one process."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path

from benchmarks.contenders import FIRST, LATER
from benchmarks.phases import compare_first, compare_later, read_first, read_later
from benchmarks.results import Result
from benchmarks.stage import Conditions, Reader, Stage

SHARDS, SAMPLES = 4, 500
CONDITIONS = (Conditions(2.0, 1000.0), Conditions(2.0, 100.0))


def run(stage: Stage) -> list[Result]:
    if importlib.util.find_spec("webdataset") is None:
        reason = "webdataset is not installed: pip install -e '.[bench]'"
        stage.skipped.update(dict.fromkeys((*FIRST, *LATER), reason))
        return []
    data = stage.new_folder()
    samples = stage.photographs(SHARDS * stage.size(SAMPLES, 20))
    write_shards(data / "shards", sorted(samples.rglob("*.jpg")))
    for conditions in stage.conditions(*CONDITIONS):
        read_first(stage, data, reader, conditions)
    read_later(stage, data, reader(0), [(reader, {})])
    compare_first(stage)
    compare_later(stage)
    return stage.records.results()


def reader(_: int) -> Reader:
    return Reader("read_shards.py")


def write_shards(folder: Path, samples: list[Path]) -> None:
    folder.mkdir()
    for number in range(SHARDS):
        with tarfile.open(folder / f"shard-{number:03}.tar", "w") as shard:
            for path in samples[number::SHARDS]:
                shard.add(path, arcname=f"{path.parent.name}_{path.name}")
