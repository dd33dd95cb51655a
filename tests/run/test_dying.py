"""What dies while the command runs: daemons, the keeper, scratch. The command reads the source from then on."""

from __future__ import annotations

import os
import shutil
import signal

import psutil
import pytest

from tests.conftest import needs_root
from tests.harness import lives, mounts_everywhere, wait_until
from tests.run.running import Job, JobPlace, kill_together, warnings_of

GONE = "is cached no more, because its daemon was killed by SIGKILL: from now on it is read from the source"
KEEPER_DIED = "cachefs: warning: the keeper of the mounts died: from now on the data are read from the source"


def wait_for_warning(job: Job, text: str) -> None:
    wait_until(lambda: text in job.stderr, f"it says {text!r}")


def assert_source_shows(place: JobPlace, job: Job) -> None:
    """The command sees the source itself, where the mount was: what was not read before, and what is new."""
    assert mounts_everywhere(place.path) == []
    assert job.command.read(place.source / "one") == b"1" * 1000
    place.write(place.source / "new", "new")
    assert job.command.read(place.source / "new") == b"new"
    assert job.command.error_of(f"open('{place.source}/written', 'w').close()") is None


def test_the_daemon_is_killed(place: JobPlace):
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    place.daemon().kill()
    wait_for_warning(job, f"cachefs: warning: {place.source} {GONE}\n")
    assert_source_shows(place, job)
    errors = job.end(3)
    assert len(warnings_of(errors)) == 1, errors
    place.wait_for_the_end()
    assert not place.scratch.exists()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_other_ends_of_the_daemon(own_place: JobPlace, number: signal.Signals):
    job = own_place.job()
    own_place.daemon().send_signal(number)
    wait_for_warning(job, f"{own_place.source} is cached no more, because ")
    assert_source_shows(own_place, job)
    assert len(warnings_of(job.end())) == 1
    own_place.wait_for_the_end()


def test_one_of_two_daemons_is_killed(place: JobPlace):
    other = place.make("other")
    place.write(other / "three", "3" * 3000)
    job = place.job(data=[place.source, other])
    leases = [daemon for daemon in place.daemons() if len(daemon.children()) > 0]
    (victim,) = [d for d in leases if job.command.ask(f"os.stat('{other}').st_dev") and serves(place, d, str(other))]
    victim.kill()
    wait_for_warning(job, f"{other} {GONE}")
    assert job.command.read(other / "three") == b"3" * 3000
    assert job.command.read(place.source / "one") == b"1" * 1000
    assert job.command.error_of(f"open('{place.source}/written', 'w')") == "EROFS"
    assert "cachefs: 1 file and 1000 B from the source" in job.end()
    place.wait_for_the_end()
    assert not place.scratch.exists()


def serves(place: JobPlace, daemon: psutil.Process, source: str) -> bool:
    return any(f'"pid": {daemon.pid},' in text and f'"mountpoint": "{source}"' in text
               for text in (lease.read_text() for lease in (place.scratch / "leases").iterdir()))  # fmt: skip


def test_a_working_directory_in_a_mount_that_dies(place: JobPlace):
    """What was open fails, as on any file system that goes; what is opened by its path from then on does not."""
    job = place.job(cwd=place.source / "sub")
    place.daemon().kill()
    wait_for_warning(job, GONE)
    assert job.command.error_of("os.listdir('.')") == "ENOTCONN"
    job.command.ask(f"os.chdir('{place.source}/sub')")
    assert job.command.read("two") == b"2" * 2000
    job.end()


def test_the_source_at_another_mountpoint_when_the_daemon_dies(place: JobPlace):
    """It shows there read-only, as before; also where the mountpoint is somebody else's."""
    at = place.path / "foreign"
    at.mkdir()
    (at / "theirs").write_text("covered")
    job = place.job(data=f"{place.source}:{at}")
    assert job.command.read(at / "one") == b"1" * 1000
    assert job.command.error_of(f"open('{at}/theirs')") == "ENOENT"
    place.daemon().kill()
    wait_for_warning(job, f"{at} {GONE}")
    assert job.command.read(at / "sub/two") == b"2" * 2000
    assert job.command.error_of(f"open('{at}/new', 'w')") == "EROFS"
    assert job.command.error_of(f"open('{at}/theirs')") == "ENOENT"
    job.end()
    place.wait_for_the_end()
    assert os.listdir(at) == ["theirs"]


def test_the_keeper_is_killed(place: JobPlace):
    job = place.job()
    keeper, daemon = place.keeper(), place.daemon()
    assert job.command.read(place.source / "one") == b"1" * 1000
    keeper.kill()
    wait_for_warning(job, KEEPER_DIED)
    wait_until(lambda: not lives(daemon), "the daemon ends with its keeper")
    assert_source_shows(place, job)
    assert warnings_of(job.end(4)) == [KEEPER_DIED]
    place.wait_for_the_end()


def test_keeper_and_daemon_are_killed(place: JobPlace):
    job = place.job()
    keeper, daemon = place.keeper(), place.daemon()
    keeper.suspend()
    daemon.kill()
    keeper.kill()
    wait_for_warning(job, KEEPER_DIED)
    assert_source_shows(place, job)
    assert warnings_of(job.end()) == [KEEPER_DIED]
    place.wait_for_the_end()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_everything_is_meant_for_the_command(own_place: JobPlace, name: str):
    """Batch systems send it to every process of a job. The command may go on for a while, and so does its mount."""
    job = own_place.job()
    job.command.catch(signal.Signals[name])
    daemon = own_place.daemon()
    for process in own_place.marked():
        process.send_signal(signal.Signals[name])
    job.command.got_exactly(name)
    assert daemon.is_running()
    assert job.command.read(own_place.source / "one") == b"1" * 1000
    assert job.command.error_of(f"open('{own_place.source}/new', 'w')") == "EROFS"
    assert warnings_of(job.end()) == []
    own_place.wait_for_the_end()
    assert not own_place.scratch.exists()


