"""Commands that cannot run, and data paths of every kind: what is refused, and what works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.places import Place
from tests.harness import CACHEFS, mounts_everywhere
from tests.run.running import Job, JobPlace, assert_no_mounts, warnings_of


def refused(place: JobPlace, *arguments: object, code: int, says: str) -> None:
    """Refused in one clear line, which leaves nothing behind."""
    place.refused("run", *arguments, code=code, says=says)
    place.wait_for_the_end()
    assert not place.scratch.exists()


def assert_reads_one(place: JobPlace, data: object, path: object, *, mountpoint: object = None, **keywords) -> None:
    """A run with this --data reads "one" there, through a mount, and leaves nothing."""
    done = place.cached("sh", "-c", 'cat -- "$1"; printenv CACHEFS_MOUNTS', "sh", path, data=data, **keywords)
    assert done.returncode == 0, done.stderr
    assert warnings_of(done.stderr) == []
    assert done.stdout[:1000] == "1" * 1000
    (mount,) = json.loads(done.stdout[1000:])
    assert mount["mountpoint"] == str(mountpoint or place.source)
    assert done.stderr.startswith("cachefs: 1 file and 1000 B from the source, ")
    place.wait_for_the_end()
    assert not place.scratch.exists()


# The command.


def test_a_command_that_is_not_there(place: JobPlace):
    options = ("--data", place.source, "--scratch", place.scratch, "--")
    refused(place, *options, "no-such-command", code=127, says="the command no-such-command was not found")
    refused(place, *options, place.path / "missing", code=127, says="was not found")
    refused(place, *options, place.source / "one" / "below", code=127, says="was not found")
    refused(place, *options, "", code=127, says="the command '' was not found")


def test_a_command_that_cannot_be_executed(place: JobPlace):
    options = ("--data", place.source, "--scratch", place.scratch, "--")
    refused(place, *options, place.source / "one", code=126, says="cannot be run: Permission denied")
    refused(place, *options, place.source, code=126, says="cannot be run: Is a directory")


def test_a_command_with_a_missing_interpreter(place: JobPlace):
    """Only execution tells; by then the mount has been made, and is taken away again."""
    script = place.write(place.path / "script", "#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = place.cached(script)
    assert done.returncode == 127
    assert "Traceback" not in done.stderr
    assert len(warnings_of(done.stderr)) == 1
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_a_program_that_is_none(place: JobPlace):
    program = place.write(place.path / "program", b"\x7fELF nonsense\0")
    program.chmod(0o755)
    done = place.cached(program)
    assert done.returncode in (126, 127), "which of both depends on the shell, to which it is given like any script"
    assert "Traceback" not in done.stderr
    place.wait_for_the_end()


def test_no_command(place: JobPlace):
    options = ("--data", place.source, "--scratch", place.scratch)
    refused(place, *options, code=2, says="there is no command to run")
    refused(place, *options, "--", code=2, says="there is no command to run")


def test_no_data(own_place: JobPlace):
    refused(own_place, "--", "true", code=2, says="there is no --data")
    refused(own_place, "--data", "", "--", "true", code=2, says="the path is empty")


def test_bad_options(own_place: JobPlace):
    place = own_place
    refused(place, "--data", place.source, "--capacity", "much", "--", "true", code=2, says="'much' is not a capacity")
    refused(place, "--data", place.source, "--no-such", "--", "true", code=2, says="No such option")
    refused(place, "--data", place.source, "--report", "", "--", "true", code=2, says="the path is empty")


def test_the_command_is_found_as_the_shell_finds_it(own_place: JobPlace):
    place = own_place
    for folder, mode in ("first", 0o644), ("second", 0o755):
        place.write(place.make(folder) / "tool", f"#!/bin/sh\necho {folder}\n").chmod(mode)
    path = f"{place.path}/none:{place.path}/first:{place.path}/second:{os.environ['PATH']}"
    assert place.cached("tool", env={"PATH": path}).stdout == "second\n"
    place.write(place.path / "here", "#!/bin/sh\necho here\n").chmod(0o755)
    assert place.cached("here", env={"PATH": ":" + os.environ["PATH"]}).stdout == "here\n"


# The data.


def test_data_that_are_not_there(place: JobPlace):
    options = ("--scratch", place.scratch, "--", "true")
    missing = place.path / "missing"
    refused(place, "--data", missing, *options, code=1, says=f"there is no source {missing}")
    refused(place, "--data", f"{missing}:{place.mountpoint}", *options, code=1, says="there is no source")
    refused(place, "--data", place.source / "one", *options, code=1, says="is not a directory")
    refused(place, "--data", place.source, "--data", missing, *options, code=1, says="there is no source")
    refused(place, "--data", f"{place.source}:{missing}", *options, code=1, says=f"there is no mountpoint {missing}")
    refused(place, "--data", f"{place.source}:", *options, code=2, says="has no mountpoint after its colon")


def test_the_same_data_twice(place: JobPlace):
    options = ("--scratch", place.scratch, "--", "true")
    (place.path / "link").symlink_to(place.source)
    for other in place.source, f"{place.source}/", f"{place.source}/sub/..", "source", place.path / "link":
        refused(place, "--data", place.source, "--data", other, *options, code=2, says="is given twice")
    at = place.mountpoint
    refused(place, "--data", f"{place.source}:{at}", "--data", f"{place.source / 'sub'}:{at}", *options, code=2,
            says="is given twice")  # fmt: skip


def test_data_inside_others(place: JobPlace):
    options = ("--scratch", place.scratch, "--", "true")
    inner = place.source / "sub"
    for pair in (place.source, inner), (inner, place.source), (place.source, f"{inner}:{place.mountpoint}"):
        refused(place, "--data", pair[0], "--data", pair[1], *options, code=2, says="is inside --data")


def test_scratch_that_cannot_be_right(place: JobPlace):
    """It would be served by the mount that it is to serve."""
    for scratch in place.source, place.source / "scratch":
        refused(place, "--data", place.source, "--scratch", scratch, "--", "true", code=1, says=f"scratch {scratch} is")


def test_the_same_source_at_two_mountpoints(place: JobPlace):
    at = place.make("elsewhere")
    job = place.job(data=[f"{place.source}:{place.mountpoint}", f"{place.source}:{at}"])
    assert job.command.read(place.mountpoint / "one") == job.command.read(at / "one") == b"1" * 1000
    assert "1 file and 1000 B from the source, 1 hit" in job.end(), "the second mount has what the first fetched"


@pytest.mark.parametrize("data", ["source", "./source", "../{user}/source/", "source/sub/.."])
def test_relative_data(own_place: JobPlace, data: str):
    assert_reads_one(own_place, data.format(user=own_place.user.name), "source/one")


def test_relative_data_and_mountpoint(place: JobPlace):
    assert_reads_one(place, "source:mountpoint", "mountpoint/one", mountpoint=place.mountpoint)


NAMES = ["two words", "with:colon", "a: b :c", "größe", "new\nline", "quo'te\"", "%41", "back\\slash", "-x", "\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_every_kind(own_place: JobPlace, name: str):
    place = own_place
    source = place.make(name)
    place.write(source / "one", "1" * 1000)
    assert_reads_one(place, source, source / "one", mountpoint=source)


def test_colons_and_spaces_as_each_user(place: JobPlace):
    source, at = place.make("a source:with colon"), place.make("at:some place")
    place.write(source / "one", "1" * 1000)
    assert_reads_one(place, f"{source}:{at}", at / "one", mountpoint=at)


def test_a_source_beside_its_name_with_a_colon(own_place: JobPlace):
    """What exists is meant: the whole, if that is a directory."""
    place = own_place
    whole = place.make(f"source:{place.mountpoint.name}")
    place.write(whole / "one", "1" * 1000)
    assert_reads_one(place, f"source:{place.mountpoint.name}", whole / "one", mountpoint=whole)


def test_a_link_to_the_data(place: JobPlace):
    link = place.path / "link"
    link.symlink_to(place.source)
    assert_reads_one(place, link, link / "one")


def test_a_working_directory_that_came_through_a_link(own_place: JobPlace):
    (own_place.path / "link").symlink_to(own_place.source)
    assert_reads_one(own_place, ".", "one", cwd=own_place.path / "link")


def test_empty_data(place: JobPlace):
    job = place.job(data=place.make("empty"))
    assert job.command.ask(f"os.listdir({str(place.path / 'empty')!r})") == []
    assert len(mounts_everywhere(place.path)) == 1
    job.end()


def test_a_deep_path(own_place: JobPlace):
    """Longer than what fits into the address of a socket."""
    place = own_place
    source = place.make(*["deep" * 10] * 20)
    place.write(source / "one", "1" * 1000)
    assert_reads_one(place, source, source / "one", mountpoint=source)


# Mounts that are there already.


def run_inside(place: JobPlace, job: Job, *command: object, data: object, scratch: Path | None = None):
    """Have the command of a job run another command with its data cached."""
    line = [*place.line(*(("--scratch", scratch) if scratch else ()), data=data), *map(str, command)]
    code = f"(lambda d: [d.returncode, d.stdout, d.stderr])(subprocess.run({line!r}, capture_output=True, text=True))"
    return subprocess.CompletedProcess(line, *job.command.ask(code))


def test_a_run_inside_a_run_with_the_same_data(place: JobPlace):
    job = place.job()
    for data in place.source, place.source / "sub":
        done = run_inside(place, job, "cat", place.source / "sub" / "two", data=data)
        assert (done.returncode, done.stdout, done.stderr) == (0, "2" * 2000, "")
    assert len(place.daemons()) == 1
    assert job.end().startswith("cachefs: 1 file and 2.0 KiB from the source, ")
    place.wait_for_the_end()
    assert not place.scratch.exists()


@pytest.mark.parametrize("scratch", ["scratch", "other scratch"])
def test_a_run_inside_a_run_with_other_data(place: JobPlace, scratch: str):
    other = place.make("other")
    place.write(other / "three", "3" * 3000)
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    done = run_inside(place, job, "cat", other / "three", data=other, scratch=place.path / scratch)
    assert (done.returncode, done.stdout) == (0, "3" * 3000), done.stderr
    assert done.stderr.startswith("cachefs: 1 file and 2.9 KiB from the source, ")
    assert job.command.read(place.source / "sub" / "two") == b"2" * 2000
    assert job.end().startswith("cachefs: 2 files and 2.9 KiB from the source, ")
    place.wait_for_the_end()
    assert not (place.path / scratch).exists()


def test_the_mounts_variable_of_a_run_inside_a_run(place: JobPlace):
    other = place.make("other")
    job = place.job()
    done = run_inside(place, job, "printenv", "CACHEFS_MOUNTS", data=other, scratch=place.path / "scratch2")
    assert [mount["mountpoint"] for mount in json.loads(done.stdout)] == [str(place.source), str(other)]
    job.end()


def test_over_a_mount_of_cachefs(place: JobPlace):
    """It is served by that already."""
    at = place.mount()
    done = place.cached("cat", at / "one", data=at)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1" * 1000, "")
    assert place.status(at)["misses"] == 1
    place.do("umount", at, "--purge")


def test_over_a_dead_mount_of_cachefs(place: JobPlace):
    """A crash of yesterday's: it is detached, and the source is cached anew."""
    at = place.mount()
    place.kill_daemon(at)
    done = place.cached("cat", at / "one")
    assert (done.returncode, done.stdout) == (0, "1" * 1000), done.stderr
    assert warnings_of(done.stderr) == []
    assert done.stderr.startswith("cachefs: 1 file and 1000 B from the source, ")
    place.wait_for_the_end()
    assert_no_mounts(place.path)
    assert not place.scratch.exists()


