"""From the facts of an examination to what matters: could `cachefs run` cache, with which line, and how fast then."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace

from cachefs.config import Capacity
from cachefs.mount.facts import LOCAL, Examination, Extent, Scratch, Source
from cachefs.mount.findings import Finding, judge
from cachefs.mount.forecast import Forecast, make_forecast
from cachefs.mount.measurement import SILENCE_SECONDS


@dataclass(frozen=True)
class Diagnosis:
    """`obstacle` is why `run` could not cache; `command` the line to type, None if there is none.

    `extent` and `forecast` are None without a source, or where it could not be measured.
    """

    findings: tuple[Finding, ...]
    obstacle: str | None
    command: str | None
    extent: Extent | None
    forecast: Forecast | None


def diagnose(facts: Examination, capacity: Capacity, given: Collection[str]) -> Diagnosis:
    """`given` are "scratch" and "capacity" if the user has just typed them: then the line to type has them too."""
    source, scratch = facts.source, facts.scratch
    better = find_better_scratch(facts, capacity)
    obstacle = find_obstacle(facts, capacity)
    is_cured = better is not None and find_obstacle(replace(facts, scratch=better), capacity) is None
    command = None
    if source is not None and (obstacle is None or is_cured):
        place = better or (scratch if "scratch" in given else None)
        command = _command(source, place, capacity if "capacity" in given else None)
    extent = source.extent if source is not None else None
    forecast = _forecast(source, extent, scratch, capacity) if source is not None and extent is not None else None
    return Diagnosis(judge(facts, capacity, better, forecast), obstacle, command, extent, forecast)


def find_obstacle(facts: Examination, capacity: Capacity) -> str | None:
    """Why `run` could not cache, in words; None if it could."""
    machine, source, scratch = facts.machine, facts.source, facts.scratch
    if machine.fuse is not None:
        return str(machine.fuse)
    if machine.namespaces is not None:
        problem = (None if machine.is_root else machine.helper) or (source.mounting if source else None)
        if problem is not None or machine.is_root:
            return f"{machine.namespaces.args[0]}; and {problem}" if problem else str(machine.namespaces)
    if source is not None and source.silence is not None:
        return f"source {source.path} does not answer within {SILENCE_SECONDS:g} s"
    if scratch.problem is not None:
        return str(scratch.problem)
    if not scratch.room(capacity):
        return f"there is no room in scratch {scratch.path}: choose another with --scratch"
    if source is not None and (source.path == scratch.path or source.path in scratch.path.parents):
        return f"scratch {scratch.path} is inside the source {source.path}: choose another with --scratch"
    if source is not None and scratch.path in source.path.parents:
        return f"source {source.path} is inside scratch {scratch.path}: choose another with --scratch"
    return None


def find_better_scratch(facts: Examination, capacity: Capacity) -> Scratch | None:
    """A local disk with more room, where scratch is bad or too small for the dataset; None if there is none."""
    scratch, extent = facts.scratch, facts.source.extent if facts.source else None
    disks = [place for place in facts.other_places if place.kind == LOCAL and place.room(capacity)]
    best = max(disks, key=lambda place: place.room(capacity), default=None)
    if best is None:
        return None
    room = scratch.room(capacity)
    if scratch.problem is not None or scratch.kind != LOCAL or not room:
        return best
    is_small = extent is not None and room < extent.dataset.bytes and room < best.room(capacity)
    return best if is_small else None


def _command(source: Source, scratch: Scratch | None, capacity: Capacity | None) -> str:
    words = ["cachefs", "run", "--data", str(source.path)]
    words += ["--scratch", str(scratch.path)] if scratch is not None else []
    words += ["--capacity", write_capacity(capacity)] if capacity is not None else []
    return shlex.join([*words, "--", "COMMAND"])


def write_capacity(capacity: Capacity) -> str:
    """As --capacity understands it: "80%", "50M", or bytes."""
    size = capacity.size
    if size is None:
        return f"{(capacity.share or 0.0) * 100:g}%"
    for power, unit in (4, "T"), (3, "G"), (2, "M"), (1, "K"):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)


def _forecast(source: Source, extent: Extent, scratch: Scratch, capacity: Capacity) -> Forecast | None:
    pace, speed, room = source.pace, scratch.speed, scratch.room(capacity)
    if pace is None or not extent.dataset.files or scratch.problem is not None or not room:
        return None
    write, read = (speed.write, speed.read) if speed else (None, None)
    return make_forecast(extent.dataset, room, pace, scratch_write=write, scratch_read=read)
