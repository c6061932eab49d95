"""Speed of the simulator: analytic replay, event steps by size, events beside bare SimPy.

1. Analytic replay of 10^6 tokens x 58 layers x top-8 on 32 GPUs, two threads (token draws from a
   random trace of 8,192 tokens of DeepSeek-V3's shape).
2. Event fidelity of one DeepSeek-V3 decode step of 4,096 tokens, from 8 to 256 GPUs: preparing
   (routing and costs) and running, median of several steps after one that compiles.
3. SimPy events per second of that run beside a bare SimPy loop over as many timeouts.

Usage: python benchmarks/simulate_speed.py [--json FILE] [--plot FILE] [--tokens 1000000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from moesim.cluster import load_cluster
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec
from moesim.placement import Placement
from moesim.sim.analytic import run_analytic
from moesim.sim.collectives.registry import build_exchange
from moesim.sim.engine import Engine
from moesim.sim.event import run_step
from moesim.sim.home import HomeModel
from moesim.sim.prepare import Models, one_batch
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.steps import step_work
from moesim.trace.batches import RequestIndex, draw_batches, index_requests
from moesim.trace.format import Trace, TraceMeta

SIZES = (8, 16, 32, 64, 128, 256)
STEP_TOKENS = 4096
TRACE_TOKENS = 8192
REPEATS = 3


def random_trace(model: ModelSpec) -> Trace:
    """Distinct random experts for every token and layer, with a skewed popularity."""
    rng = np.random.default_rng(0)
    layers, experts, top_k = model.num_moe_layers, model.num_experts, model.top_k
    ids = np.empty((TRACE_TOKENS, layers, top_k), np.uint8)
    weight = (np.arange(experts) + 1.0) ** -0.5
    for layer in range(layers):
        score = np.log(rng.permutation(weight)) + rng.gumbel(size=(TRACE_TOKENS, experts))
        ids[:, layer] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    order = np.arange(TRACE_TOKENS)
    return Trace(
        ids,
        (order // 16).astype(np.int32),
        (order % 16).astype(np.int32),
        np.ones(TRACE_TOKENS, np.uint8),
        TraceMeta(model.name, experts, top_k, model.moe_layer_ids),
    )


def setting(model: ModelSpec, trace: Trace, gpus: int) -> tuple[Models, Placement]:
    cluster = load_cluster("h100-sxm-ib", gpus)
    step, links, exchange = build_exchange("deepep_ll", cluster, model, phase="decode")
    home = HomeModel(cluster, model, trace.meta.layer_ids)
    row = np.arange(model.num_experts, dtype=np.int32)
    table = np.tile(row, (trace.num_layers, 1))
    placement = Placement(table, gpus, cluster.num_nodes, model.num_experts)
    return Models(cluster, step, links, exchange, home, context_tokens=2000), placement


def event_step(model: ModelSpec, trace: Trace, index: RequestIndex, gpus: int) -> dict[str, Any]:
    """Seconds of one step, and the events it took."""
    models, placement = setting(model, trace, gpus)
    batches = draw_batches(index, "decode", STEP_TOKENS, REPEATS + 1, 1)
    prepare, running, events = [], [], 0
    for b in range(len(batches)):
        clock = time.perf_counter()
        step = step_work(models, trace, one_batch(batches, b), placement, Sequential())
        ready = time.perf_counter()
        engine = Engine(models.links.num_links)
        run_step(engine, Sequential(), step.work)
        done = time.perf_counter()
        events = next(engine.env._eid)
        if b:
            prepare.append(ready - clock)
            running.append(done - ready)
    return {
        "gpus": gpus,
        "prepare_s": statistics.median(prepare),
        "run_s": statistics.median(running),
        "events": events,
        "events_per_s": events / statistics.median(running),
    }


def bare_simpy(events: int) -> float:
    """Events per second of SimPy alone: one process that waits, over and over."""

    def wait(env: simpy.Environment) -> Any:
        for _ in range(events):
            yield env.timeout(1)

    rates = []
    for _ in range(REPEATS):
        env = simpy.Environment()
        env.process(wait(env))
        clock = time.perf_counter()
        env.run()
        rates.append(events / (time.perf_counter() - clock))
    return statistics.median(rates)


def analytic(model: ModelSpec, trace: Trace, index: RequestIndex, tokens: int) -> dict[str, Any]:
    """Seconds to cost `tokens` tokens on 32 GPUs."""
    models, placement = setting(model, trace, 32)
    count = max(1, round(tokens / STEP_TOKENS))
    run_analytic(models, trace, draw_batches(index, "decode", STEP_TOKENS, 2, 1), placement)
    batches = draw_batches(index, "decode", STEP_TOKENS, count, 1)
    clock = time.perf_counter()
    run_analytic(models, trace, batches, placement)
    seconds = time.perf_counter() - clock
    choices = int(batches.indptr[-1]) * trace.num_layers * trace.top_k
    return {
        "tokens": int(batches.indptr[-1]),
        "seconds": seconds,
        "million_choices_per_s": choices / seconds / 1e6,
    }


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["steps"]
    gpus = [r["gpus"] for r in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    total = [r["prepare_s"] + r["run_s"] for r in rows]
    axes.plot(gpus, total, "o-", color="#1f4e79", label="whole step")
    axes.plot(gpus, [r["run_s"] for r in rows], "s--", color="#c55a11", label="event simulation")
    axes.plot(gpus, [r["prepare_s"] for r in rows], "^:", color="#7f7f7f", label="routing, costs")
    slope = [total[0] * g / gpus[0] for g in gpus]
    axes.plot(gpus, slope, color="#d9d9d9", zorder=0, label="proportional to GPUs")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(g) for g in gpus])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds of computing a step")
    axes.set_title("One DeepSeek-V3 decode step, 58 MoE layers, 4,096 tokens", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    args = parser.parse_args()
    model = load_model("deepseek-v3")
    trace = random_trace(model)
    index, _ = index_requests(trace, "decode")
    steps = []
    for gpus in args.sizes:
        row = event_step(model, trace, index, gpus)
        steps.append(row)
        print(
            f"{gpus:4d} GPUs: prepare {row['prepare_s']:.3f} s, run {row['run_s']:.3f} s,"
            f" {row['events']:,} events, {row['events_per_s']:,.0f}/s"
        )
    bare = bare_simpy(max(r["events"] for r in steps))
    print(f"bare SimPy: {bare:,.0f} events/s")
    replay = analytic(model, trace, index, args.tokens)
    print(
        f"analytic, 32 GPUs: {replay['tokens']:,} tokens in {replay['seconds']:.1f} s,"
        f" {replay['million_choices_per_s']:.0f} million choices a second"
    )
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "steps": steps,
        "bare_simpy_events_per_s": bare,
        "analytic": replay,
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