def test_from_inside_a_dead_mount_of_cachefs(own_place: JobPlace):
    """The working directory is in it: only its path can be meant."""
    place = own_place
    at = place.mount()
    stage = place.stage()
    cachefs = Path(sys.executable).with_name("cachefs")  # -m looks for modules in the working directory first
    if not cachefs.exists():
        pytest.skip("the command is not installed beside the interpreter")
    line = [str(cachefs), *place.line()[len(CACHEFS) :], *stage.command]
    shell = subprocess.Popen(
        ["sh", "-c", 'read _; exec "$@"', "sh", *line], cwd=at, env=place.environ(), stdin=subprocess.PIPE
    )
    place.processes_made.append(shell)
    os.kill(int(place.status(at)["pid"]), 9)
    shell.stdin.write(b"\n")
    shell.stdin.close()
    command = stage.join(shell)
    assert command.read(at / "one") == b"1" * 1000
    command.exit()
    assert shell.wait(60) == 0
    place.wait_for_the_end()


# Homes.


@pytest.mark.parametrize("home", [None, "", "/no/such/home", "/dev/null"])
def test_no_home(place: JobPlace, home: str | None):
    environment = place.environ()
    for name in "HOME", "XDG_CONFIG_HOME":
        environment.pop(name)
    if home is not None:
        environment["HOME"] = home
    done = subprocess.run(
        [*place.line(), "cat", place.source / "one"], env=environment, cwd=place.path, capture_output=True, text=True,
        check=False, **place.user.identity,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1" * 1000), done.stderr
    assert warnings_of(done.stderr) == []


def test_a_mountpoint_that_shows_something_else_already(place: Place):
    other = place.make("other")
    place.do("mount", place.source, place.mountpoint, "--scratch", place.scratch)
    says = f"{place.mountpoint} is a mount of cachefs already"
    place.refused(
        "run", "--data", f"{other}:{place.mountpoint}", "--scratch", place.path / "s2", "--", "true", says=says
    )
    same = place.do("run", "--data", f"{place.source}:{place.mountpoint}", "--", "cat", place.mountpoint / "one")
    assert same == "1" * 1000
    place.do("umount", place.mountpoint)


def test_a_file_that_its_own_user_may_not_read(ordinary_place: JobPlace):
    """The daemon has rights in the namespace that it mounts in; they do not open what the source keeps closed."""
    place = ordinary_place
    closed = place.source / "one"
    closed.chmod(0)
    done = place.cached(
        "sh", "-c", 'cat -- "$1" || cat -- "$2"', "sh", closed, place.source / "sub/two", data=place.source
    )
    assert "Permission denied" in done.stderr
    assert done.stdout == "2" * 2000
