"""umount: what is ours, what is not, what is in use, and what stays in scratch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands.places import Place, current_user, is_ours, processes_of
from tests.conftest import needs_root
from tests.harness import mounts_below, wait_until

HOLDERS = {
    "working directory": "cd source && echo",
    "open file": "exec 3<source/one && echo",
}


@contextmanager
def holder(place: Place, use: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user that uses the mount."""
    command = ["sh", "-c", f"{HOLDERS[use]}; read wait; cat <&3"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=place.path, **pipes, **place.user.identity) as process:
        assert process.stdout.readline() == b"\n"
        yield process
        if process.poll() is None:
            process.communicate(b"\n")


class TestNotOurs:
    def test_nothing_mounted(self, place: Place):
        place.refused("umount", place.source, says=(f"nothing is mounted at {place.source}", "cachefs status"))
        place.refused("umount", place.path / "missing", says="nothing is mounted at")
        place.refused("umount", place.source / "one", says="nothing is mounted at")
        place.refused("umount", code=2, says="Missing argument 'MOUNTPOINT'")

    def test_a_directory_in_a_mount(self, place: Place):
        at = place.mount()
        place.refused("umount", at / "sub", says=f"nothing is mounted at {at}/sub")
        place.do("umount", at)

    @needs_root
    @pytest.mark.parametrize("options", [(), ("--lazy",), ("--purge",)])
    def test_a_mount_of_something_else(self, place: Place, options: tuple[str, ...]):
        subprocess.run(["mount", "-t", "tmpfs", "none", place.mountpoint], check=True)
        try:
            says = (f"{place.mountpoint} is a mount of tmpfs, not of cachefs", "unmount it with umount")
            place.refused("umount", place.mountpoint, *options, says=says)
            assert mounts_below(place.path) == [place.mountpoint]
        finally:
            subprocess.run(["umount", place.mountpoint], check=True)

    @needs_root
    def test_a_mount_of_another_user(self, ordinary_place: Place):
        place = ordinary_place
        root = Place(current_user(), place.path)
        at = root.mount()
        says = (f"cannot unmount {at}", "only the user who mounted it can, or root")
        place.refused("umount", at, says=says)
        place.refused("umount", at, "--lazy", says=says)
        root.do("umount", at)

    @needs_root
    @pytest.mark.parametrize("options", [(), ("--lazy",)])
    def test_a_promoted_mount_of_another_user(self, ordinary_place: Place, options: tuple[str, ...]):
        place = ordinary_place
        root = Place(current_user(), place.path)
        at = root.mount(place.source, "--allow-other")
        for path in at.rglob("*"):
            if path.is_file():
                path.read_bytes()
        wait_until(lambda: root.status(at)["promoted_directories"] == ["."], "all of it is promoted")
        place.refused("umount", at, *options, says=f"cannot unmount {at}: ")
        root.do("umount", at)

    @needs_root
    def test_root_unmounts_for_another_user(self, ordinary_place: Place):
        at = ordinary_place.mount()
        Place(current_user(), ordinary_place.path).do("umount", at)
        assert not is_ours(at)


class TestDead:
    @pytest.mark.parametrize("options", [(), ("--lazy",), ("--purge",), ("--lazy", "--purge")])
    def test_is_unmounted(self, place: Place, options: tuple[str, ...]):
        at = place.mount()
        place.kill_daemon(at)
        place.do("umount", at, *options)
        assert (at / "one").read_bytes() == b"1" * 1000
        assert place.scratch.exists() == ("--purge" not in options)

    def test_with_a_process_in_it(self, place: Place):
        at = place.mount()
        with holder(place, "open file") as process:
            place.kill_daemon(at)
            place.refused("umount", at, says=(f"sh (pid {process.pid}, open file)", "--lazy"))
            place.do("umount", at, "--lazy")
        assert not is_ours(at)

    def test_whose_scratch_is_gone(self, place: Place):
        at = place.mount()
        place.kill_daemon(at)
        subprocess.run(["rm", "-r", place.scratch], check=True)
        place.do("umount", at)
        assert not is_ours(at)


