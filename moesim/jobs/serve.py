"""`serve`: requests through a service: TTFT, TPOT, end-to-end times, throughput, goodput."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moesim.choices import MoeComm, Overlap, Router
from moesim.cluster import Cluster
from moesim.cluster.prices import Prices, check_names, parse_prices
from moesim.errors import InfeasibleError, InputError, MismatchError
from moesim.figures import LATENCIES, SERVICE_FIGURES, figure, text_table
from moesim.jobs import inputs
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.result import Result
from moesim.numerals import number
from moesim.serving.config import Level, ServingConfig
from moesim.serving.deployment import Deployment
from moesim.serving.fit import (
    Split,
    check_possible,
    default_pools,
    pools_text,
    service_gpus,
)
from moesim.serving.record import run_record
from moesim.serving.requests import Requests
from moesim.serving.routing import DomainRouting
from moesim.serving.run import simulate_serving
from moesim.serving.slo import parse_slo
from moesim.serving.speculative import Speculation
from moesim.serving.stall import stalls_of
from moesim.types import Progress

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture
    from moesim.jobs.inputs import ClusterLike, ModelLike, PlanLike, TraceLike

STATS = ("mean", "p50", "p90", "p99")
DRAFT_SHARE = 0.05
HIDDEN_AT_ZERO = ("preemptions", "shortened", "demoted")
_LEVEL = re.compile(r"^(queue|refuse|shorten|demote)(?:@([0-9]{1,9}))?(?:=([0-9.]+))?$")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ServeResult(Result):
    """record: the whole run, as `--json` prints it (see `moesim.serving.record`)."""

    record: Mapping[str, Any]

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(self.record["notices"])

    @property
    def missed(self) -> bool:
        """Whether a promise for all requests was missed."""
        return self.record["slo"] is not None and bool(self.record["slo"]["missed"])

    def line(self) -> str:
        record, metrics, rate = self.record, self.record["metrics"], "output_tokens_per_s_per_gpu"
        times = ", ".join(
            f"{short.upper()} p99 {figure(f'{short}_p99').text(metrics[f'{short}_p99'])} ms"
            for short in ("ttft", "tpot")
        )
        return (
            f"{record['name']}, {record['counts']['finished']:,} requests served;"
            f" {times}, {figure(rate).text(metrics[rate])} output tokens/s per GPU"
        )

    def summary(self) -> str:
        record, lines = self.record, []
        if record["defaults"]:
            taken = "; ".join(f"{k}: {v}" for k, v in record["defaults"].items())
            lines.append(f"defaults taken: {taken}")
        counts, metrics, asked = record["counts"], record["metrics"], record["requests"]
        lines.append(
            f"{asked['num_requests']:,} requests of {asked['source']} over"
            f" {asked['span_s']:,.0f} s ({asked['rate_per_s']:.2f}/s), prompts of"
            f" {asked['prompt_tokens']['mean']:,.0f} and outputs of"
            f" {asked['output_tokens']['mean']:,.0f} tokens on average"
        )
        one = record["deployment"]
        lines.append(f"{record['name']}; KV cache of {one['kv_tokens_per_rank']:,} tokens per rank")
        lines += [line for line in record["predictions"] if line.startswith("rebalancing: ")]
        others = [f"{n:,} {name}" for name, n in counts.items() if n and name != "finished"]
        lines.append(", ".join([f"{counts['finished']:,} finished", *others]))
        lines += _window(record["window"])
        lines += [_latencies(metrics), *_levels(record["by_level"])]
        rows = []
        for name in SERVICE_FIGURES:
            value, known = metrics.get(name), figure(name)
            if value is None or (name in HIDDEN_AT_ZERO and value == 0):
                continue
            rows.append([known.heading, known.text(value)])
        lines.append(text_table(["", ""], rows).lstrip("\n"))
        if record["pools"] is not None:
            lines.append(_pools_line(record["pools"]))
        if record["slo"] is not None:
            lines += _slo_lines(record["slo"])
        lines.append(f"basis: {record['basis']} at the weakest part (--json lists every part)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return dict(self.record)

    def to_frame(self) -> pd.DataFrame:
        """One row per figure: value in its base unit (seconds for times), and label."""
        import pandas as pd

        from moesim.figures import FIGURES

        rows = {
            name: {"value": value, "label": FIGURES[name].label if name in FIGURES else name}
            for name, value in self.record["metrics"].items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("figure")

    def picture(self) -> Picture:
        from moesim.draw.serving import serving_poster

        return serving_poster(self.record)


def serve(
    requests: Requests | str | os.PathLike[str],
    *,
    model: ModelLike | None = None,
    cluster: ClusterLike | None = None,
    gpus: int | None = None,
    replicas: int | None = None,
    tp: int | None = None,
    dp: int | None = None,
    pp: int = 1,
    ep: int | None = None,
    engine: str = "vllm",
    moe_comm: MoeComm | None = None,
    redundant_experts: int | None = None,
    two_batch_overlap: Overlap = "off",
    expert_gpus: int | None = None,
    micro_batches: int = 3,
    dispatch_tokens: int | None = None,
    kv_scale: float = 1.0,
    kv_window: int | None = None,
    expert_dtype: str | None = None,
    kv_dtype: str = "bf16",
    max_batch_tokens: int | None = None,
    max_sequences: int | None = None,
    memory_fraction: float | None = None,
    block_size: int = 16,
    prefix_cache: bool | None = None,
    shared_reads: bool = False,
    prefill: Literal["mixed", "first"] | None = None,
    chunk_tokens: int | None = None,
    router: Router = "least_loaded",
    length_error: float | None = None,
    decode_gpus: int | None = None,
    decode_replicas: int | None = None,
    transfer: float | None = None,
    speculate: float | Sequence[float] | None = None,
    drafts: int = 4,
    fixed_drafts: bool = False,
    draft_share: float | None = None,
    priorities: Sequence[float] | None = None,
    level: Sequence[str] = (),
    plan: PlanLike | None = None,
    trace: TraceLike | None = None,
    reroute: str | None = None,
    domain_mix: Mapping[str, float] | None = None,
    drift_hours: float | None = None,
    rebalance_every: Sequence[int] = (),
    rebalance_stall: Sequence[float] = (),
    slo: str | None = None,
    price: Sequence[str] = (),
    rate_scale: float = 1.0,
    first: int | None = None,
    skip_empty: bool = False,
    time_unit: str | None = None,
    block_tokens: int | None = None,
    until: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ServeResult:
    """Serve requests with a deployment.

    requests: a log by its path, or arrivals drawn as "poisson:rate=8,requests=2000,prompt=1000,
    output=200". time_unit, block_tokens: what a log does not say of itself. replicas, tp, dp, ep:
    what is left out is `serving.fit.default_split`'s, with a cluster given as an object in one
    engine. reroute: a rule of routing for the trace, as "drop:factor=1.25" for a capacity factor;
    expert loads are of what it leaves, messages of the model's top-k. rebalance_every,
    rebalance_stall: steps between two placements and ms that each stops an engine; two of each for
    engines that take prompts and engines that decode, one for both; without ms as long as moving
    all layers takes. speculate: the probability that a drafted token is accepted, or those of the
    first, the second and so on; without `draft_share` the model's multi-token-prediction layer
    drafts, where it has one. The other names and defaults
    are those of `moesim serve`; progress(done, total) counts requests.

    Raises InputError where the GPUs do not divide or nothing names the model, InfeasibleError where
    the model does not fit or a promise cannot be kept even by an idle service.
    """
    if prefill not in (None, "mixed", "first"):
        raise InputError(f"`prefill` {prefill}", "give mixed or first")
    promises = parse_slo(slo) if slo is not None else None
    prices = Prices(parse_prices(list(price)))
    defaults: dict[str, str] = {}
    arriving = arriving_requests(
        requests,
        seed=seed,
        skip_empty=skip_empty,
        time_unit=time_unit,
        block_tokens=block_tokens,
        first=first,
        rate_scale=rate_scale,
    )
    if priorities is not None:
        arriving = arriving.with_priorities(list(priorities), seed)
    options = {
        "engine": engine,
        "moe_comm": moe_comm,
        "redundant_experts": redundant_experts,
        "two_batch_overlap": two_batch_overlap,
        "expert_gpus": expert_gpus,
        "micro_batches": micro_batches,
        "dispatch_tokens": dispatch_tokens,
        "mtp": speculate is not None and draft_share is None,
        "kv_scale": kv_scale,
        "kv_window": kv_window,
        "expert_dtype": expert_dtype,
        "kv_dtype": kv_dtype,
        "max_batch_tokens": max_batch_tokens,
        "max_sequences": max_sequences,
        "memory_fraction": memory_fraction,
    }
    asked = {
        "gpus": gpus,
        "replicas": replicas,
        "tp": tp,
        "dp": dp,
        "pp": pp,
        "ep": ep,
        "decode_gpus": decode_gpus,
        "decode_replicas": decode_replicas,
    }
    if reroute is not None and trace is None:
        raise InputError("`reroute` without `trace`", "give the trace that the rule changes")
    routed, changed = None, None
    if trace is not None:
        whole = inputs.token_trace_of(trace, "moesim serve")
        routed, changed = inputs.rerouted(whole, reroute, seed=seed)
    front, back = _pools(model, cluster, plan, routed, asked, options, defaults)
    deployment = front.engine
    pools = [front.engine, *([] if back is None else [back.engine])]
    check_names(prices.given, {gpu.name for one in pools for gpu in one.cluster.gpus})
    config = ServingConfig(
        replicas=front.replicas,
        router=router,
        length_error=length_error,
        decode=None if back is None else back.engine,
        decode_replicas=1 if back is None else back.replicas,
        transfer_gb_per_s=transfer,
        block_size=block_size,
        prefix_cache=prefix_cache,
        shared_reads=shared_reads,
        chunk_tokens=chunk_tokens,
        prefill_first=None if prefill is None else prefill == "first",
        speculation=_speculation(
            deployment, speculate, drafts, fixed_drafts, draft_share, defaults
        ),
        levels=_level_rules(level),
        routing=_routing(deployment, domain_mix, drift_hours, seed),
        stalls=stalls_of(
            rebalance_every, rebalance_stall, [p.engine for p in (front, back) if p is not None]
        ),
        until_s=float("inf") if until is None else until,
        seed=seed,
    )
    if promises is not None:
        check_possible(promises, deployment, arriving, config)
    begin = time.perf_counter()
    result = simulate_serving(deployment, arriving, config, progress=progress)
    return ServeResult(
        run_record(
            deployment,
            arriving,
            config,
            result,
            slo=promises,
            defaults=defaults,
            notices=(*arriving.notices, *([] if changed is None else [changed])),
            seconds=time.perf_counter() - begin,
            prices=prices,
        )
    )


def _pools(
    model: ModelLike | None,
    cluster: ClusterLike | None,
    plan: PlanLike | None,
    trace: TraceLike | None,
    asked: dict[str, int | None],
    options: dict[str, Any],
    defaults: dict[str, str],
) -> tuple[Split, Split | None]:
    """The front (or only) engines, and the decoding ones. asked: `gpus` and how they are divided,
    None for the default."""
    from moesim.cluster import DEFAULT_CLUSTER

    made = inputs.plan_of(plan) if plan is not None else None
    if made is not None and made.cache is not None:
        raise MismatchError(
            "the plan keeps experts outside of GPU memory, and serve simulates no offloading",
            "simulate it with moesim simulate, or make a plan without `offload`",
        )
    routed = inputs.token_trace_of(trace, "moesim serve") if trace is not None else None
    named = (made.model if made is not None else "") or (
        routed.meta.model if routed is not None else ""
    )
    if model is None and not named:
        raise InputError(
            "nothing says which model is served", "name one with `model` (a preset or config.json)"
        )
    spec = inputs.model_required(model, named, "the plan or trace")
    options["mtp"] = options["mtp"] and spec.mtp_layers > 0
    split = dict(asked)
    gpus = split.pop("gpus")
    machine = inputs.machine_in(cluster)
    if gpus is None:
        apart = options["expert_gpus"]
        gpus = service_gpus(split["replicas"], split["tp"], split["dp"], split["pp"] or 1, apart)
        if isinstance(cluster, Cluster):
            gpus = cluster.num_gpus
        elif machine is not None:
            gpus = len(machine.gpus)
        elif made is not None:
            gpus = made.placement.num_gpus * (split["replicas"] or 1)
        defaults["GPUs"] = str(gpus)
    if cluster is None:
        cluster = defaults["cluster"] = DEFAULT_CLUSTER
    if isinstance(cluster, Cluster) and split["replicas"] is None:
        split["replicas"] = 1
    sized = partial(inputs.cluster_of, cluster)
    try:
        front, back = default_pools(spec, sized, gpus, **split, **options, plan=made, trace=routed)
    except InfeasibleError as error:
        if machine is None:
            raise
        raise InfeasibleError(
            f"{error.cause}; serve keeps all experts in GPU memory, without offloading",
            f"take a model of fewer bits or a machine of more GPUs, or ask `moesim cache --machine"
            f" {machine.name} --model {spec.name}` what offloading engines make of it",
        ) from None
    defaults["deployment"] = pools_text(front, back)
    if made is not None and back is not None and back.engine.num_gpus != front.engine.num_gpus:
        raise InputError(
            f"the plan is for {front.engine.num_gpus} GPUs, a decoding engine has"
            f" {back.engine.num_gpus}",
            "give prompts and decoding engines of the plan's size, or no plan",
        )
    return front, back


def _speculation(
    deployment: Deployment,
    speculate: float | Sequence[float] | None,
    drafts: int,
    fixed: bool,
    share: float | None,
    defaults: dict[str, str],
) -> Speculation | None:
    if speculate is None:
        if share is not None:
            raise InputError("`draft_share` without `speculate`", "give an acceptance, as 0.7")
        return None
    given = tuple(speculate) if isinstance(speculate, Sequence) else (speculate,)
    if deployment.mtp:
        defaults["drafting"] = "multi-token-prediction layer"
        return Speculation(given, drafts, 0.0, fixed)
    if share is None:
        defaults["drafting"] = f"{DRAFT_SHARE:g} of a step per token"
    return Speculation(given, drafts, DRAFT_SHARE if share is None else share, fixed)


def _level_rules(texts: Sequence[str]) -> tuple[Level, ...]:
    """Levels from texts such as "queue", "refuse@8" and "shorten@8=0.5"."""
    out = []
    for text in texts:
        found = _LEVEL.match(text)
        if found is None or (found[3] is not None and found[1] != "shorten"):
            raise InputError(
                f"`level` {text!r:.60}", "write queue, refuse@8, shorten@8=0.5 or demote@8"
            )
        share = numbers(found[3], "level")[0] if found[3] is not None else 0.5
        out.append(Level(found[1], int(found[2] or 0), share))  # type: ignore[arg-type]
    return tuple(out)


def _routing(
    deployment: Deployment, mix: Mapping[str, float] | None, drift_hours: float | None, seed: int
) -> DomainRouting | None:
    """The domains of the deployment's trace. Raises InputError for a mix without a trace."""
    if deployment.trace is None:
        if mix is not None or drift_hours is not None:
            raise InputError(
                "a domain mix or drift without a routing trace", "name one with `trace`"
            )
        return None
    hours = float("inf") if drift_hours is None else drift_hours
    weights = None if mix is None else dict(mix)
    return DomainRouting(deployment.trace, weights, hours * 3600.0, seed)


