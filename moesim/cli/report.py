"""`moesim report`: one HTML page from what the other commands wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.output import echo
from moesim.errors import InputError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Plan files, what commands print with --json, or folders of them.",
            metavar="RUN...",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    trace: Annotated[
        str | None,
        typer.Option(
            help="Trace for the maps of load and traffic.", show_default="the one a plan names"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Make one HTML page of plans, simulations, cache plans, validations and studies.

    The page is one file that loads nothing and runs no script: charts with their tables, what every
    figure rests on, and where it comes from. Runs of one model make one page.

    Example: moesim report plan.json simulated.json --out report.html
    """
    from moesim.files import atomic_write
    from moesim.report.html.page import make_page
    from moesim.report.html.runs import load_runs
    from moesim.trace.format import load_token_trace

    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"cannot write {out}", "name a file in a folder that exists")
    loaded, passed = load_runs(runs)
    if any(run.path.resolve() == out.resolve() for run in loaded):
        raise InputError(f"{out} is one of the runs", "name another file with --out")
    given = load_token_trace(trace, "moesim report") if trace is not None else None
    page = make_page(loaded, passed, given)
    atomic_write(out, page.html)
    for text in (*(f"passed over {p}" for p in passed), *page.left_out):
        print(f"note: {text}", file=sys.stderr)
    if as_json:
        data = {
            "report": str(out),
            "bytes": len(page.html.encode()),
            "sections": list(page.sections),
            "left_out": list(page.left_out),
            "passed_over": passed,
        }
        echo(json.dumps(data, indent=1))
        return
    size = len(page.html.encode()) / 1e3
    echo(f"wrote {out}: {size:,.0f} kB, {len(page.sections)} sections")