class TestBusy:
    @pytest.mark.parametrize("use", HOLDERS)
    def test_names_the_process(self, place: Place, use: str):
        at = place.mount()
        with holder(place, use) as process:
            line = place.refused("umount", at, says=(f"{at} is busy: held by sh (pid {process.pid}, {use})", "--lazy"))
            assert line.count("pid") == 1, "our own workers, which have the source open, do not hold the mount"
            assert is_ours(at)
            assert place.read_as_user(at / "sub" / "two") == b"2" * 2000
        place.do("umount", at)
        assert not is_ours(at)

    def test_names_a_process_that_runs_a_program_from_there(self, place: Place):
        program = place.write(place.source / "program", Path("/bin/sh").read_bytes())
        program.chmod(0o755)
        at = place.mount()
        command = [program, "-c", "echo; read wait"]
        with subprocess.Popen(
            command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, **place.user.identity
        ) as process:
            assert process.stdout.readline() == b"\n"
            place.refused("umount", at, says=f"program (pid {process.pid}, ")
            process.communicate(b"\n")
        place.do("umount", at)

    def test_does_not_name_who_was_there_before(self, place: Place):
        with holder(place, "working directory") as earlier:
            at = place.mount()
            with holder(place, "open file") as process:
                line = place.refused("umount", at, says=f"pid {process.pid}")
                assert str(earlier.pid) not in line
            place.do("umount", at)

    @pytest.mark.parametrize("use", HOLDERS)
    def test_lazy_detaches(self, place: Place, use: str):
        at = place.mount()
        with holder(place, use):
            place.do("umount", at, "--lazy")
            assert not is_ours(at)
            assert (at / "one").read_bytes() == b"1" * 1000
            assert processes_of(place.path)
        wait_until(lambda: not processes_of(place.path), "the daemon ends with its last user")
        assert os.listdir(place.scratch / "leases") == []

    def test_what_is_detached_goes_on_working(self, place: Place):
        at = place.mount()
        with holder(place, "open file") as process:
            place.do("umount", at, "--lazy")
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.read() == b"1" * 1000
            process.wait()
        wait_until(lambda: not processes_of(place.path), "the daemon ends with its last user")

    def test_lazy_with_purge_does_not_purge_under_a_user(self, place: Place):
        at = place.mount()
        with holder(place, "open file"):
            done = place.run("umount", at, "--lazy", "--purge")
            assert done.returncode == 1
            assert done.stderr == (
                f"cachefs: {at} is detached but still in use, so scratch {place.scratch} is not purged: "
                f"purge it later with: cachefs purge --scratch {place.scratch}\n"
            )
            assert not is_ours(at)
        wait_until(lambda: not processes_of(place.path), "the daemon ends with its last user")
        place.do("purge", "--scratch", place.scratch)
        assert not place.scratch.exists()

    def test_lazy_waits_where_nobody_is_in_it(self, place: Place):
        at = place.mount()
        place.do("umount", at, "--lazy", "--purge")
        assert not place.scratch.exists()


class TestPurge:
    def test_removes_scratch_that_we_made(self, place: Place):
        at = place.mount()
        assert place.read_as_user(at / "one") == b"1" * 1000
        wait_until(lambda: place.status(at)["resident_files"] == 1, "the file is resident")
        assert place.do("umount", at, "--purge") == f"purged {place.scratch}: 1 file, 1000 B\n"
        assert not place.scratch.exists()

    def test_empties_scratch_that_was_there(self, place: Place):
        place.make("scratch")
        at = place.mount()
        assert place.read_as_user(at / "one") == b"1" * 1000
        place.do("umount", at, "--purge")
        assert os.listdir(place.scratch) == []

    def test_without_it_scratch_stays(self, place: Place):
        at = place.mount()
        assert place.do("umount", at) == ""
        assert "cachefs-scratch" in os.listdir(place.scratch)
