"""Capacity sweep: two epochs of a small image classifier, 0 to 100% of its data cached, of a slow disk and a network.

240 photographs of 110 KB, decoded by 4 workers. Under the policy `hold` what came first stays. Nothing is fetched ahead
and nothing promoted, so that the first epoch shows what copying costs and a later one what a copy brings: with
prefetching a first epoch is faster (`epochs`). The page cache is dropped before each epoch. The slow disk has 5 ms and
120 MB/s, the network 10 ms and 60 MB/s: both are the slow source, which serves several requests at once, as an array of
disks does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.contenders import Running, mounted
from benchmarks.fit import Line, fit_line
from benchmarks.results import Circumstances, Result, Run, short
from benchmarks.stage import Conditions, Reader, Stage, lacking

REPETITIONS = 1
SOURCES = {"slow disk": Conditions(5.0, 120.0), "network": Conditions(10.0, 60.0)}
SHARES = tuple(number / 10 for number in range(11))
QUICK_SHARES = (0.0, 1.0)
FILES, QUICK_FILES, BATCH, WORKERS = 240, 24, 16, 4
FIRST, SECOND, CACHED = "first epoch", "second epoch", "share cached"
DIRECT = "uncached"
SIZE = (9, 6)
_COLOURS = ("#d1793b", "#0b6fb8")


def run(stage: Stage) -> list[Result]:
    reason = lacking("torch", "PIL", "numpy")
    if reason is not None:
        stage.skipped.update(dict.fromkeys(("source", "cachefs"), reason))
        return []
    data = stage.photographs(stage.options.samples or stage.size(FILES, QUICK_FILES))
    size = sum(path.stat().st_size for path in data.rglob("*.jpg"))
    for name, conditions in list(SOURCES.items())[: stage.size(len(SOURCES), 1)]:
        with stage.slow(data, conditions) as source:
            for repetition in range(stage.repetitions):
                reader = Reader(
                    "train.py", ("--epochs", 2, "--batch", BATCH, "--seed", repetition), ("--workers", WORKERS)
                )
                stage.drop_caches()
                seconds = [
                    each.seconds for each in stage.measure(reader, Running(source.path), data, stage.drop_caches)
                ]
                stage.records.add(DIRECT, name, "time", "s", statistics.fmean(seconds), {})
                stage.tell(f"{name}, uncached: {seconds[0]:.1f} and {seconds[1]:.1f} s")
                for share in SHARES if not stage.options.is_quick else QUICK_SHARES:
                    known: Circumstances = {"capacity_share": share}
                    folder = stage.new_folder()
                    options = (f"--capacity={round(share * size)}", "--prefetch=off", "--no-promote")
                    stage.drop_caches()
                    with mounted(source.path, folder / "mount", folder / "scratch", *options) as running:
                        first, second = stage.measure(reader, running, data, stage.drop_caches)
                        cached = running.status()["resident_bytes"] / size
                    stage.records.add(FIRST, name, "time", "s", first.seconds, known)
                    stage.records.add(SECOND, name, "time", "s", second.seconds, known)
                    stage.records.add(CACHED, name, CACHED, "of bytes", cached, known)
                    stage.tell(f"{name}, {cached:.0%} cached: {first.seconds:.1f} and {second.seconds:.1f} s")
    return stage.records.results()


def points(run: Run, name: str) -> tuple[float, list[tuple[float, float, float]]]:
    """(Uncached seconds; share cached, seconds of the first epoch and of the second) of a source, by capacity."""
    medians = {
        (each.case, each.circumstances.get("capacity_share")): each.median
        for each in run.results
        if each.contender == name
    }
    shares = sorted(share for case, share in medians if case == FIRST and share is not None)
    found = [(medians[CACHED, share], medians[FIRST, share], medians[SECOND, share]) for share in shares]
    return medians[DIRECT, None], found


def fits(run: Run, name: str) -> tuple[Line, Line]:
    """What of an uncached epoch the second one saves, and how many times as fast it is, by the share cached."""
    direct, found = points(run, name)
    shares = [share for share, _, _ in found]
    return (
        fit_line(shares, [1 - second / direct for _, _, second in found]),
        fit_line(shares, [direct / second for _, _, second in found]),
    )


def _names(run: Run) -> list[str]:
    return list(dict.fromkeys(each.contender for each in run.results))


def summarize(run: Run) -> Iterator[str]:
    for name in _names(run):
        direct, found = points(run, name)
        saving, speed_up = fits(run, name)
        overheads = [first / direct - 1 for _, first, _ in found]
        spread = f"{min(overheads):+.1%} to {max(overheads):+.1%}"
        yield (
            f"- {name}: an epoch takes {short(direct)} s uncached, {short(found[-1][2])} s with all of it cached. "
            f"The speedup as the share of that time which the second epoch saves, by the share x cached: {saving}; as "
            f"the quotient of the times: {speed_up}, because that is a hyperbola where a hit costs little. "
            f"The first epoch against uncached: {statistics.median(overheads):+.1%} ({spread})."
        )


def draw(figure: Any, run: Run) -> None:
    names = _names(run)
    (savings, *_), (times, *_) = rows = figure.subplots(2, len(names), squeeze=False)
    assert savings is not times
    for column, name in enumerate(names):
        direct, found = points(run, name)
        saving, _ = fits(run, name)
        shares = [share for share, _, _ in found]
        top, bottom = rows[0][column], rows[1][column]
        top.set_title(name, loc="left", fontsize=10, fontweight="bold")
        top.plot(shares, [1 - second / direct for _, _, second in found], "o", color=_COLOURS[1], label="second epoch")
        top.plot([0, 1], [saving.at(0), saving.at(1)], color="#4a4f55", linewidth=1, label=f"fit: {saving}")
        top.set_ylabel("time saved")
        top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bottom.plot(shares, [first for _, first, _ in found], "o-", color=_COLOURS[0], label=FIRST)
        bottom.plot(shares, [second for _, _, second in found], "o-", color=_COLOURS[1], label=SECOND)
        bottom.axhline(direct, color="#4a4f55", linestyle="--", linewidth=1, label=DIRECT)
        bottom.set_ylabel("s an epoch")
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel("share of the dataset in scratch")
        for axis in top, bottom:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axis.legend(frameon=False, fontsize=8)
