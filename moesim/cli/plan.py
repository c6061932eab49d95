"""`moesim plan`: the main job."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.caching.group import GroupPlan
    from moesim.jobs.plan import PlanRequest, PlanResult
    from moesim.planning.evaluate import Figure

OBJECTIVE_FIGURE = {"balance": "imbalance", "traffic": "fan_out", "time": "step_us"}

ROWS: tuple[tuple[str, str, str, float], ...] = (
    ("balancedness", "balancedness, mean", "{:.3f}", 1.0),
    ("balancedness_worst_layer", "balancedness, worst layer", "{:.3f}", 1.0),
    ("imbalance", "imbalance (max/mean), mean", "{:.3f}", 1.0),
    ("imbalance_p99", "imbalance, p99", "{:.2f}", 1.0),
    ("fan_out", "GPUs a token", "{:.2f}", 1.0),
    ("node_fan_out", "nodes a token", "{:.2f}", 1.0),
    ("inter_node_bytes", "inter-node KB a token", "{:.1f}", 1e-3),
    ("step_us", "MoE time a step, ms (predicted)", "{:.3f}", 1e-3),
)
"""Figure, label, format, factor."""

MAX_BATCH_TOKENS = 1 << 20
MAX_TIME_LIMIT_S = 1e6


def plan(
    trace: Annotated[
        str, typer.Option(help="Trace file, trace directory, or sample:NAME.", metavar="TRACE")
    ],
    gpus: Annotated[int, typer.Option(help="GPUs of one expert-parallel group.", min=1)],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Cluster name or YAML file; resized to --gpus.", show_default="h100-sxm-ib"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Preset or config.json; default: the one the trace names.")
    ] = None,
    solver: Annotated[str, typer.Option(help="See moesim solver list.")] = "local_search",
    objective: Annotated[
        str | None, typer.Option(help="balance, traffic or time.", show_default="time")
    ] = None,
    redundant_experts: Annotated[
        int, typer.Option(help="Slots beyond one for each expert, per layer.")
    ] = 0,
    slots: Annotated[
        str | None, typer.Option(help="Slots a layer: one total, or one number for each GPU.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode.", show_default="what the trace has")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a step over all GPUs.",
            show_default="4096 or 256",
            min=1,
            max=MAX_BATCH_TOKENS,
        ),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Plan for one domain of the trace.")] = None,
    replica_policy: Annotated[
        str, typer.Option(help="How a replica is chosen: split, hash, nearest or lp.")
    ] = "split",
    all_to_all: Annotated[
        str | None,
        typer.Option(help="nccl, deepep, deepep_ll or nvlink.", show_default="by cluster"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same plan.", min=0)] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.")] = 60.0,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Plan even if the weights do not fit.")
    ] = False,
    robust: Annotated[
        str | None,
        typer.Option(
            help="Make the worst small, not the mean: worst-domain, or cvar:0.9 for the worst"
            " tenth of batches.",
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
        typer.Option(help="With --offload: GB of memory a GPU.", show_default="the GPU's"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Plan file to write.")] = Path("plan.json"),
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the load before and after (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Place the experts of a model on GPUs from a routing trace.

    Half of the trace's requests are used to find the placement; every figure printed comes from
    the other half. A load trace (expert counts by step, as engines record them) gives a plan for
    balance, tuned on the first half of its steps and judged on the second.

    Example: moesim plan --trace sample:debian-moe --gpus 8 --plot load.png
    """
    from moesim.cli.interrupt import stoppable
    from moesim.cli.progress import progress_bar
    from moesim.cluster import load_cluster
    from moesim.cost.step import KINDS_OF
    from moesim.jobs.plan import DEFAULT_CLUSTER, PlanRequest, make_plan
    from moesim.jobs.plan_loads import make_load_plan
    from moesim.placement import load_plan
    from moesim.planning.home_ranks import HOME_RANKS
    from moesim.planning.migration import DEFAULT_STEPS
    from moesim.planning.robust import parse_robust
    from moesim.trace.format import LoadTrace, load_trace, require_tokens

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    for target in (out, plot):
        if target is not None:
            _check_target(target)
    if not 0 <= time_limit <= MAX_TIME_LIMIT_S:
        raise InputError(
            f"--time-limit {time_limit} is not a number of seconds", "give seconds, such as 60"
        )
    if steps_between_moves is not None and old_plan is None:
        raise InputError("--steps-between-moves without --from", "name the plan in use with --from")
    loaded = load_trace(trace)
    if offload:
        require_tokens(loaded, "--offload")
    request = PlanRequest(
        trace=loaded,
        cluster=load_cluster(cluster or DEFAULT_CLUSTER, num_gpus=gpus),
        model=_model(model, loaded.meta.model),
        objective=objective,  # type: ignore[arg-type]
        solver=solver,
        redundant_experts=redundant_experts,
        slots=_slots(slots),
        phase=_choice("phase", phase, ("prefill", "decode")),  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        domain=domain,
        replica_policy=_choice(  # type: ignore[arg-type]
            "replica policy", replica_policy, ("split", "hash", "nearest", "lp")
        ),
        all_to_all=_choice("all-to-all library", all_to_all, tuple(KINDS_OF)),
        seed=seed,
        time_limit_s=time_limit,
        check_memory=not (ignore_memory or offload),
        robust=parse_robust(robust) if robust is not None else None,
        old_plan=load_plan(old_plan) if old_plan is not None else None,
        steps_between_moves=DEFAULT_STEPS if steps_between_moves is None else steps_between_moves,
        home_ranks=_choice("home ranks", home_ranks, HOME_RANKS),
    )
    with stoppable() as stop, progress_bar("searching layers") as progress:
        if isinstance(loaded, LoadTrace):
            result = make_load_plan(loaded, request, progress=progress, stop=stop)
        else:
            result = make_plan(request, progress=progress, stop=stop)
    if cluster is None:
        result.defaults["cluster"] = DEFAULT_CLUSTER
    cached = _offload(result, request, hbm) if offload else None
    if cached is not None:
        result = replace(result, plan=replace(result.plan, cache=cached.to_dict()))
    result.plan.save(out)
    if plot is not None:
        from moesim.draw.plan import plot_load

        plot_load(result, plot)
    if as_json:
        data = _as_json(result, out)
        if cached is not None:
            data["cache"] = [asdict(row) for row in cached.results]
        typer.echo(json.dumps(data, indent=1))
        return
    _print(result, out, plot)
    if cached is not None:
        _print_offload(cached)


