"""cachefs run"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cachefs.cli.options import ConfiguredCommand, mount_options, run_options, scratch_path, take_sharding
from cachefs.cli.printing import complain, count
from cachefs.config import Settings, format_size
from cachefs.errors import CachefsError, ShardError, UsageError, describe
from cachefs.mount.checks import check_capacity, check_paths, warnings
from cachefs.mount.job import Watched, find_command, run_command
from cachefs.mount.memory import WITHOUT, check_memory
from cachefs.mount.mountinfo import FSTYPE, Mount, containing_mount, find_mount, resolve_mountpoint
from cachefs.mount.namespaces import join_namespaces
from cachefs.mount.rendezvous import Attendance, attend, fork_keeper
from cachefs.mount.unmount import detach_dead_mounts, live_lease, uncover

MOUNTS_VARIABLE = "CACHEFS_MOUNTS"
_TOTALS = ("fetches", "source_bytes_read", "hits", "hit_bytes", "misses", "bypasses", "wait_seconds")


@click.command(cls=ConfiguredCommand, context_settings={"allow_interspersed_args": False})
@run_options
@mount_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARG...]")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    data: tuple[str, ...],
    keep: bool,
    strict: bool,
    report: Path | None,
    command: tuple[str, ...],
    scratch: Path | None,
    **options: Any,
) -> None:
    """Run COMMAND with its data cached, and leave nothing behind.

    Mounts over each --data path, runs the command, unmounts, and purges scratch; exits as the command does. Needs no
    root: nobody else sees the mounts. Whatever of this cannot be done, the command runs all the same, and reads the
    source. Commands with the same options that run on a node at the same time share one cache.
    """
    if not command:
        raise UsageError("there is no command to run", "write it after --, as in: cachefs run --data DIR -- COMMAND")
    if not data:
        raise UsageError("there is no --data", "name the directory that the command reads: --data DIR")
    options["sharding"] = take_sharding(ctx, options)
    find_command(command[0], os.environ)
    detach_dead_mounts([path for text in data for path in _paths_in(text)])
    settings = list(_settings_of(data, _scratch_path(scratch), options))
    place = None if report is None else report.absolute()
    with _Job(settings, keep=keep, is_strict=strict) as job:
        started = time.monotonic()
        status = run_command(command, job.environment(), job.watched)
        facts = {"command": command, "exit_status": status, "seconds": round(time.monotonic() - started, 3)}
        try:
            _be_interrupted_by_signals()
            job.finish(place, facts)
        except KeyboardInterrupt:
            _tell_user("warning: interrupted: the keeper cleans up without us")
    raise SystemExit(status)


def _be_interrupted_by_signals() -> None:
    """Have what would end us raise KeyboardInterrupt: the command has ended, and its exit status is ours to give."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


