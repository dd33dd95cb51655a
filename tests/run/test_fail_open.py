"""Where nothing can be cached the command runs on the source, with one line that says why; --strict makes it an error.

Machines without this or that are made real in mount and user namespaces.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_refused_machine import HIDE_FUSERMOUNT, NEW_DEV
from tests.conftest import needs_root
from tests.run.running import JobPlace, warnings_of


def on_machine(place: JobPlace, setup: str, *command: object, options: tuple[object, ...] = (), data: object = None):
    """Run a command with its data cached, as the user, where root has run the shell script `setup`."""
    before = place.on_own_mounts(setup)
    return place.cached(*command, before=before, options=options, data=data, user=0, group=0)


def assert_open(place: JobPlace, done: subprocess.CompletedProcess[str], *says: str, said: str = "1" * 1000) -> None:
    """The command has read the source, and one line has said why."""
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert len(warnings_of(done.stderr)) == 1, done.stderr
    assert done.stderr.startswith("cachefs: warning: "), done.stderr
    for words in ("is not cached, the command reads the source: ", *says):
        assert words in done.stderr, done.stderr
    place.wait_for_the_end()


def assert_strict(place: JobPlace, done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for words in (" cannot be cached, and --strict was given: ", *says):
        assert words in done.stderr
    place.wait_for_the_end()


@needs_root
def test_no_device(place: JobPlace):
    cat = ("cat", place.source / "one")
    assert_open(place, on_machine(place, NEW_DEV, *cat), f"{place.source} is not cached", "there is no /dev/fuse")
    assert_strict(place, on_machine(place, NEW_DEV, *cat, options=("--strict",)), "there is no /dev/fuse")
    assert not place.scratch.exists()


@needs_root
def test_no_permission_on_the_device(ordinary_place: JobPlace):
    place = ordinary_place
    setup = f"{NEW_DEV} && mknod -m 600 /dev/fuse c 10 229"
    done = on_machine(place, setup, "cat", place.source / "one")
    assert_open(place, done, "/dev/fuse cannot be opened: Permission denied")


@needs_root
def test_a_device_without_its_module(place: JobPlace):
    setup = f"{NEW_DEV} && mknod -m 666 /dev/fuse c 10 253"
    assert_open(place, on_machine(place, setup, "cat", place.source / "one"), "/dev/fuse cannot be opened")


@needs_root
def test_neither_fusermount3_nor_a_home_is_needed(ordinary_place: JobPlace):
    done = on_machine(ordinary_place, HIDE_FUSERMOUNT, "cat", ordinary_place.source / "one")
    assert (done.returncode, done.stdout, warnings_of(done.stderr)) == (0, "1" * 1000, [])


# User namespaces.


def run_with_namespaces_limited(
    place: JobPlace, *command: object, data: object = None, options: tuple[object, ...] = (), limit: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run it as the place's user in a user namespace of root's, in which not more than `limit` can be made."""
    line = [*place.line(*options, data=data), *command]
    mounts = ("--mount", "--propagation", "unchanged")
    return place.run_with_namespaces_limited(*line, limit=limit, unshare=mounts)


@needs_root
def test_fusermount3_instead_of_user_namespaces(ordinary_place: JobPlace):
    """It works for what this user may write to, with all that belongs to it; and the mount is seen by others."""
    place = ordinary_place
    script = f"cat {place.source}/one; stat -f -c %T {place.source}; touch {place.source}/new"
    done = run_with_namespaces_limited(place, "sh", "-c", script)
    assert done.returncode == 1, "touch has failed"
    assert done.stdout.startswith("1" * 1000 + "fuse")
    assert "Read-only file system" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("cachefs: 1 file and 1000 B from the source, ")
    place.wait_for_the_end()
    assert not place.scratch.exists()


def foreign_data(place: JobPlace) -> Path:
    """A directory of root's, which the user may read and not mount on: `file` in it says "theirs"."""
    foreign = place.path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("theirs")
    return foreign


