"""`moesim elastic`: an expert-parallel group that grows and shrinks with a day's load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption, MaxBatchTokensOption, SeedOption
from moesim.cli.output import echo


def elastic(
    requests: Annotated[
        str, typer.Option(help="Log or poisson:..., as for moesim serve.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="Preset or Hugging Face config.json.", show_default=False)
    ],
    widths: Annotated[str, typer.Option(help="GPUs of the group, as 2,4,8.", show_default=False)],
    slo: Annotated[
        str, typer.Option(help="Promises to requests, as ttft<2s,tpot<50ms.", show_default=False)
    ],
    peak: Annotated[
        float, typer.Option(help="Requests/s of the busiest hour.", show_default=False)
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Cluster name or YAML file; resized to each width.", show_default="h100-sxm-ib"
        ),
    ] = None,
    day: Annotated[
        str | None,
        typer.Option(
            help="Relative load of the 24 hours, with commas between.",
            show_default="a cosine, peak at 14 h",
        ),
    ] = None,
    good: Annotated[
        float, typer.Option(help="Share of requests whose promises are to be kept.")
    ] = 0.99,
    restart: Annotated[float, typer.Option(help="Ms to form a group anew.")] = 1000.0,
    first: Annotated[
        int | None,
        typer.Option(help="Requests at each rate.", show_default="those of two minutes", min=1),
    ] = None,
    max_batch_tokens: MaxBatchTokensOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Widen and narrow an expert-parallel group with a day's load: least-movement plans between
    widths, their stalls, promises missed and dollars of each policy.

    Exits with 1 where no changing width is cheaper than a fixed one that keeps the promises.

    Example: moesim elastic --requests azure.csv --model DeepSeek-V2-Lite --widths 2,4,8
    --slo "ttft<2s,tpot<50ms" --peak 60
    """
    from moesim.cli.output import check_targets, given, wrote
    from moesim.cli.progress import progress_bar
    from moesim.jobs.serve import numbers
    from moesim.studies.elastic import elastic as run

    check_targets(out)
    with progress_bar("simulating hours") as progress:
        result = run(
            **given(
                run,
                locals(),
                widths=[int(w) for w in numbers(widths, "widths")],
                day=None if day is None else numbers(day, "day"),
            )
        )
    if out is not None:
        result.save(out)
        echo(wrote(out), err=True)
    if as_json:
        echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        echo(result.summary())
    return 0 if result.worth_it else 1
