"""What was measured: every single value by case, contender and circumstances; ratios; goals; files of results.

Invariants:
- A result has one value a repetition, in their order, so a ratio is taken between values of the same repetition.
- A goal is printed beside what was measured; nothing fails because it is missed.
"""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

RATIO = "ratio"

Circumstances = dict[str, float]
"""What a value depends on besides contender and case: `processes`, `latency_ms`, `bandwidth_mb_s`, `files`,
`file_bytes`, `capacity_share`, `samples`, `workers`, `epoch`, `percentile`."""


def describe_circumstances(circumstances: Circumstances) -> str:
    """As text, "4 processes, 2 ms"; empty without any."""
    forms = {
        "processes": lambda value: f"{value:g} process{'es' if value > 1 else ''}",
        "latency_ms": lambda value: f"{value:g} ms",
        "bandwidth_mb_s": lambda value: f"{value:,.0f} MB/s",
        "files": lambda value: f"{value:,.0f} files",
        "capacity_share": lambda value: f"capacity {value:.0%}",
        "workers": lambda value: f"{value:g} worker{'' if value == 1 else 's'}",
        "samples": lambda value: f"{value:,.0f} samples",
        "percentile": lambda value: f"{value:g}% of files",
        "epoch": lambda value: f"epoch {value:g}",
        "file_bytes": lambda value: f"{value:,.0f} bytes each",
    }
    return ", ".join(forms[name](value) for name, value in circumstances.items())


@dataclass(frozen=True)
class Goal:
    """What a median should be. `relation` is "at most", "below" or "at least"."""

    relation: str
    limit: float

    def is_reached(self, value: float) -> bool:
        if self.relation == "at least":
            return value >= self.limit
        return value < self.limit if self.relation == "below" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """One quantity in one case, measured in each repetition."""

    case: str
    contender: str
    quantity: str
    unit: str
    values: list[float]
    circumstances: Circumstances = field(default_factory=dict)
    goal: Goal | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """Median, least and greatest as text, "1.04 (1.01 to 1.10)"; a single value alone."""
        if len(self.values) == 1:
            return short(self.median)
        return f"{short(self.median)} ({short(min(self.values))} to {short(max(self.values))})"


def ratio(numerator: Result, denominator: Result, case: str, goal: Goal | None = None) -> Result:
    """Of each value and that of the same repetition. ValueError if they were not measured equally often."""
    if len(numerator.values) != len(denominator.values):
        raise ValueError(
            f"{case}: {len(numerator.values)} values of {numerator.contender} "
            f"and {len(denominator.values)} of {denominator.contender} are not of the same repetitions"
        )
    return Result(
        case=case,
        contender=f"{numerator.contender} / {denominator.contender}",
        quantity=RATIO,
        unit="x",
        values=[above / below for above, below in zip(numerator.values, denominator.values, strict=True)],
        circumstances={**denominator.circumstances, **numerator.circumstances},
        goal=goal,
    )


class Records:
    """The results of one workload while they grow."""

    def __init__(self) -> None:
        self._results: dict[tuple[Any, ...], Result] = {}
        self._derived: list[Result] = []

    def add(
        self, case: str, contender: str, quantity: str, unit: str, value: float, circumstances: Circumstances
    ) -> None:
        """The value of one more repetition."""
        key = (case, contender, quantity, *sorted(circumstances.items()))
        known = self._results.setdefault(key, Result(case, contender, quantity, unit, [], circumstances))
        known.values.append(value)

    def find(self, case: str, contender: str, quantity: str = "time", **circumstances: float) -> Result | None:
        """The first result like that whose circumstances include those given; None if it was not measured."""
        for result in self._results.values():
            is_it = (result.case, result.contender, result.quantity) == (case, contender, quantity)
            if is_it and circumstances.items() <= result.circumstances.items():
                return result
        return None

    def compare(
        self, case: str, numerator: Result | None, denominator: Result | None, goal: Goal | None = None
    ) -> None:
        """Add a ratio, if both were measured."""
        if numerator is not None and denominator is not None:
            self._derived.append(ratio(numerator, denominator, case, goal))

    def aim(self, result: Result | None, case: str, goal: Goal) -> None:
        """Add a result once more as a figure with a goal, if it was measured."""
        if result is not None:
            self._derived.append(replace(result, case=case, goal=goal))

    def results(self) -> list[Result]:
        return [*self._results.values(), *self._derived]


@dataclass(frozen=True)
class Run:
    """The content of one file of results. `skipped` gives a reason for each contender that did not take part."""

    workload: str
    title: str
    started: str
    seconds: float
    repetitions: int
    page_cache: str
    machine: dict[str, Any]
    skipped: dict[str, str]
    results: list[Result]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.workload}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    def write_values(self, folder: Path) -> Path:
        """The same as a CSV file: a row a value, each with the machine and the versions."""
        path = folder / f"{self.workload}.csv"
        names = list(dict.fromkeys(name for result in self.results for name in result.circumstances))
        known = {
            name: self.machine.get(name) for name in ("processor", "cores", "kernel", "python", "revision", "seed")
        }
        versions = {name: self.machine.get("packages", {}).get(name) for name in ("cachefs", "pyfuse3", "torch")}
        header = ["case", "contender", *names, "repetition", "quantity", "value", "unit", "started", *known, *versions]
        with open(path, "w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(header)
            for result in self.results:
                where = [result.circumstances.get(name, "") for name in names]
                for repetition, value in enumerate(result.values, start=1):
                    what = [result.quantity, value, result.unit, self.started]
                    row = [
                        result.case,
                        result.contender,
                        *where,
                        repetition,
                        *what,
                        *known.values(),
                        *versions.values(),
                    ]
                    rows.writerow(row)
        return path

    @classmethod
    def read(cls, path: Path) -> Run:
        content = json.loads(path.read_text())
        results = [
            Result(**{**each, "goal": Goal(**each["goal"]) if each["goal"] else None}) for each in content["results"]
        ]
        return cls(**{**content, "results": results})

    def goals(self) -> list[Result]:
        return [result for result in self.results if result.goal is not None]


def short(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
