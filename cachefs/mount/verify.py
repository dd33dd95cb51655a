"""`cachefs verify`: checks a scratch directory against its index and every copy against its checksum, and repairs it.

Invariants:
- Nothing is changed without `repair`; with it only what is wrong is dropped, and is fetched again when it is asked for.
- Mounts may use the scratch meanwhile. What only holds still without them (the count, what a crash left) is looked at
  under scratch's lock, and only if there is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cachefs.cache.index import IndexDamagedError, IndexReader, forget_files, remove_index
from cachefs.cache.ledger import Ledger
from cachefs.cache.residency import FLUSH_SECONDS
from cachefs.cache.scratch import Scratch, open_scratch, scratch_lock
from cachefs.cache.storage import Storage
from cachefs.cache.trees import Trees, fell
from cachefs.cache.verification import MISSING, Checked, Fault, Verification
from cachefs.errors import CachefsError, describe
from cachefs.mount.control_client import ask
from cachefs.mount.leases import boot_id, live_leases
from cachefs.mount.mountinfo import mount_id_of, read_mounts

_NOBODY = "verify"
_LOOKS = 4


@dataclass
class Verified:
    """The outcome: what was checked, and how many faults are left."""

    checked: Checked = field(default_factory=Checked)
    left: int = 0


def verify(
    path: Path,
    *,
    repair: bool,
    on_progress: Callable[[Checked, int, int], None],
    on_fault: Callable[[str], None],
) -> Verified:
    """Check the scratch directory `path`.

    `on_progress` is given what was checked so far, and the files and bytes that the ledger counts; `on_fault` is given
    a line for each fault. Raises CachefsError.
    """
    scratch = open_scratch(path)
    try:
        return _Verify(scratch, repair, on_progress, on_fault).run()
    except OSError as error:
        raise CachefsError(
            f"scratch {path} cannot be verified: {describe(error)} ({error.filename})", "remove the cause, or purge it"
        ) from None
    finally:
        os.close(scratch.fd)


class _Verify:
    def __init__(
        self,
        scratch: Scratch,
        repair: bool,
        on_progress: Callable[[Checked, int, int], None],
        on_fault: Callable[[str], None],
    ) -> None:
        self._scratch = scratch
        self._repair = repair
        self._on_progress = on_progress
        self._on_fault = on_fault
        self._index = scratch.at("index.db")
        self._storage = Storage(scratch.fd, boot_id())
        self._ledger = Ledger(scratch.fd, _NOBODY, self._storage.boot)
        self._verified = Verified()
        self._gone: list[bytes] = []

    def run(self) -> Verified:
        try:
            stored_bytes, stored_files = self._ledger.stored()
            with closing(self._open_index()) as index:
                verification = Verification(self._storage, index)
                for fault in verification.run(lambda checked: self._on_progress(checked, stored_files, stored_bytes)):
                    self._note_file(fault)
                self._verified.checked = verification.checked
                missing = verification.missing()
            for fault in self._still_missing(missing):
                self._note_file(fault)
            if self._repair and self._gone:
                forget_files(self._index, self._gone)
            self._check_what_holds_still()
        finally:
            self._ledger.close()
            for fd in self._storage.fds:
                os.close(fd)
        return self._verified

    def _open_index(self) -> IndexReader:
        try:
            return IndexReader(self._index)
        except IndexDamagedError as error:
            self._note(f"index.db: it is damaged ({error.strerror}); no copy can be checked", is_mended=self._repair)
            if self._repair:
                remove_index(self._index)
            return IndexReader(None)

    def _still_missing(self, missing: list[Fault]) -> list[Fault]:
        """Those that the index knows each time when all mounts have written what they know.

        One look is not enough: a file that is evicted right after that is not there, and the index knows it still.
        """
        if not missing or not live_leases(self._scratch):
            return missing
        with closing(self._open_index()) as index:
            for _ in range(_LOOKS):
                if not missing:
                    break
                for record in live_leases(self._scratch):
                    try:
                        ask(self._scratch, record.id, "flush")
                    except CachefsError:  # it is ending, or hangs
                        time.sleep(2 * FLUSH_SECONDS)
                now = index.of([fault.name for fault in missing])
                missing = [fault for fault in missing if fault.name in now and not self._storage.has(fault.name)]
        return missing

    def _note_file(self, fault: Fault) -> None:
        line = f"{os.fsdecode(fault.path)}: {fault.what} ({fault.name.hex()})"
        if self._storage.is_shown(fault.name, fault.boot) and live_leases(self._scratch):
            self._note(f"{line}; it is promoted: unmount before it can be repaired", is_mended=False)
            return
        if self._repair:
            if fault.what == MISSING:  # or evicted, and the index was not told: then it is not counted any more
                self._ledger.doubt()
            elif self._storage.drop(fault.name, fault.boot) and fault.size is not None:
                self._ledger.remove(fault.size)
                self._ledger.doubt()
        if not self._storage.has(fault.name):  # else there is a good copy, beside one from before the last boot
            self._gone.append(fault.name)
        self._note(line, is_mended=self._repair)

    def _note(self, line: str, *, is_mended: bool) -> None:
        self._verified.left += not is_mended
        self._on_fault(line)

    def _check_what_holds_still(self) -> None:
        with scratch_lock(self._scratch.fd):
            if live_leases(self._scratch):
                return
            self._check_left_overs()
            sizes = [size for _, _, size in self._storage.scan()]
            stored = self._ledger.stored()
            if stored != (sum(sizes), len(sizes)) or self._ledger.reserved():
                if not self._ledger.is_doubted:  # else the next mount counts afresh anyway
                    self._note(
                        f"ledger: it counts {stored[1]} files, {stored[0]} bytes, {self._ledger.reserved()} reserved,"
                        f" and there are {len(sizes)}, {sum(sizes)} bytes",
                        is_mended=self._repair,
                    )
                if self._repair:
                    self._ledger.reset(sum(sizes), len(sizes))

    def _check_left_overs(self) -> None:
        """What mounts that have died left half done."""
        staged = self._storage.staged()
        if staged:
            self._note(f"staging: {len(staged)} half-copied, of mounts that have died", is_mended=self._repair)
            if self._repair:
                self._storage.discard_abandoned()
        trees = Trees(self._scratch.fd)
        try:
            shown = {mount.tree for mount in read_mounts()}
            for name in trees.names():
                is_mended = self._repair and name not in shown
                self._note(f"trees/{name}: of a mount that has died", is_mended=is_mended)
                if is_mended:
                    for _ in fell(trees.fd, name, mount_id_of):
                        pass
        finally:
            os.close(trees.fd)
