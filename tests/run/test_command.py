"""The command is run as if we were not there: its ids, streams, limits, environment and exit status are its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.run.running import JobPlace, warnings_of

SUMMARY = "cachefs: 2 files and 2.9 KiB from the source, 0 hits, "
PYTHON = (sys.executable, "-I", "-S", "-c")


def assert_nothing_left(place: JobPlace) -> None:
    place.wait_for_the_end()
    assert not place.scratch.exists(), list(place.scratch.rglob("*"))


def test_it_reads_through_a_mount_which_is_gone_afterwards(place: JobPlace):
    script = 'cat "$1"/one "$1"/sub/two; grep -c " $1 .*fuse.cachefs" /proc/self/mountinfo; ls -d "$2"'
    done = place.cached("sh", "-c", script, "sh", place.source, place.scratch)
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "2" * 2000 + f"1\n{place.scratch}\n")
    assert done.stderr.startswith(SUMMARY)
    assert done.stderr.count("\n") == 1
    assert_nothing_left(place)


@needs_root
def test_data_of_somebody_else(ordinary_place: JobPlace):
    place = ordinary_place
    foreign = place.path / "foreign"
    (foreign / "sub").mkdir(parents=True)
    (foreign / "file").write_text("theirs")
    foreign.chmod(0o555)
    done = place.cached("sh", "-c", f"stat -f -c %T {foreign}; cat {foreign}/file", data=foreign)
    assert (done.returncode, done.stdout) == (0, "fuseblk\ntheirs") or done.stdout == "fuse\ntheirs"
    assert warnings_of(done.stderr) == []
    assert_nothing_left(place)


def test_several_data_at_once(place: JobPlace):
    other = place.make("other")
    place.write(other / "three", "3" * 3000)
    job = place.job(data=[place.source, other])
    assert [mount["mountpoint"] for mount in job.command.mounts] == [str(place.source), str(other)]
    assert job.command.read(place.source / "one") == b"1" * 1000
    assert job.command.read(other / "three") == b"3" * 3000
    assert len(place.daemons()) == 2
    assert job.end().startswith("cachefs: 2 files and 3.9 KiB from the source, ")
    assert_nothing_left(place)


def test_the_mounts_variable(place: JobPlace):
    job = place.job(data=f"{place.source}:{place.mountpoint}")
    expected = {"source": str(place.source), "mountpoint": str(place.mountpoint), "scratch": str(place.scratch)}
    assert job.command.mounts == [expected]
    assert job.command.read(place.mountpoint / "one") == b"1" * 1000
    job.end()


def test_writing_to_the_data_is_refused_while_they_are_cached(place: JobPlace):
    job = place.job()
    for expression in (f"open('{place.source}/new', 'w')", f"open('{place.source}/one', 'a')",
                       f"os.unlink('{place.source}/one')", f"os.mkdir('{place.source}/folder')"):  # fmt: skip
        assert job.command.error_of(expression) == "EROFS"
    job.end()
    assert sorted(os.listdir(place.source)) == ["one", "sub"]


@pytest.mark.parametrize("status", [0, 1, 2, 42, 255])
def test_the_exit_status_is_the_command_s(place: JobPlace, status: int):
    job = place.job()
    job.end(status)
    assert_nothing_left(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGPIPE])
def test_a_signal_that_ends_the_command(own_place: JobPlace, number: signal.Signals):
    job = own_place.job()
    if number != signal.SIGKILL:
        job.command.ask(f"bool(signal.signal({int(number)}, signal.SIG_DFL))")
    job.command.ask("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
    job.command.say(f"os.kill(os.getpid(), {int(number)})")
    assert job.wait() == 128 + number
    assert_nothing_left(own_place)


def test_it_keeps_who_it_is(place: JobPlace):
    job = place.job(umask=0o027)
    ask = job.command.ask
    identity = (place.user.uid, place.user.uid, place.user.gid, place.user.gid)
    assert tuple(ask("[os.getuid(), os.geteuid(), os.getgid(), os.getegid()]")) == identity
    assert ask("os.getppid()") == job.pid
    assert ask("[os.getpgid(0), os.getsid(0)]") == [os.getpgid(job.pid), os.getsid(job.pid)]
    assert ask("os.umask(0)") == 0o027
    assert ask("os.getcwd()") == str(place.path)
    job.end()


def test_an_ordinary_user_gets_no_capabilities(ordinary_place: JobPlace):
    job = ordinary_place.job()
    status = dict(line.split(":\t", 1) for line in job.command.ask("read('/proc/self/status')").splitlines())
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    job.end()


def test_its_priority_is_unchanged(place: JobPlace):
    job = place.job(before=("nice", "-n", "7"))
    assert job.command.ask("os.nice(0)") == os.nice(0) + 7
    job.end()


@needs_root
def test_supplementary_groups_still_open_doors(place: JobPlace):
    group = 54321
    closed = place.write(place.path / "for-the-group", "secret")
    os.chown(closed, 0, group)
    closed.chmod(0o040 if place.user.uid else 0o640)
    inside = place.write(place.source / "for-the-group", "secret too")
    os.chown(inside, 0, group)
    inside.chmod(0o640)
    job = place.job(**{**place.user.identity, "user": place.user.uid, "extra_groups": [group]})
    assert job.command.read(closed) == b"secret"
    assert job.command.read(inside) == b"secret too"
    if place.user.uid == 0:
        assert group in job.command.ask("os.getgroups()")
    job.end()


LIMITS = {
    resource.RLIMIT_NOFILE: 200,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 500,
    resource.RLIMIT_STACK: 1 << 22,
}


def test_its_limits_are_unchanged(place: JobPlace):
    """A limit of file sizes below those of the data keeps us from copying, not the command from reading."""

    def limit() -> None:
        for number, size in LIMITS.items():
            resource.setrlimit(number, (size, resource.getrlimit(number)[1]))

    job = place.job(preexec_fn=limit, stderr=subprocess.PIPE)
    for number, size in LIMITS.items():
        assert job.command.ask(f"resource.getrlimit({number})") == list((size, resource.getrlimit(number)[1]))
    assert job.command.read(place.source / "one") == b"1" * 1000
    job.command.exit()
    _, errors = job.process.communicate(timeout=60)
    assert job.process.returncode == 0, errors
    assert_nothing_left(place)


def test_hard_limits(own_place: JobPlace):
    """Whatever a hard limit keeps us from, the command runs and reads."""
    for limit in "--nofile=24:24", "--fsize=100:100", "--as=400000000:400000000", "--nproc=1:1", "--cpu=1:1":
        done = own_place.cached("cat", own_place.source / "one", before=("prlimit", limit))
        assert (done.returncode, done.stdout) == (0, "1" * 1000), (limit, done.stderr)
        assert "Traceback" not in done.stderr, limit
        own_place.wait_for_the_end()


def test_no_room_for_a_process(ordinary_place: JobPlace):
    """The command then takes our place."""
    place = ordinary_place
    done = place.cached("cat", place.source / "one", before=("prlimit", "--nproc=1:1"))
    assert (done.returncode, done.stdout) == (0, "1" * 1000), done.stderr
    assert "Traceback" not in done.stderr


def test_its_environment_is_unchanged(own_place: JobPlace):
    """But for CACHEFS_MOUNTS: nothing that the interpreter does to its own is seen."""
    place = own_place
    environment = {b"PATH": os.environb[b"PATH"], b"EMPTY": b"", b"ODD": b"\xff\n=", b"HOME": os.fsencode(place.path)}
    environment[b"TEST_PLACE"] = os.fsencode(place.path)
    script = "import sys; sys.stdout.buffer.write(open('/proc/self/environ', 'rb').read())"
    done = subprocess.run(
        [*place.line(), *PYTHON, script], capture_output=True, env=environment, check=False, cwd=place.path
    )
    assert done.returncode == 0, done.stderr
    got = dict(item.split(b"=", 1) for item in done.stdout.rstrip(b"\0").split(b"\0"))
    assert json.loads(got.pop(b"CACHEFS_MOUNTS"))[0]["source"] == str(place.source)
    assert got == environment


def test_streams(place: JobPlace):
    data = bytes(range(256)) * 4096
    script = "cat; printf '\\000\\377' >&2; exit 3"
    done = place.cached("sh", "-c", script, input=data, text=False)
    assert (done.returncode, done.stdout) == (3, data)
    assert done.stderr.startswith(b"\0\xffcachefs: ")


def test_a_closed_stdin_and_stdout(place: JobPlace):
    line = " ".join([*place.line(), "sh", "-c", f'"cat {place.source}/one >{place.path}/copy; echo hello; cat"'])
    done = place.cached_by_shell(f"{line} <&- >&-")
    assert done.returncode == 0, done.stderr
    assert (place.path / "copy").read_bytes() == b"1" * 1000
    assert_nothing_left(place)


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_stream_that_nobody_reads(place: JobPlace, stream: str):
    """What we cannot say changes nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    job = place.job(**{stream: writing})
    os.close(writing)
    assert job.command.read(place.source / "one") == b"1" * 1000
    job.command.exit(5)
    assert job.wait() == 5
    assert_nothing_left(place)