class _Job:
    """The mounts of a command, from the start of its context to the end; without any, where they cannot be had."""

    def __init__(self, settings: Sequence[Settings], *, keep: bool, is_strict: bool) -> None:
        self._settings = settings
        self._keep = keep
        self._is_strict = is_strict
        self._is_view = any(one.sharding is not None and one.sharding.mode == "view" for one in settings)
        self._attendance: Attendance | None = None

    def __enter__(self) -> _Job:
        if self._settings:
            try:
                self._attend()
            except ShardError:  # other data than were meant are worse than none
                raise
            except (CachefsError, OSError) as error:
                self._go_without(str(error) if isinstance(error, CachefsError) else describe(error))
            except Exception as error:  # a bug of ours must not keep the command from running
                self._go_without(f"a bug of cachefs: {error!r}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._attendance is not None:
            self._attendance.close()

    @property
    def watched(self) -> Watched | None:
        return None if self._attendance is None else Watched(self._attendance.fileno(), self._hear)

    def environment(self) -> dict[str, str]:
        """The command's: our own, and where its mounts are."""
        mounts = _outer_mounts()
        for mount in self._attendance.mounts if self._attendance is not None else ():
            if mount.problem is None:
                mounts.append({"source": mount.source, "mountpoint": mount.mountpoint, "scratch": mount.scratch})
        return {**_own_environment(), MOUNTS_VARIABLE: json.dumps(mounts)}

    def finish(self, report: Path | None, facts: dict[str, Any]) -> None:
        """Leave the mounts to the others, or take them away; say how it was."""
        answer: dict[str, Any] = {"mounts": [], "is_last": True, "problems": []}
        failure: str | None = None
        attendance = self._attendance
        if attendance is not None and report is not None:
            so_far = attendance.ask("report", self._tell)  # written before we leave: the last to leave writes last
            if so_far is not None:
                failure = _write_report(report, facts, {**so_far, "is_last": False})
        if attendance is not None:
            left = attendance.ask("leave", self._tell)
            if left is None:
                self._keeper_died()
            answer = left or answer
        for problem in answer["problems"]:
            _tell_user(f"warning: {problem}")
        if report is not None and answer["is_last"]:
            failure = _write_report(report, facts, answer)
        if failure is not None:
            _tell_user(f"warning: {failure}")
        if answer["is_last"] and any("hits" in mount for mount in answer["mounts"]):
            _sum_up(_totals_of(answer["mounts"]))

    def _attend(self) -> None:
        is_first = False

        def start_keeper(listener: socket.socket) -> None:
            nonlocal is_first
            is_first = True
            fork_keeper(listener, self._settings, keep=self._keep)

        attendance = attend(self._settings, self._keep, start_keeper)
        problems = [(mount.source, mount.problem) for mount in attendance.mounts if mount.problem is not None]
        try:
            for mount in attendance.mounts:
                if mount.is_shard_missing:
                    raise ShardError(f"{mount.source} cannot be divided as --shard says: {mount.problem}")
            if problems:
                self._refuse_if_strict(*problems[0])
            is_of_use = len(problems) < len(self._settings) or any(s.source != s.mountpoint for s in self._settings)
            if attendance.is_private and is_of_use:
                join_namespaces(attendance.namespaces)
        except BaseException:
            attendance.close()
            raise
        finally:
            for descriptor in attendance.namespaces:
                os.close(descriptor)
        self._attendance = attendance
        for source, problem in problems:
            _warn_uncached(source, problem)
        if is_first:
            served = [
                one for one, mount in zip(self._settings, attendance.mounts, strict=True) if mount.problem is None
            ]
            said = [text for mount in attendance.mounts for text in mount.warnings]
            for warning in [*{text for one in served for text in warnings(one)}, *said]:
                _tell_user(f"warning: {warning}")

    def _go_without(self, reason: str) -> None:
        for one in self._settings:
            self._refuse_if_strict(str(one.source), reason)
            _warn_uncached(str(one.source), reason)

    def _refuse_if_strict(self, source: str, reason: str) -> None:
        """Raise CachefsError where the command is not to run on the source itself: it has what is not to be seen."""
        if self._is_view:
            raise ShardError(f"{source} cannot be shown as --shard-mode view says: {reason}")
        if self._is_strict:
            raise CachefsError(f"{source} cannot be cached, and --strict was given: {reason}")

    def _hear(self) -> bool:
        """Take in what the keeper says while the command runs. False when it will say nothing any more."""
        assert self._attendance is not None  # it is its descriptor that is watched
        event = self._attendance.receive()
        if event is None:
            self._keeper_died()
            return False
        self._tell(event)
        return True

    def _tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "gone":
            _tell_user(
                f"warning: {event['mountpoint']} is cached no more, because {event['reason']}: "
                "from now on it is read from the source"
            )
        elif event["event"] == "failed":
            _tell_user(f"warning: {event['reason']}")

    def _keeper_died(self) -> None:
        """Nobody looks after the mounts any more, and their daemons end: uncover the sources."""
        attendance, self._attendance = self._attendance, None
        if attendance is None:
            return
        for mount in attendance.mounts:
            if mount.problem is None:
                uncover(Path(mount.mountpoint), Path(mount.scratch), is_private=attendance.is_private)
        attendance.close()
        _tell_user("warning: the keeper of the mounts died: from now on the data are read from the source")


def _settings_of(data: Sequence[str], scratch: Path, options: dict[str, Any]) -> Iterator[Settings]:
    """What to mount for each --data that is not in a mount of ours already. Raises CachefsError for bad input."""
    made: list[Settings] = []
    for text in data:
        source, mountpoint = _split(text)
        target = resolve_mountpoint(mountpoint or source)
        if find_mount(target) is None:  # nothing there that could hang: follow a link to the directory itself
            target = Path(os.path.realpath(target))
        settings = Settings(
            source=target if mountpoint is None else Path(os.path.realpath(source)),
            mountpoint=target,
            scratch=scratch,
            is_memory_optional=True,
            **options,
        )
        for other in made:
            _check_apart(other, settings)
        made.append(settings)
        around = containing_mount(target)
        if around is not None and around.fstype == FSTYPE and _shows(around, settings):
            continue  # by a `cachefs run` around this one, or by `cachefs mount`
        check_paths(settings, is_private=True)  # the keeper asks again where it is not
        try:
            check_capacity(settings)
        except CachefsError as error:  # 5% of the disk stay free all the same
            _tell_user(f"warning: {error}")
        try:
            check_memory(settings)
        except CachefsError as error:
            _tell_user(f"warning: {error}; {WITHOUT}")
            settings = replace(settings, memory=None)
        yield settings


def _scratch_path(scratch: Path | None) -> Path:
    try:
        return scratch_path(scratch)
    except FileNotFoundError:  # no temporary directory can be written to: the daemon will say so of this one
        return Path(os.environ.get("TMPDIR") or "/tmp", f"cachefs-{os.getuid()}")


def _shows(mount: Mount, settings: Settings) -> bool:
    """Whether a mount of ours, at the mountpoint or around it, is one of the source that is meant.

    Raises UsageError where it is, and of another shard: what it shows cannot be divided once more.
    """
    lease = live_lease(mount) if mount.path == settings.mountpoint else None
    is_it = settings.source == settings.mountpoint or (lease is not None and lease.source == str(settings.source))
    if is_it and settings.sharding is not None and (lease is None or lease.shard != str(settings.sharding)):
        raise UsageError(
            f"{settings.mountpoint} is in a mount of cachefs already, which has not shard {settings.sharding}",
            "unmount it, or leave --shard to the cachefs that mounts it",
        )
    return is_it


def _split(text: str) -> tuple[Path, Path | None]:
    """SOURCE and MOUNTPOINT of a --data, either of which may have colons in it: SOURCE is what exists."""
    if os.path.isdir(text):
        return Path(text), None
    at = text.rfind(":")
    while at > 0:
        if os.path.isdir(text[:at]):
            if at + 1 == len(text):
                raise UsageError(f"--data {text} has no mountpoint after its colon", "write --data SOURCE:MOUNTPOINT")
            return Path(text[:at]), Path(text[at + 1 :])
        at = text.rfind(":", 0, at)
    return Path(text), None


def _paths_in(text: str) -> Iterator[Path]:
    """All paths that a --data may mean; nothing is looked at, for a dead mount may be there."""
    yield Path(text)
    for at, character in enumerate(text):
        if character == ":":
            yield Path(text[:at])
            yield Path(text[at + 1 :])


def _check_apart(one: Settings, other: Settings) -> None:
    """Raise UsageError for mounts of which one would cover the other."""
    if one.mountpoint == other.mountpoint:
        raise UsageError(f"--data {one.mountpoint} is given twice", "name each directory once")
    for outer, inner in (one, other), (other, one):
        for path in inner.mountpoint, inner.source:
            if outer.mountpoint == path or outer.mountpoint in path.parents:
                raise UsageError(f"--data {path} is inside --data {outer.mountpoint}", "name the outer directory alone")


def _warn_uncached(source: str, reason: str) -> None:
    _tell_user(f"warning: {source} is not cached, the command reads the source: {reason}")


def _tell_user(line: str) -> None:
    """Say it, if anybody listens: what cannot be said keeps no command from running, and changes no exit status."""
    try:
        complain(line)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter tries again at its end, and fails


def _own_environment() -> dict[str, str]:
    """Our environment as we got it: where there is no locale the interpreter sets LC_CTYPE, for itself (PEP 538)."""
    environment = dict(os.environ)
    with suppress(OSError):
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
        if not any(item.startswith(b"LC_CTYPE=") for item in given):
            environment.pop("LC_CTYPE", None)
    return environment


def _outer_mounts() -> list[Any]:
    """The mounts that a `cachefs run` around this one has told of."""
    try:
        mounts = json.loads(os.environ.get(MOUNTS_VARIABLE, "[]"))
    except ValueError:
        return []
    return mounts if isinstance(mounts, list) else []


def _totals_of(mounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: round(sum(mount.get(key, 0) for mount in mounts), 3) for key in _TOTALS}


def _write_report(path: Path, facts: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """Write it, whole or not at all; what went wrong."""
    mounts = answer["mounts"]
    content = {**facts, "is_last": answer["is_last"], "totals": _totals_of(mounts), "mounts": mounts}
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        return f"the report {path} cannot be written: {describe(error)}"
    return None


def _sum_up(totals: dict[str, Any]) -> None:
    fetched, saved = format_size(totals["source_bytes_read"]), format_size(totals["hit_bytes"])
    _tell_user(
        f"{count(totals['fetches'], 'file')} and {fetched} from the source, {count(totals['hits'], 'hit')}, "
        f"{totals['wait_seconds']:,.1f} s waited, {saved} saved"
    )
