"""Walk and stat of 100,000 files in 100 directories: for the first time, again, and with the kernel's caches dropped.

Who asks the source for one file after the other takes minutes, twice the time for twice the files: those contenders
walk the first directories alone, as many as take some ten seconds, and their times are a file's all the same.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.contenders import Running
from benchmarks.results import Goal, Result
from benchmarks.stage import Conditions, Measured, Reader, Stage, rotated

FILES, IN_A_DIRECTORY = 100_000, 1000
SLOW_FILES = 10_000
"""Where an operation takes 20 ms nobody walks more than these."""
SERIAL = ("source", "rclone", "rclone-debian")
SERIAL_SECONDS, REQUESTS = 10.0, 3
"""How long that may take, and what a file costs of the source's operations."""
FROM_SOURCE = ("source", "cachefs", "rclone", "rclone-debian")
FROM_SCRATCH = ("scratch", "bindfs", "pyfuse3-example")
CONDITIONS = (Conditions(2.0, 1000.0),)
FIRST, SECOND, DROPPED = "first walk", "second walk", "third walk, kernel's caches dropped"
GOALS = {FIRST: Goal("at most", 0.3), SECOND: Goal("at most", 0.02)}


def run(stage: Stage) -> list[Result]:
    files = stage.size(FILES, 400)
    per_directory = stage.size(IN_A_DIRECTORY, 100)
    data = make_tree(stage.new_folder(), files, per_directory)
    usual = stage.conditions(*CONDITIONS)
    for conditions in usual:
        most = files if conditions.latency_ms < 10 else min(files, SLOW_FILES)
        tree = data if most == files else make_tree(stage.new_folder(), most, per_directory)
        fitting = SERIAL_SECONDS * 1e3 / (REQUESTS * (conditions.latency_ms + 0.3))
        share = max(1, int(min(most, fitting) / per_directory))
        _walk_source(stage, tree, conditions, share)
    local = stage.contenders(*FROM_SCRATCH)
    for repetition in range(stage.repetitions):
        for contender in rotated(local, repetition):
            with stage.start(contender, data, data) as running:
                stage.drop_caches()
                for case in (FIRST, SECOND):
                    (measured,) = stage.measure(Reader("walk.py"), running, data)
                    stage.note(case, contender, measured, {})
    for conditions in usual:
        known = conditions.circumstances()
        direct = stage.records.find(FIRST, "source", **known)
        for name in FROM_SOURCE[1:]:
            for case in (FIRST, SECOND, DROPPED):
                goal = GOALS.get(case) if name == "cachefs" and conditions.latency_ms == 2.0 else None
                stage.records.compare(f"{case} / first", stage.records.find(case, name, **known), direct, goal)
    return stage.records.results()


def _walk_source(stage: Stage, data: Path, conditions: Conditions, share: int) -> None:
    known = conditions.circumstances()
    taking_part = stage.contenders(*FROM_SOURCE)
    with stage.slow(data, conditions) as source:
        for repetition in range(stage.repetitions):
            for contender in rotated(taking_part, repetition):
                part = ("--directories", share) if contender.name in SERIAL else ()
                with stage.start(contender, source.path, data) as running:
                    stage.drop_caches()
                    for case in (FIRST,) if contender.name == "source" else (FIRST, SECOND, DROPPED):
                        if case != DROPPED or stage.drop_caches():
                            stage.note(case, contender, _walk(stage, running, data, part), known)
                    stage.note_memory("memory after the walk", contender, running, known)


def _walk(stage: Stage, running: Running, data: Path, part: tuple[object, ...]) -> Measured:
    (measured,) = stage.measure(Reader("walk.py", part), running, data)
    return measured


def make_tree(folder: Path, files: int, in_a_directory: int) -> Path:
    """`files` files of one byte below `folder`, named like those of ImageNet."""
    for number in range(0, files, in_a_directory):
        directory = folder / f"n{number // in_a_directory:08}"
        directory.mkdir()
        for index in range(number, min(number + in_a_directory, files)):
            (directory / f"n{number // in_a_directory:08}_{index:08}.JPEG").write_bytes(b"\0")
    return folder