def test_a_warning_that_nobody_reads(own_place: JobPlace):
    own_place.write(own_place.path / "scratch", "a file")
    reading, writing = os.pipe()
    os.close(reading)
    job = own_place.job(stderr=writing)
    os.close(writing)
    assert job.command.read(own_place.source / "one") == b"1" * 1000
    job.command.exit(5)
    assert job.wait() == 5


def test_descriptors_are_passed_on(place: JobPlace):
    """What the caller gave, as it was; and none of ours."""
    reading, writing = os.pipe()
    with open(place.source / "one", "rb") as file:
        job = place.job(pass_fds=(writing, file.fileno()))
        os.close(writing)
        job.command.ask(f"os.write({writing}, b'over it')")
        assert os.read(reading, 100) == b"over it"
        assert job.command.ask(f"os.read({file.fileno()}, 10).decode()") == "1" * 10
        connections = job.command.ask("[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') "
                                      f"if int(n) > 2 and int(n) not in ({writing}, {file.fileno()}) "
                                      "and os.path.exists(f'/proc/self/fd/{n}')]")  # fmt: skip
        assert len([name for name in connections if name.startswith(("socket:", "pipe:", "anon_inode:"))]) == 1
        job.end()
    assert os.read(reading, 100) == b"", "nobody else holds it"
    os.close(reading)


