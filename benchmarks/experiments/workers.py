"""Workers: 100 batches of photographs by 0 to 8 loader workers, directly and through the mount, five times each.

A batch has 4 JPEG files of 15 to 150 KB, crops of real photographs (scikit-image's; generated ones without it), which
the workers decode for a small classifier. The source has 2 ms and 1 Gbit/s. The mount has everything, as in later
epochs. Each repetition is an epoch of 400 files, the workers stay, and one more, in which they start, does not count;
error bars are one standard deviation. For comparison the same loader hands over blank images, which it does not load.
"""

from __future__ import annotations

import importlib.util
import io
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, Running
from benchmarks.results import Result, Run, short
from benchmarks.stage import Conditions, Reader, Stage, lacking

REPETITIONS = 5
BATCHES, BATCH, QUICK_BATCHES, WIDTH = 100, 4, 10, 12
WORKERS = tuple(range(9))
QUICK_WORKERS = (2,)
CONDITIONS = Conditions(2.0, 125.0)
CLASSES, SHOWN, SIDE = 20, 12, 160
CASE, TIME, WAITED = "100 batches", "time", "waited for data"
DIRECT, CACHED, BLANK = "source", "cachefs", "blank images"
TITLES = {DIRECT: "directly", CACHED: "through the mount", BLANK: "nothing to load"}
BLANK_EPOCHS = 3
CLOSE = 1.1
"""So many times the least time is as good as the least."""
BOUND = 0.1
"""A training that waits for its data for more than this share of the time longer than for blank images is bound by its
loading."""
SIZE = (8, 3.5)
PICTURE = "workers_batch.jpg"
_COLOURS = {DIRECT: "#4a4f55", CACHED: "#0b6fb8", BLANK: "#b9bec4"}


def run(stage: Stage) -> list[Result]:
    reason = lacking("torch", "PIL", "numpy")
    if reason is not None:
        stage.skipped.update(dict.fromkeys((DIRECT, CACHED), reason))
        return []
    data = _photographs(stage, BATCH * stage.size(BATCHES, QUICK_BATCHES))
    if stage.options.pictures is not None:
        stage.options.pictures.mkdir(parents=True, exist_ok=True)
        (stage.options.pictures / PICTURE).write_bytes(picture_of(sorted(data.rglob("*.jpg"))))
    counts = QUICK_WORKERS if stage.options.is_quick else WORKERS
    for workers in counts:
        _measure(stage, BLANK, Running(data), data, workers)
    with stage.slow(data, CONDITIONS) as source:
        for workers in counts:
            stage.drop_caches()
            _measure(stage, DIRECT, Running(source.path), data, workers)
        with stage.start(CONTENDERS["cachefs"], source.path, data) as running:
            stage.measure(Reader("read_files.py", ("--do", "check"), ("--processes", 4)), running, data)
            running.settle()
            for workers in counts:
                _measure(stage, CACHED, running, data, workers)
    return stage.records.results()


def _photographs(stage: Stage, files: int) -> Path:
    if importlib.util.find_spec("skimage") is None:
        return stage.photographs(files)
    from tests.training.photographs import make_photographs  # needs what was looked for

    folder = stage.new_folder()
    make_photographs(folder, files=files, classes=min(CLASSES, files), seed=stage.options.seed)
    return folder


def _measure(stage: Stage, contender: str, running: Running, data: Path, workers: int) -> None:
    times = min(stage.repetitions, BLANK_EPOCHS) if contender == BLANK else stage.repetitions
    arguments = ["--epochs", 1 + times, "--batch", BATCH, "--width", WIDTH, "--seed", 0]
    arguments += ["--blank"] if contender == BLANK else []
    how = ("--workers", workers, *(["--persistent"] if workers else []))
    _, *epochs = stage.measure(Reader("train.py", tuple(arguments), how), running, data)
    for measured in epochs:
        waited = measured.waited_seconds or 0.0
        stage.records.add(CASE, contender, TIME, "s", measured.seconds, {"workers": workers})
        stage.records.add(CASE, contender, WAITED, "s", waited, {"workers": workers})
    mean = statistics.fmean(each.seconds for each in epochs)
    stage.tell(f"{workers} workers, {TITLES[contender]}: {mean:.2f} s")


