"""Traces, plans and model shapes for the validation on hardware, into one folder to carry there.

    python verification/hardware/prepare.py OUT_FOLDER [--data ../shared/data] [--gpus 2]
        [--redundant 8] [--model NAME]... [--no-plans]

The models that calibration measures by default, or those named. Where a real token-level trace of
the model exists it is used; otherwise the routing is drawn, and `about.json`, every trace's
`meta.source` and hence every result say so:

- deepseek-v2-lite, gpt-oss-20b: real traces of those models.
- olmoe-1b-7b: a real trace of another model of the same routing shape (64 experts, top-8).
- mixtral-8x7b: drawn token by token (Gumbel top-2) from the published expert popularity of
  Mixtral-8x7B by domain in layers 0, 7 and 15.
- qwen3-30b-a3b, deepseek-v3: drawn (Gumbel top-8) from the popularity by domain of two or four
  layers of the real 64-expert trace put side by side, since no trace with so many experts is at
  hand.

Plans are tuned on the tuning half of the requests; the replay draws from the held-out half.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.caching.plan import load_cache_plan
from moesim.cli.main import run
from moesim.errors import InfeasibleError
from moesim.placement import EMPTY, Placement, Plan, load_plan
from moesim.replay.cache_schedule import plan_schedule
from moesim.replay.calibrate import DEFAULT_SHAPES
from moesim.replay.cases import longest_first, pick_layers
from moesim.replay.shape import ExpertShape
from moesim.solvers.base import Problem, Traffic
from moesim.solvers.registry import find_solver
from moesim.trace.batches import (
    Phase,
    RequestIndex,
    draw_batches,
    index_requests,
    split_requests,
)
from moesim.trace.format import Trace, TraceMeta, load_token_trace, save_trace

NUM_TUNING_BATCHES = 48
TUNING_TOKENS = 2048
TILT = 0.6
DRAWN_TOKENS = 60_000
SHAPES = {s.name: s for s in (*DEFAULT_SHAPES, ExpertShape("deepseek-v3", 7168, 2048, 256, 8))}
OFFLOADED = "olmoe-1b-7b"
CACHE_GB = (4, 6, 8)
CACHE_TOKENS, CACHE_LAYERS = 96, 6
Array = npt.NDArray[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--redundant", type=int, help="slots a layer; default: 1/8 of the experts")
    parser.add_argument("--model", action="append", choices=sorted(SHAPES), help="repeat")
    parser.add_argument("--no-plans", action="store_true", help="traces, shapes and caches alone")
    arguments = parser.parse_args()
    about = {}
    for shape in [SHAPES[n] for n in arguments.model or [s.name for s in DEFAULT_SHAPES]]:
        folder = arguments.out / shape.name
        folder.mkdir(parents=True, exist_ok=True)
        trace, basis = make_trace(shape, arguments.data)
        if (trace.num_experts, trace.top_k) != (shape.num_experts, shape.top_k):
            raise SystemExit(f"{shape.name}: the trace has another routing shape")
        save_trace(trace, folder / "trace.npz")
        (folder / "shape.json").write_text(json.dumps(shape.to_json()))
        shares = {}
        (folder / "config.json").write_text(json.dumps(hf_config(trace, shape)))
        plans = {}
        if not arguments.no_plans:
            plans = make_plans(trace, shape, arguments.gpus, arguments.redundant, folder)
        for name, plan in plans.items():
            plan.save(folder / f"{name}.json")
            shares[name] = plan.evaluation["largest_gpu_share"]
        about[shape.name] = {"routing": basis, "plans": shares}
        if shape.name == OFFLOADED:
            about[shape.name]["caches"] = make_caches(trace, shape, folder / "cache")
        print(shape.name, basis, shares)
    (arguments.out / "about.json").write_text(json.dumps(about, indent=1))


def make_trace(shape: ExpertShape, data: Path) -> tuple[Trace, str]:
    """The trace to replay for a model, without arrays that nothing here needs, and its basis."""
    if shape.name in ("gpt-oss-20b", "deepseek-v2-lite"):
        trace = load_token_trace(data / f"{shape.name}.npz", "prepare")
        return trim(trace, trace.meta.source), "real trace of this model"
    real = load_token_trace(data / "debian-moe.npz", "prepare")
    if shape.name == "olmoe-1b-7b":
        basis = "real trace of another model with 64 experts, top-8"
        return trim(real, {"basis": basis}), basis
    if shape.name == "mixtral-8x7b":
        published = np.load(data / "published" / "mixtral_8x7b_domain_counts.npz")
        counts = published["expert_counts"].astype(np.float64)
        basis = "drawn from Mixtral-8x7B's published popularity by domain, layers 0, 7, 15"
        return draw_trace(real, shape, counts, (0, 7, 15), basis), basis
    counts = domain_counts(real)
    group = shape.num_experts // real.num_experts
    joined = np.concatenate([np.roll(counts, i, axis=1) for i in range(group)], axis=2)
    what = {2: "pairs", 4: "groups of four"}[group]
    basis = f"drawn from the popularity of {what} of layers of a real 64-expert trace"
    return draw_trace(real, shape, joined, real.meta.layer_ids, basis), basis


def make_caches(trace: Trace, shape: ExpertShape, folder: Path) -> dict[str, float]:
    """Cache plans at several HBM sizes and, as the replay takes them, the schedules of the longest
    requests' tokens, on demand and one layer ahead. Returns slots a layer of each plan."""
    folder.mkdir(exist_ok=True)
    picked = pick_layers(trace.num_layers, CACHE_LAYERS)
    experts = np.asarray(trace.expert_ids[longest_first(trace, CACHE_TOKENS)])[:, picked]
    layer_ids = tuple(trace.meta.layer_ids[i] for i in picked)
    slots = {}
    for size in CACHE_GB:
        path = folder / f"hbm{size}.json"
        command = ["cache", "--trace", str(folder.parent / "trace.npz"), "--hbm", str(size)]
        command += ["--model", str(folder.parent / "config.json"), "--gpu", "h200-sxm"]
        command += ["--policy", "lru", "--prefetch", "none", "--cpu", "off", "--out", str(path)]
        if run([*command, "--json"]) != 0:
            raise SystemExit(f"no cache plan of {size} GB")
        plan = load_cache_plan(path)
        slots[path.stem] = round(plan.num_slots / trace.num_layers, 2)
        for lookahead in (0, 1):
            schedule = plan_schedule(plan, experts, layer_ids, lookahead=lookahead)
            schedule.save(folder / f"{path.stem}-{lookahead}.npz")
    return slots


