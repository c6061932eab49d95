"""`moesim trace check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from moesim.cli.output import echo


def check(
    trace: Annotated[str, typer.Argument(help="Trace file, trace directory, or sample:NAME.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Check a trace for what is well-formed but cannot be right.

    Exit code 0 without errors (warnings are allowed), 1 with errors, 2 if the trace cannot be
    read.

    Example: moesim trace check sample:debian-moe
    """
    from moesim.cli.progress import progress_bar
    from moesim.trace.check import check_trace
    from moesim.trace.format import load_trace

    loaded = load_trace(trace)
    with progress_bar("checking") as progress:
        findings = check_trace(loaded, progress)
    num_errors = sum(f.severity == "error" for f in findings)
    if as_json:
        report = {
            "findings": [asdict(f) for f in findings],
            "num_errors": num_errors,
            "num_warnings": len(findings) - num_errors,
        }
        echo(json.dumps(report, indent=2))
    else:
        for finding in findings:
            times = "once" if finding.count == 1 else f"{finding.count:,} times"
            echo(f"{finding.severity}: {finding.code}, {times}: {finding.message}")
        num_warnings = len(findings) - num_errors
        echo(f"{_count(num_errors, 'error')}, {_count(num_warnings, 'warning')}")
    if num_errors:
        raise typer.Exit(1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