def test_what_the_death_of_everything_leaves_is_reclaimed(place: JobPlace):
    """Run, keeper, daemon: scratch is marked, a purge removes it, and so does the next run."""
    for reclaim in "purge", "run":
        job = place.job()
        assert job.command.read(place.source / "one") == b"1" * 1000
        wait_until(lambda: list((place.scratch / "files").rglob("*/*/*")), "the copy is complete")
        kill_together([psutil.Process(job.pid), place.keeper(), place.daemon()])
        job.wait()
        place.wait_for_the_end()
        assert (place.scratch / "cachefs-scratch").exists()
        if reclaim == "purge":
            assert place.run("purge", "--scratch", place.scratch).returncode == 0
        else:
            done = place.cached("cat", place.source / "one")
            assert (done.returncode, done.stdout) == (0, "1" * 1000)
            assert "0 files and 0 B from the source, 1 hit" in done.stderr, "what was complete is used again"
            place.wait_for_the_end()
        assert not place.scratch.exists()


def test_after_the_death_of_everything_a_mount_works(own_place: JobPlace):
    place = own_place
    job = place.job()
    kill_together([psutil.Process(job.pid), place.keeper(), place.daemon()])
    job.wait()
    place.wait_for_the_end()
    at = place.mount()
    assert (at / "one").read_bytes() == b"1" * 1000
    place.do("umount", at, "--purge")
    assert not place.scratch.exists()


@pytest.mark.slow
def test_a_daemon_that_does_not_answer_at_the_end(own_place: JobPlace):
    """It is given its time, and then killed: the end comes all the same."""
    place = own_place
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    place.daemon().suspend()
    job.end(6)
    place.wait_for_the_end()
    assert not place.scratch.exists()


@pytest.mark.slow
def test_run_is_killed_while_the_daemon_does_not_answer(own_place: JobPlace):
    job = own_place.job()
    own_place.daemon().suspend()
    job.kill()
    job.wait()
    own_place.wait_for_the_end()
    assert not own_place.scratch.exists()


def test_scratch_is_removed(place: JobPlace):
    """rm -rf, by a node's cleaning, say: reads stay right, of what was cached and of what was not."""
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    shutil.rmtree(place.scratch)
    for name, content in ("one", b"1" * 1000), ("sub/two", b"2" * 2000), ("one", b"1" * 1000):
        assert job.command.read(place.source / name) == content
    errors = job.end()
    assert "Traceback" not in errors
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_scratch_is_removed_and_made_anew(own_place: JobPlace):
    """By another job with the same scratch, which has it for itself then."""
    place = own_place
    job = place.job()
    shutil.rmtree(place.scratch)
    other = place.make("other")
    place.write(other / "three", "3")
    second = place.job(data=other)
    assert job.command.read(place.source / "one") == b"1" * 1000
    assert second.command.read(other / "three") == b"3"
    job.end()
    assert second.command.read(other / "three") == b"3"
    second.end()
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_scratch_can_no_longer_be_written(ordinary_place: JobPlace):
    place = ordinary_place
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    closed = [place.scratch / name for name in ("staging", "files")]
    for folder in closed:
        folder.chmod(0o500)
    assert job.command.read(place.source / "sub" / "two") == b"2" * 2000
    assert job.command.read(place.source / "one") == b"1" * 1000
    for folder in closed:
        folder.chmod(0o700)
    job.end()
    place.wait_for_the_end()
    assert not place.scratch.exists()


@needs_root
def test_the_disk_of_scratch_runs_full(place: JobPlace):
    """Not by us: others write there too."""
    disk = place.make("disk")
    for number in range(5):
        place.write(place.source / f"file{number}", bytes([48 + number]) * 30_000)
    machine = place.machine(f"mount -t tmpfs -o mode=777,size=1m none {disk}")
    job = machine.job("--scratch", disk / "scratch")
    read = job.command.read
    assert read(place.source / "file0") == b"0" * 30_000
    machine.do(f"cat /dev/zero > {disk}/full; true")
    for number in 0, 1, 2, 0, 3, 4, 1:
        assert read(place.source / f"file{number}") == b"%d" % number * 30_000
    errors = job.end()
    assert "Traceback" not in errors
    place.wait_for_the_end()


def test_a_source_file_changes_hands_when_the_daemon_dies_in_a_read(place: JobPlace, slow_source):
    """A reader that waits for the source gets an error; the next open works."""
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    slow = slow_source(place.source, **others)
    job = place.job(data=slow.path)
    reader = place.stage()
    job.command.ask(f"subprocess.Popen({list(reader.command)!r}).pid")
    second = reader.join()
    slow.fail("one", op="read", hang=True)
    second.say(f"read('{slow.path}/one')")
    wait_until(lambda: slow.statistics().file("one").opens, "it reads")
    place.daemon().kill()
    wait_for_warning(job, GONE)
    assert "errno" in second.hear()
    slow.clear_faults()
    assert second.read(slow.path / "one") == b"1" * 1000
    second.exit()
    job.end()
    place.wait_for_the_end()
