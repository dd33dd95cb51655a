"""The share of one mount: found before the mount answers, told in `status`, compared with what others have found.

Invariants:
- All of the source is listed and divided before the mount serves: no file is judged twice, and a share that cannot be
  had is an error before anything is fetched. A part of the listing that is missing is an error too: who divides less
  than the others comes to another division.
- A name that comes later is in one share all the same: see `cache/shards`.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from cachefs.cache.cache import Cache
from cachefs.cache.capacity import CapacityKeeper
from cachefs.cache.prefetch import Prefetch
from cachefs.cache.shards import Division, Listing, Share
from cachefs.config import Settings, Sharding, format_size
from cachefs.errors import ShardError, describe
from cachefs.fs.filesystem import FileSystem
from cachefs.fs.read_through import ReadThrough
from cachefs.mount.leases import LeaseRecord
from cachefs.mount.membership import Membership
from cachefs.mount.mountinfo import FSTYPE, mount_id_of, read_mounts
from cachefs.mount.unmount import live_lease
from cachefs.source.attributes import Attributes

log = logging.getLogger(__name__)

_PASSED_OVER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)
"""What has gone while it was listed, and what nobody may look into: no rank has it."""

NO_SHARD: dict[str, Any] = {
    "shard": None,
    "shard_by": None,
    "shard_mode": None,
    "shard_seed": None,
    "shard_files": None,
    "shard_bytes": None,
    "shard_listed_files": None,
    "shard_listed_bytes": None,
    "shard_fingerprint": None,
    "shard_warnings": [],
}
"""What `status` says of a mount of everything."""


def check_undivided(source_fd: int) -> None:
    """Raise ShardError for a source that is a view of a shard: a part of it would be taken for a part of everything.

    It may be one since a moment ago, where two ranks mount over the same path.
    """
    mounts, number = read_mounts(), mount_id_of(source_fd)
    mount = next((mount for mount in mounts if mount.id == number), None)
    if mount is not None and mount.tree is not None:  # promoted by it: the lease is that of the mount beneath
        tree = mount.tree
        mount = next((other for other in mounts if other.lease is not None and other.lease[1] == tree), mount)
    lease = live_lease(mount) if mount is not None and mount.fstype == FSTYPE else None
    if mount is not None and lease is not None and " view" in lease.shard:
        raise ShardError(
            f"the source is in the mount at {mount.path}, which shows shard {lease.shard} alone",
            "mount at another place, or leave --shard to one of the two",
        )


async def take_share(
    sharding: Sharding,
    capacity: CapacityKeeper,
    filesystem: FileSystem,
    cache: Cache,
    prefetch: Prefetch,
    read_through: ReadThrough,
) -> Share:
    """Find the share, and have the mount show, or keep, that alone from now on. Raises ShardError."""

    async def room() -> int:
        try:
            return capacity.room() - await capacity.held_by_others()
        except OSError as error:
            log.warning("not known what other datasets hold error=%r", describe(error))
            return capacity.room()

    began = time.monotonic()
    share = await find_share(sharding, room, filesystem)
    cache.keeps = read_through.wants = share.keeps
    if sharding.fill:
        cache.is_extra = prefetch.is_extra = share.is_extra
    if sharding.mode == "view":
        await filesystem.show_only(share.has)
    log.info("shard %s files=%d bytes=%d seconds=%.1f", sharding, share.files, share.bytes, time.monotonic() - began)
    return share


async def find_share(sharding: Sharding, room: Callable[[], Awaitable[int]], filesystem: FileSystem) -> Share:
    """List the source and divide it; the share, made to fit the room as `sharding` says. Raises ShardError.

    `room` is asked when the listing is there: how many bytes scratch can hold.
    """
    listing = await _list(sharding, filesystem)
    division = await trio.to_thread.run_sync(Division, listing, sharding.count)
    share = Share(division, sharding.number)
    _fit(sharding, share, await room())
    return share


class DeclaredShare:
    """A mount's share, as it is declared to the other mounts of the scratch."""

    def __init__(self, settings: Settings, sharding: Sharding, share: Share, room: int, membership: Membership) -> None:
        self._scratch = settings.scratch
        self._sharding = sharding
        self._share = share
        self._room = room
        self._membership = membership

    async def declare(self) -> None:
        """Put it into the lease, and say in the log what does not go together with others. Waits for scratch's lock."""
        division = self._share.division
        said = division.fingerprint, division.bytes[self._sharding.number]
        try:
            await trio.to_thread.run_sync(self._membership.declare, *said, abandon_on_cancel=True)
        except OSError as error:
            log.warning("other mounts do not hear of this shard error=%r", describe(error))
        for warning in self.warnings():
            log.warning("%s", warning)

    def status(self) -> dict[str, Any]:
        """Sizes in bytes; the listing's count each name."""
        division = self._share.division
        return {
            "shard": f"{self._sharding.number}/{self._sharding.count}",
            "shard_by": self._sharding.by,
            "shard_mode": self._sharding.mode,
            "shard_seed": self._sharding.seed,
            "shard_files": self._share.files,
            "shard_bytes": self._share.bytes,
            "shard_listed_files": sum(division.files),
            "shard_listed_bytes": sum(division.bytes),
            "shard_fingerprint": division.fingerprint,
            "shard_warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What does not go together with other live mounts: the listings of those that divide the same source alike,
        and that are of this scratch or show here; the shards of those of this scratch."""
        ours, division = self._membership.record, self._share.division
        live = [record for record in self._live() if record.fingerprint]
        found: list[str] = []
        for other in [*live, *_live_elsewhere(self._scratch)]:
            is_alike = (other.dataset, other.division) == (ours.dataset, ours.division)
            if is_alike and other.fingerprint not in ("", division.fingerprint):
                found.append(
                    f"the source was listed otherwise by the mount of shard {other.shard} at {other.mountpoint} "
                    f"(fingerprint {other.fingerprint}, here {division.fingerprint}): some files may be in no shard or "
                    "in two; mount all ranks anew while the source does not change"
                )
        shards = {(record.dataset, record.division, _number(record)): record.shard_bytes for record in live}
        needed = sum(shards.values())
        if len(shards) > 1 and needed > self._room:
            found.append(
                f"the shards of the mounts of this scratch take {format_size(needed)} together, and it has room for "
                f"{format_size(self._room)}: the rest is read from the source"
            )
        if self._share.bytes < division.bytes[self._sharding.number]:
            found.append(
                f"{format_size(division.bytes[self._sharding.number] - self._share.bytes)} of the shard are cut off, "
                "because scratch has no room for them: they are read from the source"
            )
        return found

    def find_spare(self) -> Callable[[bytes], bool] | None:
        """What says of a path whether it is in no live mount's shard; None where some have others, or everything."""
        ours, division = self._membership.record, self._share.division
        live = [record for record in self._live() if record.dataset == ours.dataset]
        if any(
            record.division != ours.division or record.fingerprint not in ("", division.fingerprint) for record in live
        ):
            return None
        numbers = {self._sharding.number, *map(_number, live)}
        return lambda path: division.owner(path) not in numbers

    def _live(self) -> list[LeaseRecord]:
        """Of the mounts of this scratch."""
        try:
            return self._membership.live()
        except OSError:  # somebody has removed scratch
            return []


def _live_elsewhere(scratch: Path) -> list[LeaseRecord]:
    """The leases of the live mounts that show here and have another scratch: on other disks, say."""
    others = [mount for mount in read_mounts() if mount.lease is not None and mount.lease[0] != scratch]
    return [record for mount in others if (record := live_lease(mount)) is not None]


async def _list(sharding: Sharding, filesystem: FileSystem) -> Listing:
    listing = Listing(sharding.seed)

    async def add(path: bytes, packed: bytes) -> None:
        attributes = Attributes.unpack(packed)
        content = (attributes.device, attributes.inode) if attributes.links > 1 else None
        listing.add(path, attributes.size, content)

    def fail(path: bytes, error: OSError) -> None:
        if error.errno not in _PASSED_OVER:
            raise error

    try:
        root = await filesystem.find(b"")
        await filesystem.walk(root, is_tree=True, on_file=add, by_name=True, on_error=fail)
    except OSError as error:
        raise ShardError(
            f"the source cannot be divided into shards, because it could not be listed: {describe(error)}",
            "try again when it answers",
        ) from None
    return listing


def _fit(sharding: Sharding, share: Share, room: int) -> None:
    if share.bytes > room:
        if not sharding.cut:
            raise ShardError(
                f"shard {sharding.number}/{sharding.count} has {format_size(share.bytes)} in {share.files:,} files, "
                f"and scratch has room for {format_size(room)}",
                "give it more with --capacity or another --scratch, or keep what fits with --shard-cut",
            )
        share.cut(room)
    elif sharding.fill:
        share.grow(room)


def _number(record: LeaseRecord) -> int:
    return int(record.shard.partition("/")[0])
