"""`moesim plan`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.choices import Objective
from moesim.cli.options import (
    BatchTokensOption,
    ClusterOption,
    ExpertGpusOption,
    JsonOption,
    MaybeGpusOption,
    ModelOption,
    MtpOption,
    PhaseOption,
    PlotOption,
    ReplicaPolicyOption,
    RerouteOption,
    SeedOption,
    TraceOption,
)
from moesim.cli.output import echo
from moesim.errors import InputError
from moesim.numerals import whole


def plan(
    trace: TraceOption,
    gpus: MaybeGpusOption = None,
    cluster: ClusterOption = None,
    model: ModelOption = None,
    solver: Annotated[str, typer.Option(help="See moesim solver list.")] = "local_search",
    objective: Annotated[
        Objective | None,
        typer.Option(help="What to make small.", show_default="time, or balance without sizes"),
    ] = None,
    redundant_experts: Annotated[
        int, typer.Option(help="Slots beyond one for each expert, per layer.")
    ] = 0,
    slots: Annotated[
        str | None, typer.Option(help="Slots per layer: one total, or one number for each GPU.")
    ] = None,
    phase: PhaseOption = None,
    batch_tokens: BatchTokensOption = None,
    domain: Annotated[str | None, typer.Option(help="Plan for one domain of the trace.")] = None,
    reroute: RerouteOption = None,
    replica_policy: ReplicaPolicyOption = None,
    all_to_all: Annotated[
        str | None,
        typer.Option(
            help="nccl, deepep, deepep_ll, deepep_v2, nvlink or nvlink_one_sided.",
            show_default="by cluster",
        ),
    ] = None,
    seed: SeedOption = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.")] = 60.0,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Plan even if the weights do not fit.")
    ] = False,
    robust: Annotated[
        str | None,
        typer.Option(
            help="Make the worst small, not the mean: worst-domain, cvar:0.9 for the worst"
            " tenth of batches, or unseen for domains that tuning lacks.",
        ),
    ] = None,
    old_plan: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Plan in use: move experts only where that gains more than it costs."
        ),
    ] = None,
    steps_between_moves: Annotated[
        float | None,
        typer.Option(help="With --from: steps that a move is spread over.", show_default="1000"),
    ] = None,
    home_ranks: Annotated[
        str | None,
        typer.Option(
            help="Evaluate predicted home ranks too: predicted, domain, tokens, prefix, oracle.",
            show_default="contiguous",
        ),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Experts may exceed GPU memory: plan each GPU's cache."),
    ] = False,
    hbm: Annotated[
        float | None,
        typer.Option(help="With --offload: GB of memory per GPU.", show_default="the GPU's"),
    ] = None,
    expert_gpus: ExpertGpusOption = None,
    mtp: MtpOption = False,
    out: Annotated[Path, typer.Option(help="Plan file to write.")] = Path("plan.json"),
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> int:
    """Place the experts of a model on GPUs from a routing trace.

    Half of the trace's requests are used to find the placement; every figure printed comes from
    the other half. A load trace (expert counts by step, as engines record them) gives a plan for
    balance, tuned on the first half of its steps and judged on the second.

    Example: moesim plan --trace sample:debian-moe --gpus 8 --plot load.png
    """
    from moesim.cli.interrupt import stoppable
    from moesim.cli.output import check_targets, given, notice, wrote
    from moesim.cli.progress import progress_bar
    from moesim.jobs.plan import plan as run

    check_targets(out, plot=plot)
    with stoppable() as stop, progress_bar("searching layers") as progress:
        result = run(
            **given(run, locals(), slots=_slots(slots), replica_policy=replica_policy or "split")
        )
        interrupted = stop()
    result.save(out)
    if plot is not None:
        result.plot(plot)
    notice(*result.notices)
    if as_json:
        echo(json.dumps({**result.to_json(), "plan": str(out)}, indent=1))
    else:
        echo(result.summary())
        echo(wrote(out, plot))
    return 130 if interrupted else 0


def _slots(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(whole(x) for x in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 0 or max(values) > 1 << 20:
        raise InputError(
            f"`slots` {text} is not a list of slot counts",
            "give a total, or one number per GPU: 8,8,4",
        )
    return values
