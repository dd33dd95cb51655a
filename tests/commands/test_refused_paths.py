"""Sources, mountpoints and scratch directories that cannot work: one line that says why, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from cachefs.config import Settings
from cachefs.mount.checks import warnings
from tests.commands.places import Place, current_user, is_ours
from tests.conftest import needs_root


class TestSource:
    def test_that_does_not_exist(self, place: Place):
        missing = place.path / "missing"
        place.refused("mount", missing, "--scratch", place.scratch, says=(f"there is no source {missing}", "spelling"))

    def test_that_is_a_file(self, place: Place):
        file = place.source / "one"
        place.refused("mount", file, "--scratch", place.scratch, says=f"source {file} is not a directory")

    def test_below_a_file(self, place: Place):
        path = place.source / "one" / "more"
        place.refused("mount", path, "--scratch", place.scratch, says=(str(path), "Not a directory"))

    def test_that_is_a_dangling_link(self, place: Place):
        link = place.path / "link"
        link.symlink_to("nowhere")
        place.refused("mount", link, "--scratch", place.scratch, says="there is no source")

    def test_that_is_a_loop_of_links(self, place: Place):
        link = place.path / "loop"
        link.symlink_to("loop")
        place.refused("mount", link, "--scratch", place.scratch, says=("source", "symbolic link"))

    @pytest.mark.parametrize("mode", [0o300, 0o400, 0o000])
    def test_that_is_unreadable(self, ordinary_place: Place, mode: int):
        place = ordinary_place
        place.source.chmod(mode)
        try:
            says = f"source {place.source} is not readable by this user"
            done = place.run("mount", place.source, place.mountpoint, "--scratch", place.scratch)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"cachefs: {says}")
            assert done.stderr.count("\n") == 1
            assert not is_ours(place.mountpoint)
            assert not place.scratch.exists()
        finally:
            place.source.chmod(0o755)

    def test_below_an_unreadable_directory(self, ordinary_place: Place):
        place = ordinary_place
        place.source.chmod(0)
        try:
            done = place.run("mount", place.source / "sub", "--scratch", place.scratch)
            assert done.returncode == 1
            assert done.stderr == f"cachefs: source {place.source}/sub cannot be reached: Permission denied\n"
            assert not place.scratch.exists()
        finally:
            place.source.chmod(0o755)

    def test_empty_argument_is_not_the_current_directory(self, own_place: Place):
        own_place.refused("mount", "", "--scratch", own_place.scratch, code=2, says=("SOURCE", "the path is empty"))
        own_place.refused("mount", own_place.source, "", code=2, says=("MOUNTPOINT", "the path is empty"))
        own_place.refused("mount", own_place.source, "--scratch", "", code=2, says=("--scratch", "the path is empty"))
        own_place.refused("umount", "", code=2, says="the path is empty")

    def test_no_argument(self, own_place: Place):
        own_place.refused("mount", code=2, says="Missing argument 'SOURCE'")
        own_place.refused("mount", "a", "b", "c", code=2, says="unexpected extra argument")


class TestMountpoint:
    def test_that_does_not_exist(self, place: Place):
        missing = place.path / "missing"
        says = (f"there is no mountpoint {missing}", "make it")
        place.refused("mount", place.source, missing, "--scratch", place.scratch, says=says)

    def test_that_is_a_file(self, place: Place):
        file = place.source / "one"
        says = f"mountpoint {file} is not a directory"
        place.refused("mount", place.source, file, "--scratch", place.scratch, says=says)

    @pytest.mark.parametrize("path", ["/usr", "/tmp"])
    def test_of_somebody_else(self, ordinary_place: Place, path: str):
        place = ordinary_place
        says = (f"this user may not mount at {path}", "give a MOUNTPOINT")
        place.refused("mount", place.source, path, "--scratch", place.scratch, says=says)
        place.refused("mount", path, "--scratch", place.scratch, says=says)

    def test_already_mounted_by_us(self, place: Place):
        at = place.mount()
        says = (f"{at} is a mount of cachefs already", f"cachefs umount {at}")
        place.refused("mount", at, "--scratch", place.scratch, says=says)
        place.refused("mount", place.source / "sub", at, "--scratch", place.path / "other", says=says)
        place.do("umount", at)

    def test_already_mounted_by_us_and_dead(self, place: Place):
        at = place.mount()
        place.kill_daemon(at)
        place.refused("mount", at, "--scratch", place.scratch, says=f"{at} is a mount of cachefs already")
        place.do("umount", at)
        place.mount()
        place.do("umount", at)


class TestScratch:
    def refused(self, place: Place, scratch: Path, *says: str) -> None:
        place.refused("mount", place.source, place.mountpoint, "--scratch", scratch, says=says)
        assert not is_ours(place.mountpoint)

    def test_inside_the_source(self, place: Place):
        self.refused(place, place.source / "scratch", "is inside the source", "--scratch")
        self.refused(place, place.source / "sub", "is inside the source")
        self.refused(place, place.source, "is the source itself")

    def test_inside_the_source_by_way_of_a_link(self, place: Place):
        (place.path / "link").symlink_to(place.source / "sub")
        self.refused(place, place.path / "link" / "scratch", f"scratch {place.source}/sub/scratch is inside the source")

    def test_inside_the_mountpoint(self, place: Place):
        self.refused(place, place.mountpoint / "scratch", "is inside the mountpoint")
        self.refused(place, place.mountpoint, "is the mountpoint itself")

    def test_around_the_source(self, place: Place):
        scratch = place.make("scratch")
        source = place.make("scratch", "source")
        says = f"source {source} is inside scratch {scratch}"
        place.refused("mount", source, place.mountpoint, "--scratch", scratch, says=says)

    def test_around_the_mountpoint(self, place: Place):
        scratch = place.make("scratch")
        at = place.make("scratch", "mountpoint")
        says = f"mountpoint {at} is inside scratch {scratch}"
        place.refused("mount", place.source, at, "--scratch", scratch, says=says)

    def test_in_a_directory_that_does_not_exist(self, place: Place):
        self.refused(place, place.path / "no" / "scratch", f"{place.path}/no does not exist", "make that first")
        place.refused(
            "mount", place.source, "--scratch", place.path / "no" / "x", "--capacity", "1M", says="does not exist"
        )

    def test_that_cannot_be_made(self, ordinary_place: Place):
        self.refused(ordinary_place, Path("/usr/cachefs-scratch"), "cannot be made: Permission denied", "--scratch")

    def test_below_a_directory_that_cannot_be_entered(self, ordinary_place: Place):
        closed = ordinary_place.make("closed", mode=0)
        self.refused(ordinary_place, closed / "scratch", "cannot be made: Permission denied")
        place = ordinary_place
        arguments = ("mount", place.source, "--scratch", closed / "scratch", "--capacity", "1M")
        place.refused(*arguments, says="cannot be made: Permission denied")
        closed.chmod(0o700)

    def test_that_is_not_writable(self, ordinary_place: Place):
        scratch = ordinary_place.make("scratch", mode=0o500)
        self.refused(ordinary_place, scratch, f"scratch {scratch} is not writable", "--scratch")

    def test_of_another_user(self, ordinary_place: Place):
        self.refused(ordinary_place, Path("/usr"), "scratch /usr is owned by uid 0, not", "--scratch")
        self.refused(ordinary_place, Path("/etc/ssl/private"), "is owned by uid 0")

    @needs_root
    def test_of_another_user_for_root(self, ordinary_place: Place):
        scratch = ordinary_place.make("scratch")
        says = f"scratch {scratch} is owned by uid {ordinary_place.user.uid}, not 0"
        Place(current_user(), ordinary_place.path).refused(
            "mount", ordinary_place.source, "--scratch", scratch, says=says
        )

    @pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
    def test_writable_by_others(self, place: Place, mode: int):
        scratch = place.make("scratch", mode=mode)
        self.refused(place, scratch, f"scratch {scratch} is writable by others (mode {mode:04o})", "--scratch")

    def test_that_is_a_link(self, place: Place):
        place.make("target")
        place.scratch.symlink_to("target")
        self.refused(place, place.scratch, f"scratch {place.scratch} is a symbolic link", "--scratch")

    def test_that_is_a_dangling_link(self, place: Place):
        place.scratch.symlink_to("nowhere")
        self.refused(place, place.scratch, f"scratch {place.scratch} is a symbolic link")

    def test_that_is_a_file(self, place: Place):
        place.write(place.scratch, "important")
        self.refused(place, place.scratch, f"scratch {place.scratch} is not a directory")

    def test_that_holds_other_files(self, place: Place):
        place.make("scratch")
        place.write(place.scratch / "thesis", "important")
        self.refused(place, place.scratch, "holds files that are not of cachefs", f"--scratch {place.scratch}/cachefs")

    @pytest.mark.parametrize("content", ["{}", "not json", '{"format": 99, "directory_made_by_cachefs": true}'])
    def test_with_a_damaged_mark(self, place: Place, content: str):
        place.make("scratch", mode=0o700)
        place.write(place.scratch / "cachefs-scratch", content)
        self.refused(place, place.scratch, str(place.scratch), "format 99" if "99" in content else "damaged")

    def test_with_a_mark_that_is_a_link_or_a_pipe(self, place: Place):
        place.make("scratch", mode=0o700)
        mark = place.scratch / "cachefs-scratch"
        mark.symlink_to(place.write(place.path / "other", '{"format": 1, "directory_made_by_cachefs": true}'))
        self.refused(place, place.scratch, "is not usable", "symbolic link")
        mark.unlink()
        os.mkfifo(mark)
        self.refused(place, place.scratch, "damaged")

    def test_readable_by_others_is_closed(self, place: Place):
        place.make("scratch", mode=0o755)
        at = place.mount()
        assert place.scratch.stat().st_mode & 0o777 == 0o700
        place.do("umount", at)
        place.scratch.chmod(0o755)
        place.mount()
        assert place.scratch.stat().st_mode & 0o777 == 0o700
        place.do("umount", at)


class TestWarnings:
    def test_of_scratch_in_memory(self, place: Place):
        if subprocess.run(["stat", "-f", "-c", "%T", "/dev/shm"], capture_output=True).stdout != b"tmpfs\n":
            pytest.skip("no tmpfs at /dev/shm")
        scratch = Path(tempfile.mkdtemp(dir="/dev/shm"))
        os.chown(scratch, place.user.uid, place.user.gid)
        try:
            done = place.run("mount", place.source, "--scratch", scratch, "--capacity", "10M")
            assert done.returncode == 0
            assert done.stderr.startswith(f"cachefs: warning: scratch {scratch} is in memory (tmpfs)")
            assert "counts against its limit" in done.stderr
            assert done.stderr.count("\n") == 1
            place.do("umount", place.source, "--purge")
            assert list(scratch.iterdir()) == []
        finally:
            shutil.rmtree(scratch)

    def test_no_warning_about_a_mount_that_fails(self, place: Place):
        place.refused("mount", place.source, "--scratch", "/dev/shm/no/scratch", says="does not exist")

    def test_of_scratch_on_a_network_file_system(self, slow_source, tmp_path: Path):
        backing = tmp_path / "backing"
        backing.mkdir()
        slow = slow_source(backing)
        [warning] = warnings(Settings(source=backing, mountpoint=backing, scratch=slow.path / "scratch"))
        assert "is on a network file system (fuse.slowsource)" in warning
        assert "hits cost its latency" in warning
        assert "--scratch" in warning

    def test_none_on_a_disk(self, tmp_path: Path):
        if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True).stdout == b"tmpfs\n":
            pytest.skip("the tests' directory is in memory")
        assert not list(warnings(Settings(source=tmp_path, mountpoint=tmp_path, scratch=tmp_path / "scratch")))