def hf_config(trace: Trace, shape: ExpertShape) -> dict[str, Any]:
    """A Hugging Face config with the trace's layers and the shape's experts."""
    return {
        "model_type": "olmoe",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.moe_intermediate_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": trace.num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "torch_dtype": "bfloat16",
    }


def trim(trace: Trace, source: dict[str, Any]) -> Trace:
    meta = TraceMeta(
        trace.meta.model, trace.num_experts, trace.top_k, trace.meta.layer_ids, source=source
    )
    return Trace(
        trace.expert_ids,
        trace.request_ids,
        trace.positions,
        trace.phases,
        meta,
        gate_weights=trace.gate_weights,
    )


def domain_counts(trace: Trace) -> Array:
    """[domains, L, E] how often each expert was chosen."""
    domains = np.asarray(trace.domain_ids)
    out = np.zeros((int(domains.max()) + 1, trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer]).astype(np.int64)
        np.add.at(out[:, layer], (domains[:, None].repeat(trace.top_k, 1), ids), 1)
    return out


def draw_trace(
    real: Trace, shape: ExpertShape, counts: Array, layer_ids: tuple[int, ...], basis: str
) -> Trace:
    """Requests, positions and domains of `real` (modulo the domains of `counts`), expert choices
    drawn without replacement in proportion to counts [domains, L, E]."""
    rng = np.random.default_rng(0)
    popularity = (counts + 1) / (counts + 1).sum(axis=2, keepdims=True)
    keep = np.sort(rng.choice(real.num_tokens, DRAWN_TOKENS, replace=False))
    domains = np.asarray(real.domain_ids)[keep] % len(counts)
    ids = np.zeros((len(keep), len(layer_ids), shape.top_k), np.uint8)
    for layer in range(len(layer_ids)):
        score = np.log(popularity[domains, layer]) + rng.gumbel(size=(len(keep), shape.num_experts))
        ids[:, layer] = np.argsort(-score, axis=1)[:, : shape.top_k]
    meta = TraceMeta(
        f"{shape.name} (drawn)", shape.num_experts, shape.top_k, layer_ids, source={"basis": basis}
    )
    requests, positions = np.asarray(real.request_ids)[keep], np.asarray(real.positions)[keep]
    return Trace(ids, requests, positions, np.asarray(real.phases)[keep], meta)


