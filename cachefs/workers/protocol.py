"""What goes over a worker's socket: one packet a message, in Python's marshal format, between forks of one process.

A job is (handler's name, *arguments). A worker answers any number of PROGRESS messages and then one RESULT,
ERROR or BUG.
"""

from __future__ import annotations

import marshal
import socket
import traceback
from collections.abc import Callable, Generator, Mapping
from typing import Any

PACKET_BYTES = 128 * 1024
"""What a handler may put into one message at the most, with room for the format around it."""
BUFFER_BYTES = PACKET_BYTES + 16 * 1024

PROGRESS, RESULT, ERROR, BUG = range(4)

Handler = Callable[..., Generator[Any, None, Any]]
"""A generator function: what it yields are the job's PROGRESS messages, what it returns its RESULT."""


def encode(message: tuple[Any, ...]) -> bytes:
    return marshal.dumps(message)


def decode(packet: memoryview) -> tuple[Any, ...]:
    message: tuple[Any, ...] = marshal.loads(packet)
    return message


def describe_error(error: OSError) -> tuple[str, int, str, str | bytes]:
    """(name of its class, errno, text, path): what can be sent of an exception."""
    path = error.filename if isinstance(error.filename, str | bytes) else b""
    return type(error).__name__, error.errno or 0, error.strerror or str(error), path


def serve(sock: socket.socket, handlers: Mapping[str, Handler]) -> None:
    """Answer jobs until the stream ends. An OSError of a handler is the job's answer; anything else is a bug.

    An ERROR message is (ERROR, name of the exception's class, errno, text, path).
    """
    while True:
        packet = sock.recv(BUFFER_BYTES)
        if not packet:
            return
        name, *arguments = marshal.loads(packet)
        try:
            job = handlers[name](*arguments)
            try:
                while True:
                    sock.sendall(encode((PROGRESS, next(job))))
            except StopIteration as stop:
                answer = encode((RESULT, stop.value))
        except OSError as error:
            answer = encode((ERROR, *describe_error(error)))
        except Exception:  # reported with its traceback, and the worker lives on
            answer = encode((BUG, traceback.format_exc()))
        try:
            sock.sendall(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
