"""The study in reports/offloading: policies, cache sizes, semantics, prediction, speed.

Reads the real traces, writes README.md, results.json and plots. Usage:

    python benchmarks/offloading_study.py --data ../shared/data --out reports/offloading
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moesim.caching.compare import compare, offline_bound, sweep_hbm
from moesim.caching.curves import layer_curves
from moesim.caching.events import decode_stream
from moesim.caching.info import limit_tokens, offload_info
from moesim.caching.memory import memory_budget
from moesim.caching.planner import make_setup, plan_cache
from moesim.caching.policies import ONLINE, POLICIES
from moesim.caching.predictors.base import accuracy, predict
from moesim.caching.predictors.registry import make_predictor, usable_predictors
from moesim.caching.rates import HostSpec, build_rates, step_times
from moesim.caching.sch import model_hit_rates
from moesim.caching.simulate import CacheSettings, expert_frequency, hit_curves
from moesim.caching.slots import allocate_slots
from moesim.caching.timeline import run_timeline
from moesim.caching.workload import Request, make_workload
from moesim.cluster.gpus import load_gpu
from moesim.draw.cache import hit_rates, speed_by_memory
from moesim.model.names import load_model
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import load_token_trace

TRACES = ("debian-moe", "deepseek-v2-lite", "gpt-oss-20b")
GPU = "h100-sxm"
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Slots a layer, in units of top-k."""
SHARES = (0.25, 0.5, 0.75)
"""Memory, as the share of all experts that fit."""
BATCHES = (1, 8, 32)
MAX_TOKENS = 16_384
NEURAL = ("neural",) if find_spec("torch") else ()
PUBLISHED_NAME = {"deepseek-v2-lite": "deepseek2lite"}


def study(name: str, data: Path, out: Path) -> dict[str, Any]:
    trace = load_token_trace(data / f"{name}.npz", "the offloading study")
    model = load_model(trace.meta.model)
    requests, notice = index_requests(trace, "decode")
    tune, held = split_requests(requests)
    held = limit_tokens(held, MAX_TOKENS, 0)
    frequency = expert_frequency(trace, tune)
    result: dict[str, Any] = {
        "notice": notice,
        "tokens": len(held.token_idx),
        "requests": len(held.ids),
        "hits": hit_tables(trace, held, frequency),
        "speed": {},
        "predictors": predictors(trace, tune, held),
    }
    info = offload_info(trace)
    result["srp"] = {m: (s.model, s.model_ratio) for m, s in info.srp.items()}
    result["sch"] = {m: [info.at_ratio(m, r)[1] for r in (0.5, 1, 2, 3)] for m in info.sch_model}
    result["published"] = published(name, data)
    if result["published"] is not None:
        pool = limit_tokens(requests, info.sch_model_tokens, 0)
        result["chr"] = {p: pool_rates(trace, pool, p) for p in ("lru", "lfu", "belady")}
    result["idle"] = {c: float(np.nanmean(row)) for c, row in info.cls.items()}
    stream = decode_stream(held)
    curves = {}
    for policy in POLICIES:
        found = hit_curves(trace, stream, CacheSettings(policy, warm=True), frequency)
        curves[policy] = found.hits.sum(axis=0) / found.accesses.sum()
    title = f"{model.name}: held-out hit rate by slots, batch 1, atomic, warm start"
    hit_rates(curves, trace.top_k, title).save(out / f"hits-{name}.png")
    rates = build_rates(model, load_gpu(GPU), HostSpec())
    for share in SHARES:
        result["speed"][share] = speeds(trace, model, rates, share)
    result["plans"] = plans(trace, model, rates, name, out)
    return result


def hit_tables(trace, held, frequency) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """{semantics: {batch: {policy: [hit rate at each ratio]}}}, warm start."""
    tables: dict[str, Any] = {}
    slots = [min(trace.num_experts, round(r * trace.top_k)) for r in RATIOS]
    for semantics in ("atomic", "sequential"):
        for batch in BATCHES if semantics == "atomic" else (1,):
            stream = decode_stream(held, batch)
            row = {}
            for policy in POLICIES:
                settings = CacheSettings(policy, semantics, warm=True)
                curves = hit_curves(trace, stream, settings, frequency)
                row[policy] = [curves.hit_rate(c) for c in slots]
            tables.setdefault(semantics, {})[batch] = row
    return tables


