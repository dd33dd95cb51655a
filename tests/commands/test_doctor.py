"""`cachefs doctor`: what it says of this machine, of sources and scratch directories of all kinds; nothing is left."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cachefs.demo.slow_source import SlowSource
from cachefs.mount.mountinfo import MEMORY_FSTYPES, NETWORK_FSTYPES, containing_mount
from tests.commands.places import Place, processes_of
from tests.commands.test_refused_machine import HIDE_FUSERMOUNT, NEW_DEV, run_on_machine
from tests.conftest import needs_root
from tests.harness import CACHEFS, wait_until

LATENCY = 0.02


class Report:
    """What the command printed: its rows by subject, each (finding, verdict, advice), and the lines after the table."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.text, self.errors = done.returncode, done.stdout, done.stderr
        lines = self.text.splitlines()
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
        self.rows = {cell[0]: tuple(cell[1:]) for cell in cells}
        assert len(self.rows) == len(cells), "each row is one line"

    def finding(self, subject: str) -> str:
        return self.rows[subject][0]

    def verdict(self, subject: str) -> str:
        return self.rows[subject][1]

    def advice(self, subject: str) -> str:
        return self.rows[subject][2]

    @property
    def command(self) -> str | None:
        """The line to type."""
        return next((line.strip() for line in self.text.splitlines() if line.startswith("  cachefs run ")), None)


def examine(place: Place, *arguments: object, **keywords: object) -> Report:
    """Run the command, which must leave everything as it was; the caller looks at how it ended."""
    before = place.snapshot()
    report = Report(place.run("doctor", *arguments, **keywords))
    wait_until(lambda: place.snapshot()["processes"] == before["processes"], "no new process")
    assert place.snapshot() == before
    return report


def assert_can_cache(report: Report) -> None:
    assert (report.code, report.errors) == (0, ""), report.text
    assert "no" not in [row[1] for row in report.rows.values()]


def assert_cannot_cache(report: Report, *says: str) -> None:
    assert report.code == 1
    assert report.errors.startswith("cachefs: run could not cache here: ")
    assert report.errors.count("\n") == 1
    for words in says:
        assert words in report.errors


@pytest.fixture
def slow(place: Place, slow_source: Callable[..., SlowSource]) -> SlowSource:
    """The place's source, slowly, for its user."""
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    return slow_source(place.source, latency=LATENCY, **others)


MACHINE_ROWS = ["/dev/fuse", "fusermount3", "open files", "processors", "memory", "memory limit"]
SCRATCH_ROWS = ["scratch", "free space", "scratch speed"]


def test_the_machine_alone(place: Place):
    report = examine(place, "--scratch", place.scratch)
    assert_can_cache(report)
    kind = "mount namespaces" if place.user.uid == 0 else "user namespaces"
    assert set(report.rows) - {"what"} == {*MACHINE_ROWS, *SCRATCH_ROWS, kind}
    assert report.verdict("/dev/fuse") == report.verdict(kind) == "ok"
    assert "run could cache here" in report.text
    assert report.command is None


def test_a_source(place: Place):
    report = examine(place, place.source, "--scratch", place.scratch)
    assert_can_cache(report)
    assert report.finding("dataset") == "2 files, 2.9 KiB; 1.5 KiB a file"
    assert report.finding("dataset fits").startswith("yes: 2.9 KiB into ")
    assert report.finding("source").startswith(f"{place.source} is on a local file system (")
    assert re.search(r"ms to the first bytes of a file \(median of \d+ opened\).*/s with 1 reader, .*/s with 4",
                     report.finding("source speed"))  # fmt: skip
    assert re.search(r"^  hit rate +100%", report.text, re.MULTILINE)
    for words in ("an estimate", "read directly", "first epoch", "later epochs"):
        assert words in report.text
    assert shlex.split(report.command) == [
        "cachefs", "run", "--data", str(place.source), "--scratch", str(place.scratch), "--", "COMMAND"
    ]  # fmt: skip


def test_the_default_scratch_is_not_in_the_line_to_type(place: Place):
    report = examine(place, place.source, env={"TMPDIR": str(place.make("tmp"))})
    assert report.finding("scratch").startswith(str(place.path / "tmp" / f"cachefs-{place.user.uid}"))
    if containing_mount(place.path).fstype not in NETWORK_FSTYPES | MEMORY_FSTYPES:
        assert report.command == f"cachefs run --data {place.source} -- COMMAND"


