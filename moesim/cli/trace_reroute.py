"""`moesim trace reroute`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption, ModelOption, PhaseOption, SeedOption
from moesim.cli.output import echo


def reroute(
    trace: Annotated[str, typer.Argument(help="Trace file, trace directory, or sample:NAME.")],
    rule: Annotated[
        str, typer.Option("--as", metavar="RULE", help="Rule, as drop:factor=1,keep=score.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Where experts are, for rules that need it.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", help="GPUs of the evaluation without a plan.", min=1),
    ] = None,
    model: ModelOption = None,
    phase: PhaseOption = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            help="Tokens of a batch.",
            show_default="4096 prefill or 256 decode",
            min=1,
            max=1 << 20,
        ),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Give a trace the choices of another routing rule: same tokens, other experts.

    Prints what changed, with imbalance and GPUs per token before and after on held-out requests.
    moesim routing list has the rules.

    Example: moesim trace reroute sample:debian-olmoe --as random
    """
    from moesim.jobs.reroute import reroute as run

    result = run(
        trace,
        rule,
        plan=plan,
        gpus=gpus,
        model=model,
        phase=phase,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    for notice in result.notices:
        echo(f"note: {notice}", err=True)
    if out is not None:
        result.save(out)
        echo(f"wrote {out}", err=True)
    if as_json:
        echo(json.dumps(result.to_json(), indent=2, allow_nan=False))
    else:
        echo(result.summary())
