"""The control socket of a mount: one JSON object a line each way. It lies in scratch, so its user alone reaches it."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

from cachefs.cache.scratch import Scratch
from cachefs.errors import CachefsError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
_LINE_BYTES = 1 << 20

Command = Callable[[Mapping[str, Any]], Mapping[str, Any]]


async def serve_control(
    scratch: Scratch,
    lease: str,
    commands: Mapping[str, Command],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests for ever."""
    path = scratch.at("sockets", lease)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        await sock.bind(os.fspath(path))
        sock.listen()
        task_status.started()

        async def answer(stream: trio.SocketStream) -> None:
            try:
                request = json.loads(await _read_line(stream))
                command = commands.get(request.get("command"))
                reply = command(request) if command else {"error": f"unknown command {request.get('command')!r}"}
            except (ValueError, AttributeError) as error:
                reply = {"error": f"not a request: {error}"}
            except trio.BrokenResourceError:
                return
            try:
                await stream.send_all(json.dumps(reply).encode() + b"\n")
            except trio.BrokenResourceError:
                log.debug("control client left before its answer")

        await trio.serve_listeners(answer, [trio.SocketListener(sock)])


async def _read_line(stream: trio.SocketStream) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        part = await stream.receive_some()
        line += part
        if not part or len(line) > _LINE_BYTES:
            break
    return bytes(line)


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
