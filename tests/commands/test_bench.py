"""`cachefs bench`: what it measures and recommends, what it refuses, and that nothing of it is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cachefs.bench import reader
from cachefs.bench.reader import find
from cachefs.bench.recommendation import fewest_close, recommend
from cachefs.bench.trial import (
    DIRECT,
    FIRST,
    LARGEST_FILE,
    LATER,
    PROMOTED_ALONE_BYTES,
    Measurement,
    Plan,
    Served,
    Trial,
    share_out,
    together,
)
from cachefs.cli.bench import _advise, _how_served
from cachefs.demo.dataset import make_dataset
from cachefs.demo.slow_source import SlowSource
from cachefs.fs.survey import LARGE_FILE_BYTES
from tests.commands.places import Place
from tests.conftest import needs_root
from tests.harness import CACHEFS, lives, mounts_everywhere, wait_until

FILES, SIZE, LATENCY = 96, 8_000, 0.02
BRIEF = ("--workers", "0,2", "--seconds", "0.5")


@pytest.fixture
def slow(place: Place, slow_source: Callable[..., SlowSource]) -> SlowSource:
    """A slow source of JPEG files, for the place's user."""
    backing = place.make("backing")
    make_dataset(backing, files=FILES, classes=3, mean_bytes=SIZE)
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    return slow_source(backing, latency=LATENCY, **others)


def try_out(place: Place, *arguments: object, **keywords: object) -> subprocess.CompletedProcess[str]:
    """Run the command, which must work and leave everything as it was."""
    before = place.snapshot()
    done = place.run("bench", *arguments, **keywords)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert_nothing_is_left(place, before)
    return done


def assert_nothing_is_left(place: Place, before: dict[str, object]) -> None:
    wait_until(lambda: place.snapshot()["processes"] == before["processes"], "no new process")
    assert place.snapshot() == before
    assert mounts_everywhere(place.path) == []


