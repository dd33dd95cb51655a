"""Asking a mount over its control socket: one JSON object a line each way. Without trio, so that it starts fast."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from cachefs.cache.scratch import Scratch
from cachefs.errors import CachefsError

ANSWER_SECONDS = 10.0


def ask(scratch: Scratch, lease: str, command: str, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Send one command to a mount. Raises CachefsError if it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(os.fspath(scratch.at("sockets", lease)))
            sock.sendall(json.dumps({"command": command}).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline()
        reply: dict[str, Any] = json.loads(line)
    except (OSError, ValueError) as error:
        raise CachefsError(f"the mount's daemon does not answer ({error})", "see its log in scratch") from None
    if "error" in reply:
        raise CachefsError(reply["error"])
    return reply