def test_scratch_in_use_is_measured_and_counted(place: Place):
    at = place.mount(place.source, place.mountpoint)
    for name in "one", "sub/two":
        place.read_as_user(at / name)
    wait_until(lambda: place.status(at)["resident_files"] == 2, "both files are resident")
    done = place.run("doctor", place.source, "--scratch", place.scratch)
    assert_can_cache(Report(done))
    assert "with the 2.9 KiB that it holds" in Report(done).finding("free space")
    assert place.status(at)["resident_files"] == 2
    place.do("umount", at)


def test_a_mount_of_ours_is_named(place: Place):
    at = place.mount()
    report = Report(place.run("doctor", at, "--scratch", place.path / "other"))
    assert "is a mount of cachefs already" in report.finding("mount over source")
    assert f"cachefs umount {at}" in report.advice("mount over source")
    place.do("umount", at)


def test_a_dead_mount_of_ours(place: Place):
    at = place.mount()
    place.kill_daemon(at)
    says = ("Transport endpoint is not connected", f"unmount it with: cachefs umount {at}")
    place.refused("doctor", at, "--scratch", place.path / "other", says=says)
    place.do("umount", at)


def test_what_is_no_source(place: Place):
    options = ("--scratch", place.scratch)
    says = f"there is no source {place.path / 'missing'}: check the spelling"
    place.refused("doctor", place.path / "missing", *options, says=says)
    place.refused("doctor", place.source / "one", *options, says="is not a directory")
    place.refused("doctor", "", *options, code=2, says="the path is empty")


def test_a_source_that_is_not_readable(ordinary_place: Place):
    place = ordinary_place
    closed = place.make("closed", mode=0o300)
    place.refused("doctor", closed, "--scratch", place.scratch, says=f"source {closed} is not readable by this user")
    place.make("closed", mode=0o700)


def test_unreadable_parts_are_named(ordinary_place: Place):
    place = ordinary_place
    place.make("source", "closed", mode=0)
    (place.source / "one").chmod(0)
    report = examine(place, place.source, "--scratch", place.scratch)
    place.make("source", "closed")
    assert_can_cache(report)
    assert report.finding("dataset").startswith("1 of its directories cannot be listed, 2 files")
    assert report.verdict("dataset") == "warning"
    assert "some fail: Permission denied" in report.finding("source speed")


@pytest.mark.parametrize(
    "name", ["two\nlines and a tab\t", "größe │ [bold]x", "x" * 200, b"\xff".decode(errors="surrogateescape")]
)
def test_odd_names(place: Place, name: str):
    source = place.make(name)
    place.write(source / name, "content")
    report = examine(place, source, "--scratch", place.scratch)
    assert (report.code, report.errors) == (0, "")
    assert "│ dataset " in report.text
    assert "1 file, 7 B" in report.text


def test_an_empty_source(place: Place):
    report = examine(place, place.make("empty"), "--scratch", place.scratch)
    assert_can_cache(report)
    assert report.rows["dataset"][:2] == ("no files", "warning")
    assert "Forecast" not in report.text


def test_a_slow_network_source(place: Place, slow: SlowSource):
    report = examine(place, slow.path, "--scratch", place.scratch)
    assert_can_cache(report)
    assert "is on a network file system (fuse.slowsource" in report.finding("source")
    found = re.match(r"(\d+) ms to the first bytes of a file", report.finding("source speed"))
    assert found, report.finding("source speed")
    assert int(found[1]) >= LATENCY * 1000
    faster = re.search(r"later epochs .*, ([\d.,]+) times as fast as read directly", report.text)
    assert faster
    assert float(faster[1]) > 1


def test_nothing_is_asked_of_the_source_but_reading(place: Place, slow: SlowSource):
    slow.reset()
    examine(place, slow.path, "--scratch", place.scratch)
    asked = {name for name, count in slow.statistics().operations.items() if count}
    reading = {"lookup", "getattr", "access", "open", "read", "release", "flush", "opendir", "readdir", "releasedir"}
    assert asked <= reading | {"statfs", "readlink", "forget", "getxattr", "listxattr"}


def test_a_dataset_larger_than_the_capacity(place: Place):
    report = examine(place, place.source, "--scratch", place.scratch, "--capacity", "1000")
    assert_can_cache(report)
    assert report.finding("dataset fits").startswith("33% of it: 2.9 KiB into 1000 B")
    assert report.verdict("dataset fits") == "warning"
    assert re.search(r"^  hit rate +33%", report.text, re.MULTILINE)
    assert "--capacity 1000 " in report.command


