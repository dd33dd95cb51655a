"""Tiers: what a file takes in memory, in scratch and of the source, and what memory above scratch brings an epoch.

1,000 photographs of 110 KB. For the latencies one process reads them one after the other through a mount that promotes
nothing; before each run the page cache is dropped, which the memory tier survives, as it is one (tmpfs). For the epochs
4 processes read, in another order each time, the page cache dropped before each epoch or not; the capacities are shares
of the dataset, and where all of it fits scratch it is promoted, as by default, or the daemon serves it from where it
is. The source has 2 ms and 1 GB/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contenders import Running, mounted
from benchmarks.results import RATIO, Goal, Result, Run, short
from benchmarks.stage import BenchmarkError, Conditions, Reader, Stage

REPETITIONS = 3
FILES, QUICK_FILES, PROCESSES = 1000, 40, 4
SOURCE = Conditions(2.0, 1000.0)
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LATENCY, COLD, WARM = "one file", "epoch, page cache dropped", "epoch"
UNCACHED, MISS = "uncached", "miss"
IN_MEMORY, ON_DISK, IN_PAGE_CACHE = "hit in memory", "hit on disk", "hit on disk, in the page cache"
HALF, BOTH, WHOLE, WHOLE_BOTH = "scratch 50%", "scratch 50%, memory 50%", "scratch 100%", "scratch 100%, memory 50%"
SERVED, SERVED_BOTH = f"{WHOLE}, not promoted", f"{WHOLE_BOTH}, not promoted"
SHARES = {
    HALF: (0.5, 0.0),
    BOTH: (0.5, 0.5),
    WHOLE: (1.0, 0.0),
    WHOLE_BOTH: (1.0, 0.5),
    SERVED: (1.0, 0.0),
    SERVED_BOTH: (1.0, 0.5),
}
"""(Of scratch, of memory), of the bytes of the dataset."""
_SPARE = 1.03
"""The memory tier keeps 2% of its room for files that move."""
EPOCHS = 3
SIZE = (9, 3.8)
_COLOURS = {
    UNCACHED: "#4a4f55",
    MISS: "#d1793b",
    ON_DISK: "#0b6fb8",
    IN_PAGE_CACHE: "#5fb0e5",
    IN_MEMORY: "#3c8d40",
    HALF: "#d1793b",
    BOTH: "#3c8d40",
    WHOLE: "#0b6fb8",
    WHOLE_BOTH: "#5fb0e5",
    SERVED: "#0b6fb8",
    SERVED_BOTH: "#5fb0e5",
}


def run(stage: Stage) -> list[Result]:
    data = stage.photographs(stage.size(FILES, QUICK_FILES))
    size = sum(path.stat().st_size for path in data.rglob("*.jpg"))
    with stage.slow(data, SOURCE) as source:
        for repetition in range(stage.repetitions):
            _measure_latencies(stage, source.path, data, size, repetition)
            _measure_epochs(stage, source.path, data, size, repetition)
    records = stage.records
    for case in COLD, WARM:
        for way in SHARES:
            records.compare(case, records.find(case, way), records.find(case, UNCACHED))
        records.compare(case, records.find(case, BOTH), records.find(case, HALF))
        goal = Goal("at most", 1.05) if case == WARM else None
        for above, below in (WHOLE_BOTH, WHOLE), (SERVED_BOTH, SERVED):
            records.compare(case, records.find(case, above), records.find(case, below), goal)
    return records.results()


def _measure_latencies(stage: Stage, source: Path, data: Path, size: int, repetition: int) -> None:
    reader = Reader("read_each.py", shuffle=("--seed", repetition))

    def note(what: str, running: Running) -> None:
        latencies = sorted(stage.measure(reader, running, data)[0].latencies or ())
        for percentile in PERCENTILES:
            value = 1e3 * latencies[min(len(latencies) - 1, len(latencies) * percentile // 100)]
            stage.records.add(LATENCY, what, "latency", "ms", value, {"percentile": percentile})
        stage.tell(f"{what}: {1e3 * latencies[len(latencies) // 2]:.3f} ms")

    stage.drop_caches()
    note(UNCACHED, Running(source))
    with _mount(stage, source, "--prefetch=off", "--no-promote") as running:
        stage.drop_caches()
        note(MISS, running)
        stage.drop_caches()
        note(ON_DISK, running)
        stage.drop_caches()
        for path in (running.scratch or data).rglob("files/*/*/*"):
            path.read_bytes()
        note(IN_PAGE_CACHE, running)
    with _mount(stage, source, "--no-promote", f"--memory={round(2 * size)}", "--prefetch=off") as running:
        stage.measure(reader, running, data)
        stage.drop_caches()
        before = running.status()["tiers"][0]["hits"]
        note(IN_MEMORY, running)
        hits = running.status()["tiers"][0]["hits"] - before
        if hits < 0.99 * len(list(data.rglob("*.jpg"))):
            raise BenchmarkError(f"{hits} files alone were hits in memory")


def _measure_epochs(stage: Stage, source: Path, data: Path, size: int, repetition: int) -> None:
    seeds = iter(range(100 * repetition, 100 * repetition + 99))

    def read(running: Running, case: str) -> float:
        """Once where the page cache was dropped: it is warm again after the first time."""
        shuffle = ("--seed", next(seeds))
        can_repeat = running.path != source and case == WARM
        reader = Reader("read_files.py", ("--processes", PROCESSES), shuffle, can_repeat=can_repeat)
        return stage.measure(reader.at_least(0.0 if stage.options.is_quick else 0.5), running, data)[0].seconds

    stage.drop_caches()
    for case in COLD, WARM:  # the slow source keeps no pages: it is the same for it
        stage.records.add(case, UNCACHED, "time", "s", read(Running(source), case), {})
    for way, (scratch, memory) in SHARES.items():
        options = [f"--capacity={round(scratch * size)}", "--policy=hold"]
        options += [f"--memory={round(memory * size * _SPARE)}"] if memory else []
        is_promoted = way not in (SERVED, SERVED_BOTH)
        options += [] if is_promoted else ["--no-promote"]
        with _mount(stage, source, *options) as running:
            for _ in range(EPOCHS):
                read(running, WARM)
            if scratch == 1.0 and is_promoted:
                running.settle()
            stage.drop_caches()
            for case in COLD, WARM:
                stage.records.add(case, way, "time", "s", read(running, case), {})
            resident = sum(tier["bytes"] for tier in running.status()["tiers"]) / size
            stage.records.add("kept", way, "kept", "of bytes", resident, {})
            stage.tell(f"{way}: {resident:.0%} kept")


@contextmanager
def _mount(stage: Stage, source: Path, *options: str) -> Iterator[Running]:
    folder = stage.new_folder()
    with mounted(source, folder / "mount", folder / "scratch", *options) as running:
        yield running


def _medians(run: Run, case: str, quantity: str) -> dict[str, float]:
    return {each.contender: each.median for each in run.results if (each.case, each.quantity) == (case, quantity)}


def summarize(run: Run) -> Iterator[str]:
    yield "| open and read of one file, ms | median | 95% are below | 99% are below |"
    yield "| --- | ---: | ---: | ---: |"
    for what in (IN_MEMORY, IN_PAGE_CACHE, ON_DISK, MISS, UNCACHED):
        known = {
            each.circumstances["percentile"]: each.median
            for each in run.results
            if (each.case, each.contender) == (LATENCY, what)
        }
        yield f"| {what} | " + " | ".join(short(known[percentile]) for percentile in (50, 95, 99)) + " |"
    yield ""
    cold, warm, kept = _medians(run, COLD, "time"), _medians(run, WARM, "time"), _medians(run, "kept", "kept")
    yield "| epoch, s | kept | page cache dropped | with the page cache |"
    yield "| --- | ---: | ---: | ---: |"
    for way in (UNCACHED, *SHARES):
        yield f"| {way} | {kept.get(way, 0.0):.0%} | {short(cold[way])} | {short(warm[way])} |"
    yield ""
    gain = short(1 / _medians(run, COLD, RATIO)[f"{BOTH} / {HALF}"])
    ratios = _medians(run, WARM, RATIO)
    promoted, served = (
        short(ratios[f"{above} / {below}"]) for above, below in ((WHOLE_BOTH, WHOLE), (SERVED_BOTH, SERVED))
    )
    yield (
        f"Where scratch has room for half of the data, memory for the other half makes an epoch {gain} times as fast. "
        f"Where scratch has room for all of it, an epoch takes {promoted} times as long with memory above as without, "
        f"and {served} times where nothing is promoted: it brings nothing there, for the page cache keeps in memory "
        "what is read from scratch."
    )


def draw(figure: Any, run: Run) -> None:
    left, right = figure.subplots(1, 2)
    for what in (IN_MEMORY, IN_PAGE_CACHE, ON_DISK, MISS, UNCACHED):
        points = sorted(
            (each.median, each.circumstances["percentile"])
            for each in run.results
            if (each.case, each.contender) == (LATENCY, what)
        )
        left.plot(*zip(*points, strict=True), color=_COLOURS[what], label=what)
    left.set_xscale("log")
    left.set_xlabel("ms for the open and read of one file")
    left.set_ylabel("% of files")
    left.legend(frameon=False, fontsize=7)
    cold = _medians(run, COLD, "time")
    names = [UNCACHED, *SHARES]
    bars = right.barh(names, [cold[name] for name in names], color=[_COLOURS[name] for name in names])
    right.bar_label(bars, [f" {short(cold[name])}" for name in names], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("s an epoch, page cache dropped")
    right.margins(x=0.15)
    right.tick_params(labelsize=8)
