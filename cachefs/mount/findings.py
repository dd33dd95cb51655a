"""The rows of `cachefs doctor`: a verdict on each fact of an examination, and what to do about it, in words."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from cachefs.config import RESERVED_SHARE, SPARED_MEMORY_SHARE, WORTH_IT, Capacity, format_size
from cachefs.errors import CachefsError
from cachefs.mount.facts import LOCAL, MEMORY, NETWORK, Examination, Extent, Machine, Scratch, Source
from cachefs.mount.forecast import READERS, Forecast
from cachefs.mount.limits import Limits
from cachefs.mount.measurement import SILENCE_SECONDS
from cachefs.mount.mountinfo import FSTYPE, Mount

_FEWEST_OPEN_FILES = 4096
"""The daemon holds a file open for each different file that readers have open."""
_LEAST_MEMORY = 512 * 1024 * 1024
"""A daemon with 1,000,000 files in its index takes 260 MiB (README, Figures), and has worker processes beside it."""


class Verdict(Enum):
    OK = "ok"
    WARNING = "warning"
    NO = "no"


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, whether that is good, and what to do about it if not."""

    subject: str
    found: str
    verdict: Verdict = Verdict.OK
    advice: str = ""


def judge(
    facts: Examination, capacity: Capacity, better: Scratch | None, forecast: Forecast | None
) -> tuple[Finding, ...]:
    """`better` is a scratch to be recommended instead of the one that was examined."""
    source, scratch = facts.source, facts.scratch
    findings = [*_judge_machine(facts.machine), *_judge_limits(facts.machine.limits)]
    if source is not None:
        findings += [_judge_mounting(facts.machine, source), *_judge_source(source)]
    findings += _judge_scratch(scratch, capacity, better)
    if source is not None and source.extent is not None and scratch.problem is None:
        room = scratch.room(capacity)
        findings.append(_judge_fit(source.extent, room, capacity, better))
        findings.append(_judge_memory(source.extent, room, facts.machine.limits))
    if forecast is not None and forecast.speed_up < WORTH_IT:
        found = f"later epochs would take {1 / forecast.speed_up:.2g} times as long as read directly"
        findings.append(Finding("use of a cache", found, Verdict.WARNING, "there is little to gain from one here"))
    return tuple(findings)


def _judge_machine(machine: Machine) -> Iterator[Finding]:
    yield _judge_problem("/dev/fuse", machine.fuse, "opens", Verdict.NO)
    if machine.is_root:
        found = "there" if machine.helper is None else str(machine.helper.args[0])
        yield Finding("fusermount3", f"{found}; root does not need it")
        yield _judge_problem("mount namespaces", machine.namespaces, "work: only its job sees what run mounts")
    else:
        yield _judge_problem("fusermount3", machine.helper, "can mount over directories that this user may write to")
        yield _judge_problem("user namespaces", machine.namespaces, "work: run can mount over any directory")


def _judge_limits(limits: Limits) -> Iterator[Finding]:
    soft, hard = ("none" if limit is None else f"{limit:,}" for limit in limits.open_files)
    found = f"soft limit {soft}, hard limit {hard}; the daemon raises its own to the hard one"
    if limits.open_files[1] is not None and limits.open_files[1] < _FEWEST_OPEN_FILES:
        advice = "ask the administrator to raise the hard limit: nofile in /etc/security/limits.conf"
        yield Finding("open files", found, Verdict.WARNING, advice)
    else:
        yield Finding("open files", found)
    of_all = "" if limits.processors == limits.processors_of_machine else f" of {limits.processors_of_machine}"
    yield Finding("processors", f"{limits.processors}{of_all} for this process")
    found = f"{format_size(limits.memory_available)} available of {format_size(limits.memory_total)}"
    if limits.memory_available < _LEAST_MEMORY:
        yield Finding("memory", found, Verdict.WARNING, "end other programs: the daemon may take some 260 MiB")
    else:
        yield Finding("memory", found)
    limit = limits.memory_limit
    if limit is None:
        yield Finding("memory limit", "none in this process's control groups")
    elif limit.size < _LEAST_MEMORY:
        advice = "ask for more memory for the job: the daemon may take some 260 MiB of it"
        yield Finding("memory limit", f"{format_size(limit.size)} ({limit.file})", Verdict.WARNING, advice)
    else:
        yield Finding("memory limit", f"{format_size(limit.size)} ({limit.file})")


