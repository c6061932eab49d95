"""`moesim validate`: replay plans on this machine's GPUs, predicted beside measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.cli.options import JsonOption, MaybeTraceOption, ModelOption, PlotOption
from moesim.cli.output import echo

OUT_OF_TOLERANCE = 1
DEFAULT_TOKENS = (128, 1024, 8192)


def validate(
    plan: Annotated[
        list[Path] | None, typer.Option(help="Plan file; repeat to compare plans.")
    ] = None,
    cache_plan: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of plans: cache plan of moesim cache, on one GPU; repeat."),
    ] = None,
    trace: MaybeTraceOption = None,
    model: ModelOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration YAML or name; without one on CPUs nothing is predicted.",
            show_default="h200-torch or h200x4-torch on H200s",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Cluster name or YAML file; resized to the ranks.",
            show_default="h200-sxm-ib on H200s, else h100-sxm-ib",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per rank; repeat.", show_default="128 1024 8192"),
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches of each size.", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="Layers, evenly spaced; 0: all.", min=0)] = 8,
    mode: Annotated[
        Literal["graph", "eager", "both"], typer.Option(help="How ranks launch.")
    ] = "both",
    dedup: Annotated[
        Literal["gpu", "none"], typer.Option(help="One message per GPU or per choice.")
    ] = "gpu",
    replica_policy: Annotated[
        str | None, typer.Option(help="split, hash or nearest.", show_default="the plan's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds without progress.")] = 120.0,
    time_limit: Annotated[float, typer.Option(help="Stop in good order after (s).")] = 3600.0,
    measured: Annotated[
        Path | None, typer.Option(help="Measure nothing: compare this record.")
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="A second record of the same run, for the noise.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the measured record (JSON).")] = None,
    plot: PlotOption = None,
    max_median_error: Annotated[float, typer.Option(help="Tolerance, layer times.")] = 0.10,
    max_p90_error: Annotated[float, typer.Option(help="Tolerance, layer times.")] = 0.20,
    min_spearman: Annotated[float, typer.Option(help="Tolerance, order of plans.")] = 0.95,
    as_json: JsonOption = False,
) -> int:
    """Replay plans with real collectives and expert kernels and compare with the cost model.

    One process per GPU is started with torchrun; each checks its results against float64 first.
    Exits with 1 when the predictions are out of tolerance or a result is wrong. A cache plan is
    replayed with experts in host memory, copied into the GPU's slots as the plan's cache does.

    Example: moesim validate --plan linear.json --plan eplb.json --trace t.npz --model olmoe
    """
    from moesim.cli.output import check_targets, given
    from moesim.errors import InputError
    from moesim.jobs.validate import validate as run

    check_targets(out, plot=plot)
    if cache_plan:
        from moesim.cli.validate_cache import validate_cache
        from moesim.cost.calibration import load_calibration

        if trace is None or plan or measured is not None:
            raise InputError(
                "a cache plan is replayed by itself, with a trace",
                "give --cache-plan and --trace, without --plan and --measured",
            )
        if calibration is not None:
            load_calibration(calibration)
        limit = max_median_error
        return validate_cache(
            cache_plan, trace, model, calibration, layers, device, timeout, out, limit, as_json
        )
    result = run(**given(run, locals(), plan=plan or (), tokens=tokens or DEFAULT_TOKENS))
    if plot is not None:
        result.plot(plot)
    echo(json.dumps(result.to_json(), indent=1) if as_json else result.summary())
    return OUT_OF_TOLERANCE if result.failures() else 0
