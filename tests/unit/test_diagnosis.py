"""What follows from the facts: whether `run` could cache, where scratch should be, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cachefs.config import DEFAULT_CAPACITY, Capacity
from cachefs.errors import CachefsError
from cachefs.mount.diagnosis import diagnose, find_obstacle, write_capacity
from cachefs.mount.facts import Examination, Machine, Scratch, Source
from cachefs.mount.findings import Verdict, format_seconds
from cachefs.mount.limits import Limits, MemoryLimit
from cachefs.mount.measurement import Reading, ScratchSpeed, Survey
from cachefs.mount.mountinfo import Mount

GIB = 2**30
LIMITS = Limits(32 * GIB, 30 * GIB, None, (1024, 1_048_576), 8, 8)
MACHINE = Machine(is_root=False, fuse=None, helper=None, namespaces=None, limits=LIMITS)
DISK = Mount(Path("/"), "8:1", "ext4", "/dev/sda1")
NFS = Mount(Path("/net/nas"), "0:50", "nfs4", "nas:/export")
TMPFS = Mount(Path("/tmp"), "0:51", "tmpfs", "tmpfs")
SPEED = ScratchSpeed(write=1e9, read=2e9, latency=1e-4)
SCRATCH = Scratch(Path("/tmp/cachefs-1"), DISK, None, available=100 * GIB, total=200 * GIB, speed=SPEED)
SURVEY = Survey(1000, True, 1000, 0, GIB / 20, 1000, 50 * GIB, [])
READING = Reading([0.02] * 10, 1_000_000, 1.0, True, 0, "")
SOURCE = Source(Path("/net/nas/data"), NFS, None, None, SURVEY, READING, (READING,) * 4)
FACTS = Examination(MACHINE, SCRATCH, SOURCE)
PROBLEM = CachefsError("it is broken", "mend it")


def with_machine(**changes: object) -> Examination:
    return replace(FACTS, machine=replace(MACHINE, **changes))


def with_source(**changes: object) -> Examination:
    return replace(FACTS, source=replace(SOURCE, **changes))


def with_scratch(**changes: object) -> Examination:
    return replace(FACTS, scratch=replace(SCRATCH, **changes))


def row(facts: Examination, subject: str, capacity: Capacity = DEFAULT_CAPACITY):
    return next(finding for finding in diagnose(facts, capacity, ()).findings if finding.subject == subject)


CAN_CACHE = {
    "all is well": FACTS,
    "no source": replace(FACTS, source=None),
    "no helper": with_machine(helper=PROBLEM),
    "not its own directory": with_source(mounting=PROBLEM),
    "no namespaces": with_machine(namespaces=PROBLEM),
    "no namespaces, no source": replace(with_machine(namespaces=PROBLEM), source=None),
    "too small": with_scratch(available=20 * GIB),
    "network scratch": with_scratch(mount=NFS),
}
CANNOT_CACHE = {
    "no device": (with_machine(fuse=PROBLEM), "it is broken: mend it"),
    "neither namespaces nor helper": (with_machine(namespaces=PROBLEM, helper=PROBLEM), "it is broken; and it is"),
    "neither namespaces nor permission": (
        replace(with_source(mounting=PROBLEM), machine=replace(MACHINE, namespaces=PROBLEM)),
        "it is broken; and it is broken: mend it",
    ),
    "root without the capability": (with_machine(namespaces=PROBLEM, is_root=True), "it is broken"),
    "silent source": (with_source(silence="reading"), "does not answer within 5 s"),
    "bad scratch": (with_scratch(problem=PROBLEM), "it is broken"),
    "full disk": (with_scratch(available=5 * GIB), "there is no room in scratch"),
    "scratch in the source": (with_scratch(path=SOURCE.path / "a" / "b"), "is inside the source"),
    "scratch is the source": (with_scratch(path=SOURCE.path), "is inside the source"),
    "source in scratch": (with_scratch(path=Path("/net")), "is inside scratch"),
}


@pytest.mark.parametrize("facts", CAN_CACHE.values(), ids=CAN_CACHE.keys())
def test_nothing_is_in_the_way(facts):
    diagnosis = diagnose(facts, DEFAULT_CAPACITY, ())
    assert diagnosis.obstacle is None
    assert (diagnosis.command is None) == (facts.source is None)


@pytest.mark.parametrize(("facts", "says"), CANNOT_CACHE.values(), ids=CANNOT_CACHE.keys())
def test_an_obstacle_is_named(facts, says):
    diagnosis = diagnose(facts, DEFAULT_CAPACITY, ())
    assert diagnosis.obstacle is not None
    assert says in diagnosis.obstacle
    assert diagnosis.command is None


def test_the_line_to_type():
    assert diagnose(FACTS, DEFAULT_CAPACITY, ()).command == "cachefs run --data /net/nas/data -- COMMAND"
    diagnosis = diagnose(with_source(path=Path("/net/my data")), Capacity(size=50 * GIB), ("scratch", "capacity"))
    expected = "cachefs run --data '/net/my data' --scratch /tmp/cachefs-1 --capacity 50G -- COMMAND"
    assert diagnosis.command == expected


@pytest.mark.parametrize("text", ["80%", "12.5%", "0%", "0", "300G", "1T", "5M", "1K", "1025"])
def test_a_capacity_is_written_as_it_is_read(text):
    assert write_capacity(Capacity.parse(text)) == text


LARGE = Scratch(Path("/scratch/cachefs-1"), replace(DISK, device="8:2"), None, 900 * GIB, 1000 * GIB)


@pytest.mark.parametrize(
    "facts",
    [with_scratch(mount=NFS), with_scratch(mount=TMPFS), with_scratch(problem=PROBLEM), with_scratch(available=GIB)],
    ids=["network", "memory", "unusable", "full"],
)
def test_a_better_scratch_is_recommended(facts):
    facts = replace(facts, other_places=(LARGE,))
    diagnosis = diagnose(facts, DEFAULT_CAPACITY, ())
    assert diagnosis.command == "cachefs run --data /net/nas/data --scratch /scratch/cachefs-1 -- COMMAND"
    assert any("--scratch /scratch/cachefs-1" in finding.advice for finding in diagnosis.findings)
    assert diagnosis.obstacle == find_obstacle(facts, DEFAULT_CAPACITY), "what is recommended is not what was asked"


def test_more_room_is_recommended_where_it_is_needed():
    facts = replace(with_scratch(available=20 * GIB), other_places=(LARGE,))
    assert "--scratch /scratch/cachefs-1" in str(diagnose(facts, DEFAULT_CAPACITY, ()).command)
    facts = replace(FACTS, other_places=(LARGE,))
    assert "--scratch" not in str(diagnose(facts, DEFAULT_CAPACITY, ()).command)


def test_a_place_in_memory_or_on_the_network_is_not_better():
    places = (replace(LARGE, mount=NFS), replace(LARGE, mount=TMPFS))
    facts = replace(with_scratch(mount=TMPFS), other_places=places)
    assert "--scratch" not in str(diagnose(facts, DEFAULT_CAPACITY, ()).command)


def test_a_better_scratch_does_not_cure_a_machine():
    facts = replace(with_machine(fuse=PROBLEM), scratch=replace(SCRATCH, problem=PROBLEM), other_places=(LARGE,))
    assert diagnose(facts, DEFAULT_CAPACITY, ()).command is None


@pytest.mark.parametrize(
    ("available", "stored", "capacity", "room"),
    [
        (100, 0, "80%", 80),
        (100, 0, "100%", 90),
        (100, 0, "30G", 30),
        (100, 0, "150G", 90),
        (20, 80, "80%", 80),
        (5, 0, "80%", 0),
        (0, 0, "80%", 0),
        (100, 0, "0", 0),
    ],
)
def test_room_is_the_capacity_within_what_stays_free(available, stored, capacity, room):
    scratch = replace(SCRATCH, available=available * GIB, stored=stored * GIB)
    assert scratch.room(Capacity.parse(capacity)) == room * GIB


def test_the_hit_rate_is_that_of_the_room():
    forecast = diagnose(FACTS, Capacity(size=10 * GIB), ()).forecast
    assert forecast is not None
    assert forecast.hit_rate == pytest.approx(0.2)
    fits = row(FACTS, "dataset fits", Capacity(size=10 * GIB))
    assert fits.verdict is Verdict.WARNING
    assert fits.found.startswith("20% of it: 50.0 GiB into 10.0 GiB")


def test_what_a_memory_tier_would_bring():
    """Nothing where the dataset fits scratch; else what memory there is, less a tenth."""
    assert "would bring nothing" in row(FACTS, "memory tier").found
    machine = FACTS.machine
    limits = replace(machine.limits, memory_total=64 * GIB, memory_available=20 * GIB, memory_limit=None)
    facts = replace(FACTS, machine=replace(machine, limits=limits))
    found = row(facts, "memory tier", Capacity(size=10 * GIB)).found
    assert found == "--memory would add up to 13.6 GiB: 47% of the dataset kept, without it 20%"
    limits = replace(limits, memory_available=3 * GIB)
    facts = replace(FACTS, machine=replace(machine, limits=limits))
    assert row(facts, "memory tier", Capacity(size=10 * GIB)).found == "there is no memory for one"


def test_no_forecast_without_a_measured_source():
    assert diagnose(with_source(several=(), silence="reading"), DEFAULT_CAPACITY, ()).forecast is None
    assert diagnose(with_source(survey=None), DEFAULT_CAPACITY, ()).forecast is None
    assert diagnose(with_scratch(problem=PROBLEM), DEFAULT_CAPACITY, ()).forecast is None


def test_a_source_as_fast_as_scratch_gets_a_warning():
    fast = replace(READING, latencies=[1e-5] * 1000, size=10**9, seconds=0.1)
    facts = with_source(one=fast, several=(fast,) * 4)
    assert row(facts, "use of a cache").verdict is Verdict.WARNING


UNSURE = replace(SURVEY, total=None, sized=9)


@pytest.mark.parametrize(
    ("survey", "found", "fits"),
    [
        (SURVEY, "1,000 files, 50.0 GiB; 51.2 MiB a file", "yes: 50.0 GiB"),
        (
            replace(SURVEY, total=None, sized=9),
            "1,000 files, about 50.0 GiB; 51.2 MiB a file, the mean of 9",
            "yes: about",
        ),
        (
            replace(SURVEY, total=None, is_listed=False, estimate=1200),
            "about 1,200 files, about 60.0 GiB;",
            "yes: about",
        ),
        (replace(UNSURE, is_listed=False, estimate=None), "at least 1,000 files, 50.0 GiB;", "perhaps: at"),
    ],
)
def test_an_estimate_says_that_it_is_one(survey, found, fits):
    facts = with_source(survey=survey)
    assert row(facts, "dataset").found.startswith(found)
    assert row(facts, "dataset fits").found.startswith(fits)


@pytest.mark.parametrize(
    ("limits", "subject"),
    [
        (replace(LIMITS, open_files=(256, 1024)), "open files"),
        (replace(LIMITS, memory_available=100 * 2**20), "memory"),
        (replace(LIMITS, memory_limit=MemoryLimit(256 * 2**20, Path("/sys/fs/cgroup/memory.max"))), "memory limit"),
    ],
)
def test_scarcity_gets_a_warning_and_advice(limits, subject):
    finding = row(with_machine(limits=limits), subject)
    assert finding.verdict is Verdict.WARNING
    assert finding.advice
    assert row(FACTS, subject).verdict is Verdict.OK


def test_no_limit_of_open_files():
    assert row(with_machine(limits=replace(LIMITS, open_files=(None, None))), "open files").verdict is Verdict.OK


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000123, "0.012 ms"),
        (0.00035, "0.35 ms"),
        (0.0411, "41 ms"),
        (0.25, "250 ms"),
        (2.54, "2.5 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (36_000_000, "10,000 h 0 min"),
    ],
)
def test_times_for_people(seconds, text):
    assert format_seconds(seconds) == text
