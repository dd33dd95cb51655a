"""How files are read in most workloads: for the first time from a source, and later, when a contender has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.contenders import FIRST, LATER, Running
from benchmarks.results import Circumstances, Goal, Result
from benchmarks.stage import Conditions, Reader, Stage, rotated

GoalOf = Callable[[Result], Goal | None]

FIRST_CASE = "first epoch"
WARM_CASE = "later epoch"
DROPPED_CASE = "later epoch, page cache dropped"


def read_first(
    stage: Stage,
    data: Path,
    reader: Callable[[int], Reader],
    conditions: Conditions,
    *,
    case: str = FIRST_CASE,
    contenders: Sequence[str] = FIRST,
    circumstances: Circumstances | None = None,
) -> None:
    """Each contender starts with nothing and reads `data` from a slow source. `reader` is given the repetition."""
    known = {**(circumstances or {}), **conditions.circumstances()}
    taking_part = stage.contenders(*contenders)
    with stage.slow(data, conditions) as source:
        for repetition in range(stage.repetitions):
            for contender in rotated(taking_part, repetition):
                stage.drop_caches()
                source.reset()
                with stage.start(contender, source.path, data) as running:
                    (measured,) = stage.measure(reader(repetition), running, data)
                    asked = source.statistics()
                stage.note(case, contender, measured, known)
                scale, unit = measured.scale
                stage.records.add(case, contender.name, "source CPU", unit, asked.cpu_seconds * scale, known)
                if measured.listing_seconds is not None:
                    listing = measured.listing_seconds
                    stage.records.add(case, contender.name, "listing before it", "s", listing, known)
                per_file = asked.requests / measured.files
                stage.records.add(case, contender.name, "source requests", "1/file", per_file, known)
                share = asked.bytes_read / measured.bytes if measured.bytes else 0.0
                stage.records.add(case, contender.name, "source bytes / bytes read", "x", share, known)


def read_later(
    stage: Stage,
    data: Path,
    fill: Reader,
    readings: Sequence[tuple[Callable[[int], Reader], Circumstances]],
    *,
    contenders: Sequence[str] = LATER,
    case: str = WARM_CASE,
    dropped_case: str | None = DROPPED_CASE,
    dropped: Sequence[int] = (0,),
) -> None:
    """All contenders have all of `data`, and are mounted side by side, so that each reading goes round them in turn.

    `fill` reads everything, untimed and without latency. Then come all readings with the page cache as the one
    before has left it, and those of the indices `dropped` again with a cold one. What that has cooled is read once,
    untimed, before the next repetition."""
    taking_part = stage.contenders(*contenders)
    with ExitStack() as stack:
        source = stack.enter_context(stage.slow(data, None))
        serving: dict[str, Running] = {}
        for contender in taking_part:
            running = stack.enter_context(stage.start(contender, source.path, data, serving))
            serving[contender.name] = running
            stage.measure(fill, running, data)
            running.settle()
        for repetition in range(stage.repetitions):
            for contender in taking_part if repetition and dropped_case else []:
                stage.measure(readings[0][0](repetition), serving[contender.name], data)
            for reader, circumstances in readings:
                for contender in rotated(taking_part, repetition):
                    repeated = reader(repetition).at_least(stage.size(1, 0))
                    for measured in stage.measure(repeated, serving[contender.name], data):
                        stage.note(case, contender, measured, circumstances)
            for reader, circumstances in [readings[index] for index in dropped] if dropped_case else []:
                for contender in rotated(taking_part, repetition):
                    if stage.drop_caches():
                        (measured,) = stage.measure(reader(repetition), serving[contender.name], data)
                        stage.note(dropped_case or "", contender, measured, circumstances)
            for contender in taking_part:
                stage.note_memory(case, contender, serving[contender.name], readings[0][1])


def compare_first(stage: Stage, case: str = FIRST_CASE, goal_of: GoalOf = lambda result: None) -> None:
    """The ratio to the source directly of all that was measured in a case of first reads."""
    _compare(stage, (case,), "source", goal_of)


def compare_later(
    stage: Stage, cases: Sequence[str] = (WARM_CASE, DROPPED_CASE), goal_of: GoalOf = lambda result: None
) -> None:
    """The ratio to scratch directly of all that was measured in cases of later reads."""
    _compare(stage, cases, "scratch", goal_of)


def _compare(stage: Stage, cases: Sequence[str], to: str, goal_of: GoalOf) -> None:
    for result in stage.records.results():
        if result.case in cases and result.quantity == "time" and result.contender != to:
            base = stage.records.find(result.case, to, **result.circumstances)
            stage.records.compare(result.case, result, base, goal_of(result))
