"""cachefs bench"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cachefs.bench.recommendation import CLOSE, Recommendation, recommend
from cachefs.bench.session import StoppedError
from cachefs.bench.trial import DIRECT, FIRST, LATER, WAYS, Measurement, Plan, Sample, Served, Trial, together
from cachefs.cli.options import ConfiguredCommand, nonempty_path, scratch_option, scratch_path
from cachefs.cli.printing import complain, count, printable, say
from cachefs.config import Settings, format_size
from cachefs.errors import CachefsError, UsageError, describe
from cachefs.mount.checks import check_fuse, check_may_cover, check_paths, warnings
from cachefs.mount.mountinfo import FSTYPE, NETWORK_FSTYPES, containing_mount
from cachefs.mount.namespaces import probe_private_namespaces

_BAR_COLUMNS = 40
_MOST_WORKERS = 64
_PICTURES = (".png", ".svg", ".pdf")
_SILENCE_SECONDS = 5.0
"""A source that does not answer in that time hangs: so would we, and no key would end us."""


def _worker_counts(text: Any) -> tuple[int, ...]:
    """click's type for "0,1,2,4,8"."""
    try:
        counts = sorted({int(part) for part in str(text).split(",")})
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2,4,8") from None
    if counts[0] < 0 or counts[-1] > _MOST_WORKERS:
        raise click.BadParameter(f"{text!r} has a number that is not from 0 to {_MOST_WORKERS}")
    return tuple(counts)


