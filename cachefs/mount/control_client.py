"""Asking a mount over its control socket: one JSON object a line each way. Without trio, so that it starts fast."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Mapping
from typing import Any

from cachefs.cache.scratch import Scratch
from cachefs.errors import CachefsError

ANSWER_SECONDS = 10.0


def ask(scratch: Scratch, lease: str, command: str, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Send one command to a mount. Raises CachefsError if it does not answer."""
    return next(ask_for_all(scratch, lease, {"command": command}, timeout))


def ask_for_all(
    scratch: Scratch, lease: str, request: Mapping[str, Any], timeout: float = ANSWER_SECONDS
) -> Generator[dict[str, Any], None, None]:
    """Send a request to a mount and give its replies as they come. Raises CachefsError if there is none for long."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(os.fspath(scratch.at("sockets", lease)))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                while True:
                    reply: dict[str, Any] = json.loads(file.readline())
                    if "error" in reply:
                        raise CachefsError(reply["error"])
                    yield reply
    except (OSError, ValueError) as error:
        raise CachefsError(f"the mount's daemon does not answer ({error})", "see its log in scratch") from None
