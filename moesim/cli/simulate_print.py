"""Tables and JSON of `moesim simulate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from moesim.jobs.simulate import SimReport, SimRequest
    from moesim.sim.result import SimResult

PARTS = (
    "attention", "gate", "shared", "dense", "dispatch", "compute", "combine", "other", "waiting",
)  # fmt: skip
LABELS = {"compute": "routed experts", "other": "other transfers", "shared": "shared experts"}
MAX_BARS = 16
BAR = 20


def report_json(request: SimRequest, report: SimReport) -> dict[str, Any]:
    """What `--json` prints."""
    links = report.models.links
    first = next(iter(report.results.values()))
    base = float(first.step_us.mean())
    plans = {}
    for name, result in report.results.items():
        plans[name] = result.to_json(links)
        plans[name]["relative_step"] = float(result.step_us.mean()) / base
    return {
        "format": "moesim-simulation",
        "version": 1,
        "model": request.model.name,
        "cluster": request.cluster.name,
        "num_gpus": request.cluster.num_gpus,
        "num_nodes": request.cluster.num_nodes,
        "phase": report.phase,
        "batch_tokens": report.batch_tokens,
        "num_requests": report.num_requests,
        "held_out": True,
        "seed": request.seed,
        "basis": report.basis,
        "predictions": list(report.notes),
        "defaults": report.defaults,
        "notices": list(report.notices),
        **report.details,
        "plans": plans,
    }


def print_report(request: SimRequest, report: SimReport) -> None:
    """Tables on standard output, notices on standard error."""
    from rich.console import Console

    for notice in report.notices:
        print(f"note: {notice}", file=sys.stderr)
    if report.defaults:
        taken = "; ".join(f"{k}: {v}" for k, v in report.defaults.items())
        typer.echo(f"defaults taken: {taken}")
    cluster = request.cluster
    first = next(iter(report.results.values()))
    typer.echo(
        f"{request.model.name} on {_count(cluster.num_gpus, 'GPU')} of"
        f" {_count(cluster.num_nodes, 'node')} of {cluster.name}:"
        f" {_count(len(first.step_us), f'{report.phase} step')} of"
        f" {_count(round(first.tokens.mean()), 'token')} from"
        f" {_count(report.num_requests, 'held-out request')}; {first.fidelity},"
        f" {first.schedule}" + (f", {first.exchange}" if cluster.num_gpus > 1 else "")
    )
    console = Console(soft_wrap=True)
    _print_steps(console, report)
    _print_gpus(console, first)
    _print_links(console, report, first)
    _print_offload(console, report)
    _print_faults(console, report.results)
    _print_rebalance(console, report.results)
    typer.echo(f"times rest on {report.basis} figures: " + "; ".join(report.notes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _print_steps(console: Console, report: SimReport) -> None:
    from rich.table import Table

    results = report.results
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("microseconds a step", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    base = float(next(iter(results.values())).step_us.mean())
    data = {name: r.to_json(report.models.links) for name, r in results.items()}
    for key, label in (("mean", "step, mean"), ("p50", "step, p50"), ("p99", "step, p99")):
        table.add_row(label, *(f"{d['step_us'][key]:,.1f}" for d in data.values()))
    for part in PARTS:
        values = [d["breakdown_us"].get(part, 0.0) for d in data.values()]
        if max(values) > 0:
            label = f"  {LABELS.get(part, part)}"
            table.add_row(label, *(f"{value:,.1f}" for value in values))
    uneven = [d["stragglers"]["token_waiting_us"] for d in data.values() if "stragglers" in d]
    if len(uneven) == len(data) and max(uneven) > 0:
        table.add_row("  (waiting that uneven tokens explain)", *(f"{us:,.1f}" for us in uneven))
    if any(d["overlapped_us"] > 0 for d in data.values()):
        row = (f"{d['overlapped_us']:,.1f}" for d in data.values())
        table.add_row("  (communication hidden)", *row)
    if len(results) > 1:
        table.add_row(
            "relative to the first", *(f"{d['step_us']['mean'] / base:.3f}" for d in data.values())
        )
    table.add_row("balancedness", *(f"{d['balancedness']:.3f}" for d in data.values()))
    drops = [d["drops"] for d in data.values() if "drops" in d]
    if drops:
        table.add_row("choices dropped", *(f"{d['dropped_share']:.2%}" for d in drops))
        if any(d["substituted"] for d in drops):
            row = (f"{d['substituted'] / d['choices']:.2%}" for d in drops)
            table.add_row("choices substituted", *row)
    table.add_row("tokens/s", *(f"{d['tokens_per_s']:,.0f}" for d in data.values()))
    for name in next(iter(data.values()))["bytes_by_link_class"]:
        row = (f"{d['bytes_by_link_class'].get(name, 0.0) / 1e6:,.2f}" for d in data.values())
        table.add_row(f"MB a step over {name}", *row)
    console.print(table)


def _print_gpus(console: Console, result: SimResult) -> None:
    busy = result.gpu_busy.mean(axis=0)
    if len(busy) > MAX_BARS:
        console.print(
            f"GPU busy: mean {busy.mean():.1%}, least {busy.min():.1%} (GPU {int(busy.argmin())}),"
            f" most {busy.max():.1%} (GPU {int(busy.argmax())})"
        )
        return
    console.print("GPU busy with kernels")
    for gpu, share in enumerate(busy.tolist()):
        console.print(f"  GPU {gpu:<3} {share:6.1%} {'#' * round(share * BAR)}", highlight=False)


def _print_offload(console: Console, report: SimReport) -> None:
    for name, result in report.results.items():
        found = result.extra.get("offload")
        if found is None:
            continue
        share = {k: found[k] / max(1, found["accesses"]) for k in ("staged", "fetched", "on_cpu")}
        console.print(
            f"{name}: {found['hit_rate']:.1%} of {found['accesses']:,} expert accesses in GPU"
            f" memory, {share['staged']:.1%} prefetched, {share['fetched']:.1%} fetched,"
            f" {share['on_cpu']:.1%} on the CPU; waiting for experts"
            f" {found['stall_us']:,.1f} us a step; {found['bytes_from_dram'] / 1e6:,.0f} MB from"
            f" DRAM, {found['bytes_from_nvme'] / 1e6:,.0f} MB from NVMe,"
            f" {found['wasted']:,} prefetches for nothing; copying"
            f" {max(found['copying_by_gpu']):.0%} of the time",
            highlight=False,
        )
        batching = result.extra.get("batching")
        if batching is not None:
            wait = batching["wait_ms"]
            console.print(
                f"  batches of {batching['order']} order from {batching['pool']} requests:"
                f" {batching['experts_per_layer_and_step']:.1f} experts a layer and step; between"
                f" two tokens a request waits {wait['mean']:,.1f} ms, p99 {wait['p99']:,.1f} ms",
                highlight=False,
            )
    expected = report.details.get("cache_plan_predicted")
    if expected is not None:
        console.print(
            f"the cache plan predicted {expected['tokens_per_s']:,.1f} tokens/s over its"
            f" {expected['num_tokens']:,} held-out tokens"
        )


def _print_faults(console: Console, results: dict[str, SimResult]) -> None:
    for name, result in results.items():
        faults = result.extra.get("faults")
        if faults is None:
            continue
        console.print(
            f"{name}: available {faults['availability']:.1%} of the time,"
            f" {_count(faults['steps_retried'], 'step')} run again,"
            f" {faults['bytes_from_gpus'] / 1e6:,.0f} MB moved between GPUs and"
            f" {faults['bytes_from_host'] / 1e6:,.0f} MB from hosts"
        )
        for outage in faults["outages"]:
            recover = outage["time_to_recover_us"]
            end = "not recovered" if recover is None else f"recovered in {recover / 1e3:,.1f} ms"
            console.print(
                f"  {outage['fault']} at {outage['at_us'] / 1e3:,.1f} ms:"
                f" {outage['lost_experts']} experts with no replica, {end}"
            )


def _print_rebalance(console: Console, results: dict[str, SimResult]) -> None:
    for name, result in results.items():
        anew = result.extra.get("rebalance")
        if anew is not None:
            console.print(
                f"{name}: {anew['num_plans']} new placements ({anew['mode']}),"
                f" {anew['bytes_from_gpus'] / 1e6:,.0f} MB moved, serving stopped"
                f" {anew['stall_share']:.1%} of the time"
            )


def _print_links(console: Console, report: SimReport, result: SimResult) -> None:
    from rich.table import Table

    rows = result.busiest_links(report.models.links)
    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("busiest links", no_wrap=True)
    for title in ("class", "busy", "GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["link"], row["class"], f"{row['busy']:.1%}", f"{row['gb_per_s']:.1f}")
    console.print(table)
