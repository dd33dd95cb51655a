"""What systemd is told of a mount that it started: sd_notify(3), and the watchdog of sd_watchdog_enabled(3).

The protocol is a datagram of lines to the socket that $NOTIFY_SOCKET names. It is small and stable, so it is spoken
here and needs no package. A message that cannot be sent is never a reason to end the mount.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from cachefs.config import format_size
from cachefs.errors import describe

log = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
"""How old the status line that systemd shows may be."""
_LAST_WORD_SECONDS = 1.0
STARTING_MORE_SECONDS = 60
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(frozen=True)
class ServiceManager:
    """Who started this process and wants to hear how it does.

    `address` is of the manager's socket; after `watchdog_seconds` without a word the manager ends this process.
    """

    address: str
    watchdog_seconds: float | None = None

    @classmethod
    def from_environment(cls) -> ServiceManager | None:
        """The manager that waits for our word, if there is one. Takes its variables away: they are not for children."""
        name, interval, pid = (os.environ.pop(variable, "") for variable in _VARIABLES)
        if not name.startswith(("/", "@")):
            return None
        is_watched = interval.isdecimal() and int(interval) > 0 and pid in ("", str(os.getpid()))
        return cls("\0" + name[1:] if name[0] == "@" else name, int(interval) / 1e6 if is_watched else None)

    def ask_for_time(self) -> None:
        """Say that the start goes on: for so long from now on the manager's time-out of starts does not count."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(f"EXTEND_TIMEOUT_USEC={STARTING_MORE_SECONDS * 1_000_000}".encode(), self.address)

    async def keep_informed(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Say that the mount serves, then how it does, for ever; when cancelled, that it ends.

        It runs in the loop that answers the kernel, so that the manager finds out when that hangs. Twice an interval
        is what sd_watchdog_enabled(3) asks for.
        """
        pause = min(STATUS_SECONDS, (self.watchdog_seconds or math.inf) / 2)
        word = "READY=1"
        try:
            while True:
                if await self._send(f"{word}\nSTATUS={status_line(status())}"):
                    word = "WATCHDOG=1"
                await trio.sleep(pause)
        finally:
            with trio.move_on_after(_LAST_WORD_SECONDS, shield=True):
                await self._send("STOPPING=1\nSTATUS=unmounting")

    async def _send(self, message: str) -> bool:
        try:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                await sock.connect(self.address)  # only a connected one tells when a full queue has room again
                await sock.send(message.encode(errors="replace"))
        except OSError as error:
            log.warning("service manager not informed error=%r", describe(error))
            return False
        return True


def status_line(report: Mapping[str, Any]) -> str:
    """The report of `status` in one line: "serving /data: 1,200 files resident (130.0 MiB), 95% hits"."""
    opens = report["hits"] + report["misses"] + report["bypasses"]
    share = f", {100 * report['hits'] // opens}% hits" if opens else ""
    mountpoint = "".join(c if c.isprintable() else "?" for c in report["mountpoint"])  # a line break would end it
    files = report["resident_files"]
    noun = "file" if files == 1 else "files"
    return f"serving {mountpoint}: {files:,} {noun} resident ({format_size(report['resident_bytes'])}){share}"
