"""Surveys, samples and trials of scratch, run as their workers run them."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from cachefs.cache.scratch import claim_scratch
from cachefs.errors import CachefsError
from cachefs.mount import measurement
from cachefs.mount.examination import share_out
from cachefs.mount.forecast import READERS
from cachefs.mount.measurement import (
    Reading,
    ScratchLook,
    ScratchSpeed,
    Survey,
    look_at_scratch,
    read_files,
    survey,
    try_scratch,
)


def result_of(job: Generator[Any, None, Any]) -> Any:
    """What a handler returns."""
    try:
        while True:
            next(job)
    except StopIteration as stop:
        return stop.value


def make_files(folder: Path, directories: int, each: int, size: int = 10) -> None:
    for number in range(directories):
        (folder / f"d{number}").mkdir()
        for name in range(each):
            (folder / f"d{number}" / f"f{name}").write_bytes(b"x" * size)


def test_a_survey_of_everything(source):
    make_files(source, 5, 4)
    (source / "link").symlink_to("d0")
    (source / "hanging").symlink_to("/nowhere")
    os.mkfifo(source / "pipe")
    found = Survey(*result_of(survey(str(source), 60.0)))
    assert (found.files, found.is_listed, found.estimate, found.total, found.mean_size) == (20, True, 20, 200, 10)
    assert len(set(found.sample)) == 20
    assert all(os.path.isfile(path) for path in found.sample)


def test_an_empty_source(source):
    found = Survey(*result_of(survey(str(source), 60.0)))
    assert (found.files, found.total, found.sample) == (0, 0, [])


def interrupt_after(monkeypatch, calls: int) -> None:
    """Time is over once it was asked for so many times."""
    asked = 0

    def is_over(_beat) -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    monkeypatch.setattr(measurement._Beat, "is_over", property(is_over))
    monkeypatch.setattr(measurement._Beat, "is_due", lambda _beat: False)


def test_what_was_not_listed_is_estimated(source, monkeypatch):
    make_files(source, 50, 3)
    interrupt_after(monkeypatch, 26)  # the root, 25 of the directories
    found = Survey(*result_of(survey(str(source), 60.0)))
    assert (found.files, found.is_listed) == (75, False)
    assert found.estimate == 75 * 51 // 26
    assert found.total is None


def test_nothing_is_concluded_from_a_few_directories(source, monkeypatch):
    make_files(source, 50, 3)
    interrupt_after(monkeypatch, 4)
    found = Survey(*result_of(survey(str(source), 60.0)))
    assert (found.files, found.estimate) == (9, None)


def test_a_survey_in_no_time_ends(source):
    make_files(source, 2, 2)
    found = Survey(*result_of(survey(str(source), 0.0)))
    assert (found.files, found.estimate, found.sized) == (0, None, 0)


def test_the_sample_of_many_files_is_bounded(source, monkeypatch):
    monkeypatch.setattr(measurement, "_SIZED_FILES", 30)
    monkeypatch.setattr(measurement, "_SAMPLE_FILES", 20)
    make_files(source, 10, 10)
    found = Survey(*result_of(survey(str(source), 60.0)))
    assert (found.files, found.sized, found.total, len(set(found.sample))) == (100, 30, None, 20)


def test_reading_whole_files(source):
    make_files(source, 1, 3, size=300_000)
    paths = [os.fsencode(path) for path in (source / "d0").iterdir()]
    found = Reading(*result_of(read_files([*paths, b"/nowhere"], 60.0, 0)))
    assert (found.files, found.size, found.is_whole) == (3, 900_000, True)
    assert (found.failed, found.reason) == (1, "No such file or directory")
    assert found.seconds >= sum(found.latencies)


def test_of_a_large_file_a_part_is_read(source, monkeypatch):
    monkeypatch.setattr(measurement, "_LONGEST_READ", 2 * 2**20)
    with open(source / "large", "wb") as file:
        file.truncate(50 * 2**20)
    found = Reading(*result_of(read_files([os.fsencode(source / "large")], 60.0, 1)))
    assert (found.files, found.size, found.is_whole) == (1, 2 * 2**20, False)


def test_readers_get_files_of_their_own():
    sample = [b"%d" % number for number in range(100)]
    alone, shares = share_out(sample)
    assert len(shares) == READERS
    assert sorted([*alone, *(path for share in shares for path in share)]) == sorted(sample)


@pytest.mark.parametrize("count", range(1, 20))
def test_few_files_are_enough_for_all_readers(count):
    alone, shares = share_out([b"%d" % number for number in range(count)])
    assert alone
    assert all(shares)


def test_a_trial_of_scratch_leaves_nothing(tmp_path):
    found = ScratchSpeed(*result_of(try_scratch(str(tmp_path / "new"), 2**30, 1.0)))
    assert min(found.write, found.read, found.latency) > 0
    assert list(tmp_path.iterdir()) == []


def test_no_trial_where_there_is_no_room(tmp_path):
    assert result_of(try_scratch(str(tmp_path), 4096 * 20, 1.0)) is None


def holds_foreign_files(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "thesis.tex").touch()


def is_marked_for_another_format(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "cachefs-scratch").write_text('{"format": 99, "directory_made_by_cachefs": true}')


def is_writable_by_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


SCRATCHES = {
    "new": lambda path: None,
    "empty": lambda path: path.mkdir(mode=0o755),
    "used": lambda path: os.close(claim_scratch(path).fd),
    "foreign": holds_foreign_files,
    "format": is_marked_for_another_format,
    "open to others": is_writable_by_others,
    "link": lambda path: path.symlink_to("/tmp"),
    "file": lambda path: path.touch(),
}


@pytest.mark.parametrize("make", SCRATCHES.values(), ids=SCRATCHES.keys())
def test_scratch_is_judged_as_a_mount_would(tmp_path, make):
    path = tmp_path / "scratch"
    make(path)
    before = [(entry, entry.lstat().st_mode, entry.lstat().st_mtime_ns) for entry in tmp_path.rglob("*")]
    found = ScratchLook(*result_of(look_at_scratch(str(path))))
    assert before == [(entry, entry.lstat().st_mode, entry.lstat().st_mtime_ns) for entry in tmp_path.rglob("*")]
    try:
        os.close(claim_scratch(path).fd)
        expected = None
    except CachefsError as error:
        expected = error.args[0]
    assert (found.problem and found.problem[0]) == expected


def test_scratch_without_a_parent(tmp_path):
    path = tmp_path / "missing" / "scratch"
    found = ScratchLook(*result_of(look_at_scratch(str(path))))
    assert found.problem is not None
    assert found.problem[0] == f"scratch {path} cannot be made: {path.parent} does not exist"


def test_what_scratch_holds_is_counted(tmp_path):
    path = tmp_path / "scratch"
    os.close(claim_scratch(path).fd)
    (path / "files" / "boot" / "ab").mkdir(parents=True)
    (path / "files" / "boot" / "ab" / "copy").write_bytes(b"x" * 1234)
    assert ScratchLook(*result_of(look_at_scratch(str(path)))).stored == 1234
