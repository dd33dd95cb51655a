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

log = logging.getLogger(__name__)

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
