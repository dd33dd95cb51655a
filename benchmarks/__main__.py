"""python -m benchmarks: runs workloads, prints ratios with their spread, writes results as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.stage import Result

WORKLOADS = ("small_files", "large_file", "listing", "million_files")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("action", choices=["run", "list"])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--repetitions", type=int, default=5, help="of each contender, interleaved [default: 5]")
    parser.add_argument("--quick", action="store_true", help="small and once: shows that it runs, not how fast")
    parser.add_argument("--folder", type=Path, help="where data and scratch lie [default: the temporary directory]")
    options = parser.parse_args()
    unknown = set(options.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))} (there are {', '.join(WORKLOADS)})")
    for name in options.workloads or WORKLOADS:
        module = importlib.import_module(f"benchmarks.{name}")
        if options.action == "list":
            print(f"{name:15} {module.__doc__.splitlines()[0]}")
            continue
        started = time.time()
        with tempfile.TemporaryDirectory(prefix="cachefs-bench-", dir=options.folder) as folder:
            results = module.run(Path(folder), 1 if options.quick else options.repetitions, quick=options.quick)
        _print(name, module.__doc__.splitlines()[0], results)
        if not options.quick:
            _write(name, results, started)
    return 0


def _print(name: str, title: str, results: list[Result]) -> None:
    table = Table(title=f"{name}: {title}", title_justify="left")
    for heading in ("", "median", "min", "max", "unit", "goal"):
        table.add_column(heading, justify="left" if heading in ("", "unit", "goal") else "right")
    for result in results:
        low, middle, high = min(result.values), statistics.median(result.values), max(result.values)
        table.add_row(result.name, f"{middle:.4g}", f"{low:.4g}", f"{high:.4g}", result.unit, result.goal)
    Console(width=120).print(table)


def _write(name: str, results: list[Result], started: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {
        "workload": name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "machine": describe_machine(),
        "results": [result.as_dict() for result in results],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
