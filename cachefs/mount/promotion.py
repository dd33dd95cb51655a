"""Promotion: what is completely resident is bound from scratch over the mount, and costs nothing of ours from then on.

`fs/survey` says which directories are complete, workers build their trees (`cache/trees`), and this binds the largest
of them, in a thread, because the paths of the mount are answered by this very process.

Invariants:
- What is bound is the tree of a whole directory, or one large file. It never changes again.
- A bind hangs on the FUSE mount itself, reached through a descriptor of it: so it goes with the mount, and never lands
  on what lies beneath. That descriptor is closed at once, so that it keeps no one from unmounting.
- A directory that is in use is not detached, which would cut its users' way up, but unmounted, or left beneath a larger
  one. Only where its tree proves to be changed it is: the mount beneath it has what is missing there.
- Who may not look into the mount gets no further by promotion.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.residency import Residency
from cachefs.cache.storage import Storage, is_same_time
from cachefs.cache.trees import MISSING, Entry, Trees
from cachefs.cache.write_watch import WriteWatch
from cachefs.config import Settings
from cachefs.errors import describe
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.inodes import Node
from cachefs.fs.survey import IncompleteError, Survey, is_below
from cachefs.mount.mountinfo import find_mount, mount_id_of, read_mounts
from cachefs.mount.namespaces import remount_read_only
from cachefs.mount.system_calls import (
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    attach_read_only,
    mount,
    umount,
)
from cachefs.source.attributes import Attributes, mtime_of, size_of
from cachefs.workers.pool import WorkerPool

log = logging.getLogger(__name__)

SHORTEST_TTL = 60.0
"""Seconds. With a --metadata-ttl below this, changes of the source are meant to be seen, so nothing is promoted."""
MOST_BINDS = 1000
"""So that the table of mounts stays small, which many programs read whole."""
SETTLE_SECONDS, _LONGEST_SETTLING = 3.0, 15.0
"""A look begins when no file has become resident for so long, or so long after there was reason for it."""
_FILES_SETTLE_SECONDS = 5.0
"""Large files are promoted on their own when their directory makes no progress."""
_REPORTED_PATHS = 100
_LEAVE_SECONDS = 5.0
_WATCH_SECONDS, _WATCHED_AT_ONCE = 1.0, 200
"""So often so many directories of the trees are looked at, in turn."""
_RETRY_SECONDS = 60.0
_CAP_SYS_ADMIN = 21
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID


def reason_against(settings: Settings) -> str | None:
    """Why a mount with these settings promotes nothing; None if it may."""
    if settings.no_promote:
        return "--no-promote was given"
    if settings.metadata_ttl < SHORTEST_TTL:
        return f"--metadata-ttl is below {SHORTEST_TTL:g} s"
    if not _may_mount():
        return "an ordinary user can promote inside cachefs run alone"
    if settings.allow_other and os.geteuid() != 0:
        return "--allow-other was given by an ordinary user, whose copies cannot have other owners"
    return None


def may_be_shown(attributes: Attributes, *, is_root: bool, may_execute: bool = True) -> bool:
    """Whether a tree can show a file or directory as the mount does.

    An ordinary user owns the whole tree, so the owner's bits must let him in. setuid bits have no place in scratch.
    Where scratch is mounted noexec (not `may_execute`), programs could not be started.
    """
    if stat.S_ISDIR(attributes.mode):
        return is_root or attributes.mode & 0o500 == 0o500
    if attributes.mode & _SPECIAL_BITS or (attributes.mode & 0o111 and not may_execute):
        return False
    return is_root or bool(attributes.mode & stat.S_IRUSR)


class Promotion:
    """The promoted part of one mount, with the lease `lease`."""

    def __init__(
        self,
        settings: Settings,
        filesystem: FileSystem,
        residency: Residency,
        storage: Storage,
        trees: Trees,
        watch: WriteWatch,
        capacity: CapacityKeeper,
        pool: WorkerPool,
        lease: str,
        source_timeout: float,
    ) -> None:
        self.reason_against = reason_against(settings)
        self._mountpoint = settings.mountpoint
        self._residency = residency
        self._trees = trees
        self._writes = watch
        self._capacity = capacity
        self._pool = pool
        self._lease = lease
        self._timeout = source_timeout
        self._bound: dict[bytes, tuple[int, int]] = {}
        self._built_mtimes: dict[bytes, int] = {}  # of the directories of our tree, in ns: they do not change any more
        self._unwatched: list[bytes] = []
        self._refused: dict[bytes, float] = {}  # paths that could not be bound → when to try again
        self._threads = trio.CapacityLimiter(1)
        is_root, may_execute = os.geteuid() == 0, not os.fstatvfs(trees.fd).f_flag & os.ST_NOEXEC
        self._survey = Survey(
            filesystem,
            residency,
            storage.boot,
            lambda attributes: may_be_shown(attributes, is_root=is_root, may_execute=may_execute),
            with_root=settings.allow_other
            or settings.is_private
            or (self.reason_against is None and _is_behind_closed_doors(settings.mountpoint)),
        )
        if self.reason_against is None:
            residency.on_add = self._survey.note_resident
            filesystem.on_open = self._survey.note_open
            filesystem.on_listing = self._survey.note_listing

    def status(self) -> dict[str, Any]:
        """What is promoted now, as the kernel says."""
        self._drop_vanished()
        paths = self._outermost()
        return {
            "promotion": "on" if self.reason_against is None else f"off: {self.reason_against}",
            "promoted_files": sum(self._bound[path][0] for path in paths),
            "promoted_bytes": self._capacity.promoted_bytes,
            "promoted_directories": [os.fsdecode(path) or "." for path in sorted(paths)[:_REPORTED_PATHS]],
        }

    def _outermost(self) -> list[bytes]:
        return [path for path in self._bound if not is_below(path, self._bound)]

    async def run(self, abandoned: Sequence[str]) -> None:
        """Promote for ever; first remove the `abandoned` trees of mounts that are gone."""
        mounted = {mount.tree for mount in read_mounts()}  # a daemon has died, and its promoted directories live
        left = [name for name in abandoned if name not in mounted]
        if left:
            try:
                await self._pool.run(("fell", left), what="fell")
            except OSError as error:
                log.warning("abandoned trees not removed error=%r", describe(error))
        if self.reason_against is not None:
            return
        await self._residency.loaded.wait()
        with trio.CancelScope() as promoting:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_trees, promoting)
                if self._writes.fd >= 0:
                    nursery.start_soon(self._watch_writes, promoting)
                while True:
                    await self._wait()
                    await self._promote()

    async def _watch_writes(self, promoting: trio.CancelScope) -> None:
        """See that nobody writes to what is shown; else withdraw: what is opened from then on is looked at by us."""
        written = None
        while written is None:
            await trio.lowlevel.wait_readable(self._writes.fd)
            written = self._writes.take()
        await self._take_back(promoting, written)

    async def _watch_trees(self, promoting: trio.CancelScope) -> None:
        """See that nobody takes our trees apart, as one who cleans up temporary directories does; else withdraw."""
        while True:
            await trio.sleep(_WATCH_SECONDS)
            if not self._bound:
                continue
            changed = await trio.to_thread.run_sync(self._find_changed, self._next_watched(), abandon_on_cancel=True)
            if changed is not None:
                return await self._take_back(promoting, changed or b".")

    async def _take_back(self, promoting: trio.CancelScope, changed: bytes) -> None:
        log.warning("promoted directories are taken back, because scratch was changed path=%r", changed)
        self.reason_against = "scratch was changed by somebody else"
        promoting.cancel()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._withdraw, [*self._bound], limiter=self._threads)

    def _next_watched(self) -> list[tuple[bytes, int | None]]:
        """What is bound, and the next directories within, each with its mtime (files without)."""
        if not self._unwatched:
            self._unwatched = [path for path in self._built_mtimes if is_below(path, self._bound)]
        watched = [*self._outermost(), *self._unwatched[:_WATCHED_AT_ONCE]]
        self._unwatched = self._unwatched[_WATCHED_AT_ONCE:]
        return [(path, self._built_mtimes.get(path)) for path in watched]

    def _find_changed(self, watched: Sequence[tuple[bytes, int | None]]) -> bytes | None:
        """One that is not as we left it in our tree. In a thread."""
        for path, built in watched:
            try:
                fd = self._open_in_tree(path)
            except OSError:
                return path
            status = os.fstat(fd)
            os.close(fd)
            if not status.st_nlink or (built is not None and not is_same_time(status.st_mtime_ns, built)):
                return path
        return None

    def _withdraw(self, bound: Sequence[bytes]) -> None:
        """Detach what is bound. In a thread."""
        for path in bound:
            with suppress(OSError):
                umount(Path(os.fsdecode(os.path.join(os.fsencode(self._mountpoint), path))), detach=True)

    async def leave(self) -> None:
        """Remove this mount's trees, after it is unmounted. What takes too long the next mount does, or purge."""
        if self._built_mtimes or self.reason_against is None:
            with trio.move_on_after(_LEAVE_SECONDS):
                try:
                    await self._pool.run(("fell", [self._lease]), what="fell")
                except OSError as error:
                    log.warning("trees not removed error=%r", describe(error))

    async def _wait(self) -> None:
        """Wait until there is reason to look, and the rush is over."""
        with trio.move_on_after(_FILES_SETTLE_SECONDS if self._survey.has_large_files() else math.inf):
            await self._survey.woken.wait()
        began = time.monotonic()
        while (now := time.monotonic()) < began + _LONGEST_SETTLING:
            quiet_at = max(began, self._survey.resident_at) + SETTLE_SECONDS
            if now >= quiet_at:
                break
            await trio.sleep(quiet_at - now)

    async def _promote(self) -> None:
        due = self._survey.take_due()
        while due:
            for node in due:
                await trio.lowlevel.checkpoint()
                await self._try(node)
            due = self._survey.take_due_at_once()
        self._drop_vanished()
        for path, (files, size) in sorted(self._survey.built.items(), key=lambda item: -item[1][1]):
            if path not in self._bound:
                await self._bind(path, files, size)
        if time.monotonic() > self._survey.resident_at + _FILES_SETTLE_SECONDS:
            for node, entry in self._survey.large_files():
                await self._promote_file(node, entry)

    async def _try(self, node: Node) -> None:
        """Build the tree of a directory if it is complete."""
        try:
            if await self._survey.is_complete(node):
                await self._build(node)
        except IncompleteError:
            self._survey.look_again(node)
        except OSError as error:
            log.info("not promoted path=%r error=%r", node.path, describe(error))

    async def _build(self, node: Node) -> None:
        path, attributes = node.path, node.attributes
        entries, files, size = self._survey.below(node), 0, 0
        try:
            await self._pool.run(("sprout", self._lease, path), what="promote")
            for batch in self._survey.batches(node):
                job = ("plant", self._lease, path, batch.entries)
                failed = dict(await self._pool.run(job, what="promote", timeout=self._timeout))
                if failed:
                    self._give_up(node, batch.entries, failed)
                    return
                entries, files, size = entries + len(batch.entries), files + batch.files, size + batch.size
            is_whole = await self._pool.run(("finish", self._lease, path, entries, attributes), what="promote")
        except OSError:
            self._survey.note_hole(node)
            raise
        if is_whole and attributes is not None:
            self._built_mtimes[path] = mtime_of(attributes)
            self._survey.note_built(node, files, size)
        else:
            log.info("not promoted path=%r error=%r", path, "a tree cannot have its attributes or entries")
            self._survey.note_hole(node)

    def _give_up(self, node: Node, entries: Sequence[Entry], failed: dict[bytes, str]) -> None:
        for name, stored, _ in entries:
            if failed.get(name) == MISSING:
                self._survey.note_missing(node, stored)
            elif name in failed:
                log.info("not promoted path=%r because of=%r", node.path, name)
                self._survey.note_hole(node)

    async def _promote_file(self, node: Node, entry: Entry) -> None:
        """Bind one large file whose directory is not complete."""
        path, parent = node.path, node.parent
        self._survey.drop_large(node)
        if path in self._bound or parent is None:
            return
        try:
            await self._pool.run(("sprout", self._lease, parent.path, entry[0]), what="promote")
            failed = await self._pool.run(("plant", self._lease, parent.path, [entry]), what="promote")
        except OSError as error:
            log.info("not promoted path=%r error=%r", path, describe(error))
            return
        if not failed:
            await self._bind(path, 1, size_of(entry[2]))

    async def _bind(self, path: bytes, files: int, size: int) -> None:
        """Bind a directory or file of the tree over the mount, in place of what was bound within it."""
        inner = [other for other in self._bound if other != path and _is_within(other, path)]
        if len(self._bound) - len(inner) >= MOST_BINDS or self._refused.get(path, 0.0) > time.monotonic():
            return
        try:
            # abandoned, because it waits for this process, which may be told to end meanwhile
            await trio.to_thread.run_sync(self._attach, path, inner, limiter=self._threads, abandon_on_cancel=True)
        except OSError as error:
            log.info("not promoted path=%r error=%r", path, describe(error))
            self._refused[path] = time.monotonic() + _RETRY_SECONDS
            return
        self._set_bound({**self._bound, path: (files, size)})
        log.debug("promoted path=%r files=%d bytes=%d", path or b".", files, size)

    def _attach(self, path: bytes, inner: Sequence[bytes]) -> None:
        """Bind `path` of our tree at the same place of the mount. In a thread. Raises OSError."""
        for other in inner:
            with suppress(OSError):  # in use: it stays beneath
                umount(Path(os.fsdecode(os.path.join(os.fsencode(self._mountpoint), other))), detach=False)
        source = self._open_in_tree(path)
        try:
            target = self._open_in_mount(path)
            try:
                _bind_read_only(source, target, lambda: self._open_in_mount(path, is_bound=True))
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _open_in_tree(self, path: bytes) -> int:
        above, _, name = path.rpartition(b"/")
        directory = self._trees.open(self._lease, above)
        try:
            return os.open(name or b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)

    def _open_in_mount(self, path: bytes, *, is_bound: bool = False) -> int:
        """A descriptor of `path` in the FUSE mount; with `is_bound` of what has been bound there."""
        ours = find_mount(self._mountpoint)
        if ours is None or ours.lease is None or ours.lease[1] != self._lease:
            raise OSError(errno.ENOTCONN, "the mount is gone")
        fd = os.open(self._mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in path.split(b"/") if path else ():
            above = fd
            try:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            finally:
                os.close(above)
        if not is_bound and mount_id_of(fd) != ours.id:
            os.close(fd)
            raise OSError(errno.EBUSY, "something else is mounted there")
        return fd

    def _drop_vanished(self) -> None:
        """Forget what somebody has unmounted."""
        if not self._bound:
            return
        top = os.fsencode(self._mountpoint)
        here = {
            os.fsencode(mount.path)[len(top) + 1 :]
            for mount in read_mounts()
            if mount.tree == self._lease and _is_within(os.fsencode(mount.path), top)
        }
        self._set_bound({path: counts for path, counts in self._bound.items() if path in here})

    def _set_bound(self, bound: dict[bytes, tuple[int, int]]) -> None:
        self._bound = bound
        self._capacity.promoted_bytes = sum(bound[path][1] for path in self._outermost())


def _bind_read_only(source: int, target: int, reopen: Any) -> None:
    try:
        return attach_read_only(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    # before Linux 5.12, or in a sandbox that does not know the calls: in two steps
    place = Path(f"/proc/self/fd/{target}")
    mount(Path(f"/proc/self/fd/{source}"), place, MS_BIND)
    bound = reopen()
    try:
        remount_read_only(Path(f"/proc/self/fd/{bound}"), MS_NOSUID | MS_NODEV)
    finally:
        os.close(bound)


def _is_within(path: bytes, top: bytes) -> bool:
    return not top or path == top or path.startswith(top + b"/")


def _may_mount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def _is_behind_closed_doors(mountpoint: Path) -> bool:
    """Whether a directory above the mountpoint lets nobody through but its owner, who is this process's user."""
    for above in mountpoint.parents:
        with suppress(OSError):
            status = above.stat()
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                return True
    return False
