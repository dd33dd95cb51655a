"""A mount in the background or in the foreground: from checked settings to a process that serves."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

from cachefs.cache.scratch import Scratch, claim_scratch, unlock_scratch
from cachefs.config import Settings
from cachefs.errors import CachefsError, ShardError
from cachefs.mount.memory import MemoryTierError, claim_memory, give_up_memory, go_without
from cachefs.mount.notify import ServiceManager
from cachefs.mount.purge import purge
from cachefs.mount.serve import KEEPER_SIGNAL, OnReady, lay_grounds, open_source, serve
from cachefs.mount.sharding import check_undivided
from cachefs.workers.fork_server import JOB_SIGNALS, detach, end_with_parent, ignore

log = logging.getLogger(__name__)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_KEPT_LOGS = 10
STILL_STARTING = b" "
"""What a daemon says over its pipe while it is not done: nothing, in JSON."""


def serve_in_foreground(settings: Settings, on_ready: OnReady) -> None:
    """Serve in this process until the mount ends; log to stderr, and tell systemd if that has started it."""
    faulthandler.enable()  # the SIGABRT of a watchdog then says where the loop hangs
    manager = ServiceManager.from_environment()
    _log_to(logging.StreamHandler(), settings)
    _serve(settings, on_ready, manager.ask_for_time if manager else _wait_patiently, manager=manager)


def serve_in_background(settings: Settings, on_ready: OnReady | None = None) -> int:
    """Serve in a daemon and return its pid when it answers. Raises CachefsError if it does not get that far."""
    pid, reading = start_daemon(settings)
    try:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
    except BaseException:  # interrupted: the mount that was asked for is not wanted any more
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    problem = problem_of_start(said, settings)
    if problem is not None:
        os.waitpid(pid, 0)
        raise problem
    if on_ready is not None:
        on_ready(warnings_of_start(said))
    return pid


def start_daemon(settings: Settings, *, is_kept: bool = False) -> tuple[int, int]:
    """Fork a daemon: its pid, and a pipe over which `problem_of_start` learns how the start went, until its end.

    One that `is_kept` ends when this process does, at the latest.
    """
    reading, writing = os.pipe()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        if is_kept:
            end_with_parent(parent, KEEPER_SIGNAL)
        os.close(reading)
        _run_daemon(settings, writing)
    os.close(writing)
    return pid, reading


def problem_of_start(said: bytes, settings: Settings) -> CachefsError | None:
    """What a daemon's word over its pipe means: None if the mount answers. Nothing said is a daemon that died."""
    if not said.strip(STILL_STARTING):
        return CachefsError("the daemon died before the mount answered", f"see the logs in {settings.scratch / 'logs'}")
    report = json.loads(said)
    if "error" not in report:
        return None
    kind = ShardError if report.get("is_shard") else CachefsError
    return kind(report["error"], report["hint"])


def warnings_of_start(said: bytes) -> list[str]:
    """What a daemon whose mount answers has to say of it."""
    return list(json.loads(said)["warnings"])


def _run_daemon(settings: Settings, pipe: int) -> None:
    """Serve, say over `pipe` how the start went, and exit."""
    status = 1
    try:
        ignore(JOB_SIGNALS)
        detach({pipe})
        os.umask(0o077)
        said = False

        def on_ready(warnings: Sequence[str]) -> None:
            nonlocal said
            said = True
            _say(pipe, {"pid": os.getpid(), "warnings": list(warnings)})

        def on_starting() -> None:
            with suppress(OSError):  # nobody waits any more
                os.write(pipe, STILL_STARTING)

        try:
            _serve(settings, on_ready, on_starting, log_file=True)
            status = 0
        except CachefsError as error:
            log.error("%s", error)
            if not said:
                is_shard = isinstance(error, ShardError)
                _say(pipe, {"error": str(error.args[0]), "hint": error.hint, "is_shard": is_shard})
        except Exception as error:
            log.exception("the daemon ends with a bug")
            if not said:
                words = traceback.format_exception_only(error)[-1].strip()
                _say(pipe, {"error": f"a bug of cachefs: {words}", "hint": f"see {settings.scratch / 'logs'}"})
    finally:
        logging.shutdown()
        os._exit(status)


def _serve(
    settings: Settings,
    on_ready: OnReady,
    on_starting: Callable[[], None],
    *,
    log_file: bool = False,
    manager: ServiceManager | None = None,
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each different file that readers have open
    source_fd = open_source(settings)  # first: it may hang, and then scratch must be free for others
    if settings.sharding is not None:
        check_undivided(source_fd)
    scratch = claim_scratch(settings.scratch)
    if log_file:
        _log_to(logging.StreamHandler(_new_log(scratch)), settings)
    memory, warnings = None, []
    try:
        try:
            memory = claim_memory(settings, scratch)
        except MemoryTierError as error:
            warnings.append(go_without(settings, error))
        keep_informed = manager.keep_informed if manager else None
        serve(lay_grounds(settings, source_fd, scratch, memory, warnings), on_ready, on_starting, keep_informed)
    except CachefsError:
        if memory is not None:
            give_up_memory(memory.scratch)
        unlock_scratch(scratch.fd)
        if scratch.is_new:
            with suppress(CachefsError):  # another mount may use it by now
                purge(settings.scratch)  # a mount that did not come about leaves nothing behind
        raise


def _wait_patiently() -> None:
    """Nobody waits who would give up."""


def _new_log(scratch: Scratch) -> TextIO:
    """This process's log; of those whose process has ended the newest stay."""
    folder = scratch.open_directory("logs")
    try:
        ended = []
        for name in os.listdir(folder):
            if re.fullmatch(r"\d+\.log", name) and not os.path.exists(f"/proc/{name.removesuffix('.log')}"):
                with suppress(FileNotFoundError):  # another mount that starts does the same
                    ended.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime, name))
        for _, name in sorted(ended)[:-_KEPT_LOGS]:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        name = f"{os.getpid()}.log"
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        return open(os.open(name, flags, 0o600, dir_fd=folder), "w", buffering=1)
    finally:
        os.close(folder)


def _log_to(handler: logging.Handler, settings: Settings) -> None:
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root = logging.getLogger("cachefs")
    root.setLevel(settings.log_level.upper())
    root.addHandler(handler)
    logging.getLogger("pyfuse3").addHandler(handler)


def _say(pipe: int, report: dict[str, object]) -> None:
    os.write(pipe, json.dumps(report).encode())
    os.close(pipe)
