"""`moesim solver list`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moesim.cli.output import echo

app = typer.Typer(help="Placement methods.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Placement methods."""


@app.command("list")
def list_solvers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """List the solvers that --solver accepts.

    Example: moesim solver list
    """
    from moesim.solvers.registry import about, solver_names

    rows = {name: about(name) for name in solver_names()}
    if as_json:
        echo(json.dumps([{"name": n, "description": t} for n, t in rows.items()], indent=2))
        return
    width = max(map(len, rows))
    for name, text in rows.items():
        echo(f"{name:<{width}}  {text}")
