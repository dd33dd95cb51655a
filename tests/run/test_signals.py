"""Signals reach the command once, however they are sent; what was ignored or blocked stays so."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.harness import lives, wait_until
from tests.run.running import SECONDS, JobPlace, assert_no_mounts

FORWARDED = (
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
    "SIGQUIT",
    "SIGUSR1",
    "SIGUSR2",
    "SIGXCPU",
    "SIGALRM",
    "SIGWINCH",
    "SIGCONT",
)


def numbers(*names: str) -> list[signal.Signals]:
    return [signal.Signals[name] for name in names]


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file)


def is_stopped(pid: int) -> bool:
    return status_of(pid)["State"].startswith("T")


def test_a_signal_to_run_reaches_the_command_once(place: JobPlace):
    job = place.job()
    job.command.catch(*numbers(*FORWARDED))
    for sent, number in enumerate(numbers(*FORWARDED), 1):
        job.kill(number)
        wait_until(lambda sent=sent: len(job.command.got) == sent, "it has arrived")
    job.command.got_exactly(*FORWARDED)
    job.end()


def test_a_signal_to_the_group_reaches_the_command_once(place: JobPlace):
    job = place.job(start_new_session=True)
    job.command.catch(*numbers(*FORWARDED))
    for sent, number in enumerate(numbers(*FORWARDED), 1):
        os.killpg(job.pid, number)
        wait_until(lambda sent=sent: len(job.command.got) >= sent, "it has arrived")
    job.command.got_exactly(*FORWARDED)
    job.end()


def test_signals_to_run_and_to_the_group_in_turn(own_place: JobPlace):
    """What was sent to the group once does not hide what is sent to run later."""
    job = own_place.job(start_new_session=True)
    job.command.catch(signal.SIGUSR1)
    for turn in range(3):
        os.killpg(job.pid, signal.SIGUSR1)
        job.command.got_exactly(*["SIGUSR1"] * (2 * turn + 1))
        job.kill(signal.SIGUSR1)
        job.command.got_exactly(*["SIGUSR1"] * (2 * turn + 2))
    job.end()


def test_a_signal_to_each_process_reaches_the_command_once(own_place: JobPlace):
    """As batch systems send them: to every process of a job, one after the other."""
    job = own_place.job(start_new_session=True)
    job.command.catch(signal.SIGUSR2)
    for pid in sorted(process.pid for process in own_place.marked()):
        if os.getsid(pid) == job.pid:
            os.kill(pid, signal.SIGUSR2)
    job.command.got_exactly("SIGUSR2")
    job.end()


def test_a_signal_to_the_command_alone(own_place: JobPlace):
    job = own_place.job()
    job.command.catch(signal.SIGTERM)
    os.kill(job.command.pid, signal.SIGTERM)
    job.command.got_exactly("SIGTERM")
    job.end()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_the_command_does_not_catch(own_place: JobPlace, name: str):
    """It ends the command, and run with its status; all is cleaned up."""
    number = signal.Signals[name]
    job = own_place.job()
    job.command.ask("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
    job.command.ask(f"bool(signal.signal({int(number)}, signal.SIG_DFL))")
    job.kill(number)
    assert job.wait() == 128 + number
    own_place.wait_for_the_end()
    assert not own_place.scratch.exists()


def test_the_command_decides_when_to_end(place: JobPlace):
    """One that saves its work first has the mount until it is done."""
    job = place.job()
    job.command.catch(signal.SIGTERM)
    job.kill(signal.SIGTERM)
    job.command.got_exactly("SIGTERM")
    assert job.command.read(place.source / "one") == b"1" * 1000
    assert job.end(15).count("\n") == 1
    place.wait_for_the_end()


def test_signals_that_were_ignored_stay_ignored(place: JobPlace):
    """nohup, and what a shell does to a command with & in a script."""
    ignored = numbers("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR2")

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    job = place.job(preexec_fn=ignore, start_new_session=True)
    for number in ignored:
        assert job.command.ask(f"disposition({int(number)})") == "ignored"
        job.kill(number)
        os.killpg(job.pid, number)
    job.command.catch(signal.SIGTERM)
    job.kill(signal.SIGTERM)
    job.command.got_exactly("SIGTERM")
    job.end()


def test_nohup(own_place: JobPlace):
    job = own_place.job(before=("nohup",), start_new_session=True)
    os.killpg(job.pid, signal.SIGHUP)
    job.kill(signal.SIGHUP)
    assert job.command.read(own_place.source / "one") == b"1" * 1000
    job.end()


def test_python_s_own_dispositions_are_not_inherited(place: JobPlace):
    job = place.job()
    status = status_of(job.command.pid)
    caught_by_python = 1 << (signal.SIGINT - 1)
    ignored_by_python = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    assert int(status["SigIgn"], 16) == ignored_by_python, "its own interpreter's"
    assert int(status["SigCgt"], 16) == caught_by_python
    assert int(status["SigBlk"], 16) == 0
    job.end()
    shell = place.cached("sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status")
    assert [int(line.split()[1], 16) for line in shell.stdout.splitlines()] == [0, 0]


def test_a_blocked_signal_stays_blocked(place: JobPlace):
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])

    job = place.job(preexec_fn=block, start_new_session=True)
    assert int(status_of(job.command.pid)["SigBlk"], 16) == 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGTERM - 1)
    job.command.catch(signal.SIGUSR1, signal.SIGUSR2)
    os.killpg(job.pid, signal.SIGUSR1)
    os.killpg(job.pid, signal.SIGUSR2)
    job.command.got_exactly("SIGUSR2")
    job.command.ask("bool(signal.pthread_sigmask(signal.SIG_SETMASK, []))")
    job.command.got_exactly("SIGUSR1", "SIGUSR2")
    job.end()


def test_children_that_are_ignored(place: JobPlace):
    """Some parents ignore SIGCHLD, which is inherited: then nobody could wait for anything."""
    job = place.job(preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert job.command.read(place.source / "one") == b"1" * 1000
    assert job.command.ask(f"disposition({int(signal.SIGCHLD)})") == "ignored"
    assert job.end(9).count("\n") == 1
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_a_broken_pipe_ends_the_command(own_place: JobPlace):
    done = own_place.cached_by_shell(f"{' '.join(own_place.line())} sh -c 'yes; echo $? >&2' | head -1")
    assert done.stdout == "y\n"
    assert done.stderr.splitlines()[0] == "141"


def test_a_command_that_stops_itself_without_a_terminal(place: JobPlace):
    """Nobody is there who would continue run, so it stays awake; SIGCONT to it continues the command."""
    job = place.job(start_new_session=True)
    for _ in range(3):
        job.command.say(f"os.kill(os.getpid(), {int(signal.SIGSTOP)})")
        wait_until(lambda: is_stopped(job.command.pid), "the command is stopped")
        job.kill(signal.SIGCONT)
        job.command.hear()
    assert not is_stopped(job.pid)
    assert job.command.read(place.source / "one") == b"1" * 1000
    job.end()


def test_a_group_that_is_stopped_goes_on_with_it(own_place: JobPlace):
    job = own_place.job(start_new_session=True)
    for _ in range(5):
        os.killpg(job.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(job.command.pid) and is_stopped(job.pid), "both are stopped")
        os.killpg(job.pid, signal.SIGCONT)
        wait_until(lambda: not is_stopped(job.command.pid) and not is_stopped(job.pid), "both go on")
        assert job.command.ask("1") == 1
    job.end()


def test_processes_that_are_stopped_and_continued_one_by_one(own_place: JobPlace):
    """As batch systems suspend jobs. Run goes on before its command does, and must not stop again."""
    job = own_place.job(start_new_session=True)
    for _ in range(10):
        pids = sorted(process.pid for process in own_place.marked() if os.getsid(process.pid) == job.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(job.command.pid) and is_stopped(job.pid), "both are stopped")
        os.kill(job.pid, signal.SIGCONT)
        wait_until(lambda: not is_stopped(job.pid), "run is awake")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not is_stopped(job.command.pid) and not is_stopped(job.pid), "both go on")
        assert job.command.ask("1") == 1
    job.end()


def test_a_group_that_is_stopped_goes_on_with_run(own_place: JobPlace):
    job = own_place.job(start_new_session=True)
    os.killpg(job.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(job.command.pid) and is_stopped(job.pid), "both are stopped")
    job.kill(signal.SIGCONT)
    assert job.command.ask("1") == 1
    job.end()


def test_a_sentinel_that_was_killed(own_place: JobPlace):
    """Signals are passed on all the same, and the end is as always."""
    job = own_place.job()
    job.command.catch(signal.SIGTERM)
    (sentinel,) = [child for child in psutil.Process(job.pid).children()
                   if child.pid != job.command.pid and os.getsid(child.pid) == os.getsid(job.pid)]  # fmt: skip
    sentinel.kill()
    job.kill(signal.SIGTERM)
    job.command.got_exactly("SIGTERM")
    job.end(3)
    own_place.wait_for_the_end()


def test_run_is_killed(place: JobPlace):
    """SIGKILL: the command goes too, and the keeper takes the mount and scratch away."""
    job = place.job()
    assert job.command.read(place.source / "one") == b"1" * 1000
    command = psutil.Process(job.command.pid)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    wait_until(lambda: not lives(command), "the command ends")
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_run_is_killed_and_a_child_of_the_command_lives_on(place: JobPlace):
    """It reads the source from then on."""
    job = place.job()
    child = place.stage()
    code = f"subprocess.Popen({list(child.command)!r}).pid"
    pid = job.command.ask(code)
    grandchild = child.join()
    daemon = place.daemon()
    assert grandchild.read(place.source / "one") == b"1" * 1000
    assert grandchild.error_of(f"open('{place.source}/new', 'w')") == "EROFS"
    job.kill()
    job.wait()
    wait_until(lambda: not lives(daemon), "the daemon ends")
    wait_until(lambda: not place.scratch.exists(), "scratch is purged")
    assert psutil.pid_exists(pid)
    assert_no_mounts(place.path)
    assert grandchild.read(place.source / "one") == b"1" * 1000
    assert grandchild.error_of(f"open('{place.source}/new', 'w').close()") is None
    grandchild.exit()
    place.wait_for_the_end()


def test_a_signal_while_the_mount_is_made(own_place: JobPlace):
    """Before the command runs run is like any program; the keeper takes away what is there by then."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGKILL:
        process, _ = own_place.launch(command=("sleep", "1000"))
        wait_until(own_place.scratch.exists, "the keeper is at work")
        process.send_signal(number)
        assert process.wait(SECONDS) in (1, 128 + number, -number)
        own_place.wait_for_the_end()
        assert not own_place.scratch.exists()


def test_a_child_of_the_command_that_holds_a_file(place: JobPlace):
    """The end does not wait for it."""
    job = place.job()
    child = place.stage()
    job.command.ask(f"subprocess.Popen({list(child.command)!r}).pid")
    grandchild = child.join()
    grandchild.ask(f"got.append(open('{place.source}/one', 'rb'))")
    job.end(2)
    assert not place.scratch.exists()
    assert grandchild.read(place.source / "one") == b"1" * 1000
    grandchild.exit()
    place.wait_for_the_end()