def numbers(text: str, name: str) -> list[float]:
    """Numbers with commas between. Raises InputError that names the field."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"`{name}` {text!r:.60} holds no number", "give numbers") from None


def _latencies(metrics: Mapping[str, float | None]) -> str:
    rows = [
        [label, *(figure(f"{name}_{stat}").text(metrics[f"{name}_{stat}"]) for stat in STATS)]
        for name, label in LATENCIES.items()
    ]
    return text_table(["ms", *STATS], rows)


def _window(window: Mapping[str, Any]) -> list[str]:
    if window["state"] == "short":
        return ["no steady state: no rates; latencies and means over time are of the whole run"]
    span = f"from {window['start_s']:,.0f} s to the last arrival at {window['end_s']:,.0f} s"
    state = "" if window["state"] == "steady" else ", not a steady state"
    return [f"latencies of requests that arrive, rates and means over time {span}{state}:"]


def _levels(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    if not levels:
        return []
    head = ["priority", "requests", "finished", "degraded", "TTFT p50", "TTFT p99", "TPOT p50"]
    rows = [
        [
            *(f"{row[name]:,}" for name in ("priority", "requests", "finished", "degraded")),
            *(figure(name).text(row[name]) for name in ("ttft_p50", "ttft_p99", "tpot_p50")),
        ]
        for row in levels
    ]
    return [text_table(head, rows)]


def _pools_line(pools: Mapping[str, float]) -> str:
    each, shares = f"{pools['sequences_per_rank']:.1f} sequences per attention rank", []
    for name, gpus in (("attention", "attention_gpus"), ("experts", "expert_gpus")):
        shares.append(f"{pools[gpus]:g} GPUs of {name} compute {pools[f'{name}_busy']:.0%} of it")
    return (
        f"two pools, a decode step of {each}: {', '.join(shares)}; its layers take"
        f" {pools['step_s'] * 1e3:,.1f} ms with the exchange as flows over the network,"
        f" {pools['step_closed_form_s'] * 1e3:,.1f} by the closed form that is used"
    )


def _slo_lines(slo: Mapping[str, Any]) -> list[str]:
    good = slo["goodput"]
    rate = ""
    if good["requests_per_s"] is not None:
        each = f"{good['requests_per_s_per_gpu']:.3f} per GPU"
        rate = f"{good['requests_per_s']:.2f} requests/s, {each}, "
    lines = [f"goodput under {slo['text']}: {rate}{good['share']:.1%} of the requests"]
    for miss in slo["missed"]:
        value = miss["value_s"]
        reason = (
            "too many requests are not served" if value is None else f"it is {value * 1e3:,.1f} ms"
        )
        lines.append(f"missed: {miss['promise']}: {reason}")
    return lines
