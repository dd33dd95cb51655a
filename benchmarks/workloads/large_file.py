"""One file of 1 GiB: from end to end, 1,000 random reads of 64 KiB in it, and its last 4 KiB right after open.

First reads are of a file of 128 MiB, for which rclone takes long; Debian's takes part at 1 GB/s.

Two local copies of one file differ in how fast they are read from the page cache, as the kernel has found memory for
them. So for later reads there are controls: another copy in scratch; the very copy that cachefs has promoted, without
the mount; and one on tmpfs, whose page cache consists of single pages, as that of FUSE does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import FIRST, LATER
from benchmarks.phases import compare_first, compare_later, read_first, read_later
from benchmarks.results import Goal, Result
from benchmarks.stage import Conditions, Reader, Stage

MIB = 1 << 20
SIZE, FIRST_SIZE, RANDOM_READS = 1024 * MIB, 128 * MIB, 1000
CONDITIONS = (Conditions(2.0, 1000.0), Conditions(2.0, 100.0))
FIRST_CASES = {
    "sequential": "first, from end to end",
    "random": "first, 64 KiB at random places",
    "tail": "first, the last 4 KiB",
}
LATER_CASES = {"sequential": "later, from end to end", "random": "later, 64 KiB at random places"}
DROPPED = ", page cache dropped"
GOALS = {"cachefs": Goal("at most", 1.03), "cachefs-no-promotion": Goal("at most", 1.25)}
CONTROLS = ("scratch-copy", "cachefs-copy", "tmpfs")


def run(stage: Stage) -> list[Result]:
    data = large_file(stage, stage.size(FIRST_SIZE, 32 * MIB))
    for conditions in stage.conditions(*CONDITIONS):
        contenders = FIRST if conditions == CONDITIONS[0] else [name for name in FIRST if name != "rclone-debian"]
        for do, case in FIRST_CASES.items():
            read_first(stage, data, reader(stage, do), conditions, case=case, contenders=contenders)
    for case in FIRST_CASES.values():
        compare_first(stage, case)
    data = large_file(stage, stage.size(SIZE, 64 * MIB))
    cases = []
    for do, case in LATER_CASES.items():
        fill = Reader("read_files.py", ("--do", "check"))
        contenders = (*LATER, *CONTROLS)
        readings = [(reader(stage, do), {})]
        read_later(stage, data, fill, readings, contenders=contenders, case=case, dropped_case=case + DROPPED)
        cases += [case, case + DROPPED]
    is_goal = (LATER_CASES["sequential"], LATER_CASES["sequential"] + DROPPED)
    compare_later(stage, cases, lambda result: GOALS.get(result.contender) if result.case in is_goal else None)
    for case in cases:
        for contender, control in ("cachefs", "cachefs-copy"), ("cachefs-no-promotion", "tmpfs"):
            found = [stage.records.find(case, name) for name in (contender, control)]
            stage.records.compare(case, found[0], found[1], GOALS[contender] if case == is_goal[0] else None)
    return stage.records.results()


def reader(stage: Stage, do: str) -> Callable[[int], Reader]:
    arguments = ("--do", do, "--reads", stage.size(RANDOM_READS, 100))
    return lambda seed: Reader("read_large.py", arguments, ("--seed", seed), is_ordered=do == "random", can_repeat=True)


def large_file(stage: Stage, size: int) -> Path:
    """A new dataset of one file of random bytes."""
    data = stage.new_folder()
    (data / "archive").mkdir()
    with open(data / "archive" / "large", "wb") as file:
        for _ in range(size // (8 * MIB)):
            file.write(os.urandom(8 * MIB))
    return data