def _judge_mounting(machine: Machine, source: Source) -> Finding:
    subject = "mount over source"
    if source.mount is not None and source.mount.fstype == FSTYPE and source.mount.path == source.path:
        advice = f"unmount it first, with: cachefs umount {shlex.quote(str(source.path))}"
        return Finding(subject, f"{source.path} is a mount of cachefs already", Verdict.WARNING, advice)
    if machine.namespaces is None:
        return Finding(subject, "run mounts in a namespace of its own: only its job sees it")
    problem = machine.helper or source.mounting or (machine.namespaces if machine.is_root else None)
    if problem is None:
        return Finding(subject, "run mounts with fusermount3, as cachefs mount does")
    advice = problem.hint or ""
    if machine.helper is None:
        advice = f"mount at a directory DIR of your own: --data {shlex.quote(str(source.path))}:DIR"
    return Finding(subject, str(problem.args[0]), Verdict.NO, advice)


def _judge_source(source: Source) -> Iterator[Finding]:
    found = f"{source.path} is on {_describe(source.mount, source.kind)}"
    if source.silence is not None:
        found = f"{found}; does not answer within {SILENCE_SECONDS:g} s ({source.silence})"
        yield Finding("source", found, Verdict.NO, "wait until it does, or tell its administrator")
    elif source.kind == MEMORY:
        yield Finding("source", found, Verdict.WARNING, "read it directly: nothing is faster than memory")
    else:
        yield Finding("source", found)
    if source.survey is not None:
        yield _judge_dataset(source)
    if source.one is not None:
        yield _judge_reading(source)


def _judge_dataset(source: Source) -> Finding:
    survey, extent = source.survey, source.extent
    assert survey is not None
    assert extent is not None
    if survey.unreadable_directories:
        found = f"{survey.unreadable_directories} of its directories cannot be listed, {describe_extent(extent)} can"
        return Finding("dataset", found, Verdict.WARNING, "check their permissions")
    if not survey.files:
        return Finding("dataset", "no files", Verdict.WARNING, "check that this is the right directory")
    of = f", the mean of {survey.sized:,}" if extent.of_bytes else ""
    return Finding("dataset", f"{describe_extent(extent)}; {format_size(survey.mean_size)} a file{of}")


def _judge_reading(source: Source) -> Finding:
    one, pace = source.one, source.pace
    assert one is not None
    reason = next((reading.reason for reading in (one, *source.several) if reading.failed), "")
    if not one.latencies:
        return Finding(
            "source speed", f"its files cannot be read: {reason}", Verdict.WARNING, "check their permissions"
        )
    latency = statistics.median(one.latencies)
    found = f"{format_seconds(latency)} to the first bytes of a file (median of {one.files:,} opened); "
    found += f"{format_size(one.size / one.seconds)}/s with 1 reader"
    found += f", {format_size(pace.bytes_per_second)}/s with {READERS}" if pace else ""
    if reason:
        return Finding("source speed", f"{found}; some fail: {reason}", Verdict.WARNING, "check their permissions")
    return Finding("source speed", found)


