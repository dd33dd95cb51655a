"""Epochs table: three epochs with and without the mount, of a loader that is bound by its data.

500 photographs of 110 KB, decoded by 4 workers, from the slow source (20 ms for each operation, 1 Gbit/s) and from a
real network file system: sshfs over sshd in a network namespace, 10 ms each way, 1 Gbit/s (`benchmarks/network.py`).
The page cache is dropped before each epoch; the mount has the default options.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, Running
from benchmarks.network import missing_sshfs, sshfs
from benchmarks.results import Result, Run, short
from benchmarks.stage import Conditions, Reader, Stage, lacking

REPETITIONS = 2
FILES, QUICK_FILES, WORKERS, EPOCHS = 500, 8, 4, 3
SLOW = Conditions(20.0, 125.0)
SLOW_CASE, REAL_CASE = "slow source", "sshfs"
DIRECT, CACHED = "source", "cachefs"
TITLES = {DIRECT: "without", CACHED: "with cachefs"}
FORERUNNER = {DIRECT: (6375, 6306, 6321), CACHED: (6473, 2264, 2240)}
"""Seconds of its epochs, on its own data and machine."""
SIZE = (8, 3.5)
_COLOURS = {DIRECT: "#4a4f55", CACHED: "#0b6fb8"}


def run(stage: Stage) -> list[Result]:
    reason = lacking("torch", "PIL", "numpy")
    if reason is not None:
        stage.skipped.update(dict.fromkeys((DIRECT, CACHED), reason))
        return []
    data = stage.photographs(stage.options.samples or stage.size(FILES, QUICK_FILES))
    cases = [SLOW_CASE]
    lack = "a quick run takes the slow source alone" if stage.options.is_quick else missing_sshfs()
    if lack is None:
        cases.append(REAL_CASE)
    else:
        stage.skipped[REAL_CASE] = lack
    for case in cases:
        with _source(stage, case, data) as source:
            for repetition in range(stage.repetitions):
                arguments = ("--epochs", EPOCHS, "--seed", repetition)
                reader = Reader("train.py", arguments, ("--workers", WORKERS))
                stage.drop_caches()
                _note(stage, case, DIRECT, stage.measure(reader, Running(source), data, stage.drop_caches))
                stage.drop_caches()
                with stage.start(CONTENDERS["cachefs"], source, data) as running:
                    _note(stage, case, CACHED, stage.measure(reader, running, data, stage.drop_caches))
    return stage.records.results()


@contextmanager
def _source(stage: Stage, case: str, data: Path) -> Iterator[Path]:
    if case == SLOW_CASE:
        with stage.slow(data, SLOW) as source:
            yield source.path
    else:
        with sshfs(data, stage.new_folder()) as path:
            yield path


def _note(stage: Stage, case: str, contender: str, epochs: list[Any]) -> None:
    for number, measured in enumerate(epochs, start=1):
        stage.records.add(case, contender, "time", "s", measured.seconds, {"epoch": number})
        stage.records.add(case, contender, "waited for data", "s", measured.waited_seconds, {"epoch": number})
    stage.tell(f"{case}, {TITLES[contender]}: {', '.join(f'{each.seconds:.1f}' for each in epochs)} s")


def table_of(run: Run) -> dict[str, dict[str, list[float]]]:
    """Seconds of each epoch, the median of the repetitions, by source and way."""
    found: dict[str, dict[str, list[float]]] = {}
    for each in run.results:
        if each.quantity == "time":
            found.setdefault(each.case, {}).setdefault(each.contender, []).append(each.median)
    return found


def summarize(run: Run) -> Iterator[str]:
    tables = table_of(run)
    if not tables:
        return
    epochs = range(1, 1 + max(len(row) for table in tables.values() for row in table.values()))
    yield "| source | | " + " | ".join(f"epoch {number}, s" for number in epochs) + " | all, s |"
    yield "| --- | --- |" + " ---: |" * (len(epochs) + 1)
    for case, rows in (*tables.items(), ("the forerunner, on its own data", FORERUNNER)):
        direct, cached = list(rows[DIRECT]), list(rows[CACHED])
        for contender in DIRECT, CACHED:
            values = [*rows[contender], sum(rows[contender])]
            yield f"| {case} | {TITLES[contender]} | " + " | ".join(map(short, values)) + " |"
        saved = [1 - with_it / without for with_it, without in zip(cached, direct, strict=True)]
        saved.append(1 - sum(cached) / sum(direct))
        yield f"| {case} | saved | " + " | ".join(f"{share:.0%}" for share in saved) + " |"
    waits = {
        each.case: sum(other.median for other in run.results if (other.case, other.contender, other.quantity)
                       == (each.case, DIRECT, "waited for data")) / sum(tables[each.case][DIRECT])
        for each in run.results
    }  # fmt: skip
    yield ""
    yield "Without it the training waited for its data for " + ", ".join(
        f"{share:.0%} of the time ({case})" for case, share in waits.items()
    ) + "."  # fmt: skip


def draw(figure: Any, run: Run) -> None:
    tables = table_of(run)
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (case, rows) in zip(axes, tables.items(), strict=True):
        axis.set_title(case, loc="left", fontsize=10, fontweight="bold")
        for number, (contender, values) in enumerate(rows.items()):
            places = [place + (number - 0.5) * 0.42 for place in range(len(values))]
            bars = axis.bar(places, values, width=0.4, color=_COLOURS[contender], label=TITLES[contender])
            axis.bar_label(bars, [short(value) for value in values], fontsize=8)
        epochs = max(map(len, rows.values()))
        axis.set_xticks(range(epochs), [f"epoch {number + 1}" for number in range(epochs)])
        axis.set_ylabel("s")
        axis.margins(y=0.12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
