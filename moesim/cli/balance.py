"""`moesim balance`: which way to balance experts, if any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import (
    BatchTokensOption,
    ClusterOption,
    GroupGpusOption,
    JsonOption,
    ModelOption,
    PhaseOption,
    PlotOption,
    RebalanceLayerOption,
    RebalancePlanOption,
    RebalanceThroughOption,
    SeedOption,
    TraceOption,
)
from moesim.cli.output import echo


def balance(
    trace: TraceOption,
    gpus: GroupGpusOption,
    cluster: ClusterOption = None,
    model: ModelOption = None,
    phase: PhaseOption = None,
    batch_tokens: BatchTokensOption = None,
    redundant_experts: Annotated[
        int | None,
        typer.Option(
            help="Slots beyond one for each expert, in the schemes that use them.",
            show_default="one per GPU",
            min=0,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps in which the log is gone through once.")] = (
        12_000
    ),
    drift: Annotated[
        bool,
        typer.Option("--drift", help="Go through the trace's domains one after the other."),
    ] = False,
    schemes: Annotated[
        str | None,
        typer.Option(help="Some of them, as plan,eplb-vllm.", show_default="all"),
    ] = None,
    interval: Annotated[
        int | None,
        typer.Option(help="EPLB once more, with a plan every so many steps.", min=1),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Steps whose loads it plans from.",
            show_default="the interval, at most 1000",
            min=1,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="It keeps what has at least this balancedness.", show_default="never"),
    ] = None,
    layers_per_chunk: Annotated[
        int | None,
        typer.Option(help="Layers that move in one step (SGLang).", show_default="all", min=1),
    ] = None,
    rebalance_async: Annotated[
        bool, typer.Option("--rebalance-async", help="Its weights move beside the steps.")
    ] = False,
    rebalance_plan: RebalancePlanOption = 10.0,
    rebalance_layer: RebalanceLayerOption = None,
    rebalance_through: RebalanceThroughOption = None,
    old_plan: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Placement in use: a plan, or ENGINE:FILE; doing nothing is to stay with it.",
            show_default="experts in order",
        ),
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(
            help="Log or poisson:..., as for moesim serve: judge by their time per output token.",
        ),
    ] = None,
    first: Annotated[
        int | None, typer.Option(help="The first so many requests.", show_default="all", min=1)
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Let requests arrive so much faster.")] = 1.0,
    slo: Annotated[
        str | None, typer.Option(help="Promises to requests, as ttft<2s,tpot<50ms.")
    ] = None,
    break_even: Annotated[
        bool,
        typer.Option(
            "--break-even", help="Compare at other batches and paces of drift: where it pays."
        ),
    ] = False,
    all_to_all: Annotated[
        str | None,
        typer.Option(help="nccl, deepep, deepep_ll or nvlink.", show_default="by cluster"),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for each of our plans.")] = 60.0,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Compare even if the weights do not fit.")
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> int:
    """Compare ways to balance experts: none, static plans, EPLB as engines run it, our plans
    improved on the way, and schemes that balance every batch.

    Judged on held-out requests in their order, in MoE time per step with stalls; redundant slots
    are charged for the KV cache that they take. A load trace (expert counts by step) is compared by
    balance and expert times alone. Exits with 1 where nothing beats doing nothing.

    Example: moesim balance --trace sample:debian-moe --gpus 8
    """
    from moesim.cli.output import check_targets, given, notice, wrote
    from moesim.cli.progress import progress_bar
    from moesim.jobs.balance import balance as run

    check_targets(out, plot=plot)
    names = tuple(name.strip() for name in (schemes or "").split(",") if name.strip())
    with progress_bar("comparing schemes") as progress:
        result = run(**given(run, locals(), schemes=names))
    if out is not None:
        result.save(out)
    if plot is not None:
        result.plot(plot)
    notice(*result.notices)
    if out is not None or plot is not None:
        echo(wrote(out, plot), err=True)
    if as_json:
        echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        echo(result.summary())
    return 0 if result.worth_it else 1
