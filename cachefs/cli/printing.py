"""What goes to the terminal: every message one line, whatever a path in it holds."""

from __future__ import annotations

import click


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(line: str) -> None:
    """One line on stdout."""
    click.echo(printable(line))


def complain(line: str) -> None:
    """One line on stderr, with our name before it."""
    click.echo(f"cachefs: {printable(line)}", err=True)


def count(number: int, noun: str) -> str:
    """`number` of something in words: "1 file", "1,200 files"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
