"""Tables of the results: on the terminal after a run, and in Markdown, with charts, where readers look.

Invariant: of README only what stands between the markers of the figures is written; what stands in the folder of
results besides the JSON files is made from them alone, but for a picture of its data that an experiment took.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import charts
from benchmarks.contenders import title
from benchmarks.experiments import EXPERIMENTS
from benchmarks.results import RATIO, Result, Run, describe_circumstances
from benchmarks.workloads import WORKLOADS

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
RATIOS = ("workload", "ratio", "goal", "measured")


def read_runs(folder: Path) -> list[Run]:
    """All results in a folder, in the order of the workloads and experiments."""
    return [Run.read(path) for name in (*WORKLOADS, *EXPERIMENTS) if (path := folder / f"{name}.json").exists()]


def write(folder: Path, readme: Path) -> Iterator[Path]:
    """Tables and charts of all results in `folder`; yields what was written. ValueError if README has no markers."""
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"{folder} has no results: python -m benchmarks run")
    pictures = []
    for run in runs:
        pictures += charts.draw(run, folder)
    yield from pictures
    tables = folder / "README.md"
    tables.write_text("\n".join(_results_page(runs, pictures)) + "\n")
    yield tables
    if readme.exists():
        readme.write_text(_with_figures(readme.read_text(), figures(runs, _relative(folder, readme.parent))))
        yield readme


def figures(runs: list[Run], folder: str) -> str:
    """The goals with what was measured, as a Markdown table that says on which machine. `folder` is for the link."""
    rows = [
        (run.workload.replace("_", " "), describe(result), str(result.goal), judged(result))
        for run in runs
        for result in run.goals()
    ]
    machines = {machine(run) for run in runs if run.goals() or run.workload in EXPERIMENTS}
    dates = sorted(run.started[:10] for run in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [
        f"From [`{folder}/`]({folder}/README.md), {when}, on {'; '.join(sorted(machines))}.",
        "Medians of the ratios within each repetition (least to greatest); what misses its goal has a ✗.",
        *("", *markdown(RATIOS, rows)),
    ]
    measured = {result.contender for run in runs for result in run.results}
    skipped = {title(name): why for run in runs for name, why in run.skipped.items() if name not in measured}
    if skipped:
        lines += ["", "Not measured: " + "; ".join(f"{name}: {why}" for name, why in sorted(skipped.items())) + "."]
    for run in runs:
        if run.workload in EXPERIMENTS and run.results:
            pictures = [f"![{name}]({folder}/{name})" for name in (f"{run.workload}.png", *_photograph_of(run))]
            lines += [
                "",
                f"**{run.title}**",
                "",
                *(line for picture in pictures for line in (picture, "")),
                *summarize(run),
            ]
    return "\n".join(lines)


def summarize(run: Run) -> list[str]:
    """What follows from the results of an experiment, as lines of Markdown; of a workload nothing."""
    if run.workload not in EXPERIMENTS:
        return []
    experiment = importlib.import_module(f"benchmarks.experiments.{run.workload}")
    return list(experiment.summarize(run))


def _photograph_of(run: Run) -> list[str]:
    """The name of the picture that an experiment has taken of its data, if it does."""
    experiment = importlib.import_module(f"benchmarks.experiments.{run.workload}")
    name = getattr(experiment, "PICTURE", None)
    return [name] if name else []


def show(run: Run, console: Console) -> None:
    """Everything that a run measured."""
    for case, results in _cases(run.results):
        header, rows = _table(results)
        _print(console, f"{run.workload}: {case}", header, rows)
    _print(console, f"{run.workload}: ratios", RATIOS[1:], _ratio_rows(run))
    for line in summarize(run):
        console.print(line, highlight=False, markup=False)
    for name, reason in run.skipped.items():
        console.print(f"skipped: {title(name)}: {reason}", highlight=False, markup=False)
    console.print(f"page cache: {run.page_cache}; {run.seconds:.0f} s in all", highlight=False)


def judged(result: Result) -> str:
    if result.goal is None:
        return result.spread
    return f"{'✓' if result.goal.is_reached(result.median) else '✗'} {result.spread}{_unit(result)}"


def describe(result: Result) -> str:
    """What a figure is of, in words: "later epoch, 4 processes: cachefs / scratch directly"."""
    what = " / ".join(title(name) for name in result.contender.split(" / "))
    where = describe_circumstances(result.circumstances)
    return f"{result.case}{', ' if where else ''}{where}: {what}"


def machine(run: Run) -> str:
    facts = run.machine
    system = f"{facts['processor']}, {facts['cores']} cores, Linux {facts['kernel']}, Python {facts['python']}"
    return f"{system}, {facts['data_and_scratch']['type']}, as {facts['user']}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _unit(result: Result) -> str:
    return "" if result.unit == "x" else f" {result.unit}"


def _ratio_rows(run: Run) -> list[tuple[str, str, str]]:
    ratios = [result for result in run.results if result.quantity == RATIO or result.goal is not None]
    return [(describe(result), str(result.goal or ""), judged(result)) for result in ratios]


def _cases(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    measured = [result for result in results if result.quantity != RATIO and result.goal is None]
    for case in dict.fromkeys(result.case for result in measured):
        yield case, [result for result in measured if result.case == case]


def _table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """A row a contender and its circumstances, a column a quantity."""
    columns = list(dict.fromkeys((result.quantity, result.unit) for result in results))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for each in results:
        row = rows.setdefault((describe_circumstances(each.circumstances), title(each.contender)), {})
        row[each.quantity, each.unit] = each.spread
    cells = [[*names, *(row.get(column, "") for column in columns)] for names, row in rows.items()]
    return ["circumstances", "contender", *(f"{quantity}, {unit}" for quantity, unit in columns)], cells


def _print(console: Console, heading: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False, markup=False)


def _results_page(runs: list[Run], pictures: list[Path]) -> Iterator[str]:
    yield from [
        "# Results",
        "",
        "Made by `python -m benchmarks report` from the JSON files beside it; do not edit.",
        "",
    ]
    yield "Each cell is a median (least to greatest) over the repetitions; times and CPU are for each file where a"
    yield "workload has several. `source CPU` is what the slow source itself costs, on the same cores."
    for run in runs:
        facts = run.machine
        yield from ["", f"## {run.workload}", "", run.title, ""]
        changed = " with uncommitted changes" if facts["has_uncommitted_changes"] else ""
        load = facts["load_average"][0]
        yield f"{run.started}, {run.repetitions} repetitions in {run.seconds:.0f} s, load average before {load:.1f};"
        yield f"{machine(run)}; revision {str(facts['revision'])[:12]}{changed}; page cache {run.page_cache}."
        for name, reason in run.skipped.items():
            yield f"Without {title(name)}: {reason}."
        for picture in pictures:
            if picture.stem == run.workload:
                yield from ["", f"![{run.workload}]({picture.name})"]
        if lines := summarize(run):
            yield from ["", *lines]
        for case, results in _cases(run.results):
            yield from ["", f"### {case}", "", *markdown(*_table(results))]
        if rows := _ratio_rows(run):
            yield from ["", "### ratios", "", *markdown(RATIOS[1:], rows)]


def _with_figures(text: str, content: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} followed by {END} to put the figures between")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _relative(folder: Path, parent: Path) -> str:
    folder, parent = folder.resolve(), parent.resolve()
    return folder.relative_to(parent).as_posix() if folder.is_relative_to(parent) else folder.as_posix()