def picture_of(paths: list[Path]) -> bytes:
    """A batch as the training sees it: SHOWN files from all over the dataset, side by side, as a JPEG."""
    from PIL import Image, ImageOps

    chosen = paths[:: max(1, len(paths) // SHOWN)][:SHOWN]
    columns = min(6, len(chosen))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(chosen) // columns) * SIDE), "white")
    for number, path in enumerate(chosen):
        with Image.open(path) as image:
            tile = ImageOps.fit(image.convert("RGB"), (SIDE - 4, SIDE - 4))
        sheet.paste(tile, (number % columns * SIDE + 2, number // columns * SIDE + 2))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=85)
    return content.getvalue()


def _found(run: Run, quantity: str) -> dict[str, dict[int, list[float]]]:
    found: dict[str, dict[int, list[float]]] = {}
    for each in run.results:
        if each.quantity == quantity:
            found.setdefault(each.contender, {})[int(each.circumstances["workers"])] = each.values
    return found


def _medians(values: dict[int, list[float]]) -> dict[int, float]:
    return {workers: statistics.median(each) for workers, each in values.items()}


def enough_workers(times: dict[int, float]) -> int:
    """The fewest whose time is close to the least."""
    least = min(times.values())
    return min(workers for workers, seconds in times.items() if seconds <= CLOSE * least)


def unbound_workers(times: dict[int, float], waits: dict[int, float], least: dict[int, float]) -> int | None:
    """The fewest with which loading is not the bottleneck any more; None if it always is.

    `least` is how long the training waits for blank images.
    """
    return min(
        (workers for workers, seconds in times.items() if waits[workers] - least.get(workers, 0.0) <= BOUND * seconds),
        default=None,
    )


def summarize(run: Run) -> Iterator[str]:
    times, waits = _found(run, TIME), _found(run, WAITED)
    blank_times, blank_waits = times.pop(BLANK, {}), _medians(waits.pop(BLANK, {}))
    for contender in times:
        medians, waited = _medians(times[contender]), _medians(waits[contender])
        enough, unbound = enough_workers(medians), unbound_workers(medians, waited, blank_waits)
        end = "stays the bottleneck" if unbound is None else f"stops being the bottleneck with num_workers={unbound}"
        wait = waited[enough] / medians[enough]
        more = "the most that were tried" if enough == max(medians) else "and more bring less than 10%"
        yield (
            f"- {TITLES[contender]}: loading {end} (while the training waits for it for more than {BOUND:.0%} of the "
            f"time longer than for blank images). With num_workers={enough} it takes {short(medians[enough])} s, "
            f"waiting {wait:.0%} of it, {more}."
        )
    if blank_times:
        least = min(_medians(blank_times).values())
        yield f"- the training alone, with blank images: {short(least)} s; it waits for them for up to " + (
            f"{max(blank_waits.values()):.2f} s, which the loader takes to hand them over."
        )


def draw(figure: Any, run: Run) -> None:
    axis = figure.subplots()
    waits = _found(run, WAITED)
    for contender, by_workers in _found(run, TIME).items():
        counts = sorted(by_workers)
        waited = [statistics.fmean(waits[contender][workers]) for workers in counts]
        label = f"{TITLES[contender]}: waiting for data"
        axis.plot(counts, waited, ":", color=_COLOURS[contender], label=label)
        if contender == BLANK:
            continue
        means = [statistics.fmean(by_workers[workers]) for workers in counts]
        spread = [statistics.stdev(by_workers[w]) if len(by_workers[w]) > 1 else 0.0 for w in counts]
        style = {"color": _COLOURS[contender], "marker": "o", "markersize": 4, "capsize": 3}
        axis.errorbar(counts, means, yerr=spread, label=TITLES[contender], **style)
    axis.set_xticks(sorted({int(each.circumstances["workers"]) for each in run.results}))
    axis.set_xlabel("num_workers")
    axis.set_ylabel("100 batches, s")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
