"""The arithmetic of a forecast."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import Run
from cachefs.mount.forecast import FETCH_SECONDS, HIT_SECONDS, Dataset, Pace, make_forecast

GB = 10**9
SLOW = Pace(bytes_per_second=10e6, files_per_second=100)
DATASET = Dataset(files=100_000, bytes=10 * GB)
FAST_DISK = {"scratch_write": 1e9, "scratch_read": 2e9}


def test_small_files_cost_their_number_and_large_ones_their_bytes():
    assert SLOW.seconds(DATASET) == 1000
    assert Pace(bytes_per_second=50e6).seconds(DATASET) == 200


def test_a_dataset_that_fits():
    forecast = make_forecast(DATASET, 20 * GB, SLOW, **FAST_DISK)
    assert forecast.hit_rate == 1
    assert forecast.direct == forecast.first == 1000
    assert forecast.later == pytest.approx(100_000 * HIT_SECONDS)
    assert forecast.speed_up == pytest.approx(1000 / (100_000 * HIT_SECONDS))


def test_what_does_not_fit_is_read_directly_again():
    forecast = make_forecast(DATASET, 4 * GB, SLOW, **FAST_DISK)
    assert forecast.hit_rate == pytest.approx(0.4)
    assert forecast.later == pytest.approx(0.6 * 1000 + 40_000 * HIT_SECONDS)


def test_without_room_nothing_changes():
    forecast = make_forecast(DATASET, 0, SLOW, **FAST_DISK)
    assert (forecast.hit_rate, forecast.first, forecast.later, forecast.speed_up) == (0, 1000, 1000, 1)


def test_the_daemon_is_the_slowest_part_for_a_fast_source():
    forecast = make_forecast(DATASET, 20 * GB, Pace(10e9, 100_000), **FAST_DISK)
    assert forecast.direct == 1
    assert forecast.first == pytest.approx(100_000 * FETCH_SECONDS)
    assert forecast.speed_up < 1


def test_scratch_is_the_slowest_part_for_large_files():
    dataset = Dataset(files=10, bytes=100 * GB)
    forecast = make_forecast(dataset, 200 * GB, Pace(1e9), scratch_write=0.5e9, scratch_read=2e9)
    assert (forecast.direct, forecast.first, forecast.later) == (100, 200, 50)


def test_scratch_that_was_not_measured_is_left_out():
    forecast = make_forecast(DATASET, 20 * GB, SLOW, scratch_write=None, scratch_read=None)
    assert forecast.first == 1000


def test_an_empty_dataset():
    forecast = make_forecast(Dataset(0, 0), GB, SLOW, **FAST_DISK)
    assert (forecast.direct, forecast.later, forecast.hit_rate, forecast.speed_up) == (0, 0, 1, 1)


def test_what_a_file_costs_is_what_was_measured():
    """The constants are those of the kept results."""
    run = Run.read(Path(__file__).parents[2] / "benchmarks/results/small_files.json")

    def measured(case: str, contender: str, quantity: str, **circumstances: float) -> float:
        (found,) = [
            result.median * 1e-6
            for result in run.results
            if (result.case, result.contender, result.quantity) == (case, contender, quantity)
            and circumstances.items() <= result.circumstances.items()
        ]
        return found

    fetch = measured("first epoch", "cachefs-prefetch-off", "daemon CPU", processes=4, latency_ms=0.2)
    assert pytest.approx(fetch, rel=0.01) == FETCH_SECONDS
    hit = measured("later epoch, page cache dropped", "cachefs-no-promotion", "time", processes=4)
    assert pytest.approx(hit, rel=0.01) == HIT_SECONDS
