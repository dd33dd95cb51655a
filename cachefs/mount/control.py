"""The control socket of a mount: one JSON object a line each way. It lies in scratch, so its user alone reaches it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from cachefs.cache.scratch import Scratch

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

log = logging.getLogger(__name__)

_LINE_BYTES = 1 << 20

Command = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Makes the reply to a request."""
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Stream = Callable[[Mapping[str, Any], Send], Awaitable[None]]
"""Sends any number of replies to a request."""


async def serve_control(
    scratch: Scratch,
    lease: str,
    commands: Mapping[str, Command],
    streams: Mapping[str, Stream],
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
            async def send(reply: Mapping[str, Any]) -> None:
                await stream.send_all(json.dumps(reply).encode() + b"\n")

            try:
                try:
                    request = json.loads(await _read_line(stream))
                    name = request.get("command")
                    if name in streams:
                        return await streams[name](request, send)
                    command = commands.get(name)
                    reply = command(request) if command else {"error": f"unknown command {name!r}"}
                except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
                    reply = {"error": f"not a request: {error}"}
                await send(reply)
            except trio.BrokenResourceError:
                log.debug("control client left before its answer")
            except BaseExceptionGroup as group:
                _, others = group.split(trio.BrokenResourceError)
                if others is not None:
                    raise

        await trio.serve_listeners(answer, [trio.SocketListener(sock)])


async def _read_line(stream: trio.SocketStream) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        part = await stream.receive_some()
        line += part
        if not part or len(line) > _LINE_BYTES:
            break
    return bytes(line)