def test_what_is_written_last_arrives_before_the_end(own_place: JobPlace):
    """Nobody but the command holds its stdout: who reads it to its end need not wait for us."""
    stage = own_place.stage()
    process, _ = own_place.launch(command=stage.command, stdout=subprocess.PIPE)
    command = stage.join(process)
    command.ask("os.write(1, b'last words')")
    command.ask("os.dup2(os.open('/dev/null', os.O_WRONLY), 1)")
    daemons = [child for child in own_place.marked() if child.pid not in (process.pid, command.pid)]
    held = [child for child in daemons if os.path.exists(f"/proc/{child.pid}/fd/1")
            and os.readlink(f"/proc/{child.pid}/fd/1").startswith("pipe:")]  # fmt: skip
    assert held == []
    command.exit()
    said, _ = process.communicate(timeout=60)
    assert said == b"last words"


def test_a_script_in_the_data_runs_from_the_mount(place: JobPlace):
    script = place.write(place.source / "train.sh", '#!/bin/sh\ncat one "$@"; pwd -P\n')
    script.chmod(0o755)
    done = place.cached("./train.sh", "sub/two", cwd=place.source)
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "2" * 2000 + f"{place.source}\n")
    assert done.stderr.startswith("cachefs: 3 files ")
    assert_nothing_left(place)


