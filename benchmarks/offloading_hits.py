"""Published hit rates and caches of experts, predicted anew for reports/offloading-people."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from moesim.caching.curves import miss_table
from moesim.caching.events import decode_stream
from moesim.caching.simulate import CacheSettings, layer_choices, run_policy
from moesim.caching.workload import Workload
from moesim.cluster.gpus import load_gpu
from moesim.offloading.rates import CPU_CALL_US, NO_GRAPH_US, gpu_rates
from moesim.trace.batches import index_requests
from moesim.trace.format import Trace, TraceMeta, load_token_trace


def row(
    group: str, what: str, unit: str, published: float, predicted: float, source: str, **more: Any
) -> dict[str, Any]:
    return {
        "group": group,
        "what": what,
        "unit": unit,
        "published": published,
        "predicted": float(f"{predicted:.4g}"),
        "error": float(f"{predicted / published - 1:.3f}"),
        "source": source,
        "fitted": False,
        "why": "",
        **more,
    }


def zipf_trace(fact: dict[str, Any], exponent: float, seed: int = 0) -> Trace:
    """Tokens that draw experts by a Zipf law, a ranking of its own for each layer and request."""
    rng = np.random.default_rng(seed)
    num, k, tokens, requests = (fact[x] for x in ("experts", "top_k", "tokens", "requests"))
    layers = 4
    log_p = -exponent * np.log(np.arange(1, num + 1))
    ids = np.empty((tokens * requests, layers, k), np.int16)
    for r in range(requests):
        for layer in range(layers):
            order = rng.permutation(num)
            drawn = rng.gumbel(size=(tokens, num)) + log_p
            top = np.argpartition(-drawn, k, axis=1)[:, :k]
            ids[r * tokens : (r + 1) * tokens, layer] = order[top]
    return Trace(
        ids,
        np.repeat(np.arange(requests, dtype=np.int32), tokens),
        np.tile(np.arange(tokens, dtype=np.int32), requests),
        np.ones(tokens * requests, np.uint8),
        TraceMeta("zipf", num, k, tuple(range(layers))),
    )


def fitted_trace(fact: dict[str, Any]) -> tuple[Trace, float]:
    """The trace whose LRU hits at fitted_slots are the published ones, and its exponent."""
    target = fact["lru"][fact["slots"].index(fact["fitted_slots"])] / 100
    low, high = 0.0, 2.0
    for _ in range(9):
        middle = (low + high) / 2
        found = lru_hits(zipf_trace(fact, middle))[fact["fitted_slots"]]
        low, high = (middle, high) if found < target else (low, middle)
    return zipf_trace(fact, (low + high) / 2), (low + high) / 2


def lru_hits(trace: Trace, pinned_half: bool = False) -> np.ndarray:
    """[E + 1] share of accesses that LRU serves, empty at first, mean over layers; with the hottest
    half of the slots pinned, where asked for."""
    stream = decode_stream(index_requests(trace, "decode")[0], 1)
    num, settings = trace.num_experts, CacheSettings("lru", warm=False)
    share = np.zeros(num + 1)
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids)[:, layer].ravel()
        frequency = np.bincount(ids, minlength=num).astype(np.float64)
        table = np.tile(frequency, (trace.num_layers, 1))
        choices = layer_choices(trace, stream, layer, table)
        if not pinned_half:
            run = run_policy(choices, settings)
            share += run.hits() / run.events.num_accesses
            continue
        order = np.argsort(-frequency, kind="stable")
        total = run_policy(choices, settings).events.num_accesses
        for slots in range(0, num + 1, 31):
            run = run_policy(choices, settings, order[: slots // 2])
            missed = miss_table(run)[slots - slots // 2].sum()
            share[slots] += 1 - missed / total
    return share / trace.num_layers


def hits(facts: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for fact in facts["hits"]:
        at = fact["slots"].index(fact["fitted_slots"])
        trace, exponent = fitted_trace(fact)
        curve = lru_hits(trace)
        name = f"LRU, Zipf exponent {exponent:.2f}"
        for i, (slots, published) in enumerate(zip(fact["slots"], fact["lru"], strict=True)):
            what = f"{name}, {slots} of {fact['experts']} slots"
            out.append(
                row("hit rates", what, "%", published, 100 * curve[slots], fact["source"],
                    fitted=i == at)
            )  # fmt: skip
        if "pinned_half" in fact:
            half = lru_hits(trace, pinned_half=True)
            for slots, published in zip(fact["slots"][:-1], fact["pinned_half"], strict=False):
                near = slots - slots % 31
                found = half[near] + curve[slots] - curve[near]
                what = f"hottest half pinned, {slots} slots"
                out.append(
                    row(
                        "hit rates",
                        what,
                        "%",
                        published,
                        100 * found,
                        fact["source"],
                        why=fact["why"],
                    )
                )
        if "static_32" in fact:
            ids = np.asarray(trace.expert_ids)
            first, second = np.array_split(ids, 2)
            found = np.mean([covered(first[:, x], second[:, x], 512) for x in range(ids.shape[1])])
            what = "32 experts most frequent in one half, share of the other"
            out.append(
                row(
                    "hit rates",
                    what,
                    "%",
                    fact["static_32"],
                    100 * float(found),
                    fact["source"],
                    why=fact["why"],
                )
            )
    return out


def covered(first: np.ndarray, second: np.ndarray, num: int, top: int = 32) -> float:
    best = np.argsort(-np.bincount(first.ravel(), minlength=num), kind="stable")[:top]
    return float(np.isin(second, best).mean())


def limited_hits(
    ids: np.ndarray, slots: int, inserts: int, pinned: np.ndarray | None = None
) -> tuple[float, float]:
    """Share of accesses that an LRU cache of each layer serves, and experts brought in per layer
    and token.

    ids: [T, L, K]. A token brings in `inserts` of its misses at most, after all its experts were
    looked up. pinned: [L, n] experts that hold n of the slots for good.
    """
    served = brought = 0
    for layer in range(ids.shape[1]):
        fixed = set() if pinned is None else set(pinned[layer].tolist())
        held: OrderedDict[int, None] = OrderedDict()
        for chosen in ids[:, layer].tolist():
            own = [x for x in chosen if x not in fixed]
            missed = [x for x in own if x not in held]
            served += len(chosen) - len(missed)
            for x in set(own) - set(missed):
                held.move_to_end(x)
            for x in missed[:inserts]:
                if len(held) + len(fixed) >= slots:
                    held.popitem(last=False)
                held[x] = None
                brought += 1
    return served / ids.size, brought / (ids.shape[0] * ids.shape[1])


def pinning_in_traces(data: Path) -> str:
    """At how many of four sizes LRU beats half of the slots pinned, on each real trace: what one
    half of the requests choose most, held against the other half's first 6,000 tokens."""
    found = []
    for name in ("debian-moe", "deepseek-v2-lite", "gpt-oss-20b"):
        trace = load_token_trace(data / f"{name}.npz", "the report")
        ids, requests = np.asarray(trace.expert_ids), np.asarray(trace.request_ids)
        num, top_k = trace.num_experts, ids.shape[2]
        ids = ids[:, :: max(1, ids.shape[1] // 4)]
        fit = np.isin(requests, np.array_split(np.unique(requests), 2)[0])
        counts = [np.bincount(ids[fit, x].ravel(), minlength=num) for x in range(ids.shape[1])]
        hottest = np.argsort(-np.array(counts), axis=1, kind="stable")
        later, above = ids[~fit][:6000], 0
        for share in (0.18, 0.36, 0.54, 0.73):
            slots = int(num * share)
            lru, _ = limited_hits(later, slots, top_k)
            half, _ = limited_hits(later, slots, top_k, hottest[:, : slots // 2])
            above += lru > half
        found.append(f"{above} of 4 ({name})")
    return ", ".join(found)


def expert_cache(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Decoding with a GPU's cache of experts, the CPU computing what it lacks. What the host's
    memory reaches is set on the run without it; experts brought in are read from there too."""
    fact = facts["expert_cache"]
    routing = facts["hits"][fact["hits"]]
    trace, _ = fitted_trace(routing)
    hit, brought = limited_hits(np.asarray(trace.expert_ids), fact["slots"], fact["inserts"])
    gpu = gpu_rates(load_gpu(fact["gpu"]), False)
    size, away, near = fact["slot_bytes"], fact["cpu_layers"], fact["layers"] - fact["cpu_layers"]
    used = fact["top_k"] * size
    on_gpu = (fact["other_bytes"] + near * used) / gpu.read + fact["layers"] * gpu.layer_s
    on_gpu += near * NO_GRAPH_US * 1e-6 + away * CPU_CALL_US * 1e-6
    read = away * used / (1 / fact["uncached"] - on_gpu)
    cached = on_gpu + away * (used * (1 - hit) + brought * size) / read
    cached += away * used * hit / gpu.read
    what = f"{fact['cpu_layers']} layers' experts on the CPU"
    return [
        row("a cache of experts", f"{what}, their memory read at {read / 1e9:.1f} GB/s", "tokens/s",
            fact["uncached"], 1 / (on_gpu + away * used / read), fact["source"], fitted=True),
        row("a cache of experts",
            f"the same with {fact['slots']} slots per layer, {fact['inserts']} brought in per"
            f" token: {hit:.0%} hits", "tokens/s", fact["cached"], 1 / cached, fact["source"]),
    ]  # fmt: skip


def dynamic_curve(work: Workload) -> np.ndarray:
    """[E + 1] share of the second half of each held-out request's choices that the n experts have
    which its first half chose most, mean over layers: KTransformers' update after a prompt."""
    trace = work.trace
    ids, requests = np.asarray(trace.expert_ids), np.asarray(trace.request_ids)
    share, num = np.zeros(trace.num_experts + 1), trace.num_experts
    total = 0
    for request in np.unique(requests[work.held_out.token_idx]):
        first, second = np.array_split(ids[requests == request], 2)
        for layer in range(trace.num_layers):
            counts = np.bincount(first[:, layer].ravel(), minlength=num)
            later = np.bincount(second[:, layer].ravel(), minlength=num)
            order = np.argsort(-counts, kind="stable")
            share[1:] += np.cumsum(later[order])
            total += int(later.sum())
    return np.asarray(share / total)