@needs_root
def test_neither_user_namespaces_nor_fusermount3(ordinary_place: JobPlace):
    place = ordinary_place
    foreign = foreign_data(place)
    done = run_with_namespaces_limited(place, "cat", foreign / "file", data=foreign)
    says = ("user namespaces are switched off on this machine", f"may not mount at {foreign}")
    assert_open(place, done, *says, said="theirs")
    done = run_with_namespaces_limited(place, "cat", foreign / "file", data=foreign, options=("--strict",))
    assert_strict(place, done, "user namespaces are switched off on this machine")
    assert not place.scratch.exists()


@needs_root
def test_one_of_several_data_cannot_be_mounted(ordinary_place: JobPlace):
    """The others are cached; with --strict nothing is, and nothing is left."""
    place = ordinary_place
    foreign = foreign_data(place)
    cat = ("cat", place.source / "one", foreign / "file")
    done = run_with_namespaces_limited(place, *cat, data=[place.source, foreign])
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "theirs"), done.stderr
    warning, summary = done.stderr.splitlines()
    assert warning.startswith(f"cachefs: warning: {foreign} is not cached, the command reads the source: ")
    assert summary.startswith("cachefs: 1 file and 1000 B from the source, ")
    place.wait_for_the_end()
    done = run_with_namespaces_limited(place, *cat, data=[place.source, foreign], options=("--strict",))
    assert_strict(place, done, str(foreign))
    assert not place.scratch.exists()


def test_no_more_user_namespaces(ordinary_place: JobPlace):
    """In one in which no other can be made, and in which fusermount3 has no power either."""
    place = ordinary_place
    inner = shlex.join(["unshare", f"--map-user={place.user.uid}"])
    before = ("unshare", "-r", "sh", "-c", f'echo 1 > /proc/sys/user/max_user_namespaces && exec {inner} "$@"', "sh")
    done = place.cached("cat", place.source / "one", before=before)
    assert_open(place, done, "no more user namespaces can be made", "/proc/sys/user/max_user_namespaces")
    done = place.cached("cat", place.source / "one", before=before, options=("--strict",))
    assert_strict(place, done, "no more user namespaces can be made")


@needs_root
def test_namespaces_that_hardly_suffice(ordinary_place: JobPlace):
    """The kernel frees one late: the trial's may still count when the job's is made. Either is well."""
    place = ordinary_place
    done = run_with_namespaces_limited(place, "cat", place.source / "one", limit=1)
    if warnings_of(done.stderr):
        assert_open(place, done, "no more user namespaces can be made")
    assert (done.returncode, done.stdout) == (0, "1" * 1000)
    place.wait_for_the_end()


@needs_root
def test_root_without_capabilities(own_place: JobPlace):
    """Root of a container: user namespaces as for any other user, or else the source."""
    place = own_place
    before = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
    done = place.cached("cat", place.source / "one", before=before)
    assert (done.returncode, done.stdout, warnings_of(done.stderr)) == (0, "1" * 1000, []), done.stderr
    place.wait_for_the_end()


# Scratch.


def test_scratch_that_cannot_be_used(place: JobPlace):
    other = place.make("scratch")
    place.write(other / "thesis.tex", "mine")
    done = place.cached("cat", place.source / "one")
    assert_open(place, done, "holds files that are not of cachefs")
    assert os.listdir(other) == ["thesis.tex"]
    done = place.cached("cat", place.source / "one", options=("--strict",))
    assert_strict(place, done, "holds files that are not of cachefs")


@pytest.mark.parametrize("scratch", ["/proc/cachefs", "/dev/null/cachefs", "/no/such/folder", "/usr/lib"])
def test_scratch_that_cannot_be_made(place: JobPlace, scratch: str):
    done = place.cached("cat", place.source / "one", options=("--scratch", scratch))
    assert_open(place, done, f"scratch {scratch} ")


