"""The experiments: what they conclude, the data and the network that they make, and that each runs quickly."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import rasters, report
from benchmarks.contenders import Running
from benchmarks.experiments import EXPERIMENTS, capacity_sweep, epochs, local_and_remote, tiers, workers
from benchmarks.fit import fit_line
from benchmarks.network import missing_sshfs, sshfs
from benchmarks.results import Result, Run
from benchmarks.stage import Measured, Options, Stage
from cachefs.mount.mountinfo import read_mounts
from tests.unit.test_benchmarks import ROOT, a_run, quickly


@given(st.floats(-10, 10), st.floats(-10, 10), st.lists(st.floats(-100, 100), min_size=2, unique_by=lambda x: round(x)))
def test_a_line_through_points_of_a_line_is_that_line(slope, intercept, xs):
    line = fit_line(xs, [intercept + slope * x for x in xs])
    assert line.slope == pytest.approx(slope, abs=1e-6)
    assert line.intercept == pytest.approx(intercept, abs=1e-5)


def test_a_line_says_how_well_it_fits():
    assert fit_line([0, 1, 2], [0, 1, 2]).r_squared == 1.0
    assert fit_line([0, 1, 2, 3], [0, 1, 0, 1]).r_squared == pytest.approx(0.2)
    assert str(fit_line([0, 1], [0.25, -1])) == "0.25 - 1.25 x, R² = 1.0000"


def test_rasters_are_those_of_their_seed(tmp_path):
    numpy = pytest.importorskip("numpy")
    few, more = rasters.make_rasters(tmp_path / "few", 2), rasters.make_rasters(tmp_path / "more", 3)
    other = rasters.make_rasters(tmp_path / "other", 1, seed=1)
    names = sorted(path.relative_to(few) for path in few.rglob("*.npz"))
    assert len(names) == 4
    assert all((few / name).read_bytes() == (more / name).read_bytes() for name in names)
    assert (few / names[0]).read_bytes() != (other / names[0]).read_bytes()
    with numpy.load(few / names[0]) as inputs, numpy.load(few / "truth" / names[0].name) as truths:
        bands, truth = inputs["pixels"], truths["pixels"]
    assert (bands.shape, truth.shape) == ((33, 224, 224), (24, 224, 224))
    assert bands.nbytes + truth.nbytes == rasters.PIXEL_BYTES
    assert (few / names[0]).stat().st_size < 0.9 * bands.nbytes


def sweep() -> Run:
    """Of a source whose uncached epoch takes 10 s, of which a share cached saves that share of 8 s."""
    results = [Result(capacity_sweep.DIRECT, "network", "time", "s", [10.0])]
    for share in (0.0, 0.5, 1.0):
        known = {"capacity_share": share}
        results += [
            Result(capacity_sweep.FIRST, "network", "time", "s", [11.0], known),
            Result(capacity_sweep.SECOND, "network", "time", "s", [10.0 - 8 * share], known),
            Result(capacity_sweep.CACHED, "network", capacity_sweep.CACHED, "of bytes", [share], known),
        ]
    return dataclasses.replace(a_run("capacity_sweep"), results=results)


def test_the_sweep_fits_a_line_to_what_is_saved():
    saving, speed_up = capacity_sweep.fits(sweep(), "network")
    assert (saving.slope, saving.intercept, saving.r_squared) == pytest.approx((0.8, 0.0, 1.0), abs=1e-9)
    assert speed_up.r_squared < 0.9
    (line,) = capacity_sweep.summarize(sweep())
    assert "0.00 + 0.80 x, R² = 1.0000" in line
    assert "The first epoch against uncached: +10.0% (+10.0% to +10.0%)." in line


def tiers_of() -> Run:
    """Memory beside a scratch of half the data makes an epoch 4 times as fast; above one of all of it, as fast."""
    ways = (tiers.IN_MEMORY, tiers.IN_PAGE_CACHE, tiers.ON_DISK, tiers.MISS, tiers.UNCACHED)
    results = [
        Result(tiers.LATENCY, way, "latency", "ms", [number * percentile / 50], {"percentile": percentile})
        for number, way in enumerate(ways, start=1)
        for percentile in tiers.PERCENTILES
    ]
    seconds = {tiers.UNCACHED: 10.0, tiers.HALF: 4.0, tiers.BOTH: 1.0, tiers.WHOLE: 0.5, tiers.WHOLE_BOTH: 0.5}
    seconds |= {tiers.SERVED: 0.8, tiers.SERVED_BOTH: 0.84}
    for way, taken in seconds.items():
        results += [Result(case, way, "time", "s", [taken]) for case in (tiers.COLD, tiers.WARM)]
        results.append(Result("kept", way, "kept", "of bytes", [0.5]))
    for case, above, below in (
        (tiers.COLD, tiers.BOTH, tiers.HALF),
        (tiers.WARM, tiers.WHOLE_BOTH, tiers.WHOLE),
        (tiers.WARM, tiers.SERVED_BOTH, tiers.SERVED),
    ):
        results.append(Result(case, f"{above} / {below}", "ratio", "x", [seconds[above] / seconds[below]]))
    return dataclasses.replace(a_run("tiers"), results=results)


def test_what_memory_above_scratch_brings():
    text = "\n".join(tiers.summarize(tiers_of()))
    assert "| hit on disk | 3.00 | 5.70 | 5.94 |" in text
    assert "memory for the other half makes an epoch 4.00 times as fast" in text
    assert "an epoch takes 1.00 times as long with memory above as without, and 1.05 times where nothing" in text


def test_an_epoch_with_a_dropped_page_cache_is_read_once(tmp_path, monkeypatch):
    """A second one would be warm, and the mean of both is neither."""
    events = []

    class Recorded(Stage):
        def drop_caches(self) -> bool:
            events.append("drop")
            return True

        def measure(self, reader, running, local, between=None) -> list[Measured]:
            events.append("--at-least" in reader.shuffle)
            return [Measured(0.1, 1, 1)]

    @contextmanager
    def mounted(*_: object):
        yield Running(tmp_path / "mount", status=lambda: {"tiers": []})

    monkeypatch.setattr(tiers, "_mount", mounted)
    stage = Recorded(tmp_path, Options(), tmp_path)
    tiers._measure_epochs(stage, tmp_path / "source", tmp_path, 1000, 0)
    after_a_drop = [event for before, event in pairwise(events) if before == "drop"]
    assert after_a_drop.count(False) == 1 + len(tiers.SHARES)
    assert True not in after_a_drop
    assert events.count(True) == len(tiers.SHARES) * (tiers.EPOCHS + 1), "warm ones are repeated"


def three_epochs() -> Run:
    """As the forerunner had them, with another source's name."""
    results = [
        Result("slow source", contender, quantity, "s", [float(seconds)], {"epoch": number})
        for contender, row in epochs.FORERUNNER.items()
        for number, seconds in enumerate(row, start=1)
        for quantity in ("time", "waited for data")
    ]
    return dataclasses.replace(a_run("epochs"), results=results)


