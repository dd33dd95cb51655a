"""What each measure that saves requests is worth: files of 110 KB and of 4 KB by 4 processes, resident, not promoted.

Beside cachefs as it is stand variants of it with one measure less or one more (`benchmarks/variants.py`). A variant is
mounted afresh over a scratch that has everything, and read three times: the first time, again, and with the page cache
dropped.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.contenders import Contender, Place, Running, mounted
from benchmarks.results import Circumstances, Result
from benchmarks.stage import Reader, Stage, rotated
from benchmarks.variants import VARIANTS

FILES = {110_000: 2000, 4096: 5000}
PROCESSES = 4
NEW_CASE, AGAIN_CASE, DROPPED_CASE = "first time in a mount", "again", "again, page cache dropped"
OURS = "cachefs"
OPTIONS = ("--no-promote", "--prefetch=off")
MEASURES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("", ()),
    **{name: (name, ()) for name in VARIANTS},
    "no time-outs": ("", ("--metadata-ttl=0",)),
}
"""(variant, options) of each."""


def run(stage: Stage) -> list[Result]:
    if not stage.contenders(OURS):
        return []
    for size, count in list(FILES.items())[: stage.size(len(FILES), 1)]:
        data = stage.photographs(stage.size(count, 60), size)
        scratch = stage.new_folder() / "scratch"
        known: Circumstances = {"processes": PROCESSES, "file_bytes": size}
        with mounted(data, stage.new_folder(), scratch, *OPTIONS, purge=False) as running:
            stage.measure(Reader("read_files.py", ("--do", "check"), ("--processes", PROCESSES)), running, data)
        for repetition in range(stage.repetitions):
            for name in rotated(list(MEASURES), repetition):
                _measure(stage, data, _contender(name, scratch), repetition, known)
    for result in stage.records.results():
        if result.quantity == "time" and result.contender != OURS:
            ours = stage.records.find(result.case, OURS, **result.circumstances)
            stage.records.compare(result.case, result, ours)
    return stage.records.results()


def _contender(name: str, scratch: Path) -> Contender:
    variant, options = MEASURES[name]

    def mount(place: Place, _: Path) -> AbstractContextManager[Running]:
        mountpoint = place.folder / "mount"
        return mounted(place.source, mountpoint, scratch, *OPTIONS, *options, purge=False, variant=variant)

    return Contender(name, name, mount, kind="cachefs")


def _measure(stage: Stage, data: Path, contender: Contender, seed: int, known: Circumstances) -> None:
    reader = Reader("read_files.py", (), ("--processes", PROCESSES, "--seed", seed))
    with stage.start(contender, data, data) as running:
        for case in (NEW_CASE, AGAIN_CASE, DROPPED_CASE):
            if case != DROPPED_CASE or stage.drop_caches():
                (measured,) = stage.measure(reader, running, data)
                stage.note(case, contender, measured, known)
