"""`moesim cache`: what stays in GPU memory when not all experts fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.caching.compare import Result
    from moesim.jobs.cache import CacheJob

DEFAULT_GPU = "l40s"


def cache(
    trace: Annotated[
        str, typer.Option(help="Trace file, trace directory, or sample:NAME.", metavar="TRACE")
    ],
    model: Annotated[
        str | None, typer.Option(help="Preset or config.json; default: the one the trace names.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU type; moesim topology list names them.")] = (
        DEFAULT_GPU
    ),
    hbm: Annotated[
        float | None,
        typer.Option(help="GB of GPU memory for the model.", show_default="the GPU's"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests decoded at once.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of context a request.", min=0)] = 2048,
    policy: Annotated[
        str, typer.Option(help="static, lru, lfu, lfru, score, activation; auto tries all.")
    ] = "auto",
    prefetch: Annotated[
        str,
        typer.Option(
            help="none, popularity, previous-layer, token-id, history, learned, neural (torch),"
            " oracle; auto tries those that are fitted in seconds."
        ),
    ] = "auto",
    cpu: Annotated[
        str, typer.Option(help="Let the CPU compute missing experts: on, off; auto tries both.")
    ] = "auto",
    expert_dtype: Annotated[
        str | None, typer.Option(help="Store experts as this type, such as int4 or fp8.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Mixed precision: average bits an expert, from widths 1, 2 and 3."),
    ] = None,
    bit_errors: Annotated[
        Path | None,
        typer.Option(help=".npy of quantisation errors [layers, experts, 3]; default: 4^-bits."),
    ] = None,
    dram: Annotated[float | None, typer.Option(help="GB of host memory for experts.")] = None,
    dram_gb_per_s: Annotated[
        float | None, typer.Option(help="Rate at which the CPU reads an expert's weights.")
    ] = None,
    cpu_us: Annotated[
        float | None, typer.Option(help="Fixed time of one expert on the CPU, microseconds.")
    ] = None,
    cpu_tflops: Annotated[
        float | None, typer.Option(help="CPU rate on an expert of many tokens.")
    ] = None,
    nvme_gb_per_s: Annotated[
        float | None, typer.Option(help="Read rate of NVMe, for experts beyond --dram.")
    ] = None,
    ilp: Annotated[
        bool,
        typer.Option("--ilp", help="Solve slots, tiers, bits by integer program too."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Decode steps simulated in each set.", min=16)] = 4096,
    seed: Annotated[int, typer.Option(help="Same seed, same plan.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Cache plan file to write.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Tokens per second against HBM (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Plan expert offloading: slots a layer, pinned experts, policy, prefetch, CPU.

    A quarter of the trace's requests gives frequencies and fits predictors, a quarter chooses, and
    every figure printed comes from the other half.

    Example: moesim cache --trace sample:debian-moe --hbm 1.3 --plot cache.png
    """
    from moesim.jobs.cache import CacheOptions, run_cache
    from moesim.trace.format import load_token_trace

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    for target in (out, plot):
        if target is not None and not target.resolve().parent.is_dir():
            raise InputError(
                f"cannot write {target}: there is no folder {target.parent}",
                "name a file in a folder that exists",
            )
    host = {
        "dram_gb": dram,
        "dram_gb_per_s": dram_gb_per_s,
        "cpu_us": cpu_us,
        "cpu_tflops": cpu_tflops,
        "nvme_gb_per_s": nvme_gb_per_s,
    }
    options = CacheOptions(
        model=model,
        gpu=gpu,
        hbm_gb=hbm,
        batch_size=batch,
        context_tokens=context,
        policy=policy,
        prefetch=prefetch,
        cpu=cpu,
        expert_dtype=expert_dtype,
        average_bits=bits,
        bit_errors=bit_errors,
        host={name: value for name, value in host.items() if value is not None},
        max_steps=steps,
        seed=seed,
        sweep=plot is not None,
    )
    job = run_cache(load_token_trace(trace, "moesim cache"), options, _say)
    exact = _solve(job) if ilp else None
    if out is not None:
        job.plan.save(out)
    if plot is not None and job.sweep is not None:
        from moesim.draw.cache import plot_speed_by_memory

        title = f"{job.plan.model}, {job.plan.gpu}, batch {batch}, {context} tokens of context"
        plot_speed_by_memory(job.sweep, job.request.hbm_gb, title, plot)
    if as_json:
        data = job.to_dict()
        if exact is not None:
            data["ilp"] = exact
        typer.echo(json.dumps(data, indent=1))
        return
    _print(job, exact)
    for target, what in ((out, "plan"), (plot, "plot")):
        if target is not None:
            typer.echo(f"{what} written to {target}")


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)
        if not text:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _solve(job: CacheJob) -> list[dict[str, Any]]:
    """Integer programs beside what the plan's own methods found, each with its bound."""
    import numpy as np

    from moesim.caching.bits import BITS, bit_budget
    from moesim.caching.planner import tier_costs
    from moesim.caching.slots import allocate_slots, allocate_tiers
    from moesim.solvers.ilp.cache import solve_bits, solve_slots, solve_tiers

    _say("integer program")
    curves, slots = job.planned.curves, job.planned.memory.num_slots
    _, own = allocate_slots(curves.cost, slots)
    rows = []
    if job.plan.nvme:
        in_dram = curves.expert_misses.shape[0] * job.plan.num_experts
        in_dram -= sum(map(len, job.plan.nvme))
        near, far = tier_costs(job.rates, job.request)
        misses = curves.expert_misses
        try:
            tiers = solve_tiers(misses, near, far, slots, in_dram)
            rows.append(_row("slots and tiers", "s of misses a token", own, tiers))
        except InputError as error:
            typer.echo(f"note: {error.cause}: a dual bound is given instead", err=True)
            *_, bound = allocate_tiers(misses, near, far, slots, in_dram)
            dual = {"own": own, "integer_program": None, "bound": bound, "status": "feasible"}
            rows.append({"what": "slots and tiers", "unit": "s of misses a token"} | dual)
    else:
        rows.append(_row("slots", "s of misses a token", own, solve_slots(curves.cost, slots)))
    if job.loss is not None and job.plan.bits is not None:
        bits = np.array(job.plan.bits)
        own = float(np.take_along_axis(job.loss, bits[:, :, None] - BITS[0], axis=2).sum())
        budget = bit_budget(job.plan.num_experts, job.average_bits)
        found = [solve_bits(layer, budget) for layer in job.loss]
        row = _row("bits", "weighted error", own, found[0])
        row["integer_program"] = sum(f.objective for f in found)
        row["bound"] = sum(f.bound for f in found)
        if any(f.status != "optimal" for f in found):
            row["status"] = "time_limit"
        rows.append(row)
    _say("")
    return rows