def test_a_working_directory_in_the_data(place: JobPlace):
    job = place.job(cwd=place.source / "sub")
    assert job.command.ask("os.getcwd()") == str(place.source / "sub")
    assert job.command.read("two") == b"2" * 2000
    assert job.command.read("../one") == b"1" * 1000
    assert job.end().startswith(SUMMARY)


def test_a_working_directory_that_was_removed(place: JobPlace):
    gone = place.make("gone")
    script = f'cd {gone} && rmdir {gone} && exec "$0" "$@"'
    done = place.cached("cat", place.source / "one", before=("sh", "-c", script))
    assert (done.returncode, done.stdout) == (0, "1" * 1000)
    assert_nothing_left(place)


def test_a_script_without_an_interpreter_line(own_place: JobPlace):
    script = own_place.write(own_place.path / "plain", "echo it is $1; exit 4")
    script.chmod(0o755)
    done = own_place.cached(script, "run")
    assert (done.returncode, done.stdout) == (4, "it is run\n")


def test_options_of_the_command_are_its_own(own_place: JobPlace):
    done = own_place.cached("printf", "%s|", "--data", "-h", "--", "--keep", "")
    assert done.stdout == "--data|-h|--|--keep||"


def test_keep_leaves_what_was_fetched_for_the_next(place: JobPlace):
    first = place.cached("cat", place.source / "one", options=("--keep",))
    assert "1 file and 1000 B from the source, 0 hits" in first.stderr
    place.wait_for_the_end()
    assert [file.read_bytes() for file in (place.scratch / "files").rglob("*") if file.is_file()] == [b"1" * 1000]
    second = place.cached("cat", place.source / "one", options=("--keep",))
    assert second.stdout == "1" * 1000
    assert "0 files and 0 B from the source, 1 hit, " in second.stderr
    assert "1000 B saved" in second.stderr
    place.wait_for_the_end()
    place.cached("cat", place.source / "one")
    assert_nothing_left(place)


def test_data_and_options_of_the_environment(own_place: JobPlace):
    place = own_place
    other = place.make("two words")
    place.write(other / "three", "3")
    env = {"CACHEFS_DATA": f"{place.source}\n{other}\n", "CACHEFS_KEEP": "1", "CACHEFS_SCRATCH": str(place.scratch)}
    done = place.run("run", "--", "cat", place.source / "one", other / "three", env=env)
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "3")
    assert done.stderr.startswith("cachefs: 2 files and 1001 B from the source")
    assert place.scratch.exists()


def test_data_and_options_of_the_file(own_place: JobPlace):
    place = own_place
    other = place.make("other:wise")
    place.write(other / "three", "3")
    report = place.path / "report.json"
    text = f"data = ['{place.source}', '{other}']\nkeep = true\nscratch = '{place.scratch}'\nreport = '{report}'\n"
    config = place.write(place.path / "config.toml", text)
    done = place.run("--config", config, "run", "--", "cat", place.source / "one", other / "three")
    assert (done.returncode, done.stdout) == (0, "1" * 1000 + "3")
    assert json.loads(report.read_text())["totals"]["fetches"] == 2
    assert place.scratch.exists()


def test_the_default_scratch_is_in_the_temporary_directory(own_place: JobPlace):
    place = own_place
    temporary = place.make("tmp")
    done = place.run("run", "--data", place.source, "--", "sh", "-c", f"ls {temporary}", env={"TMPDIR": str(temporary)})
    assert (done.returncode, done.stdout) == (0, f"cachefs-{place.user.uid}\n")
    assert list(Path(temporary).iterdir()) == []
