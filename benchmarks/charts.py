"""Charts of the results: times of all contenders as bars, cost over the number of files as lines, and experiments."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.contenders import CONTENDERS, title
from benchmarks.experiments import EXPERIMENTS
from benchmarks.results import Result, Run, describe_circumstances, short

OURS, OTHERS, REFERENCE, RCLONE = "#0b6fb8", "#a7adb4", "#4a4f55", "#d1793b"
REFERENCES = ("source", "scratch")
MOST_BARS = 9


def draw(run: Run, folder: Path) -> list[Path]:
    """One picture a workload or experiment; none if there is nothing to draw."""
    if run.workload in EXPERIMENTS:
        return _draw_experiment(run, folder)
    panels = _lines(run) if run.workload == "growth" else _bars(run)
    if not panels:
        return []
    from matplotlib.figure import Figure  # slow, and an extra: nothing but a report needs it

    heights = [0.9 + 0.32 * len(bars) for _, bars in panels] if run.workload != "growth" else [3.2] * len(panels)
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (heading, results) in zip(axes, panels, strict=True):
        axis.set_title(heading, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        (_draw_lines if run.workload == "growth" else _draw_bars)(axis, results)
    path = folder / f"{run.workload}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return [path]


def _draw_experiment(run: Run, folder: Path) -> list[Path]:
    if not run.results:
        return []
    from matplotlib.figure import Figure

    experiment = importlib.import_module(f"benchmarks.experiments.{run.workload}")
    figure = Figure(figsize=experiment.SIZE, layout="constrained")
    experiment.draw(figure, run)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    path = folder / f"{run.workload}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return [path]


def _bars(run: Run) -> list[tuple[str, list[Result]]]:
    """The times, or hit rates, of each case in its first circumstances: what is measured first is the main question."""
    panels = []
    times = [result for result in run.results if result.quantity in ("time", "hit rate")]
    for case in dict.fromkeys(result.case for result in times):
        of_case = [result for result in times if result.case == case]
        usual = of_case[0].circumstances
        results = [result for result in of_case if result.circumstances == usual][:MOST_BARS]
        where = describe_circumstances(usual)
        panels.append((f"{case} ({where})" if where else case, sorted(results, key=lambda result: result.median)))
    return panels


def _lines(run: Run) -> list[tuple[str, list[Result]]]:
    panels = []
    for what, cases in {
        "time": ("first walk", "second walk"),
        "memory": ("memory after the walks", "index: memory"),
    }.items():
        results = [result for result in run.results if result.case in cases and result.quantity == what]
        if results:
            panels.append(("time of a walk, for each file" if what == "time" else "memory of the daemon", results))
    return panels


def _draw_bars(axis, results: list[Result]) -> None:  # noqa: ANN001
    medians = [result.median for result in results]
    spread = [[median - min(result.values) for median, result in zip(medians, results, strict=True)]]
    spread.append([max(result.values) - median for median, result in zip(medians, results, strict=True)])
    names = [title(result.contender) for result in results]
    colours = [_colour(result.contender) for result in results]
    axis.barh(names, medians, xerr=spread, color=colours, height=0.7, error_kw={"elinewidth": 1, "ecolor": "#222222"})
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_xlabel(f"{results[0].unit}, median, from least to greatest", fontsize=8)
    widest = max(max(result.values) for result in results)
    axis.set_xlim(0, widest * 1.15)
    for number, result in enumerate(results):
        axis.text(max(result.values) + widest * 0.01, number, short(result.median), va="center", fontsize=8)


def _draw_lines(axis, results: list[Result]) -> None:  # noqa: ANN001
    styles = {"first walk": "-", "second walk": "--", "memory after the walks": "-", "index: memory": "--"}
    others = {"rclone": RCLONE}
    for case, contender in dict.fromkeys((result.case, result.contender) for result in results):
        points = [result for result in results if (result.case, result.contender) == (case, contender)]
        axis.plot(
            [point.circumstances["files"] for point in points],
            [point.median for point in points],
            styles[case],
            marker="o",
            markersize=4,
            color=others.get(contender) or _colour(contender),
            label=f"{title(contender)}, {case}",
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:,.0f}")
        scale.set_minor_formatter("")
    axis.set_xlabel("files", fontsize=8)
    axis.set_ylabel(results[0].unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)


def _colour(contender: str) -> str:
    if contender in REFERENCES:
        return REFERENCE
    is_ours = contender in CONTENDERS and CONTENDERS[contender].kind == "cachefs"
    return OURS if is_ours else OTHERS
