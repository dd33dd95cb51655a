"""pyfuse3's session: mounting with a reason when it fails, readiness, limits of the kernel, unmounting."""

from __future__ import annotations

import logging
import os
import select
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import trio

from cachefs.config import Settings
from cachefs.errors import CachefsError, describe
from cachefs.mount.mountinfo import find_mount, mount_name
from cachefs.mount.system_calls import umount
from cachefs.mount.unmount import uncover_whole

log = logging.getLogger(__name__)

CONNECTIONS = Path("/sys/fs/fuse/connections")
DEVICES = Path("/sys/class/bdi")
_BACKGROUND_REQUESTS = 1000
_READ_AHEAD_KIB = 256
"""Half as many requests as with the kernel's own 128 KiB. More would save more, but as much is read around each page
fault of a map, from the source too."""


class Session:
    """A mounted session."""

    def __init__(self, settings: Settings, lease: str) -> None:
        self._settings = settings
        self._name = mount_name(settings.scratch, lease)

    async def end_when_unmounted(self, end: Callable[[], None]) -> None:
        """Call `end` when the kernel has closed the connection.

        An epoll set that asks for nothing still reports errors, which is what the device's descriptor shows then.
        """
        with select.epoll() as errors:
            errors.register(_fuse_descriptor(), 0)
            await trio.lowlevel.wait_readable(errors.fileno())
        end()

    async def announce(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` when the mount answers, as well as it can."""
        try:
            # abandoned, because it waits for this process, which may be told to end meanwhile
            await trio.to_thread.run_sync(os.stat, self._settings.mountpoint, abandon_on_cancel=True)
        except OSError as error:
            raise CachefsError(f"the source {self._settings.source} does not answer: {describe(error)}") from None
        self._tune()
        on_ready()

    def unmount(self) -> None:
        """Unmount, lazily where it is in use, unless something else lies on top or it is gone already."""
        place = self._settings.mountpoint
        mount = find_mount(place)
        if mount is None or mount.name != self._name:
            pyfuse3.close(unmount=False)
            return
        uncover_whole(mount)
        pyfuse3.close(unmount=True)
        while (left := find_mount(place)) is not None and left.name == self._name and os.geteuid() == 0:
            umount(place, detach=True)  # the mount was promoted while it was unmounted

    def _tune(self) -> None:
        """Raise what the kernel asks for in advance: from 12 requests under way, and from 128 KiB in one.

        Requests that wait for a slow or hung source count, so with 12 of them even reads of resident files would
        wait. Only the mount's owner may raise that, and only where fusectl is mounted, as systemd does; the size only
        root, and only when the kernel and libfuse have agreed on the connection: that sets it to 128 KiB.
        """
        mount = find_mount(self._settings.mountpoint)
        if mount is None:
            return
        for place, value in (
            (CONNECTIONS / mount.device.partition(":")[2] / "max_background", _BACKGROUND_REQUESTS),
            (DEVICES / mount.device / "read_ahead_kb", _READ_AHEAD_KIB),
        ):
            try:
                place.write_text(str(value))
            except OSError as error:
                log.debug("not raised limit=%s error=%r", place.name, error.strerror)


@asynccontextmanager
async def mounted_session(operations: pyfuse3.Operations, settings: Settings, lease: str) -> AsyncIterator[Session]:
    """Mount `operations` at settings.mountpoint; unmount at the end. Raises CachefsError if that fails."""
    options = {f"fsname={mount_name(settings.scratch, lease)}", "subtype=cachefs", "ro", "nosuid", "nodev"}
    if settings.allow_other:
        options |= {"allow_other", "default_permissions"}
    mountpoint = os.fspath(settings.mountpoint)
    with tempfile.TemporaryFile() as said:  # libfuse and fusermount3 say on stderr why they fail
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines()
            reason = words[-1] if words else "libfuse gives no reason"
            raise CachefsError(f"cannot mount at {mountpoint}: {reason}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    session = Session(settings, lease)
    try:
        yield session
    finally:
        session.unmount()


def _fuse_descriptor() -> int:
    """libfuse's descriptor of the FUSE device, which pyfuse3 does not give."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    raise RuntimeError("no descriptor of /dev/fuse is open")
