"""How sizes, capacities and times are written, and what is refused with a word that helps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.config import Capacity, default_scratch, format_size, parse_seconds, parse_size
from cachefs.errors import CachefsError, UsageError
from tests.unit.profile import FIXED


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1 << 10),
        ("1k", 1 << 10),
        ("1.5 GiB", 3 << 29),
        ("300G", 300 << 30),
        ("300GB", 300 << 30),
        (" 2T ", 2 << 40),
        ("1P", 1 << 50),
        ("0.5M", 1 << 19),
        ("10B", 10),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "G", "-1", "-1G", "1e9", "1,5G", "1..5G", "0x10", "NaN", "inf", "1G1", "1X", "80%", "one", "1\n2"]
)
def test_nonsense_is_not_a_size(text):
    with pytest.raises(UsageError, match="not a size") as caught:
        parse_size(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_size_beyond_all_bounds_is_a_size_or_refused_and_no_bug():
    try:
        assert parse_size("9" * 400) == int("9" * 400)
    except UsageError:
        pass


def test_a_size_in_bytes_is_exact():
    assert parse_size("9007199254740993") == 9007199254740993  # 2**53 + 1: no float on the way


@pytest.mark.parametrize("text", ["300iB", "5 i"])
def test_half_a_unit_is_not_a_size(text):
    with pytest.raises(UsageError):
        parse_size(text)


@FIXED
@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        assert parse_size(text) >= 0
    except UsageError:
        pass


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("0.5", 0.5), ("3600", 3600.0), (" 7 ", 7.0), ("1e3", 1000.0)]
)
def test_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "-0.001", "nan", "inf", "-inf", "1e999", "ten", "1s", "1 2"])
def test_nonsense_is_not_a_number_of_seconds(text):
    with pytest.raises(UsageError, match="not a number of seconds"):
        parse_seconds(text)


@FIXED
@given(st.text(max_size=12))
def test_any_text_is_seconds_or_a_usage_error(text):
    try:
        seconds = parse_seconds(text)
    except UsageError:
        return
    assert math.isfinite(seconds)
    assert seconds >= 0


@pytest.mark.parametrize(
    ("text", "capacity"),
    [
        ("80%", Capacity(share=0.8)),
        ("0%", Capacity(share=0.0)),
        ("100 %", Capacity(share=1.0)),
        ("12.5%", Capacity(share=0.125)),
        ("300G", Capacity(size=300 << 30)),
        ("0", Capacity(size=0)),
    ],
)
def test_capacities(text, capacity):
    assert Capacity.parse(text) == capacity


@pytest.mark.parametrize("text", ["", "%", "101%", "100.001%", "-5%", "5%%", "%5", "big", "-1G", "9" * 400 + "%"])
def test_nonsense_is_not_a_capacity(text):
    with pytest.raises(UsageError) as caught:
        Capacity.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (110_000, "107.4 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert format_size(size) == text


@FIXED
@given(st.integers(0, 1 << 60))
def test_what_people_are_told_is_a_size_again_and_about_right(size):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06, abs=1)


def test_scratch_of_a_job_is_the_jobs_own(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/job.7")
    monkeypatch.setenv("JOB_ID", "7")
    assert default_scratch() == Path("/scratch/job.7/cachefs")
    monkeypatch.delenv("JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert default_scratch() == Path("/scratch/job.7/cachefs")


def test_an_error_says_what_and_what_to_do():
    assert str(CachefsError("it broke", "mend it")) == "it broke: mend it"
    assert str(CachefsError("it broke")) == "it broke"
