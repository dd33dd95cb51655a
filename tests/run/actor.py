"""A command for `cachefs run` that does what a test tells it: one Python expression a line, over a socket.

    python actor.py NAME        connects to the abstract socket NAME, says who it is, and ends when the test does

It is told over a socket of its own, so that its streams are free for what is tested.
"""

import errno
import json
import os
import resource  # noqa: F401 - for expressions, as the next
import signal
import socket
import subprocess  # noqa: F401
import sys

got = []
"""The names of the signals that have arrived."""


def catch(*numbers):
    for number in numbers:
        signal.signal(number, lambda number, _: got.append(signal.Signals(number).name))


def read(path):
    with open(path, "rb") as file:
        return file.read().decode("latin1")


def disposition(number):
    """How the signal was handled when this program began; Python itself ignores SIGPIPE and SIGXFSZ."""
    for line in read("/proc/self/status").splitlines():
        if line.startswith("SigIgn:"):
            return "ignored" if int(line.split()[1], 16) >> (number - 1) & 1 else "default"
    raise AssertionError("no SigIgn in /proc/self/status")


def main():
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + sys.argv[1])
        with connection.makefile("rwb") as stream:

            def say(answer):
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()

            say({"pid": os.getpid(), "mounts": json.loads(os.environ.get("CACHEFS_MOUNTS", "null"))})
            for line in stream:
                try:
                    say({"value": eval(line)})
                except OSError as error:
                    say({"errno": errno.errorcode[error.errno]})
                except Exception as error:
                    say({"problem": repr(error)})


if __name__ == "__main__":
    main()
