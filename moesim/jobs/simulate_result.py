"""The result of `simulate`: steps by placement, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesim.choices import Phase
from moesim.errors import plain
from moesim.figures import count, part_label, text_table
from moesim.jobs.result import Result
from moesim.jobs.simulate_request import SimRequest

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture
    from moesim.sim.prepare import Models
    from moesim.sim.result import SimResult
    from moesim.sim.timeline import StepTimeline

PARTS = (
    "attention", "gate", "shared", "dense", "dispatch", "compute", "combine", "other", "waiting",
)  # fmt: skip
MAX_BARS = 16
BAR = 20


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SimReport(Result):
    """Results by placement, the plan (or linear) first; defaults and notices as in `PlanResult`.
    basis, notes: what the times rest on. details: further JSON."""

    request: SimRequest
    results: dict[str, SimResult]
    models: Models
    phase: Phase
    batch_tokens: int
    num_requests: int
    defaults: dict[str, str]
    notices: tuple[str, ...]
    basis: str
    notes: tuple[str, ...]
    timeline: StepTimeline | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> SimResult:
        """The plan's result, or linear placement's."""
        return next(iter(self.results.values()))

    def line(self) -> str:
        mean = ", ".join(
            f"{name} {result.step_us.mean() / 1e3:.3f} ms" for name, result in self.results.items()
        )
        request, first = self.request, self.first
        return (
            f"{plain(request.model.name)} on {count(request.cluster.num_gpus, 'GPU')}:"
            f" {count(len(first.step_us), f'{self.phase} step')}, mean {mean}"
        )

    def summary(self) -> str:
        request, cluster, first = self.request, self.request.cluster, self.first
        lines = []
        if self.defaults:
            taken = "; ".join(f"{k}: {v}" for k, v in self.defaults.items())
            lines.append(f"defaults taken: {taken}")
        changed = request.settings()
        if changed:
            lines.append(f"settings: {'; '.join(f'{k} {v}' for k, v in changed.items())}")
        lines.append(
            f"{plain(request.model.name)} on {count(cluster.num_gpus, 'GPU')} of"
            f" {count(cluster.num_nodes, 'node')} of {cluster.name}:"
            f" {count(len(first.step_us), f'{self.phase} step')} of"
            f" {count(round(first.tokens.mean()), 'token')} from"
            f" {count(self.num_requests, 'held-out request')}; {first.fidelity},"
            f" {first.schedule}" + (f", {first.exchange}" if cluster.num_gpus > 1 else "")
        )
        lines += [_steps(self), *_pools(self.results), *_gpus(first)]
        lines += [*_links(self), *_offload(self)]
        lines += [*_faults(self.results), *_rebalance(self.results)]
        lines.append(f"times rest on {self.basis} figures: " + "; ".join(self.notes))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        request, links = self.request, self.models.links
        base = float(self.first.step_us.mean())
        plans = {}
        for name, result in self.results.items():
            plans[name] = result.to_json(links)
            plans[name]["relative_step"] = float(result.step_us.mean()) / base
        return {
            "format": "moesim-simulation",
            "version": 1,
            "model": request.model.name,
            "cluster": request.cluster.name,
            "num_gpus": request.cluster.num_gpus,
            "num_nodes": request.cluster.num_nodes,
            "phase": self.phase,
            "batch_tokens": self.batch_tokens,
            "num_requests": self.num_requests,
            "held_out": True,
            "seed": request.seed,
            "settings": request.settings(),
            "basis": self.basis,
            "predictions": list(self.notes),
            "defaults": self.defaults,
            "notices": list(self.notices),
            **self.details,
            "plans": plans,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per placement: step times and their parts, in microseconds."""
        import pandas as pd

        rows = {}
        for name, result in self.results.items():
            data = result.to_json(self.models.links)
            rows[name] = {
                **{f"step_us_{key}": data["step_us"][key] for key in ("mean", "p50", "p99")},
                **{f"{part}_us": us for part, us in data["breakdown_us"].items()},
                "balancedness": data["balancedness"],
                "tokens_per_s": data["tokens_per_s"],
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("placement")

    def picture(self) -> Picture:
        from moesim.jobs.pictures import simulation_picture

        return simulation_picture(self)


def _steps(report: SimReport) -> str:
    results = report.results
    base = float(report.first.step_us.mean())
    data = {name: r.to_json(report.models.links) for name, r in results.items()}
    rows = []
    for key, label in (("mean", "step, mean"), ("p50", "step, p50"), ("p99", "step, p99")):
        rows.append([label, *(f"{d['step_us'][key]:,.1f}" for d in data.values())])
    for part in PARTS:
        values = [d["breakdown_us"].get(part, 0.0) for d in data.values()]
        if max(values) > 0:
            rows.append([f"  {part_label(part)}", *(f"{value:,.1f}" for value in values)])
    uneven = [d["stragglers"]["token_waiting_us"] for d in data.values() if "stragglers" in d]
    if len(uneven) == len(data) and max(uneven) > 0:
        label = "  (waiting that uneven tokens explain)"
        rows.append([label, *(f"{us:,.1f}" for us in uneven)])
    if any(d["overlapped_us"] > 0 for d in data.values()):
        hidden = (f"{d['overlapped_us']:,.1f}" for d in data.values())
        rows.append(["  (communication hidden)", *hidden])
    if len(results) > 1:
        relative = (f"{d['step_us']['mean'] / base:.3f}" for d in data.values())
        rows.append(["relative to the first", *relative])
    rows.append(["balancedness", *(f"{d['balancedness']:.3f}" for d in data.values())])
    drops = [d["drops"] for d in data.values() if "drops" in d]
    if drops:
        rows.append(["choices dropped", *(f"{d['dropped_share']:.2%}" for d in drops)])
        if any(d["substituted"] for d in drops):
            given = (f"{d['substituted'] / d['choices']:.2%}" for d in drops)
            rows.append(["choices substituted", *given])
    rows.append(["tokens/s", *(f"{d['tokens_per_s']:,.0f}" for d in data.values())])
    for name in next(iter(data.values()))["bytes_by_link_class"]:
        sent = (f"{d['bytes_by_link_class'].get(name, 0.0) / 1e6:,.2f}" for d in data.values())
        rows.append([f"MB per step over {name}", *sent])
    return text_table(["microseconds per step", *results], rows)


def _pools(results: dict[str, SimResult]) -> list[str]:
    found = {n: r.extra["pools"] for n, r in results.items() if "pools" in r.extra}
    return [
        f"{name}: two pools, {pools['parts']} parts: {pools['attention_gpus']} GPUs of attention"
        f" compute {pools['attention_busy']:.0%} of a step, {pools['expert_gpus']} of experts"
        f" {pools['experts_busy']:.0%}; the exchange takes {pools['exchange_share']:.0%} each way"
        for name, pools in found.items()
    ]


def _gpus(result: SimResult) -> list[str]:
    busy = result.gpu_busy.mean(axis=0)
    if len(busy) > MAX_BARS:
        return [
            f"GPU busy: mean {busy.mean():.1%}, least {busy.min():.1%} (GPU {int(busy.argmin())}),"
            f" most {busy.max():.1%} (GPU {int(busy.argmax())})"
        ]
    bars = [
        f"  GPU {gpu:<3} {share:6.1%} {'#' * round(share * BAR)}".rstrip()
        for gpu, share in enumerate(busy.tolist())
    ]
    return ["GPU busy with kernels", *bars]


def _links(report: SimReport) -> list[str]:
    found = report.first.busiest_links(report.models.links)
    if not found:
        return []
    rows = [
        [row["link"], row["class"], f"{row['busy']:.1%}", f"{row['gb_per_s']:.1f}"] for row in found
    ]
    return [text_table(["busiest links", "class", "busy", "GB/s"], rows)]


def _offload(report: SimReport) -> list[str]:
    lines = []
    for name, result in report.results.items():
        found = result.extra.get("offload")
        if found is None:
            continue
        share = {k: found[k] / max(1, found["accesses"]) for k in ("staged", "fetched", "on_cpu")}
        lines.append(
            f"{name}: {found['hit_rate']:.1%} of {found['accesses']:,} expert accesses in GPU"
            f" memory, {share['staged']:.1%} prefetched, {share['fetched']:.1%} fetched,"
            f" {share['on_cpu']:.1%} on the CPU; waiting for experts"
            f" {found['stall_us']:,.1f} us per step; {found['bytes_from_dram'] / 1e6:,.0f} MB from"
            f" DRAM, {found['bytes_from_nvme'] / 1e6:,.0f} MB from NVMe,"
            f" {found['wasted']:,} prefetches for nothing; copying"
            f" {max(found['copying_by_gpu']):.0%} of the time"
        )
        batching = result.extra.get("batching")
        if batching is not None:
            wait = batching["wait_ms"]
            lines.append(
                f"  batches of {batching['order']} order from {batching['pool']} requests:"
                f" {batching['experts_per_layer_and_step']:.1f} experts per layer and step; between"
                f" two tokens a request waits {wait['mean']:,.1f} ms, p99 {wait['p99']:,.1f} ms"
            )
    expected = report.details.get("cache_plan_predicted")
    if expected is not None:
        lines.append(
            f"the cache plan predicted {expected['tokens_per_s']:,.1f} tokens/s over its"
            f" {expected['num_tokens']:,} held-out tokens"
        )
    return lines


def _faults(results: dict[str, SimResult]) -> list[str]:
    lines = []
    for name, result in results.items():
        faults = result.extra.get("faults")
        if faults is None:
            continue
        lines.append(
            f"{name}: available {faults['availability']:.1%} of the time,"
            f" {count(faults['steps_retried'], 'step')} run again,"
            f" {faults['bytes_from_gpus'] / 1e6:,.0f} MB moved between GPUs and"
            f" {faults['bytes_from_host'] / 1e6:,.0f} MB from hosts"
        )
        for outage in faults["outages"]:
            recover = outage["time_to_recover_us"]
            end = "not recovered" if recover is None else f"recovered in {recover / 1e3:,.1f} ms"
            lines.append(
                f"  {outage['fault']} at {outage['at_us'] / 1e3:,.1f} ms:"
                f" {outage['lost_experts']} experts with no replica, {end}"
            )
    return lines


def _rebalance(results: dict[str, SimResult]) -> list[str]:
    found = {n: r.extra["rebalance"] for n, r in results.items() if "rebalance" in r.extra}
    return [
        f"{name}: {made['num_plans']} new placements ({made['mode']}),"
        f" {made['bytes_from_gpus'] / 1e6:,.0f} MB moved, serving stopped"
        f" {made['stall_share']:.1%} of the time; each: {made['source']}"
        for name, made in found.items()
    ]
