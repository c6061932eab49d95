"""`moesim simulate`: replay a trace through a plan on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.choices import Fidelity, Keep, OnLoss, Order, Scope
from moesim.cli.options import (
    BatchTokensOption,
    ExpertGpusOption,
    JsonOption,
    MicroBatchesOption,
    ModelOption,
    MtpOption,
    PhaseOption,
    PlotOption,
    RebalanceLayerOption,
    RebalancePlanOption,
    RebalanceThroughOption,
    ReplicaPolicyOption,
    SeedOption,
    TraceOption,
)
from moesim.cli.output import echo
from moesim.errors import InputError


def simulate(
    trace: TraceOption,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan or cache plan file; without one, the linear placement."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            "--machine",
            help="Cluster name or YAML file, or a machine, as rtx-4090+ddr5-2ch.",
            show_default="the plan's, or h100-sxm-ib",
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs.", show_default="the plan's", min=1)
    ] = None,
    model: ModelOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Solvers to simulate beside, as linear,eplb; with a cache plan, policies, as"
            " resident,lru."
        ),
    ] = None,
    phase: PhaseOption = None,
    batch_tokens: BatchTokensOption = None,
    steps: Annotated[int, typer.Option(help="Steps to simulate.")] = 16,
    fidelity: Annotated[
        Fidelity, typer.Option(help="event: SimPy simulation; analytic: the closed form.")
    ] = "event",
    all_to_all: Annotated[
        str | None,
        typer.Option(
            help="nccl, deepep, deepep_ll, deepep_v2, nvlink, nvlink_one_sided, two-level or"
            " bi-level.",
            show_default="by cluster and phase",
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="sequential, shared-overlap, pipelined, co-scheduled, two-batch or"
            " context-coherent."
        ),
    ] = "sequential",
    chunks: Annotated[
        int | None,
        typer.Option(
            help="Chunks of a layer, for pipelined and co-scheduled.",
            show_default="the best of 1, 2, 4, 8",
        ),
    ] = None,
    reduce: Annotated[
        float, typer.Option(help="Share of the hidden size that is exchanged (BigMac: 0.25).")
    ] = 1.0,
    replica_policy: ReplicaPolicyOption = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Context of every decode token.", show_default="its trace position"),
    ] = None,
    moe_only: Annotated[
        bool, typer.Option("--moe-only", help="Leave out attention, gate and dense layers.")
    ] = False,
    slow: Annotated[
        list[str] | None,
        typer.Option(help="Slow GPU, as 3=0.5, or 3=0.5@10-20 from 10 to 20 ms. May repeat."),
    ] = None,
    speed_spread: Annotated[
        float, typer.Option(help="Log-normal sigma of GPU speeds, drawn for each GPU.")
    ] = 0.0,
    speed_period: Annotated[
        float | None,
        typer.Option(help="Draw new speeds every so many ms.", show_default="never"),
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(help="Drop choices beyond ceil(factor k T / E) of an expert."),
    ] = None,
    drop: Annotated[
        Keep | None,
        typer.Option(
            help="Choices that stay.",
            show_default="score with gate weights, else first",
        ),
    ] = None,
    capacity_scope: Annotated[
        Scope, typer.Option(help="Tokens that the capacity counts.")
    ] = "step",
    expanded_drop: Annotated[
        bool, typer.Option("--expanded-drop", help="Try experts of the token's own GPU first.")
    ] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="Go through the trace's domains one after the other.")
    ] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="gpu:3@50-200, node:1@50 or link:NAME=0.5@50-200; down or slower from 50 ms to"
            " 200 ms. May repeat."
        ),
    ] = None,
    mtbf: Annotated[
        float | None,
        typer.Option(help="Mean ms between failures of one GPU.", show_default="no failures"),
    ] = None,
    repair: Annotated[
        float | None, typer.Option(help="Mean ms until it is back.", show_default="never")
    ] = None,
    on_loss: Annotated[
        OnLoss, typer.Option(help="What is done about experts with no replica left.")
    ] = "reload",
    detect: Annotated[float, typer.Option(help="Ms until a failure is noticed.")] = 100.0,
    restart: Annotated[float, typer.Option(help="Ms to form the group again.")] = 1000.0,
    rebalance_every: Annotated[
        int | None,
        typer.Option(help="Make a new placement every so many steps.", show_default="never"),
    ] = None,
    rebalance_window: Annotated[
        int, typer.Option(help="Steps whose loads decide a new placement.")
    ] = 100,
    rebalance_async: Annotated[
        bool, typer.Option("--rebalance-async", help="Plan and move weights beside the steps.")
    ] = False,
    rebalance_plan: RebalancePlanOption = 10.0,
    rebalance_layer: RebalanceLayerOption = None,
    rebalance_above: Annotated[
        float | None,
        typer.Option(help="Keep what has at least this balancedness.", show_default="never"),
    ] = None,
    rebalance_through: RebalanceThroughOption = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload/--no-offload",
            help="Simulate the plan's caches, or take all experts as in GPU memory.",
        ),
    ] = True,
    batching: Annotated[
        Order | None,
        typer.Option(
            help="With a cache plan, which waiting requests decode together; pre-gated and"
            " predicted take those with the fewest experts."
        ),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(help="Requests to choose from.", show_default="32", min=1)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Steps a request is held back at most.", show_default="16", min=1),
    ] = None,
    rebalance_solver: Annotated[str, typer.Option(help="Method of the new placements.")] = "eplb",
    expert_gpus: ExpertGpusOption = None,
    micro_batches: MicroBatchesOption = 3,
    mtp: MtpOption = False,
    seed: SeedOption = 0,
    timeline: Annotated[
        Path | None, typer.Option(help="Chrome/Perfetto trace of the first steps to write.")
    ] = None,
    timeline_steps: Annotated[int, typer.Option(help="Steps in the timeline.", min=1)] = 1,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay held-out requests of a trace through a plan: time per step, where it goes, load of
    GPUs and links.

    Example: moesim simulate --trace sample:debian-moe --plan plan.json --compare linear,eplb
    """
    from moesim.cli.output import check_targets, given, notice
    from moesim.cli.progress import progress_bar
    from moesim.files import atomic_write
    from moesim.jobs.simulate import simulate as run

    check_targets(timeline, plot=plot)
    with progress_bar("simulating steps") as progress:
        report = run(
            **given(
                run,
                locals(),
                compare=tuple(n for n in (compare or "").split(",") if n),
                slow=slow or (),
                fault=fault or (),
                timeline_steps=timeline_steps if timeline is not None else 0,
            )
        )
    if timeline is not None:
        if report.timeline is None:
            raise InputError("no timeline was made", "use `fidelity` event")
        atomic_write(timeline, report.timeline.to_json())
        echo(f"wrote {timeline} (open it at ui.perfetto.dev)", err=True)
    if plot is not None:
        report.plot(plot)
        echo(f"wrote {plot}", err=True)
    notice(*report.notices)
    if as_json:
        echo(json.dumps(report.to_json(), indent=1, allow_nan=False))
        return
    echo(report.summary())