def test_the_table_of_epochs_has_the_forerunner_beside_it():
    lines = list(epochs.summarize(three_epochs()))
    assert "| slow source | without | 6,375 | 6,306 | 6,321 | 19,002 |" in lines
    assert "| slow source | saved | -2% | 64% | 65% | 42% |" in lines
    assert lines.count("| the forerunner, on its own data | with cachefs | 6,473 | 2,264 | 2,240 | 10,977 |") == 1


def test_enough_workers_are_the_fewest_that_are_close_to_the_least_time():
    assert workers.enough_workers({0: 10.0, 1: 5.0, 2: 2.1, 4: 2.0, 8: 2.3}) == 2


def test_loading_stops_being_the_bottleneck_where_the_training_hardly_waits():
    times, waits = {0: 10.0, 1: 5.0, 2: 2.1, 4: 2.0}, {0: 9.0, 1: 4.0, 2: 0.2, 4: 0.1}
    assert workers.unbound_workers(times, waits, {}) == 2
    assert workers.unbound_workers({0: 10.0}, {0: 9.0}, {}) is None
    assert workers.unbound_workers(times, {0: 9.0, 1: 4.0, 2: 0.5, 4: 0.5}, {2: 0.4, 4: 0.4}) == 2


def test_what_the_loader_takes_to_hand_over_is_not_held_against_loading():
    def told(contender: str, time: float, wait: float) -> list[Result]:
        known = {"workers": 1}
        return [
            Result(workers.CASE, contender, workers.TIME, "s", [time], known),
            Result(workers.CASE, contender, workers.WAITED, "s", [wait], known),
        ]

    results = [*told(workers.DIRECT, 2.0, 0.9), *told(workers.CACHED, 1.3, 0.3), *told(workers.BLANK, 1.2, 0.2)]
    direct, cached, blank = workers.summarize(dataclasses.replace(a_run("workers"), results=results))
    assert "loading stays the bottleneck" in direct
    assert "loading stops being the bottleneck with num_workers=1" in cached
    assert "with blank images: 1.20 s; it waits for them for up to 0.20 s" in blank


