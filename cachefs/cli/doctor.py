"""cachefs doctor"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cachefs.cli.options import ConfiguredCommand, capacity_option, nonempty_path, scratch_option, scratch_path
from cachefs.cli.printing import complain, printable, say
from cachefs.config import Capacity
from cachefs.mount.diagnosis import Diagnosis, diagnose
from cachefs.mount.findings import Finding, Verdict, describe_extent, format_seconds
from cachefs.mount.forecast import FETCH_SECONDS, HIT_SECONDS, READERS

_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.NO: "bold red"}


@click.command(cls=ConfiguredCommand)
@click.argument("source", type=nonempty_path, required=False)
@scratch_option
@capacity_option
@click.pass_context
def doctor(ctx: click.Context, /, source: Path | None, scratch: Path | None, capacity: Capacity) -> None:
    """Say whether this machine can do it, and what to do if not.

    With SOURCE, a dataset directory: also how fast it and scratch are, whether it fits, what to type, and what to
    expect of it. Takes some seconds, changes nothing and leaves nothing behind. Exits with 1 if "cachefs run" could
    not cache.
    """
    from cachefs.mount.examination import examine  # slow: help and refusals need none

    console = Console(stderr=True)
    steps = console.status("looking at this machine") if console.is_terminal else nullcontext()
    with steps as status:
        update = (lambda step: status.update(Text(printable(step)))) if status else lambda step: None
        facts = examine(source, scratch_path(scratch), update)
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    diagnosis = diagnose(facts, capacity, given)
    _print_findings(diagnosis.findings)
    _say_forecast(diagnosis)
    if diagnosis.command is not None:
        say("")
        say("Type:" if diagnosis.obstacle is None else "It could with:")
        say(f"  {diagnosis.command}")
    if diagnosis.obstacle is not None:
        complain(f"run could not cache here: {diagnosis.obstacle}")
        raise SystemExit(1)
    if source is None:
        say("")
        say("run could cache here. What a dataset may expect says: cachefs doctor SOURCE")


def _print_findings(findings: tuple[Finding, ...]) -> None:
    table = Table()
    for heading in ("what", "finding", "verdict", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        verdict = Text(finding.verdict.value, _STYLES[finding.verdict])
        table.add_row(finding.subject, Text(printable(finding.found)), verdict, Text(printable(finding.advice)))
    # where nothing has to fit a screen no line is folded or coloured, so that it can be searched and copied
    console = Console() if sys.stdout.isatty() else Console(width=10_000, force_terminal=False, color_system=None)
    console.print(table)


def _say_forecast(diagnosis: Diagnosis) -> None:
    forecast, extent = diagnosis.forecast, diagnosis.extent
    if forecast is None or extent is None:
        return
    least = "at least " if extent.is_least else ""
    say("")
    say(f"Forecast for {READERS} readers, an estimate:")
    say(f"  read directly   {least}{format_seconds(forecast.direct)} an epoch")
    say(f"  first epoch     {least}{format_seconds(forecast.first)} through cachefs")
    faster = f"{forecast.speed_up:.1f} times as fast as read directly"
    say(f"  later epochs    {least}{format_seconds(forecast.later)}, {faster}")
    say(f"  hit rate        {'at most ' if least else ''}{forecast.hit_rate:.0%} in later epochs, policy hold or auto")
    say(f"  It follows from {describe_extent(extent)}, the speeds above, and from cachefs's benchmarks: to copy a")
    say(f"  file takes the daemon {FETCH_SECONDS * 1e6:.0f} us, to read one from scratch {HIT_SECONDS * 1e6:.0f} us.")
    say("  Files that the page cache still holds are read faster.")