@needs_root
def test_a_read_only_temporary_directory(place: JobPlace):
    temporary = place.make("tmp")
    setup = f"mount -t tmpfs -o ro none {temporary}"
    command = place.on_own_mounts(setup)
    line = [word for word in place.line() if word not in ("--scratch", str(place.scratch))]
    env = place.environ({"TMPDIR": str(temporary), "JOB_ID": "1"})
    script = f"cat {place.source}/one"
    done = subprocess.run(
        [*command, *line, "sh", "-c", script], cwd=place.path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1" * 1000), done.stderr
    place.wait_for_the_end()


@needs_root
@pytest.mark.skipif(
    any(folder in map(str, Path(sys.executable).parents) for folder in ("/tmp", "/var/tmp", "/dev/shm")),
    reason="the interpreter itself is in a temporary directory",
)
def test_no_temporary_directory_at_all(place: JobPlace):
    """Where nothing can be written anywhere there is no scratch by default either."""
    setup = "".join(f"mount -t tmpfs -o ro none {folder} && " for folder in ("/var/tmp", "/dev/shm"))
    setup += f"mount --bind {place.path} /mnt && mount -t tmpfs -o size=64k none /tmp && mkdir -p {place.path} && "
    setup += f"mount --move /mnt {place.path} && mount -o remount,ro,bind {place.path} && mount -o remount,ro /tmp"
    line = [word for word in place.line() if word not in ("--scratch", str(place.scratch))]
    command = [*place.on_own_mounts(f"{setup} && cd {place.path}"), *line]
    done = subprocess.run(
        [*command, "cat", place.source / "one"],
        cwd="/",
        env=place.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert_open(place, done)


@needs_root
@pytest.mark.parametrize("room", ["no blocks", "no inodes"])
def test_a_full_scratch(place: JobPlace, room: str):
    """Nothing can be written from the beginning, not even our mark, or not much more than that."""
    disk = place.make("disk")
    options = "size=32k" if room == "no blocks" else "size=1m,nr_inodes=2"
    fill = f"head -c 32k /dev/zero > {disk}/full; true" if room == "no blocks" else f"touch {disk}/full"
    setup = f"mount -t tmpfs -o mode=777,{options} none {disk} && {{ {fill}; }}"
    cat = ("cat", place.source / "one", place.source / "sub" / "two")
    done = on_machine(place, setup, *cat, options=("--scratch", disk / "scratch"))
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "2" * 2000), done.stderr
    assert len(warnings_of(done.stderr)) >= 1
    assert "Traceback" not in done.stderr
    place.wait_for_the_end()


@needs_root
@pytest.mark.parametrize("size", ["100k", "200k", "400k", "1m"])
def test_a_scratch_that_is_nearly_full(own_place: JobPlace, size: str):
    """Wherever it runs out of room, the bytes are right and the command does not notice."""
    place = own_place
    for number in range(20):
        place.write(place.source / f"file{number}", bytes([number]) * 50_000)
    disk = place.make("disk")
    setup = f"mount -t tmpfs -o mode=777,size={size} none {disk}"
    names = [place.source / f"file{number}" for number in range(20)]
    done = on_machine(
        place, setup, "sh", "-c", 'cat "$@" "$@" | md5sum', "sh", *names, options=("--scratch", disk / "s")
    )
    expected = place.cached_by_shell(shlex.join(["cat", *map(str, names * 2)]) + " | md5sum")
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
    assert "Traceback" not in done.stderr
    place.wait_for_the_end()


def test_a_capacity_that_is_too_large(own_place: JobPlace):
    done = own_place.cached("cat", own_place.source / "one", options=("--capacity", "900T"))
    assert (done.returncode, done.stdout) == (0, "1" * 1000)
    assert len(warnings_of(done.stderr)) == 1
    assert "is larger than the disk of scratch" in done.stderr
    own_place.wait_for_the_end()


def test_no_room_at_all(place: JobPlace):
    done = place.cached("cat", place.source / "one", options=("--capacity", "0"))
    assert (done.returncode, done.stdout) == (0, "1" * 1000)
    assert "Traceback" not in done.stderr
    place.wait_for_the_end()