def _row(what: str, unit: str, own: float, found: Any) -> dict[str, Any]:
    return {
        "what": what,
        "unit": unit,
        "own": own,
        "integer_program": found.objective,
        "bound": found.bound,
        "status": found.status,
    }


def _print(job: CacheJob, exact: list[dict[str, Any]] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    _say("")
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    plan, memory = job.plan, job.planned.memory
    typer.echo(
        f"{plan.model} on {plan.gpu}: {job.request.hbm_gb:g} GB hold {memory.num_slots} of"
        f" {memory.num_experts} experts of {memory.slot_bytes / 1e6:.1f} MB beside"
        f" {memory.dense_bytes / 1e9:.2f} GB of dense weights, {memory.kv_bytes / 1e9:.2f} GB of KV"
        f" cache and {memory.workspace_bytes / 1e9:.1f} GB of workspace"
    )
    if memory.everything_fits:
        typer.echo("everything fits: all experts stay in HBM, no cache is needed")
    else:
        pinned = [len(row) for row in plan.pinned]
        prefetch = plan.prefetch
        typer.echo(
            f"policy {plan.policy}; {sum(plan.slots)} slots, {min(plan.slots)} to"
            f" {max(plan.slots)} a layer; {sum(pinned)} experts pinned;"
            f" CPU {'computes misses' if plan.cpu == 'auto' else 'unused'}; prefetch "
            + (
                "none"
                if prefetch is None
                else f"{prefetch.predictor}, {prefetch.depth} layers ahead, at most"
                f" {prefetch.width} a layer of score {prefetch.min_score:g} or more"
            )
        )
        if plan.nvme:
            typer.echo(f"{sum(map(len, plan.nvme))} experts live on NVMe, the rest in DRAM")
        if job.bits is not None:
            typer.echo(job.bits)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("held-out requests", no_wrap=True)
    for title in ("tokens/s", "hits", "prefetched", "on CPU", "MB/token"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in job.results:
        table.add_row(*_cells(row))
    table.add_row(
        "offline bound (any policy)",
        f"{job.bound_tokens_per_s:.1f}",
        f"{job.bound_hit_rate:.1%}",
        "",
        "",
        "",
    )
    console = Console()
    if console.width < 90:
        console = Console(width=90)
    console.print(table)
    if "prefetch_precision" in plan.predicted:
        wasted = plan.predicted["wasted_bytes_per_token"] / 1e6
        typer.echo(
            f"prefetch: precision {plan.predicted['prefetch_precision']:.1%}, recall"
            f" {plan.predicted['prefetch_recall']:.1%}, {wasted:.1f} MB a token sent for nothing"
        )
    for check in exact or ():
        found = check["integer_program"]
        program = "" if found is None else f" integer program {found:.6g} ({check['status']}),"
        typer.echo(
            f"{check['what']}: {check['own']:.6g} {check['unit']} as planned,{program} bound"
            f" {check['bound']:.6g}"
        )
    typer.echo(f"weakest figure behind this: {job.basis}")
    for line in job.rate_notes:
        typer.echo(f"  {line}")


def _cells(row: Result) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.tokens_per_s:.1f}",
        f"{row.hit_rate:.1%}",
        f"{row.prefetch_hit_rate:.1%}",
        f"{row.cpu_share:.1%}",
        f"{row.bytes_per_token / 1e6:.1f}",
    )
