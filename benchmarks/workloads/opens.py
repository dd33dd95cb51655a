"""10,000 files opened and closed, none read, in a shuffled order by 1 and 4 processes; 1,000 of them the first time."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.phases import compare_first, compare_later, read_first, read_later
from benchmarks.results import Result
from benchmarks.stage import Conditions, Reader, Stage

FILES, FIRST_FILES, MEAN_BYTES = 10_000, 1000, 4096
CONDITIONS = (Conditions(2.0, 1000.0),)
FIRST_CASE, LATER_CASE = "first opens", "later opens"


def run(stage: Stage) -> list[Result]:
    data = stage.photographs(stage.size(FIRST_FILES, 100), MEAN_BYTES)
    for conditions in stage.conditions(*CONDITIONS):
        read_first(stage, data, reader(4), conditions, case=FIRST_CASE, circumstances={"processes": 4})
    data = stage.photographs(stage.size(FILES, 400), MEAN_BYTES)
    check = Reader("read_files.py", ("--do", "check"), ("--processes", 4))
    readings = [(reader(processes), {"processes": processes}) for processes in (4, 1)]
    read_later(stage, data, check, readings, case=LATER_CASE, dropped_case=None)
    compare_first(stage, FIRST_CASE)
    compare_later(stage, (LATER_CASE,))
    return stage.records.results()


def reader(processes: int) -> Callable[[int], Reader]:
    return lambda seed: Reader(
        "read_files.py", ("--do", "open"), ("--processes", processes, "--seed", seed), can_repeat=True
    )
