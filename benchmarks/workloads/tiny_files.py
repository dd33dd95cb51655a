"""20,000 files of 4 KB, read in a shuffled order by 4 processes; 2,000 of them in the first epoch."""

from __future__ import annotations

from benchmarks.phases import compare_first, compare_later, read_first, read_later
from benchmarks.results import Result
from benchmarks.stage import Conditions, Reader, Stage

FILES, FIRST_FILES, MEAN_BYTES, PROCESSES = 20_000, 2000, 4096, 4
CONDITIONS = (Conditions(2.0, 1000.0),)


def run(stage: Stage) -> list[Result]:
    known = {"processes": PROCESSES}
    data = stage.photographs(stage.size(FIRST_FILES, 100), MEAN_BYTES)
    for conditions in stage.conditions(*CONDITIONS):
        read_first(stage, data, reader, conditions, circumstances=known)
    data = stage.photographs(stage.size(FILES, 400), MEAN_BYTES)
    check = Reader("read_files.py", ("--do", "check"), ("--processes", PROCESSES))
    read_later(stage, data, check, [(reader, known)])
    compare_first(stage)
    compare_later(stage)
    return stage.records.results()


def reader(seed: int) -> Reader:
    return Reader("read_files.py", (), ("--processes", PROCESSES, "--seed", seed), can_repeat=True)