def test_the_capacity_of_the_environment_counts(own_place: Place):
    place = own_place
    report = examine(place, place.source, "--scratch", place.scratch, env={"CACHEFS_CAPACITY": "1000"})
    assert report.finding("dataset fits").startswith("33% of it")
    assert "--capacity" not in report.command
    place.refused("doctor", "--capacity", "much", code=2, says="'much' is not a capacity")


def test_no_room(place: Place):
    report = examine(place, place.source, "--scratch", place.scratch, "--capacity", "0")
    assert report.verdict("free space") == "no"
    assert_cannot_cache(report, f"there is no room in scratch {place.scratch}")


def test_a_source_that_hangs(own_place: Place, slow_source: Callable[..., SlowSource]):
    place = own_place
    slow = slow_source(place.source)
    slow.fail(hang=True)
    report = Report(place.run("doctor", slow.path, "--scratch", place.scratch))
    assert_cannot_cache(report, f"source {slow.path} does not answer within 5 s")
    assert report.verdict("source") == "no"
    assert "dataset" not in report.rows
    assert report.verdict("scratch") == "ok"
    assert not place.scratch.exists()


@pytest.mark.parametrize(("operation", "step"), [("readdir", "being listed"), ("read", "reading")])
def test_a_source_that_hangs_later(own_place: Place, slow_source: Callable[..., SlowSource], operation: str, step: str):
    place = own_place
    slow = slow_source(place.source)
    slow.fail(op=operation, hang=True)
    report = Report(place.run("doctor", slow.path, "--scratch", place.scratch))
    assert_cannot_cache(report, "does not answer within 5 s")
    assert f"does not answer within 5 s ({step})" in report.finding("source")
    assert ("dataset" in report.rows) == (operation == "read")
    assert "Forecast" not in report.text


def test_a_source_that_fails(own_place: Place, slow_source: Callable[..., SlowSource]):
    place = own_place
    slow = slow_source(place.source)
    slow.fail(op="read", errno="EIO")
    report = examine(place, slow.path, "--scratch", place.scratch)
    assert report.rows["source speed"][:2] == ("its files cannot be read: Input/output error", "warning")


def test_scratch_that_cannot_be_used(place: Place):
    place.make("scratch")
    place.write(place.scratch / "thesis.tex", "mine")
    report = examine(place, place.source, "--scratch", place.scratch)
    assert_cannot_cache(report, "holds files that are not of cachefs")
    assert report.verdict("scratch") == "no"
    assert "scratch speed" not in report.rows


def test_scratch_of_somebody_else(ordinary_place: Place):
    report = examine(ordinary_place, ordinary_place.source, "--scratch", "/usr/cachefs-scratch")
    assert_cannot_cache(report, "scratch /usr/cachefs-scratch cannot be made: /usr is not writable")


def test_scratch_inside_the_source(place: Place):
    report = examine(place, place.source, "--scratch", place.source / "sub" / "scratch")
    assert_cannot_cache(report, "is inside the source", "choose another with --scratch")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_scratch_in_memory(place: Place):
    report = examine(place, place.source, "--scratch", "/dev/shm/cachefs-doctor-test")
    assert_can_cache(report)
    assert "in memory (tmpfs" in report.finding("scratch")
    assert report.verdict("scratch") == "warning"
    assert "--scratch" in report.advice("scratch")
    assert not Path("/dev/shm/cachefs-doctor-test").exists()


def test_scratch_on_the_network(own_place: Place, slow_source: Callable[..., SlowSource]):
    place = own_place
    slow = slow_source(place.make("remote"))
    report = examine(place, place.source, "--scratch", slow.path / "scratch")
    assert "is on a network file system (fuse.slowsource" in report.finding("scratch") or report.code == 1
    assert report.verdict("scratch") in ("warning", "no")


def test_a_low_limit_of_open_files(place: Place):
    command = ["prlimit", "--nofile=500:1000", *CACHEFS, "doctor", "--scratch", str(place.scratch)]
    done = subprocess.run(
        command, cwd=place.path, env=place.environ(), capture_output=True, text=True, check=False, **place.user.identity
    )
    report = Report(done)
    assert_can_cache(report)
    assert report.finding("open files").startswith("soft limit 500, hard limit 1,000;")
    assert report.verdict("open files") == "warning"


