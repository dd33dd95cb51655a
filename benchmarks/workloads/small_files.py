"""5,000 JPEG files of 110 KB, read in a shuffled order by 1, 4 and 8 processes.

The first epoch reads fewer of them where the source is slower, so that reading them directly takes some seconds. rclone
takes several times as long: Debian's takes part where an operation takes 2 ms, and neither by 1 and 8 processes.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.contenders import FIRST
from benchmarks.phases import DROPPED_CASE, FIRST_CASE, WARM_CASE, compare_first, compare_later, read_first, read_later
from benchmarks.results import Goal, Result
from benchmarks.stage import Conditions, Reader, Stage

FILES = 5000
FIRST_FILES = {0.2: 2000, 2.0: 1000, 20.0: 200}
PROCESSES = (4, 1, 8)
CONDITIONS = (Conditions(2.0, 1000.0), Conditions(0.2, 1000.0), Conditions(20.0, 1000.0), Conditions(2.0, 100.0))

FIRST_GOALS = {
    ("cachefs-prefetch-auto", 2.0): Goal("at most", 0.6),
    ("cachefs-prefetch-auto", 0.2): Goal("at most", 1.2),
    ("cachefs-prefetch-off", 2.0): Goal("at most", 1.05),
    ("cachefs-prefetch-off", 0.2): Goal("at most", 1.05),
}
PROMOTED = Goal("at most", 1.05)
NOT_PROMOTED = Goal("at most", 2.0)
AGAINST_RCLONE = Goal("at least", 5.0)


def run(stage: Stage) -> list[Result]:
    for conditions in stage.conditions(*CONDITIONS):
        files = stage.size(FIRST_FILES.get(conditions.latency_ms, 1000), 60)
        contenders = FIRST if conditions == CONDITIONS[0] else [name for name in FIRST if name != "rclone-debian"]
        data, known = stage.photographs(files), {"processes": 4}
        read_first(stage, data, reader(4), conditions, contenders=contenders, circumstances=known)
    for processes in () if stage.options.is_quick else (1, 8):
        data = stage.photographs(250 * processes)
        contenders = ("source", "cachefs-prefetch-off", "cachefs-prefetch-auto")
        known = {"processes": processes}
        read_first(stage, data, reader(processes), CONDITIONS[0], contenders=contenders, circumstances=known)
    data = stage.photographs(stage.size(FILES, 200))
    counts = PROCESSES[: stage.size(len(PROCESSES), 2)]
    readings = [(reader(processes), {"processes": processes}) for processes in counts]
    read_later(stage, data, Reader("read_files.py", ("--do", "check"), ("--processes", 4)), readings)

    compare_first(stage, goal_of=_first_goal)
    compare_later(stage, goal_of=_later_goal)
    find = stage.records.find
    for case in (WARM_CASE, DROPPED_CASE):
        for processes in counts:
            ours = find(case, "cachefs-no-promotion", processes=processes)
            is_goal = case == WARM_CASE and processes == 4
            bindfs = find(case, "bindfs", processes=processes)
            stage.records.compare(case, ours, bindfs, NOT_PROMOTED if is_goal else None)
            rclone = find(case, "rclone", processes=processes)
            stage.records.compare(case, rclone, ours, AGAINST_RCLONE if is_goal else None)
    direct = find(FIRST_CASE, "source", processes=4, latency_ms=2.0)
    for name in ("cachefs", "cachefs-no-promotion"):
        stage.records.compare("a first epoch against a later one", direct, find(WARM_CASE, name, processes=4))
    return stage.records.results()


def reader(processes: int) -> Callable[[int], Reader]:
    return lambda seed: Reader("read_files.py", (), ("--processes", processes, "--seed", seed), can_repeat=True)


def _first_goal(result: Result) -> Goal | None:
    known = result.circumstances
    is_usual = known["processes"] == 4 and known["bandwidth_mb_s"] == 1000
    return FIRST_GOALS.get((result.contender, known["latency_ms"])) if is_usual else None


def _later_goal(result: Result) -> Goal | None:
    is_usual = result.case == WARM_CASE and result.circumstances["processes"] == 4
    return PROMOTED if is_usual and result.contender == "cachefs" else None