def _check_target(path: Path) -> None:
    """Refuse before the search what could not be written after it."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory", "name a file")
    if not path.resolve().parent.is_dir():
        raise InputError(
            f"cannot write {path}: there is no folder {path.parent}",
            "name a file in a folder that exists",
        )


def _model(name: str | None, from_trace: str) -> Any:
    """The model asked for, or the preset that the trace names; a trace cannot name a file."""
    from moesim.errors import UnknownNameError
    from moesim.model.names import load_model, preset_aliases

    if name is not None:
        return load_model(name)
    try:
        preset_aliases(from_trace)
    except UnknownNameError:
        return None
    return load_model(from_trace)


def _choice(kind: str, value: str | None, known: tuple[str, ...]) -> str | None:
    from moesim.errors import UnknownNameError

    if value is not None and value not in known:
        raise UnknownNameError(kind, value, known)
    return value


def _slots(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(int(x) for x in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 0 or max(values) > 1 << 20:
        raise InputError(
            f"--slots {text} is not a list of slot counts",
            "give a total, or one number a GPU: 8,8,4",
        )
    return values


def _print(result: PlanResult, out: Path, plot: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    for notice in result.notices:
        print(f"note: {notice}", file=sys.stderr)
    if result.defaults:
        taken = "; ".join(f"{name}: {value}" for name, value in result.defaults.items())
        typer.echo(f"defaults taken: {taken}")
    plan, sample = result.plan, result.sample
    placement = plan.placement
    typer.echo(
        f"{_plain(plan.model)}: {placement.num_layers} MoE layers, {placement.num_experts} experts"
        f" in {placement.num_slots} slots on {_count(placement.num_gpus, 'GPU')} of"
        f" {_count(placement.num_nodes, 'node')}; objective {plan.objective}"
    )
    typer.echo(
        result.judged_on
        or f"held-out: {sample.num_requests} requests that tuning never saw,"
        f" {sample.num_main} batches; 95% bootstrap intervals over requests"
    )
    rows = [r for r in ROWS if r[0] in result.chosen.figures]
    if placement.num_nodes == 1:
        rows = [r for r in rows if r[0] not in ("node_fan_out", "inter_node_bytes")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    apart = plan.evaluation.get("held_out", True)
    table.add_column("held-out figure" if apart else "figure, not held out", no_wrap=True)
    for candidate in result.candidates:
        table.add_column(candidate.name, justify="right", no_wrap=True)
    for name, label, form, factor in rows:
        cells = [_cell(c.figures[name], form, factor) for c in result.candidates]
        table.add_row(label, *cells)
    for label, texts in result.rows:
        table.add_row(label, *(texts.get(c.name, "") for c in result.candidates))
    console = Console(soft_wrap=True)
    console.width = max(console.width, 40 + 20 * len(result.candidates))
    console.print(table)
    _print_verdict(result)
    for line in result.lines:
        typer.echo(line)
    _print_bound(result)
    if result.step is not None:
        typer.echo(
            f"predicted times rest on {result.step.basis} figures: " + "; ".join(result.step.notes)
        )
    typer.echo(f"wrote {out}" + (f" and {plot}" if plot is not None else ""))


def _print_bound(result: PlanResult) -> None:
    """One line: how far from the best the plan can be, on the data it was tuned on."""
    plan = result.plan
    if plan.objective_value is None or plan.bound is None or plan.gap is None:
        return
    unit = "max/mean load" if plan.objective == "balance" else "us a layer"
    typer.echo(
        f"tuning objective: {plan.objective_value:.4g} {unit}; no placement is below"
        f" {plan.bound:.4g} (gap {100 * plan.gap:.1f}%, status {plan.status};"
        f" bound: {result.bound_kind})"
    )


def _print_verdict(result: PlanResult) -> None:
    """One line: the objective's figure against EPLB's, paired."""
    name = OBJECTIVE_FIGURE[result.plan.objective]
    reference = next(c for c in result.candidates if c.name in ("eplb", "greedy"))
    if reference is result.chosen or name not in result.improvement:
        return
    delta, base = result.improvement[name], reference.figures[name].value
    low, high = 100 * delta.low / base, 100 * delta.high / base
    what = {"imbalance": "imbalance", "fan_out": "GPUs a token", "step_us": "MoE time"}[name]
    typer.echo(
        f"{result.chosen.name} against {reference.name}: {what} {100 * delta.value / base:+.1f}%"
        f" ({low:+.1f}% to {high:+.1f}%)"
    )
    if name == "imbalance":
        excess = delta.value / (base - 1) if base > 1 else 0.0
        typer.echo(f"excess imbalance (max/mean - 1): {100 * excess:+.1f}%")


def _offload(result: PlanResult, request: PlanRequest, hbm: float | None) -> GroupPlan:
    """A cache plan for every GPU of the placement, decoding one request a GPU."""
    from moesim.caching.group import plan_group
    from moesim.caching.planner import Request
    from moesim.cli.progress import progress_bar
    from moesim.trace.format import require_tokens

    gpus = tuple(request.cluster.gpus)
    if request.model is None:
        raise InputError(
            "--offload needs the model's sizes, and the trace names no known model",
            "give --model: moesim model list",
        )
    asked = Request(
        hbm_gb=min(gpu.hbm_gb for gpu in gpus) if hbm is None else hbm,
        batch_size=len(gpus),
        prefetch="auto" if len(gpus) == 1 else "none",
        seed=request.seed,
    )
    with progress_bar("caching") as progress:
        return plan_group(
            require_tokens(request.trace, "--offload"),
            result.plan.placement,
            request.model,
            gpus,
            asked,
            progress=progress,
        )


def _print_offload(cached: GroupPlan) -> None:
    for note in cached.notes:
        print(f"note: {note}", file=sys.stderr)
    for plan, row in zip(cached.plans, cached.results, strict=True):
        memory = plan.memory
        typer.echo(
            f"{row.name}: {plan.num_slots} of its experts in HBM ({memory['num_slots']} slots),"
            f" policy {plan.policy}, {row.hit_rate:.1%} hits,"
            f" {row.bytes_per_token / 1e6:.1f} MB a token over the host link"
        )


def _plain(name: str) -> str:
    """A name out of a file, on one line and without control characters."""
    return "".join(ch for ch in " ".join(name.split()) if ch.isprintable())[:80] or "unnamed model"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cell(figure: Figure, form: str, factor: float) -> str:
    half = form.format((figure.high - figure.low) / 2 * factor)
    text = form.format(figure.value * factor)
    return text if float(half) == 0 else f"{text} ±{half}"


def _as_json(result: PlanResult, out: Path) -> dict[str, Any]:
    plan = result.plan
    return {
        "format": "moesim-plan-run",
        "version": 1,
        "plan": str(out),
        "model": plan.model,
        "objective": plan.objective,
        "solver": plan.solver,
        "status": plan.status,
        "objective_value": plan.objective_value,
        "bound": plan.bound,
        "gap": plan.gap,
        "bound_kind": result.bound_kind,
        "defaults": result.defaults,
        "notices": list(result.notices),
        "evaluation": plan.evaluation,
        "improvement": {n: f.to_json() for n, f in result.improvement.items()},
        "basis": result.step.basis if result.step is not None else None,
        "predictions": list(result.step.notes) if result.step is not None else [],
    }
