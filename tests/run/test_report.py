"""What a run says at its end: the line on stderr, and the JSON of --report."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.harness import wait_until
from tests.run.running import JobPlace, warnings_of

TOTALS = {"fetches", "source_bytes_read", "hits", "hit_bytes", "misses", "bypasses", "wait_seconds"}


def report_of(place: JobPlace, name: str = "report.json") -> dict[str, Any]:
    return json.loads((place.path / name).read_text())


def test_a_report_is_what_the_source_counted(place: JobPlace, slow_source):
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    slow = slow_source(place.source, **others)
    other = place.make("other")
    place.write(other / "three", "3" * 300)
    job = place.job("--report", "report.json", data=[slow.path, other])
    assert job.command.read(slow.path / "one") == b"1" * 1000
    assert job.command.read(slow.path / "sub/two") == b"2" * 2000
    wait_until(
        lambda: len([p for p in (place.scratch / "files").rglob("*") if p.is_file()]) == 2, "copies are complete"
    )
    assert job.command.read(slow.path / "one") == b"1" * 1000
    assert job.command.read(other / "three") == b"3" * 300
    errors = job.end(5)
    report = report_of(place)
    assert set(report) == {"command", "exit_status", "seconds", "is_last", "totals", "mounts"}
    assert report["command"][0].endswith("python")
    assert (report["exit_status"], report["is_last"]) == (5, True)
    assert report["seconds"] > 0
    assert set(report["totals"]) == TOTALS
    assert slow.statistics().bytes_read == 3000
    expected = {"fetches": 3, "source_bytes_read": 3300, "hits": 1, "hit_bytes": 1000, "misses": 3, "bypasses": 0}
    assert {key: report["totals"][key] for key in expected} == expected
    assert [mount["mountpoint"] for mount in report["mounts"]] == [str(slow.path), str(other)]
    assert [mount["source_bytes_read"] for mount in report["mounts"]] == [3000, 300]
    assert [mount["problem"] for mount in report["mounts"]] == [None, None]
    for mount in report["mounts"]:
        assert {"policy", "capacity_bytes", "resident_files", "evictions", "uptime_seconds"} <= set(mount)
    assert errors.startswith("cachefs: 3 files and 3.2 KiB from the source, 1 hit, ")
    assert errors.endswith(" s waited, 1000 B saved\n")


def test_each_of_several_reports(place: JobPlace):
    """One who leaves while others go on writes what was until then; the last writes how it ended."""
    first = place.job("--report", "first.json")
    second = place.job("--report", "second.json")
    first.command.read(place.source / "one")
    first.end(1)
    second.command.read(place.source / "sub/two")
    second.end(2)
    early, late = report_of(place, "first.json"), report_of(place, "second.json")
    assert [(r["is_last"], r["exit_status"], r["totals"]["fetches"]) for r in (early, late)] == [
        (False, 1, 1),
        (True, 2, 2),
    ]


def test_a_report_that_all_share(own_place: JobPlace):
    """The last one wins, whatever the order."""
    jobs = [own_place.job("--report", "report.json") for _ in range(3)]
    for job in jobs:
        job.command.exit()
    for job in jobs:
        assert job.wait() == 0
    assert report_of(own_place)["is_last"] is True


def test_where_the_report_goes(own_place: JobPlace):
    """Relative to where run was started, whatever the command does; an old one is replaced."""
    place = own_place
    old = place.write(place.make("sub") / "report.json", "old")
    done = place.cached("sh", "-c", "cd /; exit 3", options=("--report", "report.json"), cwd=place.path / "sub")
    assert done.returncode == 3
    assert json.loads(old.read_text())["exit_status"] == 3
    assert os.listdir(place.path / "sub") == ["report.json"]


def test_a_report_that_cannot_be_written(place: JobPlace):
    for path in "/proc/report.json", place.path / "missing" / "report.json", place.path / "source", "/dev/null/report":
        done = place.cached("sh", "-c", "exit 7", options=("--report", path))
        assert done.returncode == 7
        (warning,) = warnings_of(done.stderr)
        assert warning.startswith(f"cachefs: warning: the report {path} cannot be written: "), warning
    assert sorted(os.listdir(place.source)) == ["one", "sub"]
    assert [name for name in os.listdir(place.path) if name.startswith(".")] == []


def test_a_report_in_the_data(place: JobPlace):
    """They are read-only while they are cached, and the source itself again when the last one writes."""
    done = place.cached("true", options=("--report", place.source / "report.json"))
    assert (done.returncode, warnings_of(done.stderr)) == (0, [])
    assert report_of(place, "source/report.json")["is_last"] is True


def test_a_report_when_nothing_is_cached(place: JobPlace):
    place.write(place.path / "scratch", "a file, no directory")
    done = place.cached("sh", "-c", "exit 4", options=("--report", "report.json"))
    assert done.returncode == 4
    report = report_of(place)
    assert report["exit_status"] == 4
    assert report["totals"]["fetches"] == 0
    (mount,) = report["mounts"]
    assert "is not a directory" in mount["problem"]
    assert done.stderr.count("\n") == 1, "one warning, and nothing to sum up"


def test_a_report_of_a_daemon_that_died(place: JobPlace):
    job = place.job("--report", "report.json")
    job.command.read(place.source / "one")
    place.daemon().kill()
    wait_until(lambda: "is cached no more" in job.stderr, "it says so")
    job.end()
    (mount,) = report_of(place)["mounts"]
    assert mount["problem"] == "its daemon was killed by SIGKILL"


def test_a_report_of_a_keeper_that_died(own_place: JobPlace):
    job = own_place.job("--report", "report.json")
    own_place.keeper().kill()
    wait_until(lambda: "the keeper of the mounts died" in job.stderr, "it says so")
    job.end(9)
    assert report_of(own_place)["exit_status"] == 9


def test_a_report_of_a_command_that_was_killed(own_place: JobPlace):
    job = own_place.job("--report", "report.json")
    job.command.say("os.kill(os.getpid(), 9)")
    assert job.wait() == 137
    assert report_of(own_place)["exit_status"] == 137
    assert report_of(own_place)["is_last"] is True