@needs_root
def test_no_device(place: Place):
    report = Report(run_on_machine(place, NEW_DEV, "doctor", place.source, "--scratch", place.scratch))
    assert_cannot_cache(report, "there is no /dev/fuse", "modprobe fuse")
    assert report.verdict("/dev/fuse") == "no"
    assert report.verdict("source") == report.verdict("scratch") == "ok"
    assert report.command is None


@needs_root
def test_no_fusermount3(place: Place):
    report = Report(run_on_machine(place, HIDE_FUSERMOUNT, "doctor", place.source, "--scratch", place.scratch))
    assert_can_cache(report)
    if place.user.uid:
        assert report.rows["fusermount3"] == ("there is no fusermount3", "warning", "install the package fuse3")


def test_no_more_user_namespaces(ordinary_place: Place):
    """In a user namespace in which no other can be made, and in which fusermount3 has no power either."""
    place = ordinary_place
    doctor = [*CACHEFS, "doctor", str(place.source), "--scratch", str(place.scratch)]
    inner = shlex.join(["unshare", f"--map-user={place.user.uid}", *doctor])
    command = ["unshare", "-r", "sh", "-c", f"echo 1 > /proc/sys/user/max_user_namespaces && exec {inner}"]
    done = subprocess.run(
        command, cwd=place.path, env=place.environ(), capture_output=True, text=True, check=False, **place.user.identity
    )
    report = Report(done)
    assert report.verdict("user namespaces") == "warning"
    assert "no more user namespaces can be made" in report.finding("user namespaces")
    assert "/proc/sys/user/max_user_namespaces" in report.finding("user namespaces")
    assert_cannot_cache(report, "no more user namespaces can be made", "fusermount3 is not setuid root")
    assert report.verdict("mount over source") == "no"


@needs_root
def test_fusermount3_instead_of_user_namespaces(ordinary_place: Place):
    """User namespaces are switched off; what this user may write to can still be covered, and nothing else."""
    place = ordinary_place
    foreign = place.path / "foreign"
    foreign.mkdir()

    def run(source: Path) -> Report:
        return Report(place.run_with_namespaces_limited(*CACHEFS, "doctor", source, "--scratch", place.scratch))

    report = run(place.source)
    assert_can_cache(report)
    assert report.verdict("user namespaces") == "warning"
    assert "/proc/sys/user/max_user_namespaces is 0" in report.finding("user namespaces")
    assert "with fusermount3" in report.finding("mount over source")
    report = run(foreign)
    assert_cannot_cache(report, "user namespaces", f"this user may not mount at {foreign}")
    assert f"--data {foreign}:DIR" in report.advice("mount over source")


def test_nothing_is_coloured_where_nobody_looks(place: Place):
    report = examine(place, place.source, "--scratch", place.scratch, env={"FORCE_COLOR": "1", "COLUMNS": "40"})
    assert "\x1b" not in report.text
    assert report.verdict("source") == "ok"


def test_ascii_output(own_place: Place):
    done = own_place.run("doctor", own_place.source, "--scratch", own_place.scratch, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_on_a_terminal(own_place: Place):
    """It has colours, says meanwhile what it does, and fits into the width."""
    place = own_place
    ours, theirs = pty.openpty()
    environment = place.environ({"TERM": "xterm", "COLUMNS": "100"})
    command = [*CACHEFS, "doctor", str(place.source), "--scratch", str(place.scratch)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the terminal has no other side any more
                break
            said += part
    os.close(ours)
    assert process.returncode == 0, said
    text = said.decode()
    assert "\x1b[32mok" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert f"measuring {place.scratch}" in plain
    assert max(len(line.rstrip("\r")) for line in plain.split("\n") if line.startswith(("│", "┃"))) <= 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_interrupted(own_place: Place, slow_source: Callable[..., SlowSource], number: signal.Signals):
    place, pipe = own_place, subprocess.PIPE
    slow = slow_source(place.source)
    slow.reset()
    slow.set(latency=0.3)
    process = place.start("doctor", slow.path, "--scratch", place.scratch, stdout=pipe, stderr=pipe)
    wait_until(lambda: slow.statistics().operations.get("lookup", 0) >= 1, "it looks at the source")
    wait_until(lambda: psutil.Process(process.pid).children(recursive=True), "it has workers")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode
    assert "Traceback" not in errors
    wait_until(lambda: not processes_of(place.path), "its workers end")
    assert not place.scratch.exists()
