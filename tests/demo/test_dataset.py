"""The dataset of the demonstration, and the loader that reads it."""

import itertools
import json
import math
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cachefs.demo import loader
from cachefs.demo.dataset import DatasetSummary, make_dataset


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*.*")}


def load(directory, *options):
    return subprocess.run(
        [sys.executable, loader.__file__, directory, *options],
        capture_output=True,
        text=True,
        check=False,
        env={},
        cwd="/",
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset")
    return directory, make_dataset(directory, files=200, classes=12, mean_bytes=30_000, seed=7)


def test_tree_and_summary(dataset):
    directory, summary = dataset
    files = contents(directory)
    assert summary == DatasetSummary(200, sum(map(len, files.values())))
    assert Path("class_07/img_00103.jpg") in files
    assert {path.parent for path in files} == {Path(f"class_{number:02}") for number in range(12)}


def test_sizes_spread_around_the_mean(dataset):
    sizes = [len(content) for content in contents(dataset[0]).values()]
    assert statistics.mean(sizes) == pytest.approx(30_000, rel=0.15)
    assert statistics.stdev(map(math.log, sizes)) == pytest.approx(0.35, abs=0.1)


def test_every_file_differs(dataset):
    files = contents(dataset[0]).values()
    assert len(set(files)) == len(files)
    assert all(content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9") for content in files)


def test_files_differ_even_where_there_is_little_to_choose(tmp_path):
    make_dataset(tmp_path, files=300, classes=1, mean_bytes=500)
    assert len(set(contents(tmp_path).values())) == 300


def test_the_seed_decides(dataset, tmp_path):
    directory, _ = dataset
    make_dataset(tmp_path / "same", files=200, classes=12, mean_bytes=30_000, seed=7)
    make_dataset(tmp_path / "other", files=200, classes=12, mean_bytes=30_000, seed=8)
    assert contents(tmp_path / "same") == contents(directory)
    assert not set(contents(tmp_path / "other").values()) & set(contents(directory).values())


@pytest.mark.parametrize("mean_bytes", [500, 110_000])
def test_pillow_decodes_every_file(tmp_path, mean_bytes):
    image = pytest.importorskip("PIL.Image")
    make_dataset(tmp_path, files=40, classes=2, mean_bytes=mean_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in tmp_path.rglob("*.jpg"):
            with image.open(path) as opened:
                opened.load()
                assert opened.mode == "RGB"
                assert min(opened.size) >= 16


def test_loader_reads_everything_whatever_the_order(dataset):
    directory, summary = dataset
    lines = [
        json.loads(line)
        for seed in ("0", "1")
        for line in load(directory, "--epochs", "2", "--workers", "2", "--seed", seed).stdout.splitlines()
    ]
    assert [line["epoch"] for line in lines] == [1, 2, 1, 2]
    assert {(line["files"], line["bytes"]) for line in lines} == {(summary.files, summary.bytes)}
    assert len({line["digest"] for line in lines}) == 1


def test_loader_digest_tells_contents_and_names_apart(tmp_path):
    make_dataset(tmp_path, files=4, classes=2, mean_bytes=2_000)
    first, second = sorted(tmp_path.rglob("*.jpg"))[:2]
    digests = [json.loads(load(tmp_path).stdout)["digest"]]
    first.write_bytes(first.read_bytes().replace(b"0 0", b"9 9", 1))
    digests.append(json.loads(load(tmp_path).stdout)["digest"])
    second.rename(second.with_name("renamed.jpg"))
    digests.append(json.loads(load(tmp_path).stdout)["digest"])
    assert all(one != other for one, other in itertools.combinations(digests, 2))


def test_loader_says_which_file_is_cut_short(tmp_path):
    make_dataset(tmp_path, files=4, classes=1, mean_bytes=2_000)
    broken = tmp_path / "class_00" / "img_00002.jpg"
    broken.write_bytes(broken.read_bytes()[:-2])
    result = load(tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "class_00/img_00002.jpg is not a whole JPEG" in result.stderr


def test_loader_without_a_directory(tmp_path):
    result = load(tmp_path / "absent")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "absent" in result.stderr