def rows(text: str) -> dict[int, list[str]]:
    """The table by the number of workers: direct, first epoch, later epochs, ratio, MB/s."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {int(row[0]): row[1:] for row in cells}


def rate(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_a_slow_source(place: Place, slow: SlowSource):
    done = try_out(place, slow.path, *BRIEF, "--scratch", place.scratch)
    assert f"All of {FILES} files in {slow.path}" in done.stdout
    table = rows(done.stdout)
    assert sorted(table) == [0, 2]
    for direct, first, later, ratio, _ in table.values():
        assert rate(later) > rate(direct) > 0
        assert rate(first) > 0
        assert float(ratio.removesuffix(" x")) > 1
    assert "what its file server has cached is not known" in done.stdout
    assert re.search(r"Two readings with the same number of workers differ by \d+% on the average", done.stdout)
    bars = re.findall(r"^ *(direct|first epoch|later epochs), +(\d) workers +[\d,.]+  █+$", done.stdout, re.MULTILINE)
    assert bars == [(way, workers) for way in (DIRECT, FIRST, LATER) for workers in ("0", "2")]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  cachefs run "))
    command, _, advice = line.partition("        ")
    assert advice.startswith("with num_workers=2,")
    expected = ["cachefs", "run", "--data", str(slow.path), "--scratch", str(place.scratch), "--", "python", "train.py"]
    assert shlex.split(command) == expected


def test_a_sample_of_it(place: Place, slow: SlowSource):
    slow.reset()
    done = try_out(place, slow.path, *BRIEF, "--files", "40", env={"CACHEFS_SCRATCH": str(place.scratch)})
    assert f"A sample of 40, of {FILES} files, in {slow.path}" in done.stdout
    opened = [path for path, counts in slow.statistics().files.items() if counts.opens and path.endswith(b".jpg")]
    assert len(opened) <= 40, "nothing is fetched that is not in the sample"
    assert "--scratch" not in next(line for line in done.stdout.splitlines() if line.startswith("  cachefs run "))
    assert "Later epochs were served by the daemon" in done.stdout


def test_files_that_are_all_there_are_served_from_scratch(place: Place, slow: SlowSource):
    """Where we may mount."""
    slow.set(latency=0.002)
    done = try_out(place, slow.path, "--workers", "0,2", "--seconds", "1.5", "--scratch", place.scratch)
    assert "Later epochs were served from scratch directly, because all files are there." in done.stdout
    assert re.search(r"^  cachefs run .* -- python train.py +with num_workers=2,", done.stdout, re.MULTILINE)


def test_a_sample_of_directories_that_are_there_as_a_whole(own_place: Place):
    """They are promoted some seconds after the first epoch: no number of workers is to profit from that alone."""
    classes = own_place.make("classes")
    for number in range(100):
        own_place.write(own_place.make("classes", f"class{number}") / "a.bin", "x" * SIZE)
    done = try_out(own_place, classes, *BRIEF, "--files", "80", "--scratch", own_place.scratch)
    says = "Later epochs were served from scratch directly, because all files of their directories are there."
    assert says in done.stdout


def test_a_part_that_is_promoted(own_place: Place):
    for number in range(40):
        own_place.write(own_place.make("source", f"class{number}") / "a.bin", "x" * SIZE)
        own_place.write(own_place.make("source", "large") / f"{number}.bin", "x" * SIZE)
    done = try_out(own_place, own_place.source, *BRIEF, "--files", "70", "--scratch", own_place.scratch)
    (line,) = (line for line in done.stdout.splitlines() if "partly served by the daemon" in line)
    promoted, files = map(int, re.findall(r"(\d+) of (\d+) files", line)[0])
    assert 20 < promoted < files <= 70


def test_how_later_epochs_were_served():
    assert "first 3, at the end 7 of 9 files" in _how_served(Served(9, 3, 7), is_all=False)
    assert "by the daemon: a directory" in _how_served(Served(9, 0, 0), is_all=False)
    assert "because all files are there" in _how_served(Served(9, 9, 9), is_all=True)


def test_a_file_that_is_promoted_without_its_directory():
    assert PROMOTED_ALONE_BYTES == LARGE_FILE_BYTES


def test_readings_in_two_orders(own_place: Place):
    """What a server warms in the course of time favours no number of workers; and no file is read directly twice."""
    files = [(f"{number}", 1) for number in range(400)]
    trial = Trial(Plan(own_place.source, own_place.path, (0, 2, 4), 3.0, 400, 0, False, 0))
    turns = trial._turns(share_out(files, 3, seed=0))
    assert [(workers, seconds) for workers, _, seconds in turns] == [(k, 1.5) for k in (0, 2, 4, 4, 2, 0)]
    read = [path for _, part, _ in turns for path in part]
    assert sorted(read) == sorted(path for path, _ in files)
    few = trial._turns(share_out(files[:100], 3, seed=0))
    assert [(workers, seconds) for workers, _, seconds in few] == [(k, 3.0) for k in (0, 2, 4)]


def test_few_files(place: Place):
    done = try_out(place, place.source, *BRIEF, "--scratch", place.scratch)
    assert "There are few files" in done.stdout
    assert "may have helped those that read directly" in done.stdout
    assert "none is an image" in done.stdout
    assert "num_workers=2 at least, " in done.stdout
    assert [row[1] != "" for _, row in sorted(rows(done.stdout).items())] == [False, True]


def test_the_settings_of_mounts_do_not_count(own_place: Place):
    """Neither those of the environment nor those of the file: it measures what the line to type brings."""
    place = own_place
    settings = {"CACHEFS_KEEP": "1", "CACHEFS_CAPACITY": "0", "CACHEFS_DATA": "/nowhere", "CACHEFS_NO_PROMOTE": "1"}
    done = try_out(place, place.source, *BRIEF, "--scratch", place.scratch, env=settings)
    assert "Later epochs were served from scratch directly" in done.stdout


@needs_root
def test_files_that_fail_are_told(ordinary_place: Place):
    place = ordinary_place
    os.chown(place.source / "one", 0, 0)
    (place.source / "one").chmod(0o600)
    done = try_out(place, place.source, *BRIEF, "--scratch", place.scratch)
    assert "Permission denied" in done.stdout
    assert "Reading failed" in done.stdout


def test_a_chart(own_place: Place):
    pytest.importorskip("matplotlib")
    place = own_place
    for name in "chart.png", "chart.svg":
        done = place.run("bench", place.source, *BRIEF, "--scratch", place.scratch, "--chart", place.path / name)
        assert done.returncode == 0, done.stderr
        assert f"Drawn: {place.path / name}" in done.stdout
        assert (place.path / name).stat().st_size > 1000


def test_ascii_output(own_place: Place):
    place = own_place
    done = try_out(place, place.source, *BRIEF, "--scratch", place.scratch, env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii()
    assert " ##" in done.stdout


@needs_root
@pytest.mark.parametrize("whose", ["own", "foreign"])
def test_where_only_fusermount3_mounts(ordinary_place: Place, slow_source: Callable[..., SlowSource], whose: str):
    """The mount is beside the source then, which need not be the user's own."""
    place = ordinary_place
    backing = place.make("backing")
    make_dataset(backing, files=FILES, classes=3, mean_bytes=SIZE)
    if whose == "foreign":
        os.chown(backing, 0, 0)
        backing.chmod(0o1755)
    slow = slow_source(backing, latency=LATENCY, allow_other=True)
    options = (*BRIEF, "--scratch", place.scratch)
    mounts = ("--mount", "--propagation", "unchanged")
    done = place.run_with_namespaces_limited(*CACHEFS, "bench", slow.path, *options, unshare=mounts)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Later epochs were served by the daemon" in done.stdout
    assert f"cachefs run --data {slow.path}" in done.stdout
    assert (f"--data {slow.path}:DIR" in done.stdout) == (whose == "foreign")
    assert not [path for path in place.path.iterdir() if path.name.startswith("cachefs-bench-")]


