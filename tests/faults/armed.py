"""cachefs whose daemon is killed when it first gets to a named point: `python -m tests.faults.armed POINT ARGUMENT...`

The points are wrapped around functions of the package in this process, which daemon and workers are forked from. So the
package itself knows nothing of them. Without a daemon (a purge) the process itself is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cachefs.cache import copying, ledger, memory, residency, storage, trees
from cachefs.cli import main
from cachefs.mount import daemon, membership, promotion, purge

_victim = os.getpid()


def die(*_: Any) -> None:
    """Kill the daemon with SIGKILL, and stop here until that has ended this process too."""
    os.kill(_victim, signal.SIGKILL)
    while True:
        signal.pause()


def _half_write(fd: int, data: Any, offset: int) -> None:
    os.pwrite(fd, memoryview(data)[: len(data) // 2], offset)
    die()


def _before(owner: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(owner, name, die)


def _after(owner: Any, name: str) -> Callable[[], None]:
    whole = getattr(owner, name)

    def do(*arguments: Any, **keywords: Any) -> None:
        whole(*arguments, **keywords)
        die()

    return lambda: setattr(owner, name, do)


def _half_move() -> None:
    whole = copying.CopyHandlers._copy_over

    def do(*arguments: Any) -> str:
        copying._write_all = _half_write
        return whole(*arguments)

    copying.CopyHandlers._copy_over = do  # type: ignore[method-assign]


FETCHING = {
    "before the first byte": _before(copying.CopyHandlers, "_copy"),
    "in the middle": lambda: setattr(copying, "_write_all", _half_write),
    "after the last byte": _before(copying, "_mark"),
    "before the rename": _before(storage.Storage, "commit"),
    "after the rename": _after(storage.Storage, "commit"),
    "after the count": _after(ledger.Ledger, "settle"),
    "before the record": _before(residency.Residency, "_flush"),
    "while it leaves": _before(membership.Membership, "leave"),
}
EVICTING = {
    "before it evicts": _before(copying, "_remove_one"),
    "after it has evicted": _after(copying, "_remove_one"),
    "before evictions count": _before(ledger.Ledger, "remove"),
}
MOVING = {
    "before it moves": _before(copying.CopyHandlers, "_copy_over"),
    "in the middle of a move": _half_move,
    "before what has moved is removed": _after(copying.CopyHandlers, "_copy_over"),
    "after it is removed": _after(copying, "_remove_one"),
    "before a move counts": _before(memory.MemoryTier, "_note_moved_down"),
    "after a move counts": _after(memory.MemoryTier, "_note_moved_down"),
}
PROMOTING = {
    "in the middle of a tree": _after(trees.TreeHandlers, "_plant_file"),
    "before a tree is finished": _before(trees.TreeHandlers, "_finish"),
    "before it binds": _before(promotion.Promotion, "_attach"),
    "after it has bound": _after(promotion.Promotion, "_attach"),
}
PURGING = {
    "before it removes": _before(purge, "_remove_tree"),
    "in the middle of removing": _after(purge, "_remove_tree"),
}
POINTS = {**FETCHING, **EVICTING, **MOVING, **PROMOTING, **PURGING}


def _note_daemon(serve: Callable[..., None]) -> Callable[..., None]:
    def do(*arguments: Any, **keywords: Any) -> None:
        global _victim
        _victim = os.getpid()
        serve(*arguments, **keywords)

    return do


if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    daemon._serve = _note_daemon(daemon._serve)
    sys.exit(main(sys.argv[2:], prog_name="cachefs"))