def time_table(folder: Path, num_gpus: int) -> npt.NDArray[np.int32]:
    """[L, E] what `moesim plan` makes of the folder's trace for least predicted time on H200s."""
    out = folder / "time.json"
    command = ["plan", "--trace", str(folder / "trace.npz"), "--model", str(folder / "config.json")]
    command += ["--gpus", str(num_gpus), "--cluster", "h200-sxm-ib", "--objective", "time"]
    command += ["--batch-tokens", str(TUNING_TOKENS * num_gpus), "--ignore-memory"]
    if run([*command, "--out", str(out), "--json"]) != 0:
        raise SystemExit("no plan for the least time")
    return load_plan(out).placement.physical_to_logical


def make_plans(
    trace: Trace, shape: ExpertShape, num_gpus: int, redundant: int | None, folder: Path
) -> dict[str, Plan]:
    """Plans by name: two that ignore load, five solved, three bad on purpose."""
    phase: Phase = "prefill" if (np.asarray(trace.phases) == 0).any() else "decode"
    tuning = split_requests(index_requests(trace, phase)[0])[0]
    plain = problem_of(trace, tuning, num_gpus, shape.num_experts, "balance")
    slots = shape.num_experts // 8 if redundant is None else redundant
    roomy, eplb = with_replicas(trace, tuning, num_gpus, shape.num_experts, slots)
    traffic = problem_of(trace, tuning, num_gpus, shape.num_experts, "traffic")
    load = plain.mean_load
    tables = {
        "linear": ("linear", solve("linear", plain)),
        "round_robin": ("round_robin", solve("round_robin", plain)),
        "eplb": ("eplb", solve("eplb", plain)),
        "eplb_redundant": ("eplb", eplb),
        "balanced": ("local_search", solve("local_search", plain)),
        "balanced_redundant": ("local_search", solve("local_search", roomy)),
        "traffic": ("local_search", solve("local_search", traffic)),
        "time": ("local_search", time_table(folder, num_gpus)),
        "bad_hot": ("hottest experts together", hot_first(load, num_gpus)),
        "bad_tilt": ("first GPU given 60% of the load", tilted(load, num_gpus)),
        "bad_crowded": ("hottest 5/8 of the experts on the first half", crowded(load, num_gpus)),
    }
    out = {}
    for name, (solver, table) in tables.items():
        placement = Placement(table, num_gpus, 1, shape.num_experts)
        share = gpu_shares(placement, load).max(axis=1).mean()
        out[name] = Plan(
            trace.meta.model,
            trace.meta.layer_ids,
            placement,
            solver=solver,
            evaluation={"largest_gpu_share": round(float(share), 4)},
        )
    return out


