"""`moesim routing list` and `moesim routing show`."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer

from moesim.cli.options import JsonOption
from moesim.cli.output import echo

app = typer.Typer(help="Rules of routing.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Rules of routing."""


@app.command("list")
def list_rules(as_json: JsonOption = False) -> None:
    """List the rules that moesim trace reroute --as accepts.

    Example: moesim routing list
    """
    from moesim.routing.spec import RULES

    rows = {name: RULES.get(name).TITLE for name in RULES.names()}
    if as_json:
        echo(json.dumps([{"name": n, "title": t} for n, t in rows.items()], indent=2))
        return
    width = max(map(len, rows))
    for name, text in rows.items():
        echo(f"{name:<{width}}  {text}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Rule, as moesim routing list has it.")],
    as_json: JsonOption = False,
) -> None:
    """What a rule does, its parameters, its paper, and what of that is left out.

    Example: moesim routing show drop
    """
    from moesim.figures import text_table
    from moesim.routing.spec import RULES, parameters

    kind = RULES.get(name)
    rows = parameters(kind)
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    if as_json:
        record = {
            "name": name,
            "title": kind.TITLE,
            "description": text,
            "paper": kind.PAPER,
            "left_out": kind.LEFT_OUT,
            "needs": list(kind.NEEDS),
            "parameters": [{"name": n, "type": t, "default": d} for n, t, d in rows],
        }
        echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    echo(f"{name}: {kind.TITLE}\n\n{text}\n")
    if rows:
        head = ["parameter", "values", "default"]
        echo(text_table(head, [[n, t, d or "(needed)"] for n, t, d in rows], left=3) + "\n")
    echo(f"paper     {kind.PAPER}")
    if kind.LEFT_OUT:
        echo(f"left out  {kind.LEFT_OUT}")
    if kind.NEEDS:
        echo(f"needs     {', '.join(kind.NEEDS)}")
