"""Local and remote: training on pairs of rasters, near and far, with and without the mount, by 0 and 4 workers.

Near is the local disk; far takes 10 ms for each operation and has 1 Gbit/s. A sample has 33 bands of 224 x 224 pixels
and 24 bands of truth, which the workers decompress (`benchmarks/rasters.py`). The page cache is dropped before each
epoch. The mount has the default options; its first epoch begins with an empty scratch. `--samples 5000` takes ten times
as long.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, Running
from benchmarks.rasters import PIXEL_BYTES, make_rasters
from benchmarks.results import Circumstances, Result, Run, short
from benchmarks.stage import READ_SECONDS, Conditions, Reader, Stage, lacking
from cachefs.config import format_size

REPETITIONS = 1
SAMPLES, QUICK_SAMPLES = 500, 8
WORKERS = (0, 4)
FAR = Conditions(10.0, 125.0)
NEAR_CASE, FAR_CASE = "near", "far"
DIRECT, FIRST, LATER = "source", "cachefs, first epoch", "cachefs, later epoch"
WAYS = (DIRECT, FIRST, LATER)
TITLES = {DIRECT: "without the mount", FIRST: "with the mount, first epoch", LATER: "with the mount, later epoch"}
SIZE = (8, 4)
_COLOURS = {DIRECT: "#4a4f55", FIRST: "#8fc1e3", LATER: "#0b6fb8"}


def run(stage: Stage) -> list[Result]:
    reason = lacking("torch", "numpy")
    if reason is not None:
        stage.skipped.update(dict.fromkeys(("source", "cachefs"), reason))
        return []
    samples = stage.options.samples or stage.size(SAMPLES, QUICK_SAMPLES)
    stage.tell(f"making {samples:,} samples, {format_size(samples * PIXEL_BYTES)} of pixels")
    data = make_rasters(stage.new_folder(), samples, stage.options.seed)
    limit = READ_SECONDS * max(1.0, samples / SAMPLES)
    for case in NEAR_CASE, FAR_CASE:
        for repetition in range(stage.repetitions):
            for workers in WORKERS[-stage.size(len(WORKERS), 1) :]:
                known: Circumstances = {"workers": workers, "samples": samples}

                def reader(epochs: int, workers: int = workers, repetition: int = repetition) -> Reader:
                    arguments = ("--epochs", epochs, "--seed", repetition)
                    return Reader("train_rasters.py", arguments, ("--workers", workers), limit=limit)

                with _source(stage, case, data) as source:
                    stage.drop_caches()
                    (direct,) = stage.measure(reader(1), Running(source), data)
                    _note(stage, case, DIRECT, direct.seconds, known)
                    stage.drop_caches()
                    with stage.start(CONTENDERS["cachefs"], source, data) as running:

                        def settle(running: Running = running) -> None:
                            running.settle()
                            stage.drop_caches()

                        first, later = stage.measure(reader(2), running, data, between=settle)
                    _note(stage, case, FIRST, first.seconds, known)
                    _note(stage, case, LATER, later.seconds, known)
    return stage.records.results()


@contextmanager
def _source(stage: Stage, case: str, data: Path) -> Iterator[Path]:
    if case == NEAR_CASE:
        yield data
        return
    slow: AbstractContextManager[Any] = stage.slow(data, FAR)
    with slow as source:
        yield source.path


def _note(stage: Stage, case: str, way: str, seconds: float, known: Circumstances) -> None:
    stage.records.add(case, way, "time", "s", seconds, known)
    stage.tell(f"{case}, {TITLES[way]}, {known['workers']:g} workers: {seconds:.1f} s")


def _found(run: Run) -> dict[tuple[str, str, int], list[float]]:
    return {(each.case, each.contender, int(each.circumstances["workers"])): each.values for each in run.results}


def summarize(run: Run) -> Iterator[str]:
    found = {key: statistics.median(values) for key, values in _found(run).items()}
    if not found:
        return
    workers = max(key[2] for key in found)
    samples = run.results[0].circumstances["samples"]
    yield f"{samples:,.0f} samples, {format_size(samples * PIXEL_BYTES)} of pixels. Seconds an epoch:"
    yield ""
    counts = sorted({key[2] for key in found})
    yield "| | " + " | ".join(f"{case}, {count} workers" for case in (NEAR_CASE, FAR_CASE) for count in counts) + " |"
    yield "| --- |" + " ---: |" * (2 * len(counts))
    for way in WAYS:
        row = [short(found[case, way, count]) for case in (NEAR_CASE, FAR_CASE) for count in counts]
        yield f"| {TITLES[way]} | {' | '.join(row)} |"
    yield ""
    near = found[NEAR_CASE, DIRECT, workers]
    ratio = found[FAR_CASE, LATER, workers] / near
    best = min((way, count) for way, count in ((way, count) for way in WAYS for count in counts)
               if found[FAR_CASE, way, count] == min(found[FAR_CASE, w, c] for w in WAYS for c in counts))  # fmt: skip
    yield (
        f"Far with the mount takes {short(ratio)} times as long as near without it in later epochs, and "
        f"{short(found[FAR_CASE, DIRECT, workers] / near)} times without ({workers} workers). "
        f"Best of all far: {TITLES[best[0]]}, {best[1]} workers."
    )


def draw(figure: Any, run: Run) -> None:
    found = _found(run)
    counts = sorted({key[2] for key in found})
    axis = figure.subplots()
    groups = [(case, count) for case in (NEAR_CASE, FAR_CASE) for count in counts]
    for number, way in enumerate(WAYS):
        values = [statistics.median(found[case, way, count]) for case, count in groups]
        places = [place + (number - 1) * 0.27 for place in range(len(groups))]
        bars = axis.bar(places, values, width=0.25, color=_COLOURS[way], label=TITLES[way])
        axis.bar_label(bars, [short(value) for value in values], fontsize=8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(groups)), [f"{case}, {count} workers" for case, count in groups])
    axis.set_ylabel("training, s an epoch")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter("")
    axis.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=len(WAYS), frameon=False, fontsize=8)
