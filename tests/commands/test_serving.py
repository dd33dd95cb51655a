"""How a mount starts and ends: what the command leaves open, the foreground, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.commands.places import Place, is_ours, processes_of
from tests.harness import CACHEFS, wait_until

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def leases(place: Place) -> list[str]:
    return os.listdir(place.scratch / "leases") + os.listdir(place.scratch / "sockets")


def assert_ended_cleanly(place: Place) -> None:
    wait_until(lambda: not processes_of(place.path), "the daemon ends")
    assert not is_ours(place.source)
    assert (place.source / "one").read_bytes() == b"1" * 1000
    assert leases(place) == []


def test_mount_holds_no_pipe(place: Place):
    process = place.start(
        "mount",
        place.source,
        "--scratch",
        place.scratch,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    printed = (
        process.stdout.read(),
        process.stderr.read(),
    )  # returns at the end of both, which the daemon must not delay
    assert printed == ("", "")
    assert process.wait() == 0
    assert is_ours(place.source)
    pipes = {os.readlink(f"/proc/self/fd/{pipe.fileno()}") for pipe in (process.stdin, process.stdout, process.stderr)}
    held = {os.readlink(link) for pid in processes_of(place.path) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert held
    assert not pipes & held
    for pipe in process.stdin, process.stdout, process.stderr:
        pipe.close()
    place.do("umount", place.source)


def test_the_daemon_leaves_the_terminal_and_the_directory(place: Place):
    place.mount()
    daemon = psutil.Process(int(place.status(place.source)["pid"]))
    assert os.getsid(daemon.pid) == daemon.pid != os.getsid(0)
    assert os.readlink(f"/proc/{daemon.pid}/cwd") == "/"
    place.do("umount", place.source)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-", "<&- >&-"])
def test_mount_with_closed_streams(place: Place, closed: str):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *CACHEFS]
    command += ["mount", str(place.source), "--scratch", str(place.scratch)]
    done = subprocess.run(command, env=place.environ(), cwd=place.path, check=False, **place.user.identity)
    assert done.returncode == 0
    assert place.read_as_user(place.source / "one") == b"1" * 1000
    command[-4:] = ["umount", str(place.source)]
    assert (
        subprocess.run(command, env=place.environ(), cwd=place.path, check=False, **place.user.identity).returncode == 0
    )
    assert_ended_cleanly(place)


class TestForeground:
    def start(self, place: Place) -> subprocess.Popen[str]:
        process = place.start(
            "mount",
            place.source,
            "--scratch",
            place.scratch,
            "--foreground",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for line in process.stderr:
            if line == f"cachefs: serving {place.source}\n":
                break
        return process

    def test_says_only_that_it_serves(self, place: Place):
        command = ("mount", place.source, "--scratch", place.scratch, "--foreground")
        with place.start(*command, stderr=subprocess.PIPE) as process:
            said = process.stderr.readline()
            process.terminate()
            process.stderr.read()
            assert process.wait() == 0
        assert said == f"cachefs: serving {place.source}\n"

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_serves_until_a_signal(self, place: Place, number: signal.Signals):
        with self.start(place) as process:
            assert place.read_as_user(place.source / "one") == b"1" * 1000
            assert place.status(place.source)["pid"] == process.pid
            process.send_signal(number)
            assert process.wait() == 0
            assert process.stdout.read() == ""
            said = process.stderr.read()
            assert f"ending signal={number.name}" in said
            assert "Traceback" not in said
        assert_ended_cleanly(place)

    def test_serves_until_unmounted(self, place: Place):
        with self.start(place) as process:
            place.do("umount", place.source)
            assert process.wait() == 0
        assert_ended_cleanly(place)

    def test_says_why_it_does_not_serve(self, place: Place):
        scratch = place.make("scratch", mode=0o777)
        place.refused("mount", place.source, "--foreground", "--scratch", scratch, says="is writable by others")


class TestSignals:
    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_end_an_idle_daemon(self, place: Place, number: signal.Signals):
        place.mount()
        os.kill(int(place.status(place.source)["pid"]), number)
        assert_ended_cleanly(place)

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    @pytest.mark.parametrize("use", ["open file", "working directory"])
    def test_end_a_daemon_in_use(self, place: Place, number: signal.Signals, use: str):
        place.mount()
        pid = int(place.status(place.source)["pid"])
        script = "cd source && echo" if use == "working directory" else "exec 3<source/one && echo"
        with subprocess.Popen(
            ["sh", "-c", f"{script}; read wait"],
            cwd=place.path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **place.user.identity,
        ) as holder:
            assert holder.stdout.readline() == b"\n"
            os.kill(pid, number)
            assert_ended_cleanly(place)
            holder.communicate(b"\n")

    def test_hanging_up_the_terminal_does_not_end_it(self, place: Place):
        place.mount()
        pid = int(place.status(place.source)["pid"])
        assert os.getsid(pid) == pid  # no terminal can send it one
        place.do("umount", place.source)


def test_a_second_mount_serves_from_what_the_first_left(place: Place):
    place.mount()
    assert place.read_as_user(place.source / "one") == b"1" * 1000
    wait_until(lambda: place.status(place.source)["resident_files"] == 1, "the file is resident")
    place.do("umount", place.source)
    place.mount()
    assert place.read_as_user(place.source / "one") == b"1" * 1000
    status = place.status(place.source)
    assert (status["hits"], status["misses"], status["resident_files"]) == (1, 0, 1)
    place.do("umount", place.source)
