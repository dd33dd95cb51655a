"""What systemd is told, over a real datagram socket, and the line of status."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.mount import notify
from cachefs.mount.notify import ServiceManager, status_line
from tests.harness import wait_until

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
REPORT = {
    "mountpoint": "/data",
    "resident_files": 1200,
    "resident_bytes": 130 << 20,
    "hits": 1915,
    "misses": 90,
    "bypasses": 10,
}
LINE = "STATUS=serving /data: 1,200 files resident (130.0 MiB), 95% hits"


class Listener:
    """systemd's end: a bound datagram socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)

    def hear(self) -> list[str]:
        """The lines of the next message."""
        return self.socket.recv(4096).decode().split("\n")

    async def hear_soon(self) -> list[str]:
        return await trio.to_thread.run_sync(self.hear)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(str(tmp_path / "notify"))
    with listener.socket:
        yield listener


@pytest.fixture
def manager(listener: Listener) -> ServiceManager:
    return ServiceManager(listener.socket.getsockname(), watchdog_seconds=0.02)


class TestEnvironment:
    def manager(self, monkeypatch: pytest.MonkeyPatch, **variables: str) -> ServiceManager | None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        manager = ServiceManager.from_environment()
        assert not set(VARIABLES) & set(os.environ)  # not for children
        return manager

    def test_nobody_waits(self, monkeypatch):
        assert self.manager(monkeypatch) is None
        assert self.manager(monkeypatch, WATCHDOG_USEC="1000000") is None

    @pytest.mark.parametrize("name", ["", "relative", "vsock:2:1234"])
    def test_what_is_not_understood_is_nobody(self, monkeypatch, name):
        assert self.manager(monkeypatch, NOTIFY_SOCKET=name) is None

    def test_socket(self, monkeypatch):
        assert self.manager(monkeypatch, NOTIFY_SOCKET="/run/notify") == ServiceManager("/run/notify")
        assert self.manager(monkeypatch, NOTIFY_SOCKET="@abstract/name") == ServiceManager("\0abstract/name")

    @pytest.mark.parametrize("pid", ["", str(os.getpid())], ids=["of anybody", "ours"])
    def test_watchdog(self, monkeypatch, pid):
        manager = self.manager(monkeypatch, NOTIFY_SOCKET="/n", WATCHDOG_USEC="30000000", WATCHDOG_PID=pid)
        assert manager == ServiceManager("/n", 30.0)

    @pytest.mark.parametrize(
        ("microseconds", "pid"), [("30000000", "1"), ("0", ""), ("", ""), ("-5", ""), ("soon", ""), ("30000000", "x")]
    )
    def test_no_watchdog_for_us(self, monkeypatch, microseconds, pid):
        manager = self.manager(monkeypatch, NOTIFY_SOCKET="/n", WATCHDOG_USEC=microseconds, WATCHDOG_PID=pid)
        assert manager == ServiceManager("/n")


def test_more_time_to_start(manager: ServiceManager, listener: Listener):
    """While the source is listed to find a shard."""
    manager.ask_for_time()
    assert listener.hear() == [f"EXTEND_TIMEOUT_USEC={notify.STARTING_MORE_SECONDS * 1_000_000}"]
    ServiceManager("/nowhere").ask_for_time()  # nobody is there: it starts all the same


class TestKeepInformed:
    def test_from_the_first_word_to_the_last(self, listener, manager):
        heard = []

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manager.keep_informed, lambda: REPORT)
                for _ in range(3):
                    heard.append(await listener.hear_soon())
                nursery.cancel_scope.cancel()

        trio.run(main)
        assert heard == [["READY=1", LINE], ["WATCHDOG=1", LINE], ["WATCHDOG=1", LINE]]
        while (last := listener.hear())[0] == "WATCHDOG=1":
            continue
        assert last == ["STOPPING=1", "STATUS=unmounting"]

    def test_status_is_of_the_moment(self, listener, manager):
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                report = dict(REPORT)
                nursery.start_soon(manager.keep_informed, lambda: report)
                await listener.hear_soon()
                report["resident_files"] = 1201
                while "1,201 files" not in (await listener.hear_soon())[1]:
                    continue
                nursery.cancel_scope.cancel()

        trio.run(main)

    @pytest.mark.parametrize(("watchdog", "pause"), [(None, 5.0), (60.0, 5.0), (4.0, 2.0)])
    def test_how_often(self, listener, monkeypatch, watchdog, pause):
        """Twice in the watchdog's interval, and so often that the status is fresh."""
        pauses = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            raise KeyboardInterrupt

        monkeypatch.setattr(notify.trio, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            trio.run(ServiceManager(listener.socket.getsockname(), watchdog).keep_informed, lambda: REPORT)
        assert pauses == [pause]

    def test_abstract_socket(self):
        address = f"\0cachefs-test-{os.getpid()}"
        listener = Listener(address)
        with listener.socket:
            trio.run(run_until_heard, ServiceManager(address), listener)

    def test_a_manager_that_is_away_for_a_while(self, tmp_path, caplog):
        """It is told again when it is back; the mount goes on meanwhile."""
        address = str(tmp_path / "notify")
        caplog.set_level(logging.WARNING)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ServiceManager(address, watchdog_seconds=0.02).keep_informed, lambda: REPORT)
                await trio.to_thread.run_sync(wait_until, lambda: caplog.records, "it is missed")
                back = Listener(address)
                with back.socket:
                    assert (await back.hear_soon())[0] == "READY=1"
                    assert (await back.hear_soon())[0] == "WATCHDOG=1"
                    nursery.cancel_scope.cancel()

        trio.run(main)
        assert caplog.messages[0] == "service manager not informed error='No such file or directory'"

    def test_a_manager_that_does_not_listen_holds_nothing_up(self, listener, manager, monkeypatch):
        monkeypatch.setattr(notify, "_LAST_WORD_SECONDS", 0.01)
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with filler, suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(b"", listener.socket.getsockname())

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manager.keep_informed, lambda: REPORT)
                await trio.testing.wait_all_tasks_blocked()  # waits for room, in epoll and not in a loop
                nursery.cancel_scope.cancel()

        trio.run(main)
        messages = []
        listener.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                messages.append(listener.socket.recv(4096))
        assert set(messages) == {b""}


class TestStatusLine:
    def test_all_of_it(self):
        assert status_line(REPORT) == LINE.removeprefix("STATUS=")

    def test_before_the_first_open(self):
        report = {**REPORT, "resident_files": 0, "resident_bytes": 0, "hits": 0, "misses": 0, "bypasses": 0}
        assert status_line(report) == "serving /data: 0 files resident (0 B)"

    def test_one_file(self):
        assert "1 file resident" in status_line({**REPORT, "resident_files": 1})

    @pytest.mark.parametrize("mountpoint", ["/da\nWATCHDOG=trigger", "/da\udcff"])
    def test_stays_one_printable_line(self, mountpoint):
        line = status_line({**REPORT, "mountpoint": mountpoint})
        assert line.isprintable()
        assert line.startswith("serving /da?")


async def run_until_heard(manager: ServiceManager, listener: Listener) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.keep_informed, lambda: REPORT)
        assert (await listener.hear_soon())[0] == "READY=1"
        nursery.cancel_scope.cancel()
