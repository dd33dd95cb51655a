"""A PyTorch loop over 1,000 JPEG files that 4 workers decode: an epoch from the source, and 3 later epochs."""

from __future__ import annotations

from benchmarks.contenders import FIRST, LATER
from benchmarks.phases import WARM_CASE, compare_first, compare_later, read_first, read_later
from benchmarks.results import Goal, Result
from benchmarks.stage import Conditions, Reader, Stage, lacking

FILES, WORKERS, EPOCHS = 1000, 4, 3
CONDITIONS = (Conditions(2.0, 1000.0),)
GOAL = Goal("at most", 1.02)


def run(stage: Stage) -> list[Result]:
    reason = lacking("torch", "PIL", "numpy")
    if reason is not None:
        stage.skipped.update(dict.fromkeys((*FIRST, *LATER), reason))
        return []
    data = stage.photographs(stage.size(FILES, 60))
    for conditions in stage.conditions(*CONDITIONS):
        read_first(stage, data, lambda seed: reader(seed, 1), conditions)
    check = Reader("read_files.py", ("--do", "check"))
    epochs = stage.size(EPOCHS, 1)
    read_later(stage, data, check, [(lambda seed: reader(seed, epochs), {})], dropped_case=None)
    compare_first(stage)
    compare_later(stage, (WARM_CASE,), lambda result: GOAL if result.contender == "cachefs" else None)
    return stage.records.results()


def reader(seed: int, epochs: int) -> Reader:
    arguments = ("--epochs", epochs, "--workers", WORKERS)
    return Reader("train.py", arguments, ("--seed", seed), is_ordered=True)
