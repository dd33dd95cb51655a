"""cachefs demo"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from cachefs.config import format_size
from cachefs.demo.demonstration import Demonstration, Measurement, Scale
from cachefs.mount.checks import check_fuse
from cachefs.mount.namespaces import probe_private_namespaces

_BAR_COLUMNS = 40


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Of the dataset and of the loader's order")
def demo(seed: int) -> None:
    """Show on made-up data what a mount brings.

    An ordinary loader reads a slow source, without and with a mount over it. Takes less than a minute, needs no
    dataset and leaves nothing behind.
    """
    check_fuse(allow_other=False)
    scale = Scale()
    console = Console()
    folder = Path(tempfile.gettempdir())
    console.print(
        f"Making {scale.files} JPEG files of some {format_size(scale.mean_bytes)} in {folder}, on a source with "
        f"{scale.latency * 1000:g} ms for each operation and {format_size(scale.bandwidth)}/s ..."
    )
    results: list[Measurement] = []
    with Demonstration(scale, seed, beside=probe_private_namespaces() is not None) as demonstration:
        console.print(f"Reading all of it with {scale.workers} worker processes, in a new order each epoch:")
        for result in demonstration.measurements():
            results.append(result)
            longest = max(r.seconds for r in results)
            bar = "█" * max(1, round(_BAR_COLUMNS * result.seconds / longest))
            console.print(f"  {result.name:>8} {result.seconds:7.2f} s  {bar}", highlight=False)
    direct = results[0].seconds
    table = Table(title="The same loader, the same path")
    for heading in ("", "seconds", "files/s", "from the source", "speed-up"):
        table.add_column(heading, justify="left" if not heading else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.seconds:.2f}",
            f"{result.files / result.seconds:,.0f}",
            format_size(result.source_bytes),
            f"{direct / result.seconds:.1f} x",
        )
    console.print(table)
    console.print("Every byte was compared. Unmounted and purged; nothing is left.")