def _finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    """click's callback: nan is in every range."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number of seconds", ctx, parameter)
    return value


@click.command(cls=ConfiguredCommand)
@click.argument("source", type=nonempty_path)
@click.option(
    "--workers",
    type=_worker_counts,
    default="0,1,2,4,8",
    metavar="N,N,...",
    show_default=True,
    help="Numbers of worker processes to try; 0 reads in the process itself",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    default=3.0,
    show_default=True,
    callback=_finite,
    help="For each number, at most: directly, of a first epoch, and of later ones",
)
@click.option(
    "--files", type=click.IntRange(1, 100_000), default=4000, show_default=True, help="In the sample, at most"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample")
@click.option("--chart", type=nonempty_path, metavar="FILE", help="Draw it there, as PNG, SVG or PDF; needs matplotlib")
@scratch_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    source: Path,
    workers: tuple[int, ...],
    seconds: float,
    files: int,
    seed: int,
    chart: Path | None,
    scratch: Path | None,
) -> None:
    """Say how many workers load SOURCE fastest, and what a mount brings.

    Reads a sample of its files with several numbers of worker processes, directly and through a mount, and decodes
    images where Pillow is installed. Then it gives the line to type and num_workers. Takes a minute or so, changes
    nothing and leaves nothing behind: what it copies lies beside scratch meanwhile.
    """
    draw = None if chart is None else _chart_of(chart)
    _check_answers(source)
    path, place = _checked_places(source, scratch_path(scratch))
    problem = probe_private_namespaces()
    check_fuse(allow_other=False, is_private=problem is None)
    for warning in warnings(Settings(path, path, scratch_path(scratch))):
        complain(f"warning: {warning}")
    with _stop_on_signals() as (stop, received):
        plan = Plan(path, place, workers, seconds, files, seed, problem is not None, stop)
        trial = Trial(plan)
        try:
            results, sample = _try(plan, trial)
        except StoppedError:
            complain(f"interrupted: {trial.left() or 'nothing is left'}")
            raise SystemExit(128 + received()) from None
        except CachefsError:
            _warn_of(trial.left())
            raise
    _warn_of(trial.left())
    console = Console()
    _print_chart(console, results)
    console.print(_table(results))
    for line in _explain(plan, sample, results, trial.served):
        say(line)
    is_given = ctx.get_parameter_source("scratch") is ParameterSource.COMMANDLINE
    for line in _advise(plan, scratch_path(scratch) if is_given else None, recommend(results)):
        say(line)
    if draw is not None:
        draw(results, str(path))


def _checked_places(source: Path, scratch: Path) -> tuple[Path, Path]:
    """The source itself, and where a folder for the trial can be made. Raises CachefsError for what cannot work."""
    path = Path(os.path.realpath(source))
    mount = containing_mount(path)
    if mount is not None and mount.fstype == FSTYPE:
        raise CachefsError(f"source {path} is cached already: {mount.path} is a mount of cachefs", "unmount it first")
    check_paths(Settings(path, path, scratch), is_private=True)
    return path, _place_for(scratch)


def _place_for(scratch: Path) -> Path:
    """Beside scratch; in it, where it is another file system than what is around it, or that is closed to us."""
    if not scratch.is_dir():
        return scratch.parent
    is_apart = scratch.stat().st_dev != scratch.parent.stat().st_dev
    if not is_apart and os.access(scratch.parent, os.W_OK | os.X_OK, effective_ids=True):
        return scratch.parent
    try:
        is_empty = not os.listdir(scratch)
    except OSError:  # making a folder in it will say why
        is_empty = True
    if not is_empty:
        raise CachefsError(
            f"scratch {scratch} is in use, and beside it is no room for a trial on the same disk",
            f"try one in it: --scratch {scratch / 'bench'}",
        )
    return scratch


def _check_answers(source: Path) -> None:
    """Raise CachefsError if `source` hangs. Asked by a process that is left alone then: it may not even be killed."""
    command = [sys.executable, "-I", "-S", "-c", "import os, sys; os.stat(sys.argv[1])", os.path.abspath(source)]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)
    try:
        process.wait(_SILENCE_SECONDS)  # what else is wrong with it is said later
    except subprocess.TimeoutExpired:
        process.kill()
        raise CachefsError(
            f"source {source} does not answer within {_SILENCE_SECONDS:g} s",
            f"the file server or the network is down (process {process.pid} waits for it, and ends when it answers)",
        ) from None
    except BaseException:
        process.kill()
        raise


@contextmanager
def _stop_on_signals() -> Iterator[tuple[int, Callable[[], int]]]:
    """A descriptor that can be read once a signal wants to end us, and which one it was. Until then nothing happens."""
    received: list[int] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading, lambda: received[0] if received else 0
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _warn_of(left: str) -> None:
    if left:
        complain(f"warning: {left}")


def _try(plan: Plan, trial: Trial) -> tuple[list[Measurement], Sample]:
    errors = Console(stderr=True)
    steps = (
        errors.status(Text(printable(f"looking for files in {plan.source}"))) if errors.is_terminal else nullcontext()
    )
    results: list[Measurement] = []
    with steps as status, trial:
        sample = trial.sample

        def tell(step: str) -> None:
            if status is not None:
                status.update(Text(step))

        found = count(sample.found.seen, "file")
        more = "" if sample.found.is_counted else " or more"
        part = f"All of {found}" if sample.found.is_all else f"A sample of {sample.files:,}, of {found}{more},"
        each = format_size(sample.bytes / sample.files)
        tell("reading directly")
        for result in trial.measurements():
            results.append(result)
            tell(f"{result.way}, {count(result.workers, 'worker')}: {result.rate:,.0f} files/s")
    say(f"{part} in {plan.source}, {each} each, for {plan.seconds:g} s a time at most")
    return together(results), sample


def _print_chart(console: Console, results: Sequence[Measurement]) -> None:
    block = "█" if (console.encoding or "").lower().startswith("utf") else "#"
    best = max(result.rate for result in results)
    console.print("Files a second:", highlight=False)
    for way in WAYS:
        for result in (each for each in results if each.way == way):
            bar = block * max(1, round(_BAR_COLUMNS * result.rate / best))
            label = f"{way:>12}, {count(result.workers, 'worker'):>10}"
            console.print(f"{label} {result.rate:9,.1f}  {bar}", highlight=False)


def _table(results: Sequence[Measurement]) -> Table:
    table = Table(title="Files a second")
    for heading in ("num_workers", DIRECT, FIRST, LATER, "faster", "later, MB/s"):
        table.add_column(heading, justify="right")
    by = {(each.way, each.workers): each for each in results}
    for workers in sorted({each.workers for each in results}):
        row = [by.get((way, workers)) for way in WAYS]
        direct, _, later = row
        ratio = f"{later.rate / direct.rate:.1f} x" if later and direct and direct.rate else ""
        speed = f"{later.bytes / later.seconds / 1e6:,.1f}" if later and later.seconds else ""
        table.add_row(str(workers), *(f"{each.rate:,.1f}" if each else "" for each in row), ratio, speed)
    return table


def _explain(plan: Plan, sample: Sample, results: Sequence[Measurement], served: Served) -> Iterator[str]:
    """How it was measured, as far as the figures depend on it."""
    if any(each.decoded for each in results):
        processors = count(len(os.sched_getaffinity(0)), "processor")
        yield f"Each file was read and, if it is an image, decoded, on {processors}."
    elif sample.decodes:
        yield "Each file was read, and none is an image that Pillow decodes: what your loader does with it is left out."
    else:
        yield "Each file was read, not decoded. If they are images: pip install pillow, for decoding has its share."
    mount = containing_mount(plan.source)
    is_remote = mount is not None and mount.fstype in NETWORK_FSTYPES
    unknown = "; what its file server has cached is not known" if is_remote else ""
    yield f"What the page cache has of a file was dropped before it was read{unknown}."
    if cached := sum(each.cached for each in results if each.way == DIRECT):
        yield f"Of {count(cached, 'file')} read directly something stayed: they are new, in use, or in memory anyway."
    spreads = [(each.highest - each.lowest) / each.rate for each in results if len(each.rates) > 1 and each.rate]
    if spreads:
        mean, most = sum(spreads) / len(spreads), max(spreads)
        yield f"Two readings with the same number of workers differ by {mean:.0%} on the average, {most:.0%} at most."
    if sample.is_shared:
        yield "There are few files: all numbers of workers have read the same ones, and one of them the first epoch."
        yield "So what a file server has cached of them may have helped those that read directly."
    yield "Nothing was fetched ahead, which makes a real first epoch faster where directories are read through."
    yield _how_served(served, is_all=sample.found.is_all)
    if sample.found.links:
        yield f"Left out: {count(sample.found.links, 'symbolic link')}."
    if left_out := sample.found.too_large + sample.found.empty:
        yield f"Left out: {count(left_out, 'file')}, empty or too large."
    if failed := sum(each.failed for each in results):
        reason = next(each.reason for each in results if each.reason)
        yield f"Reading failed {count(failed, 'time')}: {reason}"


def _how_served(served: Served, *, is_all: bool) -> str:
    fewest, most = sorted((served.before, served.after))
    if fewest == served.files:
        of = "" if is_all else " of their directories"
        return f"Later epochs were served from scratch directly, because all files{of} are there."
    if not most:
        return "Later epochs were served by the daemon: a directory whose files are all in scratch is faster."
    part = f"{fewest:,}" if fewest == most else f"first {served.before:,}, at the end {served.after:,}"
    return (
        f"Later epochs were partly served by the daemon: {part} of {count(served.files, 'file')} came from scratch "
        f"directly, where all files of a directory are there."
    )


def _advise(plan: Plan, scratch: Path | None, advice: Recommendation) -> Iterator[str]:
    """The line to type, with the scratch that the user has just typed."""
    yield ""
    rates = f"{advice.later_rate:,.0f} files/s in later epochs against {advice.direct_rate:,.0f} directly"
    bound = " at least" if advice.is_least else ""
    fewest = f"with num_workers={advice.workers}{bound}, the fewest with {CLOSE:.0%} of the best rate"
    most = max(plan.workers)
    counts = ",".join(str(each) for each in (most, 2 * most, 4 * most) if each <= _MOST_WORKERS)
    try_more = f"more than {most} workers may bring more" + (f": try --workers {counts}.)" if "," in counts else ".)")
    more = f"  (Directly {try_more}"
    if advice.also_close:
        numbers = ", ".join(map(str, advice.also_close))
        fewest += f"; about the same with {numbers}, as far as its readings tell"
    if advice.is_same:
        yield f"cachefs brings about the same here: {rates}, but two readings differ by more. Read it directly:"
        yield f"  python train.py        {fewest}"
        yield f"  (Longer readings tell more: try --seconds {min(600.0, 3 * plan.seconds):g}.)"
    elif not advice.is_worth_it:
        yield f"cachefs brings little here: {rates}, {advice.speed_up:.1f} times as many. Read it directly:"
        yield f"  python train.py        {fewest}"
    if not advice.is_worth_it:
        if advice.is_direct_rising:
            yield more
        return
    data = os.fspath(plan.source)
    words = ["cachefs", "run", "--data", f"{data}:DIR" if plan.is_beside and not _may_cover(plan.source) else data]
    words += ["--scratch", os.fspath(scratch)] if scratch is not None else []
    yield f"cachefs brings {advice.speed_up:.1f} times as many: {rates}. Type:"
    yield f"  {shlex.join([*words, '--', 'python', 'train.py'])}        {fewest}"
    if words[3] != data:
        yield "  DIR is an empty directory of your own, where train.py then finds the data."
    if advice.is_later_rising:
        yield f"  ({try_more[0].upper()}{try_more[1:]}"
    elif advice.is_direct_rising:
        yield more
    elif advice.direct_workers != advice.workers:
        yield f"  (Directly it would want num_workers={advice.direct_workers}.)"


def _may_cover(source: Path) -> bool:
    try:
        check_may_cover(source)
    except CachefsError:
        return False
    return True


def _chart_of(path: Path) -> Callable[[Sequence[Measurement], str], None]:
    """What draws it. Raises UsageError for a chart that cannot be drawn, before anything is measured."""
    if path.suffix.lower() not in _PICTURES:
        raise UsageError(f"--chart {path} is not a name of a picture", f"end it with {', '.join(_PICTURES)}")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(
            f"--chart {path} cannot be written: there is no such directory to write to", "name another file"
        )
    if path.is_dir():
        raise UsageError(f"--chart {path} is a directory", "name a file")
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UsageError("--chart needs matplotlib", "pip install matplotlib, or leave it out") from None

    def draw(results: Sequence[Measurement], title: str) -> None:
        figure: Any = figures.Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for way in WAYS:
            points = [each for each in results if each.way == way]
            axis.plot([each.workers for each in points], [each.rate for each in points], marker="o", label=way)
        axis.set_title(printable(title), loc="left", fontsize=10)
        axis.set_xlabel("num_workers")
        axis.set_ylabel("files a second")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        try:
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise CachefsError(f"--chart {path} cannot be written: {describe(error)}") from None
        say(f"Drawn: {path}")

    return draw