def _judge_scratch(scratch: Scratch, capacity: Capacity, better: Scratch | None) -> Iterator[Finding]:
    instead = ""
    if better is not None:
        instead = f"use {_option(better)}, a local disk with {format_size(better.available)} free"
    if scratch.problem is not None:
        yield Finding("scratch", str(scratch.problem.args[0]), Verdict.NO, instead or scratch.problem.hint or "")
        return
    found = f"{scratch.path} is on {_describe(scratch.mount, scratch.kind)}"
    instead = instead or "choose a local disk with --scratch"
    if scratch.kind == NETWORK:
        yield Finding("scratch", f"{found}: hits cost its latency", Verdict.WARNING, instead)
    elif scratch.kind == MEMORY:
        found += ": what it holds is taken from the memory of the job and counts against its limit"
        yield Finding("scratch", found, Verdict.WARNING, f"{instead}, or set --capacity")
    else:
        yield Finding("scratch", found)
    room = scratch.room(capacity)
    found = f"{format_size(scratch.available)} free of {format_size(scratch.total)}, room for {format_size(room)}"
    if scratch.stored:
        found += f" with the {format_size(scratch.stored)} that it holds"
    if room:
        yield Finding("free space", found)
    else:
        yield Finding("free space", f"{found} ({RESERVED_SHARE:.0%} stay free)", Verdict.NO, f"free some, or {instead}")
    if scratch.speed is not None:
        speed = scratch.speed
        found = f"{format_seconds(speed.latency)} for a page at random; "
        found += f"{format_size(speed.read)}/s read, {format_size(speed.write)}/s written"
        yield Finding("scratch speed", found)


def _judge_fit(extent: Extent, room: int, capacity: Capacity, better: Scratch | None) -> Finding:
    size, found = extent.dataset.bytes, f"{_describe_size(extent)} into {format_size(room)}"
    if size <= room:
        return Finding("dataset fits", f"{'perhaps' if extent.is_least else 'yes'}: {found}")
    advice = "give more with --capacity, or choose another with --scratch"
    if better is not None and better.room(capacity) > room:
        advice = f"there is room for {format_size(better.room(capacity))} with {_option(better)}"
    found = f"{room / size:.0%} of it: {found}; the rest is read from the source"
    return Finding("dataset fits", found, Verdict.WARNING, advice)


def _judge_memory(extent: Extent, room: int, limits: Limits) -> Finding:
    """What --memory would bring."""
    size = extent.dataset.bytes
    if size <= room:
        found = (
            "--memory would bring nothing: the dataset fits scratch, and the page cache keeps what memory has room for"
        )
        return Finding("memory tier", found)
    most = limits.most_memory
    could = min(limits.memory_available, most) - round(SPARED_MEMORY_SHARE * most)
    if could <= 0:
        return Finding("memory tier", "there is no memory for one")
    found = f"--memory would add up to {format_size(could)}: {min(1.0, (room + could) / size):.0%} of the dataset kept"
    return Finding("memory tier", f"{found}, without it {room / size:.0%}")


def _judge_problem(
    subject: str, problem: CachefsError | None, found: str, verdict: Verdict = Verdict.WARNING
) -> Finding:
    if problem is None:
        return Finding(subject, found)
    return Finding(subject, str(problem.args[0]), verdict, problem.hint or "")


def _describe(mount: Mount | None, kind: str) -> str:
    if mount is None:
        return "an unknown file system"
    words = {
        NETWORK: "a network file system",
        MEMORY: "a file system in memory",
        LOCAL: "a FUSE file system" if mount.fstype.startswith("fuse") else "a local file system",
    }
    return f"{words[kind]} ({mount.fstype}, {mount.name})"


def _option(scratch: Scratch) -> str:
    return f"--scratch {shlex.quote(str(scratch.path))}"


def _describe_size(extent: Extent) -> str:
    return f"{extent.of_bytes} {format_size(extent.dataset.bytes)}".strip()


def describe_extent(extent: Extent) -> str:
    """ "about 1,281,000 files, about 140.0 GiB", or without "about" what was counted."""
    files = "1 file" if extent.dataset.files == 1 else f"{extent.dataset.files:,} files"
    size = format_size(extent.dataset.bytes) if extent.is_least else _describe_size(extent)
    return f"{extent.of_files} {files}, {size}".strip()


def format_seconds(seconds: float) -> str:
    """`seconds` for people: "0.35 ms", "41 ms", "2.5 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
