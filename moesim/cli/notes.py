"""Notices on stderr."""

from __future__ import annotations

import typer

from moesim.errors import one_line


def note(line: str) -> None:
    """Print one notice; names in it are stripped of control characters."""
    typer.echo(f"note: {one_line(line)}", err=True)
