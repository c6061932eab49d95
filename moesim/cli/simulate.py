"""`moesim simulate`: replay a trace through a plan on a cluster."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from moesim.errors import InputError


def simulate(
    trace: Annotated[
        str, typer.Option(help="Trace file, trace directory, or sample:NAME.", metavar="TRACE")
    ],
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan or cache plan file; without one, the linear placement."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Cluster name or YAML file.", show_default="the plan's, or h100-sxm-ib"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs.", show_default="the plan's", min=1)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Preset or config.json; default: the one the trace names.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Solvers to simulate beside, as linear,eplb; with a cache plan, policies, as"
            " resident,lru."
        ),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode.", show_default="the plan's or trace's")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step over all GPUs.", show_default="the plan's"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to simulate.")] = 16,
    fidelity: Annotated[
        str, typer.Option(help="event: SimPy simulation; analytic: the closed form.")
    ] = "event",
    all_to_all: Annotated[
        str | None,
        typer.Option(
            help="nccl, deepep, deepep_ll, nvlink, two-level or bi-level.",
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
    replica_policy: Annotated[
        str | None,
        typer.Option(help="split, hash, nearest or lp.", show_default="the plan's"),
    ] = None,
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
        typer.Option(help="Draw the speeds anew every so many ms.", show_default="never"),
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(help="Drop choices beyond ceil(factor k T / E) of an expert."),
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            help="Choices that stay: score, random, first or last.",
            show_default="score with gate weights, else first",
        ),
    ] = None,
    capacity_scope: Annotated[
        str, typer.Option(help="Tokens that the capacity counts: step or gpu.")
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
        str, typer.Option(help="Experts with no replica left: reload, replan, wait or fail.")
    ] = "reload",
    detect: Annotated[float, typer.Option(help="Ms until a failure is noticed.")] = 100.0,
    restart: Annotated[float, typer.Option(help="Ms to form the group again.")] = 1000.0,
    rebalance_every: Annotated[
        int | None, typer.Option(help="Place anew every so many steps.", show_default="never")
    ] = None,
    rebalance_window: Annotated[
        int, typer.Option(help="Steps whose loads a new placement goes by.")
    ] = 100,
    rebalance_async: Annotated[
        bool, typer.Option("--rebalance-async", help="Plan and move weights beside the steps.")
    ] = False,
    rebalance_plan: Annotated[float, typer.Option(help="Ms to compute a placement.")] = 10.0,
    rebalance_above: Annotated[
        float | None,
        typer.Option(help="Leave alone what is balanced at least so well.", show_default="never"),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload/--no-offload",
            help="Simulate the plan's caches, or take all experts as in GPU memory.",
        ),
    ] = True,
    batching: Annotated[
        str | None,
        typer.Option(
            help="With a cache plan, which waiting requests decode together: fifo, pre-gated or"
            " predicted (fewest experts)."
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
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.", min=0)] = 0,
    timeline: Annotated[
        Path | None, typer.Option(help="Chrome/Perfetto trace of the first steps to write.")
    ] = None,
    timeline_steps: Annotated[int, typer.Option(help="Steps in the timeline.", min=1)] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the parts of a step (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Replay held-out requests of a trace through a plan: time per step, where it goes, load of
    GPUs and links.

    With --requests FILE it serves requests instead: moesim simulate --requests FILE --help.

    Example: moesim simulate --trace sample:debian-moe --plan plan.json --compare linear,eplb
    """
    from moesim.cli.progress import progress_bar
    from moesim.cli.simulate_input import (
        batching_of,
        choice,
        drop_policy,
        fault_spec,
        load_inputs,
        rebalance_policy,
        writable,
    )
    from moesim.cli.simulate_print import print_report, report_json
    from moesim.files import atomic_write
    from moesim.jobs.simulate import FIDELITIES, SimRequest
    from moesim.jobs.simulate import simulate as run
    from moesim.sim.stragglers import parse_slow

    writable(timeline, plot)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    loaded = load_inputs(trace, plan, cluster, gpus, model, offload)
    request = SimRequest(
        trace=loaded.trace,
        cluster=loaded.cluster,
        model=loaded.model,
        plan=loaded.plan,
        compare=tuple(n for n in (compare or "").split(",") if n),
        phase=choice("phase", phase, ("prefill", "decode")),  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        num_steps=steps,
        all_to_all=all_to_all,
        schedule=schedule,
        num_chunks=chunks,
        reduce=reduce,
        fidelity=choice("fidelity", fidelity, FIDELITIES),  # type: ignore[arg-type]
        replica_policy=choice(  # type: ignore[arg-type]
            "replica policy", replica_policy, ("split", "hash", "nearest", "lp")
        ),
        context_tokens=context_tokens,
        home_ranks=not moe_only,
        seed=seed,
        drift=drift,
        faults=fault_spec(
            loaded.cluster, loaded.model, fault or [], mtbf, repair, on_loss, detect, restart
        ),
        rebalance=rebalance_policy(
            rebalance_every,
            rebalance_window,
            rebalance_async,
            rebalance_plan,
            rebalance_above,
        ),
        rebalance_solver=rebalance_solver,
        caches=loaded.caches,
        batching=batching_of(batching, pool, patience),
        timeline_steps=timeline_steps if timeline is not None else 0,
        slow=tuple(parse_slow(text, loaded.cluster.num_gpus) for text in slow or ()),
        speed_sigma=speed_spread,
        speed_period_us=math.inf if speed_period is None else speed_period * 1e3,
        drop=drop_policy(loaded.trace, capacity_factor, drop, capacity_scope, expanded_drop, seed),
    )
    with progress_bar("simulating steps") as progress:
        report = run(request, progress=progress)
    if timeline is not None:
        if report.timeline is None:
            raise InputError("no timeline was made", "use --fidelity event")
        atomic_write(timeline, report.timeline.to_json())
        typer.echo(f"wrote {timeline} (open it at ui.perfetto.dev)", err=True)
    if plot is not None:
        from moesim.draw.simulate import plot_simulation

        title = f"{loaded.model.name}, {loaded.cluster.num_gpus} GPUs of {loaded.cluster.name}"
        plot_simulation(report.results, plot, title)
        typer.echo(f"wrote {plot}", err=True)
    report.defaults.update(loaded.defaults)
    if as_json:
        typer.echo(json.dumps(report_json(request, report), indent=1, allow_nan=False))
        return
    print_report(request, report)
