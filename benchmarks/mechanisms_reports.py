"""Rows of `benchmarks/mechanisms.py` out of other committed reports, and those that cannot be."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import moesim
from benchmarks.mechanisms_row import Row
from moesim.routing.api import reroute

if TYPE_CHECKING:
    from benchmarks.mechanisms import Traces

SCORED = "sample:debian-olmoe-scores"
REPORTS = Path(__file__).parents[1] / "reports"
NOT_JUDGED = (
    (
        "Tutel, whole layer",
        "arXiv:2206.03382, abstract",
        "4.96x and 5.75x of a MoE layer on 16 and 2,048 A100s",
        "its factor is mostly of faster kernels for encoding and decoding than those of its"
        " baseline; our tables hold the kernels of today. Its two-level exchange and its pipelining"
        " have rows of their own",
    ),
    (
        "PCCL",
        "arXiv:2504.18658, abstract",
        "up to 168x (reduce-scatter), 33x (all-gather) over RCCL on 2,048 GCDs",
        "a library on another vendor's machines; nothing of it was measured on ours, and a"
        " collective's time here is a table of measurements, not an algorithm",
    ),
    (
        "Kernels within a GPU (MegaBlocks and others)",
        "arXiv:2211.15841, abstract",
        "MegaBlocks: training up to 40% faster than with Tutel, up to 2.4x as fast as dense models"
        " by Megatron-LM",
        "grouped-GEMM time is a measured table: a faster kernel is another table"
        " (`moesim calibrate`)",
    ),
    (
        "UNCURL, MC-SMoE and Task-MoE: accuracy after pruning or merging",
        "arXiv:2409.01483, 2310.01334 and 2110.03742, abstracts",
        "accuracy nearly kept (UNCURL: up to a pruning factor that depends on the number of experts"
        " in pretraining)",
        "no trace says what a model answers with other experts: gate mass kept is what we print",
    ),
    (
        "Training: FlexMoE, SmartMoE, FasterMoE, expert dropout and others",
        "FasterMoE's and SmartMoE's project pages; FlexMoE, arXiv:2304.03946, abstract in part; the"
        " others' claims were not read",
        "FasterMoE 17.87x over ZeRO's data parallelism on 64 GPUs; SmartMoE up to 1.88x over"
        " FasterMoE; FlexMoE: none in what was readable",
        "gradients and optimiser states are no part of a deployment; placement and replication of"
        " theirs are what `plan` and `balance` do for inference",
    ),
)


def offloading(traces: Traces) -> Iterator[Row]:
    found = json.loads((REPORTS / "offloading" / "batching.json").read_text(encoding="utf-8"))
    for system, order, source, claim in (
        (
            "Read-ME, expert-aware batching",
            "pre-gated",
            "arXiv:2410.19123, abstract",
            "mean end-to-end latency up to 6.1% lower",
        ),
        (
            "ExpertFlow, batches by predicted experts",
            "predicted",
            "arXiv:2410.17954, abstract of version 2",
            "GPU memory up to 93.72% lower, throughput up to 10x of strong offloading baselines",
        ),
    ):
        gains = []
        for trace in found.values():
            by = {
                (row["batch"], row["order"]): row["tokens_per_s"]
                for row in trace["rows"]
                if row["patience"] == 16
            }
            gains += [by[b, order] / by[b, "fifo"] - 1 for b, o in by if o == "fifo"]
        yield Row(
            system,
            source,
            claim,
            f"tokens come {min(gains):.0%} to {max(gains):.0%} faster in batches of 4 and 8",
            "four traces, one H100 with half of the experts, reports/offloading",
            "the batches alone: caching and prefetching have tables of their own there; its model"
            " was made for it"
            if order == "pre-gated"
            else "its baseline fetches all experts of a layer, ours those that miss",
        )


def memory(traces: Traces) -> Iterator[Row]:
    found = json.loads((REPORTS / "offloading" / "results.json").read_text(encoding="utf-8"))
    cells, gains = [], []
    for name, trace in found.items():
        plan = trace["plans"]["0.25"]["tokens_per_s"]
        lru = plan["LRU, equal slots, misses fetched"]
        cells.append(f"{name} {plan['this plan'] / lru:.2f}x")
        best = max(v[0] for k, v in trace["predictors"]["1"].items())
        gains.append(f"{name} {best:.0%}")
    yield Row(
        "ExpertFlow and Pre-gated MoE: prefetching",
        "arXiv:2410.17954, abstract of version 2; 2308.12066, abstract (no factor in it) and its"
        " summary at sciencestack.ai",
        "ExpertFlow up to 10x; Pre-gated about 4.2x less memory than all on the GPU, at nearly its"
        " throughput, latency up to 1.9x lower than offloading",
        f"a quarter of the experts in memory, plan with prefetching against LRU alone:"
        f" {', '.join(cells)}",
        "one H100, one request at a time, reports/offloading",
        "predictors name the next layer's experts with a recall of "
        + ", ".join(gains)
        + "; Pre-gated's router is trained to know them",
    )


def consistency(traces: Traces) -> Iterator[Row]:
    found = json.loads((REPORTS / "offloading" / "results.json").read_text(encoding="utf-8"))
    for name, trace in found.items():
        published = trace.get("published")
        if not published:
            continue
        for what in ("srp", "sch"):
            cells = [
                f"{m}: {trace[what][m][0]:.3f} ({published[what][m][0]:.3f})"
                for m in published[what]
                if m in trace[what]
            ]
            yield Row(
                f"Local routing consistency, {what.upper()}",
                "arXiv:2505.16056 and its repository's tables",
                "segment routing best performance, and best hit rate of a segment's cache",
                f"by segment length, ours (theirs): {', '.join(cells)}",
                f"{name}, reports/offloading",
                "other texts; both fall with the segment as theirs do",
            )


def home_ranks(traces: Traces) -> Iterator[Row]:
    with (REPORTS / "home-ranks" / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [float(r["change"]) for r in rows if r["homes"] in ("tokens", "prefix", "domain")]
    oracle = [float(r["change"]) for r in rows if r["homes"] == "oracle"]
    yield Row(
        "Speculative MoE",
        "arXiv:2503.04398, abstract; factors from notes on its version 5 at papernotes.org",
        "less all-to-all by placing tokens and experts together, ahead of time: throughput up to"
        " 2.78x with attention DP, latency up to 24.9% lower with attention TP",
        f"bytes between nodes {min(found):+.1f}% to {max(found):+.1f}% by predicted home ranks,"
        f" {min(oracle):+.1f}% to {max(oracle):+.1f}% with the routing known",
        "three traces, 16 H100s, reports/home-ranks",
        "a token's experts are on both nodes nearly always (1.7 to 2.0 of 2), so that little can be"
        " saved, and a home is a request's, not a token's",
    )


def pruning(traces: Traces) -> Iterator[Row]:
    for keep in (48, 32, 16):
        c = reroute(traces.deepseek, f"prune:keep={keep}").changes
        yield Row(
            "UNCURL, experts cut by frequency",
            "arXiv:2409.01483, abstract",
            "experts reduced for a task offline; above a pruning factor that depends on the experts"
            " in pretraining, performance degrades",
            f"{1 - keep / 64:.0%} of experts gone, {c.gate_mass_kept:.1%} of gate mass kept",
            f"deepseek-v2-lite, `prune:keep={keep}`",
            "for all text at once, not a task; how its own method reduces experts is not in the"
            " abstract",
        )


def scored(traces: Traces) -> Iterator[Row]:
    """Rules that choose anew from candidates, on the sample that has them."""
    plan = moesim.plan(SCORED, gpus=8, solver="greedy")
    asked = (
        (
            "LocMoE, locality",
            "arXiv:2401.13920, abstract",
            "training time per epoch 12.68% to 22.24% lower than with hash and switch routers",
            "local:weight=0.1",
            "its experts are also chosen in training; here a token's GPU is its request's number in"
            " turn, and holds 8 of 64 experts",
        ),
        (
            "SMILE, bi-level choice",
            "arXiv:2212.05191, abstract",
            "2.5x pretraining throughput",
            "group-limit:groups=8,keep=2",
            "the router was not trained for groups; what is dropped has no candidate there, 16 of"
            " 64 being listed",
        ),
        (
            "BASE layers",
            "arXiv:2103.16716, abstract",
            "equal numbers of tokens by a linear assignment, no auxiliary loss",
            "base",
            "even in groups of 256 tokens, by giving up scores; batches that are served differ",
        ),
        (
            "Expert choice",
            "arXiv:2202.09368, abstract",
            "training converges more than 2x faster than Switch's top-1 and GShard's top-2",
            "expert-choice",
            "even by construction; some tokens get no expert",
        ),
        (
            "Auxiliary-loss-free balancing",
            "arXiv:2408.15664, abstract",
            "better balance and lower loss than with an auxiliary loss",
            "bias:rate=0.001,passes=4",
            "the bias is learned on a router that was balanced by a loss already",
        ),
        (
            "Rectify-Router",
            "arXiv:2402.12399, abstract",
            "+4.7% accuracy over top-1 by rectifying drops and padding",
            "fill-in:factor=1",
            "what drops cost an answer no trace says; here they stay on the own GPU",
        ),
        (
            "Capacity-aware inference, expanded drop",
            "arXiv:2503.05066, abstract and project page",
            "1.85x, +0.2% performance on average (Mixtral; 1.94x in version 1)",
            "expanded-drop:factor=1",
            "balance is by GPU here, by expert there",
        ),
        (
            "Multilingual routing, steering",
            "arXiv:2510.04694, abstract",
            "+1% to 2% on tasks in other languages",
            "steer:toward=help,layers=2-5",
            "what it is worth no trace says; so much moves",
        ),
    )
    for system, source, claim, rule, why in asked:
        done = moesim.reroute(SCORED, rule, plan=plan.plan)
        c, before, after = done.changes, done.before, done.after
        yield Row(
            system,
            source,
            claim,
            f"{c.moved / c.choices:.1%} of choices moved, {c.dropped / c.choices:.1%} dropped;"
            f" gate mass kept {c.gate_mass_kept:.1%}; imbalance {before['imbalance'].value:.3f} to"
            f" {after['imbalance'].value:.3f}, GPUs per token {before['fan_out'].value:.2f} to"
            f" {after['fan_out'].value:.2f}, MoE time"
            f" {after['step_us'].value / before['step_us'].value - 1:+.1%}",
            f"debian-olmoe-scores, `{rule}`, greedy plan for 8 H100s, prefill",
            why,
        )


def not_judged(traces: Traces) -> Iterator[Row]:
    for system, source, claim, why in NOT_JUDGED:
        yield Row(system, source, claim, "not judged", "-", why)


SECTIONS = (scored, offloading, memory, consistency, home_ranks, pruning, not_judged)
