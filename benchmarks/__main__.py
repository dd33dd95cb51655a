"""python -m benchmarks: run workloads over all contenders, list them, or make tables and charts of the results."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType, ModuleType

from rich.console import Console

from benchmarks import report
from benchmarks.contenders import CONTENDERS, BenchmarkError
from benchmarks.machine import describe_machine
from benchmarks.results import Run
from benchmarks.stage import Options, Stage
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def main() -> int:
    options = _parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    console = Console(width=140)
    if options.action == "list":
        for name in options.workloads:
            console.print(f"{name:12} {_title(_module(name))}", highlight=False)
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
        console.print(f"written: {run.write(options.results)}", highlight=False)
    return True


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("action", choices=["run", "report", "list"])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--repetitions", type=int, default=3, help="of each contender, interleaved [default: 3]")
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
    for given, known, what in (
        (options.workloads, WORKLOADS, "workload"),
        (options.contenders, CONTENDERS, "contender"),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"no such {what}: {', '.join(sorted(unknown))} (there are {', '.join(known)})")
    if options.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    options.workloads = options.workloads or WORKLOADS
    if options.action == "run" and options.results is None and not options.quick:
        options.results = RESULTS
    return options


def _run(name: str, options: argparse.Namespace, tools: Path, console: Console) -> Run:
    module = _module(name)
    stage_options = Options(
        repetitions=options.repetitions,
        is_quick=options.quick,
        latencies=options.latency,
        bandwidths=options.bandwidth,
        contenders=options.contenders,
        folder=options.folder,
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
            machine=machine,
            skipped=stage.skipped,
            results=results,
        )


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.workloads.{name}")


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