def test_few_files_for_so_many_workers_are_not_divided(own_place: Place):
    """Each worker would have one: what a reading takes were its start."""
    make_dataset(own_place.source, files=FILES, classes=2, mean_bytes=SIZE)
    options = ("--workers", "1,8", "--seconds", "0.5", "--scratch", own_place.scratch)
    assert "There are few files" in try_out(own_place, own_place.source, *options).stdout


def test_workers_have_imported_what_they_decode_with_before_their_time_is_taken():
    images = pytest.importorskip("PIL.Image")
    script = "import PIL.Image; from cachefs.bench.reader import has_decoder; has_decoder(); print(len(PIL.Image.OPEN))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    images.init()
    assert int(done.stdout) == len(images.OPEN)


def test_a_scratch_that_is_a_disk_of_its_own(own_place: Place):
    """What is tried is that disk, and not the one around it."""
    place = own_place
    scratch = place.make("disk")
    if os.geteuid() != 0:
        pytest.skip("mounts a tmpfs")
    script = f"mount -t tmpfs tmpfs {scratch}"
    command = [*CACHEFS, "bench", place.source, *BRIEF, "--scratch", scratch]
    process = subprocess.Popen(
        [*map(str, place.on_own_mounts(script)), *map(str, command)], env=place.environ(), cwd=place.path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = set()
    while process.poll() is None:
        seen |= {path.name for path in place.path.iterdir() if path.name.startswith("cachefs-bench-")}
        time.sleep(0.01)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "num_workers=" in said
    assert not seen


@needs_root
def test_a_scratch_of_ones_own_where_nobody_may_write_beside_it(ordinary_place: Place):
    place = ordinary_place
    scratch = place.make("closed", "own")
    os.chown(place.path / "closed", 0, 0)
    done = try_out(place, place.source, *BRIEF, "--scratch", scratch)
    assert "num_workers=" in done.stdout
    assert list(scratch.iterdir()) == []


def test_only_the_processors_that_it_may_use_are_told(own_place: Place):
    pytest.importorskip("PIL")
    make_dataset(own_place.source, files=20, classes=2, mean_bytes=SIZE)
    one = min(os.sched_getaffinity(0))
    done = own_place.run(
        "bench", own_place.source, *BRIEF, "--scratch", own_place.scratch,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert "decoded, on 1 processor." in done.stdout


class TestRefused:
    def test_what_is_no_source(self, place: Place):
        options = (*BRIEF, "--scratch", place.scratch)
        place.refused("bench", place.path / "missing", *options, says=f"there is no source {place.path / 'missing'}")
        place.refused("bench", place.source / "one", *options, says="is not a directory")
        place.refused("bench", "", *options, code=2, says="the path is empty")

    def test_nothing_to_read(self, place: Place):
        options = (*BRIEF, "--scratch", place.scratch)
        empty = place.make("empty")
        place.refused("bench", empty, *options, says=f"there is no file in {empty}")
        place.write(empty / "nothing", "")
        place.refused("bench", empty, *options, says=f"all files of {empty} are empty")
        os.truncate(empty / "nothing", LARGEST_FILE + 1)
        place.refused("bench", empty, *options, says=("is larger than 64 MiB", f"cachefs doctor {empty}"))

    def test_links_alone(self, place: Place):
        links = place.make("links")
        (links / "link").symlink_to(place.source / "one")
        says = ("there are only symbolic links in", "name the directory they lead to")
        place.refused("bench", links, *BRIEF, "--scratch", place.scratch, says=says)

    def test_large_files_with_a_few_small_ones(self, own_place: Place):
        """Tar shards with a README: it alone stands for nothing."""
        os.truncate(own_place.write(own_place.source / "shard.tar", "x"), LARGEST_FILE + 1)
        says = ("most bytes of", "larger than 64 MiB", f"cachefs doctor {own_place.source}")
        own_place.refused("bench", own_place.source, *BRIEF, "--scratch", own_place.scratch, says=says)

    @needs_root
    def test_a_disk_of_scratch_that_is_all_but_full(self, own_place: Place):
        """5% of it stay free: nothing would be cached, and that is not the source's fault."""
        place = own_place
        disk = place.make("disk")
        setup = f"mount -t tmpfs -o size=64m tmpfs {disk} && truncate -s 0 {disk}/x && fallocate -l 62m {disk}/x"
        command = [*CACHEFS, "bench", place.source, *BRIEF, "--scratch", disk / "scratch"]
        words = [*map(str, place.on_own_mounts(setup)), *map(str, command)]
        done = subprocess.run(words, env=place.environ(), cwd=place.path, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout
        assert f"there is no room in {disk}" in done.stderr

    def test_a_source_that_hangs(self, own_place: Place, slow_source: Callable[..., SlowSource]):
        slow = slow_source(own_place.source)
        for op in "lookup", "getattr":
            slow.fail(op=op, hang=True)
        done = own_place.run("bench", slow.path, *BRIEF, "--scratch", own_place.scratch)
        slow.clear_faults()
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"cachefs: source {slow.path} does not answer within 5 s")

    def test_no_readable_file(self, ordinary_place: Place):
        place = ordinary_place
        for path in place.source / "one", place.source / "sub" / "two":
            path.chmod(0)
        says = f"no file of {place.source} can be read: Permission denied"
        place.refused("bench", place.source, *BRIEF, "--scratch", place.scratch, says=says)

    def test_a_closed_source(self, ordinary_place: Place):
        place = ordinary_place
        closed = place.make("closed", mode=0)
        says = f"source {closed} is not readable by this user"
        place.refused("bench", closed, *BRIEF, "--scratch", place.scratch, says=says)
        place.make("closed")

    def test_a_source_inside_scratch_and_the_reverse(self, place: Place):
        place.refused("bench", place.source / "sub", "--scratch", place.source, says="is inside scratch")
        place.refused("bench", place.source, "--scratch", place.source / "sub" / "scratch", says="is inside the source")

    def test_scratch_that_cannot_be(self, ordinary_place: Place):
        says = "no folder for the trial can be made in /usr: Permission denied"
        ordinary_place.refused("bench", ordinary_place.source, "--scratch", "/usr/scratch", says=says)
        says = "no folder for the trial can be made in /missing: No such file or directory"
        ordinary_place.refused("bench", ordinary_place.source, "--scratch", "/missing/scratch", says=says)

    def test_a_mount_of_ours(self, place: Place):
        at = place.mount()
        done = place.run("bench", at, *BRIEF, "--scratch", place.path / "other")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"source {at} is cached already" in done.stderr
        assert done.stderr.count("\n") == 1
        place.do("umount", at)

    @pytest.mark.parametrize(
        ("option", "value", "says"),
        [
            ("--workers", "four", "is not a list of numbers"),
            ("--workers", "1,-1", "is not from 0 to 64"),
            ("--workers", "1000", "is not from 0 to 64"),
            ("--seconds", "0", "not in the range"),
            ("--seconds", "nan", "is not a number of seconds"),
            ("--files", "0", "not in the range"),
            ("--chart", "chart.txt", "is not a name of a picture"),
            ("--chart", "/nowhere/chart.png", "cannot be written"),
            ("--chart", "directory.png", "is a directory"),
        ],
    )
    def test_bad_values(self, own_place: Place, option: str, value: str, says: str):
        own_place.make("directory.png")
        own_place.refused("bench", own_place.source, option, value, code=2, says=says)

    @pytest.mark.parametrize(
        ("op", "errno", "says"),
        [
            ("read", "EIO", "Input/output error: look after its file server or disk"),
            ("open", "ENOENT", "No such file or directory: was it moved or unmounted meanwhile?"),
            ("open", "EACCES", "Permission denied: check its permissions"),
        ],
    )
    def test_a_source_whose_reads_fail(
        self, own_place: Place, slow_source: Callable[..., SlowSource], op: str, errno: str, says: str
    ):
        slow = slow_source(own_place.source)
        slow.fail(op=op, errno=errno)
        before = own_place.snapshot()
        done = own_place.run("bench", slow.path, *BRIEF, "--scratch", own_place.scratch)
        assert done.returncode == 1
        assert done.stderr == f"cachefs: no file of {slow.path} can be read: {says}\n"
        assert_nothing_is_left(own_place, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["reading directly", "mounting", "reading through the mount"])
def test_interrupted(place: Place, slow: SlowSource, number: signal.Signals, when: str):
    pipe = subprocess.PIPE
    before = place.snapshot()
    seconds = "30" if when == "reading directly" else "0.3"
    options = ("--workers", "0,2", "--seconds", seconds, "--scratch", place.scratch)
    slow.reset()
    process = place.start("bench", slow.path, *options, stdout=pipe, stderr=pipe)
    ours = psutil.Process(process.pid)

    def began() -> bool:
        if when == "reading directly":
            return slow.statistics().operations.get("read", 0) >= 1
        if when == "mounting":
            return any("run" in command for command in map(command_of, children(ours)))
        return bool(mounts_everywhere(place.path))

    wait_until(began, when)
    started = children(ours)
    assert started
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said + errors
    assert errors == "cachefs: interrupted: nothing is left\n"
    wait_until(lambda: not any(child.is_running() for child in started), "its processes end")
    assert_nothing_is_left(place, before)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def start_where_it_hangs(place: Place, slow: SlowSource, op: str) -> subprocess.Popen[str]:
    """A bench without workers, which waits in `op` of the source."""
    slow.fail(op=op, hang=True)
    slow.reset()
    options = ("--workers", "0", "--seconds", "30", "--scratch", place.scratch)
    process = place.start("bench", slow.path, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: slow.statistics().operations.get(op, 0) >= 1, "it waits")
    return process


def test_an_interrupt_does_not_wait_for_a_read_that_hangs(own_place: Place, slow_source: Callable[..., SlowSource]):
    """Which the process itself makes where there are no workers."""
    make_dataset(own_place.source, files=FILES, classes=3, mean_bytes=SIZE)
    slow = slow_source(own_place.source)
    before = own_place.snapshot()
    process = start_where_it_hangs(own_place, slow, "read")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert errors == "cachefs: interrupted: nothing is left\n"
    assert_nothing_is_left(own_place, before)


def test_an_interrupt_does_not_wait_for_what_the_kernel_keeps(own_place: Place, slow_source: Callable[..., SlowSource]):
    """An open that the source's file system has been told of cannot even be killed: it is named."""
    slow = slow_source(own_place.source)
    before = own_place.snapshot()
    process = start_where_it_hangs(own_place, slow, "open")
    started = children(psutil.Process(process.pid))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGINT
    (pid,) = re.findall(r"^cachefs: interrupted: process (\d+) cannot be ended", errors)
    assert int(pid) in [each.pid for each in started if each.is_running()]
    slow.clear_faults()
    wait_until(lambda: not any(map(lives, started)), "its processes end")
    assert_nothing_is_left(own_place, before)


@needs_root
def test_an_interrupt_does_not_wait_for_a_listing_of_the_mount(slow: SlowSource, place: Place):
    """Which cannot be killed before the mount has been taken away."""
    before = place.snapshot()
    slow.set(latency=0.1)
    process = place.start(
        "bench", slow.path, *BRIEF, "--scratch", place.scratch, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: any(map(heeds_signals, readers_in_a_run(process.pid))), "it lists")
    for op in "lookup", "getattr", "readdir":
        slow.fail(op=op, hang=True)
    wait_until(lambda: asks_nothing_more(slow), "it waits")
    started = children(psutil.Process(process.pid))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGINT
    assert mounts_everywhere(place.path) == []
    told = {int(pid) for pid in re.findall(r"\d+", errors)}
    assert {each.pid for each in started if lives(each)} <= told
    slow.clear_faults()
    wait_until(lambda: not any(map(lives, started)), "its processes end")
    assert_nothing_is_left(place, before)


def asks_nothing_more(slow: SlowSource) -> bool:
    before = slow.statistics().requests
    time.sleep(0.5)  # some times its latency
    return slow.statistics().requests == before


def readers_in_a_run(pid: int) -> list[psutil.Process]:
    """Of a bench, below its `cachefs run`."""
    runs = [each for each in children(psutil.Process(pid)) if "run" in command_of(each)]
    below = [each for run in runs for each in children(run) if each not in runs]
    return [each for each in below if command_of(each)[-1:] == [reader.__file__]]


def heeds_signals(process: psutil.Process) -> bool:
    """Whether it has begun its work, and with it said what it does when it is to end."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return False
    return bool(int(re.findall(r"^SigCgt:\s+(\w+)", status, re.MULTILINE)[0], 16) >> (signal.SIGTERM - 1) & 1)


def test_who_is_killed_takes_its_readers_along(own_place: Place, slow_source: Callable[..., SlowSource]):
    make_dataset(own_place.source, files=FILES, classes=3, mean_bytes=SIZE)
    slow = slow_source(own_place.source, latency=LATENCY)
    slow.reset()
    options = ("--workers", "2", "--seconds", "30", "--scratch", own_place.scratch)
    process = own_place.start("bench", slow.path, *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: slow.statistics().operations.get("read", 0) >= 1, "it reads")
    started = children(psutil.Process(process.pid))
    process.kill()
    process.wait()
    wait_until(lambda: not any(child.is_running() for child in started), "its processes end", seconds=60)


@pytest.fixture
def measured() -> Callable[..., list[Measurement]]:
    def make(direct: dict[int, float], later: dict[int, float]) -> list[Measurement]:
        rates = [(DIRECT, direct), (FIRST, {0: 10_000.0}), (LATER, later)]
        return [Measurement(way, k, 10.0, round(10 * rate), 1) for way, of in rates for k, rate in of.items()]

    return make


class TestRecommendation:
    def test_the_fewest_workers_that_are_about_the_best(self, measured: Callable[..., list[Measurement]]):
        advice = recommend(measured({0: 10, 1: 10, 4: 35, 8: 70}, {0: 900, 1: 800, 2: 1000, 4: 1100, 8: 1050}))
        assert advice.workers == 2
        assert advice.direct_workers == 8
        assert advice.is_worth_it
        assert advice.is_direct_rising
        assert advice.speed_up == pytest.approx(1100 / 70)

    def test_without_use_of_a_cache_it_is_for_reading_directly(self, measured: Callable[..., list[Measurement]]):
        advice = recommend(measured({1: 500, 2: 950, 4: 1000}, {1: 1100, 2: 1100, 4: 1150}))
        assert not advice.is_worth_it
        assert not advice.is_direct_rising
        assert advice.workers == advice.direct_workers == 2

    def test_where_more_workers_may_bring_more_it_says_so(self, measured: Callable[..., list[Measurement]]):
        """Also through the mount, as where a machine has more processors than were tried; and numbers that it takes."""
        advice = recommend(measured({1: 100, 8: 101}, {1: 100, 4: 400, 8: 800}))
        assert advice.is_later_rising
        assert not advice.is_direct_rising

        def told(*workers: int) -> str:
            plan = Plan(Path("/data"), Path("/tmp"), workers, 1.0, 1, 0, False, 0)
            return "\n".join(_advise(plan, None, advice))

        assert "(More than 8 workers may bring more: try --workers 8,16,32.)" in told(1, 4, 8)
        assert "(More than 32 workers may bring more: try --workers 32,64.)" in told(1, 32)
        assert "(More than 64 workers may bring more.)" in told(1, 64)

    def test_what_is_within_the_spread_of_two_readings_is_about_the_same(self):
        """It was decided by a threshold of one reading each."""

        def told(direct: dict[int, tuple[float, float]], later: dict[int, tuple[float, float]]) -> str:
            ways = (DIRECT, direct), (LATER, later)
            readings = [(way, k, rates[turn]) for turn in (0, 1) for way, of in ways for k, rates in of.items()]
            results = together(
                Measurement(way, k, 10.0, round(10 * rate), 1, rates=(rate,), decoded=1) for way, k, rate in readings
            )
            plan = Plan(Path("/data"), Path("/tmp"), (1, 4), 1.0, 1, 0, False, 0)
            return "\n".join(_advise(plan, None, recommend(results)))

        assert "brings about the same here: 130 files/s" in told(
            {1: (50, 50), 4: (80, 120)}, {1: (50, 50), 4: (110, 150)}
        )
        assert "brings 1.3 times as many" in told({1: (50, 50), 4: (99, 101)}, {1: (50, 50), 4: (110, 150)})
        clear = told({1: (50, 52), 4: (99, 101)}, {1: (300, 310), 4: (480, 500)})
        assert "about the same" not in clear
        assert "num_workers=4" in clear
        noisy = told({1: (50, 52), 4: (99, 101)}, {1: (300, 490), 4: (480, 500)})
        assert "num_workers=4, the fewest with 90% of the best rate; about the same with 1," in noisy

    def test_without_decoding_it_is_a_lower_bound(self):
        """Reading a .npy costs so little that one worker does it: what the loader does with it was not measured."""
        plan = Plan(Path("/data"), Path("/tmp"), (1, 4), 1.0, 1, 0, False, 0)
        read = [Measurement(way, k, 1.0, rate, 1) for way, rate in ((DIRECT, 10), (LATER, 100)) for k in (1, 4)]
        decoded = [replace(each, decoded=each.files) for each in read]
        for results, says in (read, "with num_workers=1 at least, "), (decoded, "with num_workers=1, "):
            assert says in "\n".join(_advise(plan, None, recommend(results)))

    def test_no_workers_at_all_only_if_nothing_else_was_tried(self):
        assert fewest_close({0: 100.0, 1: 50.0}) == 1
        assert fewest_close({0: 100.0}) == 0


def test_parts_have_like_sizes_and_no_file_twice():
    files = [(f"{number}", number**2) for number in range(101)]
    parts = share_out(files, 4, seed=1)
    assert sorted(path for part in parts for path in part) == sorted(path for path, _ in files)
    assert {len(part) for part in parts} == {25, 26}
    sizes = [sum(int(path) ** 2 for path in part if path != "100") for part in parts]
    assert max(sizes) < 1.15 * min(sizes)
    assert parts == share_out(files, 4, seed=1)
    assert parts != share_out(files, 4, seed=2)


def test_what_is_found_and_what_is_left_out(tmp_path: Path):
    for name, size in {"a": 10, "b": 20, "large": 1000, "empty": 0}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "link").symlink_to("a")
    found = find(str(tmp_path), 10.0, 100, 100, 0)
    assert sorted(map(tuple, found.files)) == [("a", 10), ("b", 20)]
    assert (found.seen, found.is_all, found.too_large, found.empty) == (4, True, 1, 1)
    assert (found.too_large_bytes, found.links) == (1000, 1)
    assert found.whole == [""]
    some = find(str(tmp_path), 10.0, 2, 100, 0)
    assert (some.is_all, some.is_counted, some.whole) == (False, True, [])
    assert not find(str(tmp_path), 0.0, 2, 100, 0).is_counted


def test_the_reader_knows_of_no_cache():
    assert "cachefs" not in Path(reader.__file__).read_text().split('"""', 2)[2]
