"""cachefs demo"""

import click


@click.command()
def demo() -> None:
    """A self-contained demonstration."""