def test_of_more_workers_than_were_tried_nothing_is_said():
    def trained(times: dict[int, float]) -> Run:
        results = [
            Result(workers.CASE, workers.DIRECT, quantity, "s", [value], {"workers": count})
            for count, value in times.items()
            for quantity in (workers.TIME, workers.WAITED)
        ]
        return dataclasses.replace(a_run("workers"), results=results)

    (line,) = workers.summarize(trained({0: 10.0, 4: 5.0, 8: 2.5}))
    assert line.endswith("the most that were tried.")
    (line,) = workers.summarize(trained({0: 10.0, 4: 2.5, 8: 2.5}))
    assert line.endswith("and more bring less than 10%.")


def rasters_near_and_far() -> Run:
    seconds = {local_and_remote.DIRECT: (10.0, 100.0), local_and_remote.FIRST: (11.0, 30.0), "": ()}
    seconds[local_and_remote.LATER] = (10.0, 11.0)
    results = [
        Result(case, way, "time", "s", [time / (1 + count)], {"workers": count, "samples": 8})
        for way, times in seconds.items()
        for case, time in zip(("near", "far"), times, strict=False)
        for count in (0, 4)
    ]
    return dataclasses.replace(a_run("local_and_remote"), results=results)


def test_local_and_remote_says_what_is_best():
    text = "\n".join(local_and_remote.summarize(rasters_near_and_far()))
    assert "1.10 times as long as near without it in later epochs, and 10.00 times without" in text
    assert "Best of all far: with the mount, later epoch, 4 workers." in text


def test_experiments_are_in_the_report_with_their_figures(tmp_path):
    pytest.importorskip("matplotlib")
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    for run in sweep(), three_epochs(), rasters_near_and_far(), tiers_of():
        run.write(folder)
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    written = list(report.write(folder, readme))
    for name in "capacity_sweep", "epochs", "local_and_remote", "tiers":
        assert folder / f"{name}.png" in written
        assert f"![{name}.png](results/{name}.png)" in readme.read_text()
        assert f"![{name}]({name}.png)" in (folder / "README.md").read_text()
    assert "R² = 1.0000" in readme.read_text()
    assert "| slow source | saved |" in readme.read_text()


@pytest.mark.skipif(missing_sshfs() is not None, reason=str(missing_sshfs()))
def test_a_real_network_file_system_shows_the_files_and_leaves_nothing(tmp_path):
    export, folder = tmp_path / "export", tmp_path / "network"
    for path in export, folder:
        path.mkdir()
    (export / "file").write_bytes(b"x" * 100_000)
    with sshfs(export, folder, one_way_ms=5.0) as mountpoint:
        began = time.perf_counter()
        assert (mountpoint / "file").read_bytes() == b"x" * 100_000
        assert time.perf_counter() - began >= 0.01, "a round trip at the least"
    assert not [mount.path for mount in read_mounts() if mount.path.is_relative_to(tmp_path)]
    assert not (folder / "keys").exists()


def test_what_a_proxy_delays_arrives_whole():
    echoed = b""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, listen = server.getsockname()[1], socket.create_server(("127.0.0.1", 0))
        place = listen.getsockname()[1]
        listen.close()
        command = [sys.executable, "-m", "benchmarks.delay_proxy", str(place), "127.0.0.1", str(port), "20"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as proxy:
            try:
                assert proxy.stdout is not None
                assert proxy.stdout.readline() == b"serving\n"
                with socket.create_connection(("127.0.0.1", place)) as ours:
                    began = time.perf_counter()
                    ours.sendall(b"x" * 300_000)
                    ours.shutdown(socket.SHUT_WR)
                    theirs, _ = server.accept()
                    with theirs:
                        while part := theirs.recv(1 << 16):
                            echoed += part
                    assert time.perf_counter() - began >= 0.02
            finally:
                proxy.terminate()
    assert echoed == b"x" * 300_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_quickly_and_writes_its_table_and_figure(name, tmp_path):
    run = quickly("experiment", name, tmp_path)
    if importlib.util.find_spec("torch") is None:
        assert "torch" in run.skipped["cachefs"]
        return
    assert run.results
    assert all(len(each.values) == run.repetitions for each in run.results)
    assert report.summarize(run)
    assert len(list(csv.DictReader((tmp_path / "results" / f"{name}.csv").read_text().splitlines()))) == len(
        run.results
    )
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 5000
    if name == "workers":
        assert (tmp_path / "results" / workers.PICTURE).stat().st_size > 5000
