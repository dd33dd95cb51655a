"""python -m benchmarks: run workloads over all contenders, or experiments; list them; report on the results."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

from rich.console import Console

from benchmarks import charts, report
from benchmarks.contenders import CONTENDERS, BenchmarkError
from benchmarks.experiments import EXPERIMENTS
from benchmarks.machine import describe_machine
from benchmarks.results import Run
from benchmarks.stage import Options, Stage
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
USUAL_REPETITIONS = 3


def main() -> int:
    options = _parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    console = Console(width=140)
    if options.action == "list":
        for name in options.workloads:
            console.print(f"{name:16} {_title(_module(name))}", highlight=False)
        return 0
    if options.action == "report":
        for path in report.write(options.results or RESULTS, options.readme):
            console.print(str(path), highlight=False)
        return 0
    with tempfile.TemporaryDirectory(prefix="cachefs-bench-tools-") as tools:
        done = [_run_and_show(name, options, Path(tools), console) for name in options.workloads]
    return 0 if all(done) else 1


def _run_and_show(name: str, options: argparse.Namespace, tools: Path, console: Console) -> bool:
    """False if it failed, which keeps no other workload from running."""
    try:
        run = _run(name, options, tools, console)
    except BenchmarkError as error:
        console.print(f"{name} failed: {error}", highlight=False, markup=False)
        return False
    report.show(run, console)
    if options.results is not None:
        for path in _keep(run, options.results):
            console.print(f"written: {path}", highlight=False)
    return True


def _keep(run: Run, folder: Path) -> Iterator[Path]:
    """The results as JSON; of an experiment as CSV too, and drawn, where matplotlib is installed."""
    yield run.write(folder)
    if run.workload in EXPERIMENTS:
        yield run.write_values(folder)
        if importlib.util.find_spec("matplotlib") is not None:
            yield from charts.draw(run, folder)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("action", choices=["run", "experiment", "report", "list"])
    names = f"run: of {', '.join(WORKLOADS)}; experiment: of {', '.join(EXPERIMENTS)}; all of them by default"
    parser.add_argument("workloads", nargs="*", metavar="NAME", help=names)
    parser.add_argument(
        "--repetitions", type=int, help="interleaved [default: 3 of each contender; as an experiment wants it]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data [default: 0]")
    parser.add_argument("--samples", type=int, help="in the dataset of the experiment local_and_remote, such as 5000")
    parser.add_argument("--quick", action="store_true", help="small and once: shows that it runs, not how fast")
    parser.add_argument("--latency", type=_numbers, default=(), help="of the source, in ms, such as 0.2,2,20")
    parser.add_argument("--bandwidth", type=_numbers, default=(), help="of the source, in MB/s, such as 100,1000")
    parser.add_argument("--contenders", type=_names, default=(), help=f"of {', '.join(CONTENDERS)}; all by default")
    parser.add_argument("--folder", type=Path, help="where data and scratch lie [default: the temporary directory]")
    parser.add_argument(
        "--results", type=Path, help="their folder [default: benchmarks/results; with --quick they are not kept]"
    )
    parser.add_argument("--readme", type=Path, default=README, help="in which report puts the figures")
    options = parser.parse_intermixed_args()
    available = {"run": WORKLOADS, "experiment": EXPERIMENTS}.get(options.action, (*WORKLOADS, *EXPERIMENTS))
    for given, known, what in (
        (options.workloads, available, "experiment" if options.action == "experiment" else "workload"),
        (options.contenders, CONTENDERS, "contender"),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"no such {what}: {', '.join(sorted(unknown))} (there are {', '.join(known)})")
    for name in "repetitions", "samples":
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if options.action == "experiment" and (options.latency or options.bandwidth or options.contenders):
        parser.error("--latency, --bandwidth and --contenders are of run: an experiment has its own")
    if options.samples is not None and (options.action != "experiment" or options.workloads != ["local_and_remote"]):
        parser.error("--samples is of experiment local_and_remote alone")
    if options.folder is not None and not (options.folder.is_dir() and os.access(options.folder, os.W_OK)):
        parser.error(f"--folder {options.folder} is not a directory that can be written to")
    options.workloads = options.workloads or available
    if options.action in ("run", "experiment") and options.results is None and not options.quick:
        options.results = RESULTS
    return options


def _run(name: str, options: argparse.Namespace, tools: Path, console: Console) -> Run:
    module = _module(name)
    stage_options = Options(
        repetitions=options.repetitions or getattr(module, "REPETITIONS", USUAL_REPETITIONS),
        is_quick=options.quick,
        latencies=options.latency,
        bandwidths=options.bandwidth,
        contenders=options.contenders,
        folder=options.folder,
        seed=options.seed,
        samples=options.samples,
        pictures=options.results,
    )

    def tell(line: str) -> None:
        console.print(f"[{time.monotonic() - began:6.1f} s] {name}: {line}", highlight=False, markup=False)

    started, began = time.time(), time.monotonic()
    with Stage.open(stage_options, tools, tell) as stage:
        machine = describe_machine(stage.folder)
        results = module.run(stage)
        return Run(
            workload=name,
            title=_title(module),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            seconds=round(time.monotonic() - began, 1),
            repetitions=stage.repetitions,
            page_cache=stage.page_cache,
            machine={**machine, "seed": options.seed},
            skipped=stage.skipped,
            results=results,
        )


def _module(name: str) -> ModuleType:
    package = "experiments" if name in EXPERIMENTS else "workloads"
    return importlib.import_module(f"benchmarks.{package}.{name}")


def _title(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _end(number: int, _: FrameType | None) -> None:
    """So that every block is left in order: without a mount, a process or a file."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
