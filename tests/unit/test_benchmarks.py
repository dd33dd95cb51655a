"""The benchmarks run, say all that they must, and their report is made from files of results. No time is asserted."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.contenders import CONTENDERS, LATER, BenchmarkError, Running
from benchmarks.results import Goal, Records, Result, Run, ratio, short
from benchmarks.stage import Conditions, Options, Reader, Stage, rotated
from benchmarks.workloads import WORKLOADS
from cachefs.mount.mountinfo import read_mounts

ROOT = Path(__file__).parents[2]
CHEAP = "source,scratch,cachefs,cachefs-prefetch-auto"


def result(values: list[float], contender: str = "cachefs", **circumstances: float) -> Result:
    return Result("later epoch", contender, "time", "s", values, circumstances)


def a_run(workload: str = "small_files", goal: Goal | None = None) -> Run:
    ours, limit = result([2.0, 3.0, 4.0], processes=4), result([1.0, 2.0, 4.0], "scratch", processes=4)
    facts = {
        "processor": "a processor",
        "cores": 2,
        "kernel": "6.1",
        "python": "3.11",
        "user": "root",
        "load_average": [0.5, 0.5, 0.5],
        "data_and_scratch": {"type": "ext4"},
        "revision": "0123456789abcdef",
        "has_uncommitted_changes": False,
    }
    figures = [ours, limit, ratio(ours, limit, "later epoch", goal)]
    skipped = {"bindfs": "bindfs is not installed"}
    return Run(workload, "Files.", "2026-01-01T00:00:00Z", 12.0, 3, "dropped", facts, skipped, figures)


def test_a_ratio_is_taken_within_each_repetition():
    found = ratio(result([2.0, 9.0, 3.0]), result([1.0, 3.0, 6.0], "scratch"), "later epoch")
    assert found.values == [2.0, 3.0, 0.5]
    assert found.median == 2.0  # and not 3.0 / 3.0
    assert found.contender == "cachefs / scratch"
    assert found.unit == "x"


def test_a_ratio_of_other_repetitions_is_refused():
    with pytest.raises(ValueError, match="not of the same repetitions"):
        ratio(result([1.0, 2.0]), result([1.0], "scratch"), "later epoch")


def test_a_ratio_keeps_the_circumstances_of_both():
    found = ratio(result([1.0], processes=4), result([1.0], "source", latency_ms=2.0), "first epoch")
    assert found.circumstances == {"processes": 4, "latency_ms": 2.0}


@pytest.mark.parametrize(
    ("goal", "reached", "missed"),
    [(Goal("at most", 1.05), 1.05, 1.06), (Goal("below", 600), 599.0, 600.0), (Goal("at least", 5), 5.0, 4.9)],
)
def test_a_goal_knows_what_reaches_it(goal, reached, missed):
    assert goal.is_reached(reached)
    assert not goal.is_reached(missed)


def test_records_keep_circumstances_apart_and_find_by_some_of_them():
    records = Records()
    for processes, value in ((1, 1.0), (4, 4.0), (1, 1.5)):
        records.add("epoch", "cachefs", "time", "s", value, {"processes": processes, "latency_ms": 2.0})
    assert records.find("epoch", "cachefs", processes=1).values == [1.0, 1.5]
    assert records.find("epoch", "cachefs", processes=4).values == [4.0]
    assert records.find("epoch", "bindfs") is None
    records.compare("epoch", records.find("epoch", "bindfs"), records.find("epoch", "cachefs"))
    assert all(result.quantity == "time" for result in records.results())


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1234.5, "1,234"), (1.0449, "1.04"), (0.01234, "0.0123")])
def test_a_number_is_short(value, text):
    assert short(value) == text


def test_the_spread_is_the_median_and_the_extremes():
    assert result([3.0, 1.0, 2.0]).spread == "2.00 (1.00 to 3.00)"
    assert result([3.0]).spread == "3.00"


def test_contenders_take_turns_in_going_first():
    everyone = [CONTENDERS[name] for name in LATER]
    assert {rotated(everyone, repetition)[0].name for repetition in range(len(everyone))} == set(LATER)
    assert rotated([], 1) == []


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = a_run(goal=Goal("at most", 1.05))
    path = run.write(tmp_path)
    assert Run.read(path) == run
    assert json.loads(path.read_text())["results"][0]["values"] == [2.0, 3.0, 4.0]


def test_the_report_is_made_from_the_files_of_results(tmp_path):
    pytest.importorskip("matplotlib")
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    a_run(goal=Goal("at most", 1.05)).write(folder)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    written = list(report.write(folder, readme))
    assert written == [folder / "small_files.png", folder / "README.md", readme]
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| small files | later epoch, 4 processes: cachefs / scratch directly | at most 1.05 | ✗ 1.50" in text
    assert "(1.00 to 2.00)" in text
    assert "Not measured: bindfs over scratch: bindfs is not installed." in text
    tables = (folder / "README.md").read_text()
    assert "![small_files](small_files.png)" in tables
    assert "Without bindfs over scratch: bindfs is not installed." in tables
    before = {path: path.read_bytes() for path in written}
    list(report.write(folder, readme))
    assert {path: path.read_bytes() for path in written} == before


def test_a_readme_without_a_place_for_figures_is_left_alone(tmp_path):
    pytest.importorskip("matplotlib")
    a_run().write(tmp_path)
    readme = tmp_path / "page.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no <!-- figures -->"):
        list(report.write(tmp_path, readme))
    assert readme.read_text() == "nothing"


def test_growth_is_drawn_as_lines(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        Result(case, name, quantity, "s", [float(files)], {"files": files})
        for case, quantity in (("first walk", "time"), ("memory after the walks", "memory"))
        for name in ("scratch", "cachefs", "rclone")
        for files in (1000, 10_000)
    ]
    dataclasses.replace(a_run("growth"), results=points).write(tmp_path)
    assert next(report.write(tmp_path, tmp_path / "none.md")) == tmp_path / "growth.png"


def test_conditions_are_the_product_of_what_was_asked_for(tmp_path):
    usual = (Conditions(2.0, 1000.0), Conditions(20.0, 100.0))

    def chosen(**options: object) -> list[Conditions]:
        return Stage(tmp_path, Options(**options), tmp_path).conditions(*usual)

    assert chosen() == list(usual)
    assert chosen(is_quick=True) == [usual[0]]
    assert chosen(latencies=(0.2,)) == [Conditions(0.2, 100.0), Conditions(0.2, 1000.0)]
    assert chosen(latencies=(0.2, 2.0), bandwidths=(50.0,)) == [Conditions(0.2, 50.0), Conditions(2.0, 50.0)]


def test_who_does_not_take_part_is_named_with_a_reason(tmp_path):
    absent = dataclasses.replace(CONTENDERS["bindfs"], missing=lambda tools: "it is not installed")
    stage = Stage(tmp_path, Options(contenders=("source", "bindfs")), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTENDERS, "bindfs", absent)
        assert [contender.name for contender in stage.contenders("source", "scratch", "bindfs")] == ["source"]
    assert stage.skipped == {"scratch": "not asked for", "bindfs": "it is not installed"}


def test_bytes_that_are_not_those_of_the_files_are_found(tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder in (right, wrong):
        folder.mkdir()
        (folder / "file").write_bytes(b"x" * 10_000)
    stage = Stage(tmp_path, Options(), tmp_path)
    running = Running(right)
    reader = Reader("read_files.py")
    assert stage.measure(reader, running, wrong)[0].bytes == 10_000
    (right / "file").write_bytes(b"x" * 4096 + b"\0" * 5904)  # pages that were never filled
    with pytest.raises(BenchmarkError, match="the files have"):
        stage.measure(reader, running, wrong)


def test_the_digest_of_a_reader_depends_on_content_and_name_and_not_on_the_order(tmp_path):
    stage = Stage(tmp_path, Options(), tmp_path)

    def digest(folder: Path, *arguments: object) -> str:
        return stage._read(Reader("read_files.py", arguments), folder)[0]["digest"]

    data = tmp_path / "data"
    data.mkdir()
    for number in range(9):
        (data / str(number)).write_bytes(bytes([number]) * 5000)
    for do in ("read", "check"):
        first = digest(data, "--do", do)
        assert digest(data, "--do", do, "--seed", 3, "--processes", 4) == first
    (data / "8").rename(data / "9")
    assert digest(data, "--do", "check") != first


def test_a_short_reading_is_repeated_and_its_mean_told(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(b"x" * 10_000)
    stage = Stage(tmp_path, Options(), tmp_path)
    reader = Reader("read_files.py", (), ("--seed", 1), can_repeat=True)
    (once,) = stage._read(reader, data)
    (often,) = stage._read(reader.at_least(0.05), data)
    assert once["epochs"] == 1
    assert often["epochs"] > 1
    assert often["seconds"] * often["epochs"] >= 0.05
    assert often["bytes"] == once["bytes"] == 10_000
    assert often["digest"] == once["digest"]
    assert Reader("train.py").at_least(1.0) == Reader("train.py")


def test_a_reader_that_is_to_pause_waits_between_its_epochs(tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(
        "import json, sys, pathlib\n"
        "for epoch in range(2):\n"
        "    if epoch and '--pause' in sys.argv: sys.stdin.readline()\n"
        "    seen = pathlib.Path(sys.argv[1], 'seen').exists()\n"
        "    print(json.dumps({'seconds': 1.0, 'files': 1, 'bytes': 1, 'digest': '', 'seen': seen}), flush=True)\n"
    )
    stage = Stage(tmp_path, Options(), tmp_path)
    answers = stage._read(Reader(str(script)), tmp_path, between=(tmp_path / "seen").touch)
    assert [answer["seen"] for answer in answers] == [False, True]
    (tmp_path / "seen").unlink()
    assert [answer["seen"] for answer in stage._read(Reader(str(script)), tmp_path)] == [False, False]


@pytest.mark.parametrize(
    ("code", "says"), [("sys.exit('no such thing')", "no such thing"), ("time.sleep(60)", "0.5 s")]
)
def test_a_reader_that_fails_or_hangs_is_an_error(tmp_path, code, says):
    script = tmp_path / "reader.py"
    script.write_text(f"import sys, time\n{code}\n")
    with pytest.raises(BenchmarkError, match=says):
        Stage(tmp_path, Options(), tmp_path)._read(Reader(str(script), limit=0.5), tmp_path)


def test_values_are_a_table_with_the_machine(tmp_path):
    path = a_run("workers").write_values(tmp_path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    ours = [row for row in rows if row["contender"] == "cachefs"]
    assert [(row["repetition"], float(row["value"])) for row in ours] == [("1", 2.0), ("2", 3.0), ("3", 4.0)]
    assert {(row["kernel"], row["python"], row["processes"]) for row in rows} == {("6.1", "3.11", "4")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--folder", "/does/not/exist"], "--folder /does/not/exist is not a directory that can be written to"),
        (["experiment", "tiny_files"], "no such experiment: tiny_files"),
        (["run", "epochs"], "no such workload: epochs"),
        (["experiment", "--samples", "0"], "--samples must be 1 or more"),
        (["run", "--repetitions", "0"], "--repetitions must be 1 or more"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_clear_line(arguments, says):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("python -m benchmarks: error: ")
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def quickly(action: str, name: str, folder: Path, *options: str) -> Run:
    """Run a workload or an experiment; what it wrote. It must leave nothing but its results."""
    results = folder / "results"
    command = [sys.executable, "-m", "benchmarks", action, name, "--quick", *options]
    command += ["--folder", str(folder), "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [mount.path for mount in read_mounts() if mount.path.is_relative_to(folder)]
    assert sorted(folder.iterdir()) == [results]
    run = Run.read(results / f"{name}.json")
    assert run.machine["kernel"]
    assert run.machine["python"]
    assert run.machine["data_and_scratch"]["type"]
    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_runs_over_the_cheap_contenders(workload, tmp_path):
    run = quickly("run", workload, tmp_path, "--contenders", CHEAP)
    results = tmp_path / "results"
    needs = {"training": "torch", "shards": "webdataset"}.get(workload)
    if needs and importlib.util.find_spec(needs) is None:
        assert needs in run.skipped["cachefs"]
        return
    assert run.results
    assert all(len(each.values) == run.repetitions for each in run.results)
    known = {name for each in run.results for name in each.contender.split(" / ")}
    compares_ways = workload in ("fetching", "requests", "policies")
    assert compares_ways or {"source", "scratch", "cachefs"} & known
    assert compares_ways or known <= set(CHEAP.split(","))
    assert run.skipped.keys() <= CONTENDERS.keys() - known
    if importlib.util.find_spec("matplotlib") is not None:
        assert results / f"{workload}.png" in list(report.write(results, tmp_path / "none.md"))
