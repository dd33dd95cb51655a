"""A mount's place among those that share its scratch: its lease, its slot in the ledger, and a count that is right.

Invariants:
- Claiming, joining, counting and leaving happen under scratch's lock, so no two mounts do them at once. Joining takes
  over the lock that claiming took, so no purge comes in between.
- The lock is held until the count is right. Until then this mount stores nothing, and no other mount can join.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace

from cachefs.cache.ledger import Ledger
from cachefs.cache.scratch import Scratch, scratch_lock
from cachefs.cache.storage import Storage
from cachefs.cache.trees import Trees
from cachefs.config import Settings
from cachefs.errors import describe
from cachefs.mount.leases import Lease, LeaseRecord, live_leases, new_lease_id, process_started
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)


class Membership:
    """Joins on construction; `leave` at the end. `abandoned_trees` are those of mounts that are gone."""

    def __init__(self, settings: Settings, scratch: Scratch, storage: Storage, trees: Trees, dataset: bytes) -> None:
        self._scratch = scratch
        self._storage = storage
        self.record = LeaseRecord(
            id=new_lease_id(),
            pid=os.getpid(),
            process_started=process_started(os.getpid()),
            boot=storage.boot,
            source=str(settings.source),
            mountpoint=str(settings.mountpoint),
            dataset=dataset.hex(),
            shard="" if settings.sharding is None else str(settings.sharding),
            division="" if settings.sharding is None else settings.sharding.division,
        )
        self._has_left = False
        with ExitStack() as joining:
            joining.enter_context(scratch_lock(scratch.fd))
            others = live_leases(scratch, drop_dead=True)
            self.ledger = Ledger(scratch.fd, self.record.id, storage.boot)
            self._lease = Lease(scratch, self.record)
            self._is_counted = self.ledger.join([other.id for other in others])
            self.abandoned_trees = tuple({*trees.names()} - {other.id for other in others})
            self._joining = ExitStack() if self._is_counted else joining.pop_all()

    def live(self) -> list[LeaseRecord]:
        """The leases of all live mounts of this scratch."""
        return live_leases(self._scratch)

    def live_datasets(self) -> list[bytes]:
        """The datasets of all live mounts of this scratch."""
        return [bytes.fromhex(record.dataset) for record in self.live()]

    def declare(self, fingerprint: str, shard_bytes: int) -> None:
        """Say in the lease how this mount divides the source, and the size of its shard. Raises OSError.

        In a thread: it waits for scratch's lock. It opens scratch anew, for a lock that this very process holds would
        be no obstacle, and be gone afterwards.
        """
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._scratch.fd)
        try:
            with scratch_lock(fd):
                if not self._has_left:
                    self.record = replace(self.record, fingerprint=fingerprint, shard_bytes=shard_bytes)
                    self._lease.renew(self.record)
        finally:
            os.close(fd)

    def count_nothing(self) -> None:
        """Scratch is new: it holds nothing; let others join."""
        with self._joining:
            if not self._is_counted:
                self.ledger.set_stored(0, 0)
                self._is_counted = True

    async def count(self, index: WorkerPool) -> None:
        """Count afresh what scratch holds, where the count that was found may be wrong; let others join.

        Raises OSError if it cannot be counted.
        """
        with self._joining:
            if self._is_counted:
                return
            try:
                stored = await index.run(("reconcile",), what="index")
            except OSError as error:
                log.warning("index not reconciled error=%r", describe(error))
                stored = await index.run(("count",), what="scratch")
            self.ledger.set_stored(*stored)
            self._is_counted = True

    def doubt(self) -> None:
        """Something went wrong that the count or the index may not show."""
        self._is_counted = False

    def leave(self) -> None:
        self._joining.close()
        try:
            self._leave()
        except FileNotFoundError:
            log.warning("scratch has been removed path=%s", self._scratch.path)

    def _leave(self) -> None:
        with scratch_lock(self._scratch.fd):
            self._has_left = True
            is_alone = [self.record.id] == [other.id for other in live_leases(self._scratch)]
            if is_alone:
                self._storage.discard_abandoned()
            self.ledger.leave(clean=is_alone and self._is_counted)
            self._scratch.at("sockets", self.record.id).unlink(missing_ok=True)
            self._lease.release()