def predictors(trace, tune, held) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """{depth: {name: [precision, recall, wasted experts a token]}} with top-k experts a layer."""
    stream = decode_stream(limit_tokens(held, MAX_TOKENS // 2, 1))
    tables: dict[str, Any] = {}
    for depth in (1, 4):
        for name in (*usable_predictors(trace), *NEURAL):
            predictor = make_predictor(name, depth)
            predictor.fit(trace, tune)
            found = accuracy(predict(predictor, trace, stream, trace.top_k).expert, trace, stream)
            tables.setdefault(depth, {})[name] = [
                float(np.nanmean(found.precision)),
                float(np.nanmean(found.recall)),
                found.wasted_per_token,
            ]
    return tables


def speeds(trace, model, rates, share: float) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Held-out tokens per second of every policy with its own slots a layer, misses fetched, no
    prefetch, no CPU; and the offline bound without the CPU."""
    request = request_for(model, share)
    work = make_workload(trace, request)
    times = step_times(rates, 1, request.context_tokens, model.expert_bytes())
    memory = memory_budget(model, request.hbm_gb, 1, request.context_tokens, model.expert_bytes())
    out = {}
    for policy in (*ONLINE, "belady", "optimum"):
        stream = work.held_out if POLICIES[policy].offline else work.select
        curves = layer_curves(
            trace, stream, CacheSettings(policy, warm=True), work.frequency, times.load_s
        )
        slots, _ = allocate_slots(curves.cost, memory.num_slots)
        pins = np.take_along_axis(curves.pins, slots[:, None], axis=1)[:, 0]
        setup = make_setup(work, policy, slots, pins)
        run = run_timeline(trace, work.held_out, setup, times, None, work.held_out_events)
        out[policy] = run.tokens_per_s
    equal = np.full(trace.num_layers, memory.num_slots // trace.num_layers)
    setup = make_setup(work, "lru", equal, 0 * equal)
    run = run_timeline(trace, work.held_out, setup, times, None, work.held_out_events)
    out["lru, equal slots"] = run.tokens_per_s
    out["offline bound"] = offline_bound(work, times, cpu=False).tokens_per_s(memory.num_slots)
    return out


def plans(trace, model, rates, name: str, out: Path) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """What `moesim cache` plans at each share, beside the baselines; a plot against memory."""
    tables: dict[str, Any] = {}
    for share in SHARES:
        request = request_for(model, share)
        work = make_workload(trace, request)
        planned = plan_cache(work, rates, request)
        bound = offline_bound(work, planned.times, cpu=planned.plan.cpu == "auto")
        rows = {r.name: r.tokens_per_s for r in compare(work, planned, model.expert_bytes())}
        rows["offline bound"] = bound.tokens_per_s(planned.memory.num_slots)
        prefetch = planned.plan.prefetch
        tables[share] = {
            "hbm_gb": request.hbm_gb,
            "policy": planned.plan.policy,
            "pinned": sum(map(len, planned.plan.pinned)),
            "slots": planned.memory.num_slots,
            "prefetch": "none" if prefetch is None else f"{prefetch.predictor} {prefetch.depth}",
            "cpu": planned.plan.cpu,
            "tokens_per_s": rows,
        }
        if share == 0.5:
            sweep = sweep_hbm(work, rates, request, planned, bound)
            title = f"{model.name} on {GPU}, batch 1, {request.context_tokens} tokens of context"
            speed = {way: found.tolist() for way, found in sweep.speed.items()}
            drawn = speed_by_memory(sweep.hbm_gb.tolist(), speed, request.hbm_gb, title)
            drawn.save(out / f"speed-{name}.png")
    return tables


def pool_rates(trace, pool, policy: str) -> list[float]:  # type: ignore[no-untyped-def]
    """Hit rates in the published convention: one pool for all layers, at 0.5, 1, 2, 3 x top-k."""
    rate = model_hit_rates(trace, pool, 1, policy)
    unit = trace.num_layers * trace.top_k
    return [float(rate[int(r * unit)]) for r in (0.5, 1, 2, 3)]


def request_for(model, share: float) -> Request:  # type: ignore[no-untyped-def]
    """Memory in which that share of all experts fits, 2,048 tokens of context."""
    some = memory_budget(model, 1e4, 1, 2048, model.expert_bytes())
    fixed = some.dense_bytes + some.kv_bytes + some.workspace_bytes
    hbm = (fixed + (share * some.num_experts + 0.5) * some.slot_bytes) / 1e9
    return Request(hbm_gb=round(hbm, 3), context_tokens=2048)


def published(name: str, data: Path) -> dict[str, Any] | None:
    key = PUBLISHED_NAME.get(name)
    folder = data / "published"
    if key is None or not folder.exists():
        return None
    srp = json.loads((folder / "srp_published.json").read_text())[key]
    rates = json.loads((folder / "sch_chr_published.json").read_text())
    at = ("0.5", "1", "2", "3")
    return {
        "srp": {int(m): row for m, row in srp.items()},
        "sch": {int(m[1:]): [row[r] for r in at] for m, row in sch_rows(rates["sch"][key])},
        "chr": {p.lower(): [rates["chr"][key][p][r] for r in at] for p in ("LRU", "LFU", "Belady")},
    }


def sch_rows(table: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(m, row) for m, row in table.items() if isinstance(row, dict)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("reports/offloading"))
    parser.add_argument("--only", nargs="*", default=TRACES, help="traces to run again")
    parser.add_argument(
        "--predictors", action="store_true", help="run the part on prediction again, nothing else"
    )
    options = parser.parse_args()
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in options.only:
        print(name, flush=True)
        if options.predictors:
            trace = load_token_trace(options.data / f"{name}.npz", "the offloading study")
            tune, held = split_requests(index_requests(trace, "decode")[0])
            found = {"predictors": predictors(trace, tune, limit_tokens(held, MAX_TOKENS, 0))}
        else:
            found = study(name, options.data, options.out)
        results.setdefault(name, {}).update(json.loads(json.dumps(found)))
        file.write_text(json.dumps(results, indent=1) + "\n")
    from offloading_text import render

    batching = options.out / "batching.json"
    grouped = json.loads(batching.read_text()) if batching.exists() else None
    (options.out / "README.md").write_text(render(results, RATIOS, GPU, grouped))


if __name__ == "__main__":
    main()
