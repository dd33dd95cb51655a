"""Looks at this machine, a source and a scratch directory, and measures them: the facts for `cachefs doctor`.

Invariants:
- Nothing hangs: the source and scratch are looked at by worker processes alone, and one that says nothing for
  SILENCE_SECONDS is killed. After that the source is not asked again.
- Nothing is changed, and nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from cachefs.errors import CachefsError, SourceTimeoutError, describe
from cachefs.mount.checks import FUSE_DEVICE, check_fuse
from cachefs.mount.facts import LOCAL, Examination, Machine, Scratch, Source
from cachefs.mount.forecast import READERS
from cachefs.mount.limits import read_limits
from cachefs.mount.measurement import (
    SILENCE_SECONDS,
    Reading,
    ScratchLook,
    ScratchSpeed,
    SourceLook,
    Survey,
    handlers,
)
from cachefs.mount.mountinfo import FSTYPE, containing_mount
from cachefs.mount.namespaces import probe_private_namespaces
from cachefs.workers.fork_server import ForkServer
from cachefs.workers.pool import WorkerPool
from cachefs.workers.protocol import serve

_SURVEY_SECONDS, _READ_SECONDS, _SCRATCH_SECONDS = 2.0, 1.5, 1.0
_SMALLEST_SAMPLE = 2 * READERS
_PLACES = ("/scratch", "/local", "/localscratch", "/lscratch", "/local_scratch", "/ssd", "/nvme", "/var/tmp", "/tmp")
"""Where clusters have local disks, and every machine has some: looked at for a better scratch."""


def examine(source: Path | None, scratch: Path, on_step: Callable[[str], None]) -> Examination:
    """Look at everything, in some seconds; `on_step` is told what comes next. The process must have one thread.

    Raises CachefsError for a source that is no directory to read.
    """
    machine = Machine(
        is_root=os.geteuid() == 0,
        fuse=_fuse_problem(),
        helper=_helper_problem(),
        namespaces=probe_private_namespaces(),
        limits=read_limits(),
    )
    fork_server = ForkServer.start(lambda sock: serve(sock, handlers()), keep_fds=[])
    try:
        return trio.run(_examine, machine, fork_server, source and Path(os.path.abspath(source)), scratch, on_step)
    finally:
        fork_server.close()


async def _examine(
    machine: Machine, fork_server: ForkServer, source: Path | None, scratch: Path, on_step: Callable[[str], None]
) -> Examination:
    pool = WorkerPool(fork_server, "examination", READERS)
    try:
        seen = None
        if source is not None:
            on_step(f"looking at {source}")
            seen = await _look_at_source(pool, source, scratch)
        on_step(f"measuring {scratch}")
        place = await _look_at_scratch(pool, scratch)
        place = await _measure_scratch(pool, place)
        others = await _look_at_other_places(pool, place, seen)
        if seen is not None and seen.silence is None:
            seen = await _measure_source(pool, seen, on_step)
        return Examination(machine, place, seen, others)
    finally:
        await pool.aclose()


def _fuse_problem() -> CachefsError | None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        try:
            check_fuse(allow_other=False)
        except CachefsError as error:
            return error
    return None


def _helper_problem() -> CachefsError | None:
    """Why fusermount3 cannot mount for an ordinary user."""
    helper = shutil.which("fusermount3")
    if helper is None:
        return CachefsError("there is no fusermount3", "install the package fuse3")
    try:
        status = os.stat(helper)
    except OSError as error:
        return CachefsError(f"{helper} cannot be reached: {describe(error)}", "install the package fuse3")
    if not (status.st_mode & stat.S_ISUID and status.st_uid == 0):
        return CachefsError(f"{helper} is not setuid root", f"as root: chown root {helper}; chmod u+s {helper}")
    if _is_kept_from_privileges():
        return CachefsError(
            f"{helper} gets no privileges here (no_new_privs)", "start the container without no-new-privileges"
        )
    return None


def _is_kept_from_privileges() -> bool:
    with open("/proc/self/status") as file:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in file)


async def _look_at_source(pool: WorkerPool, path: Path, scratch: Path) -> Source:
    """Raises CachefsError, in the words of `cachefs mount`."""
    try:
        seen = SourceLook(*await _ask(pool, "look", os.fspath(path)))
    except SourceTimeoutError:
        return Source(path, containing_mount(path), silence="a first look")
    except FileNotFoundError:
        raise CachefsError(
            f"there is no source {path}", "check the spelling, and that its file system is mounted on this machine"
        ) from None
    except OSError as error:
        mount = containing_mount(path)
        is_ours = mount is not None and mount.fstype == FSTYPE
        hint = f"if its daemon has died, unmount it with: cachefs umount {path}" if is_ours else None
        raise CachefsError(f"source {path} cannot be reached: {describe(error)}", hint) from None
    path = Path(seen.path)
    if not seen.is_directory:
        raise CachefsError(f"source {path} is not a directory", "the source must be one")
    if not seen.is_readable:
        raise CachefsError(f"source {path} is not readable by this user", "check its permissions")
    try:
        said = await _ask(pool, "check mounting", os.fspath(path), os.fspath(scratch))
    except SourceTimeoutError:
        return Source(path, containing_mount(path), silence="a look at its permissions")
    return Source(path, containing_mount(path), mounting=said and CachefsError(*said))


async def _measure_source(pool: WorkerPool, source: Source, on_step: Callable[[str], None]) -> Source:
    """Count, then read with one process, then with several, as far as the source answers."""
    on_step(f"counting files in {source.path}")
    step = "being listed"
    try:
        survey = Survey(*await _ask(pool, "survey", os.fspath(source.path), _SURVEY_SECONDS))
        source = replace(source, survey=survey)
        if survey.sample:
            on_step(f"reading some files of {source.path}")
            step = "reading"
            alone, shares = share_out(survey.sample)
            source = replace(source, one=Reading(*await _ask(pool, "read", alone, _READ_SECONDS, 0)))
            source = replace(source, several=await _read_together(pool, shares))
    except SourceTimeoutError:
        return replace(source, silence=step)
    return source


def share_out(sample: list[bytes]) -> tuple[list[bytes], list[list[bytes]]]:
    """What one reader reads alone, and what each of READERS reads: different files, if there are enough."""
    if len(sample) < _SMALLEST_SAMPLE:
        return sample, [sample[number % len(sample) :] + sample[: number % len(sample)] for number in range(READERS)]
    alone = sample[:: READERS + 1]
    return alone, [sample[number + 1 :: READERS + 1] for number in range(READERS)]


async def _read_together(pool: WorkerPool, shares: list[list[bytes]]) -> tuple[Reading, ...]:
    readings: list[Reading] = []
    silent: list[SourceTimeoutError] = []

    async def read(share: list[bytes], seed: int) -> None:
        try:
            readings.append(Reading(*await _ask(pool, "read", share, _READ_SECONDS, seed)))
        except SourceTimeoutError as error:
            silent.append(error)

    async with trio.open_nursery() as nursery:
        for number, share in enumerate(shares):
            nursery.start_soon(read, share, number + 1)
    if silent:
        raise silent[0]
    return tuple(readings)


async def _look_at_scratch(pool: WorkerPool, path: Path) -> Scratch:
    try:
        seen = ScratchLook(*await _ask(pool, "look at scratch", os.fspath(path)))
    except OSError as error:
        return Scratch(path, containing_mount(path), _unusable(path, error))
    path = Path(seen.path)
    problem = CachefsError(*seen.problem) if seen.problem else None
    return Scratch(path, containing_mount(path), problem, seen.available, seen.total, seen.stored)


async def _measure_scratch(pool: WorkerPool, place: Scratch) -> Scratch:
    if place.problem is not None:
        return place
    try:
        answer = await _ask(pool, "try scratch", os.fspath(place.path), place.available, _SCRATCH_SECONDS)
    except OSError as error:
        return replace(place, problem=_unusable(place.path, error))
    return replace(place, speed=ScratchSpeed(*answer) if answer else None)


def _unusable(path: Path, error: OSError) -> CachefsError:
    reason = f"cannot be used: {describe(error)}"
    if isinstance(error, SourceTimeoutError):
        reason = f"does not answer within {SILENCE_SECONDS:g} s"
    return CachefsError(f"scratch {path} {reason}", "choose another with --scratch")


async def _look_at_other_places(pool: WorkerPool, scratch: Scratch, source: Source | None) -> tuple[Scratch, ...]:
    """Other places for scratch that this user can write to, one a file system."""
    folders = [os.environ.get("TMPDIR", ""), *_PLACES, tempfile.gettempdir()]
    devices = {scratch.mount.device if scratch.mount else None}
    found = []
    for folder in filter(os.path.isabs, folders):
        if Scratch(Path(folder), containing_mount(Path(folder))).kind != LOCAL:
            continue  # it would not be recommended, and it might hang
        place = await _look_at_scratch(pool, Path(folder, f"cachefs-{os.geteuid()}"))
        device = place.mount.device if place.mount else None
        is_in_source = source is not None and (source.path in place.path.parents or place.path in source.path.parents)
        if place.problem is None and device not in devices and not is_in_source:
            devices.add(device)
            found.append(place)
    return tuple(found)


async def _ask(pool: WorkerPool, handler: str, *arguments: Any) -> Any:
    """Raises SourceTimeoutError, and OSError of what was looked at."""
    return await pool.run((handler, *arguments), what=handler, timeout=SILENCE_SECONDS)