def problem_of(
    trace: Trace, tuning: RequestIndex, num_gpus: int, num_slots: int, objective: Any
) -> Problem:
    """Tuning batches of 2,048 tokens; links between every two GPUs, all alike."""
    batches = draw_batches(tuning, "prefill", TUNING_TOKENS, NUM_TUNING_BATCHES, 7)
    counts = np.zeros((len(batches), trace.num_layers, trace.num_experts), np.float32)
    for b in range(len(batches)):
        ids = np.asarray(trace.expert_ids[batches[b]]).astype(np.int64)
        for layer in range(trace.num_layers):
            chosen = ids[:, layer][ids[:, layer] >= 0]
            counts[b, layer] = np.bincount(chosen, minlength=trace.num_experts)
    traffic = None
    if objective != "balance":
        tokens = batches.token_idx
        lengths = np.diff(batches.indptr)
        within = np.arange(len(tokens)) - np.repeat(batches.indptr[:-1], lengths)
        pairs = [(s, d) for s in range(num_gpus) for d in range(num_gpus)]
        used = [s != d for s, d in pairs]
        traffic = Traffic(
            np.asarray(trace.expert_ids[tokens]),
            (within * num_gpus // np.repeat(lengths, lengths)).astype(np.int32),
            np.repeat(np.arange(len(batches)), lengths).astype(np.int32),
            np.concatenate(([0], np.cumsum(used))).astype(np.int64),
            np.arange(sum(used), dtype=np.int32),
            np.zeros(sum(used), np.int8),
            np.ones(sum(used)),
            np.tile(np.arange(TUNING_TOKENS * trace.top_k + 1.0), (2, 1, 1)),
            1,
        )
    capacity = np.full(num_gpus, -(-num_slots // num_gpus), np.int64)
    return Problem(counts, capacity, 1, objective, traffic=traffic, time_limit_s=60.0)


def with_replicas(
    trace: Trace, tuning: RequestIndex, num_gpus: int, num_experts: int, redundant: int
) -> tuple[Problem, npt.NDArray[np.int32]]:
    """A problem with redundant slots (fewer than asked for where EPLB would need more replicas of
    an expert than there are GPUs), and EPLB's table for it."""
    extra = max(1, redundant // num_gpus)
    while True:
        problem = problem_of(trace, tuning, num_gpus, num_experts + extra * num_gpus, "balance")
        try:
            return problem, solve("eplb", problem)
        except InfeasibleError:
            if extra == 1:
                raise
            extra //= 2


def solve(name: str, problem: Problem) -> npt.NDArray[np.int32]:
    return find_solver(name).solve(problem).placement.physical_to_logical


def hot_first(load: Array, num_gpus: int) -> npt.NDArray[np.int32]:
    """[L, E]: the most loaded experts on the first GPU, and so on."""
    return np.argsort(-load, axis=1, kind="stable").astype(np.int32)


def tilted(load: Array, num_gpus: int) -> npt.NDArray[np.int32]:
    """[L, E]: as `hot_first`, with experts exchanged until the first GPU has about 60%."""
    table = hot_first(load, num_gpus)
    size = table.shape[1] // num_gpus
    for layer, row in enumerate(table):
        for i in range(size):
            share = load[layer, row[:size]].sum() / load[layer].sum()
            if share <= max(TILT, 1.1 / num_gpus):
                break
            row[[i, -1 - i]] = row[[-1 - i, i]]
    return table


def crowded(load: Array, num_gpus: int) -> npt.NDArray[np.int32]:
    """[L, G * S]: the first half of the GPUs holds the hottest 5/8 of the experts, the others the
    rest and empty slots."""
    hot = hot_first(load, 1)
    layers, experts = hot.shape
    first = experts * 5 // 8
    half = num_gpus // 2
    size = -(-first // half)
    table = np.full((layers, num_gpus, size), EMPTY, np.int32)
    for i in range(experts):
        gpu = i % half if i < first else half + (i - first) % half
        slot = i // half if i < first else (i - first) // half
        table[:, gpu, slot] = hot[:, i]
    return table.reshape(layers, -1)


def gpu_shares(placement: Placement, load: Array) -> Array:
    """[L, G] share of the load on each GPU, replicas sharing equally."""
    table = placement.physical_to_logical
    safe = np.where(table >= 0, table, 0)
    each = np.take_along_axis(load / placement.replica_count, safe, axis=1) * (table >= 0)
    per_gpu = each.reshape(len(table), placement.num_gpus, -1).sum(axis=2)
    return per_gpu / per_gpu.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main()
