"""vLLM's expert kernels by local experts and load, weights out of the cache, on one GPU.

    python two_kernels.py FOLDER OUT.json MODEL ... [--turn FILE] [--budget SECONDS]

What a rank of an expert-parallel group of 1 to 16 does with a step's tokens: `fused_experts`
(Triton, bf16), choices of other ranks masked by the expert map, once over all tokens of the step
(all-gather, all-reduce) and once over those that it receives (all-to-all). A graph holds CALLS
calls, each with weights of its own, so that none finds its weights in the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

ROUNDS = 10
CALLS = 6
LEAST_BYTES = 400_000_000
GROUPS = (2, 4, 8, 16, 1)
TOKENS = (8, 32, 128, 512, 2048, 8192, 16384)
LOADS = ("linear", "spread", "uniform", "bad")


def table_of(load, content, layer, tokens, rng):
    """[tokens, K] experts of a step under a load."""
    experts, k = content.num_experts, content.top_k
    if load == "uniform":
        return np.argpartition(rng.random((tokens, experts)), k, axis=1)[:, :k]
    rows = rng.choice(content.decode.order, tokens, replace=True)
    ids = content.table[content.layer_of[layer]][rows].astype(int)
    if load == "linear":
        return ids
    count = np.bincount(content.table[content.layer_of[layer]].ravel(), minlength=experts)
    order = np.argsort(-count, kind="stable")
    slot = np.empty(experts, int)
    slot[order] = np.arange(experts)
    if load == "spread":
        slot[order] = np.argsort(np.arange(experts) % 16, kind="stable").argsort()
    return slot[ids]


def graph_of(ids, weights, rank, each, experts, received):
    """A graph of CALLS calls of one rank."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w1, w2 = weights
    mine = (ids // each == rank).any(axis=1)
    if received:
        ids = ids[mine]
    n = len(ids)
    if not n or not mine.any():
        return None
    picked = torch.from_numpy(ids.astype(np.int32)).cuda()
    x = torch.randn(n, w1.shape[-1], device="cuda", dtype=torch.bfloat16)
    share = torch.full(ids.shape, 1.0 / ids.shape[1], device="cuda", dtype=torch.float32)
    where = torch.full((experts,), -1, dtype=torch.int32, device="cuda")
    where[rank * each : (rank + 1) * each] = torch.arange(each, dtype=torch.int32, device="cuda")
    copies = len(w1) // each

    def run(i):
        at = i % copies * each
        return fused_experts(
            x,
            w1[at : at + each],
            w2[at : at + each],
            share,
            picked,
            global_num_experts=experts,
            expert_map=where if each < experts else None,
        )

    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(CALLS)]
    return graph, kept, x, share, picked, where, n


def main() -> None:
    """Every point: group, tokens, load, layer, rank, counts of its experts, microseconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--budget", type=float, default=1e9)
    args = parser.parse_args()
    import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config

    from moesim.engine.content import load_content

    while args.turn and not args.turn.exists():
        time.sleep(0.1)
    began, record = time.time(), {"gpu": torch.cuda.get_device_name(), "points": []}
    cases = [(n, g, load) for n in TOKENS for g in GROUPS for load in LOADS]
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        for key in args.models:
            content = load_content(args.folder / f"{key}.replay.npz")
            config = json.loads((args.folder / key / "config.json").read_text())
            hidden = config["hidden_size"]
            width = config.get("moe_intermediate_size") or config["intermediate_size"]
            bytes_each = 6 * hidden * width
            rng = np.random.default_rng(0)
            share = args.budget * (args.models.index(key) + 1) / len(args.models)
            full = content.num_experts
            most = max(full, full // 2 * -(-LEAST_BYTES // (full // 2 * bytes_each)))
            w1 = torch.randn(most, 2 * width, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
            w2 = torch.randn(most, hidden, width, device="cuda", dtype=torch.bfloat16) * 0.02
            for number in rng.permutation(len(cases)):
                tokens, group, load = cases[number]
                if time.time() - began > share:
                    break
                layer = int(rng.integers(len(content.moe_layer_ids)))
                ids = table_of(load, content, layer, tokens, rng)
                each = -(-full // group)
                for rank in sorted({0, group - 1}):
                    for received in (False, True) if group > 1 else (False,):
                        made = graph_of(ids, (w1, w2), rank, each, each * group, received)
                        if made is None:
                            continue
                        graph, n = made[0], made[-1]
                        times = []
                        for _ in range(ROUNDS + 1):
                            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                            a.record()
                            graph.replay()
                            b.record()
                            b.synchronize()
                            times.append(round(a.elapsed_time(b) / CALLS * 1e3, 3))
                        counts = np.bincount(ids.ravel(), minlength=each * group)
                        local = counts[rank * each : (rank + 1) * each]
                        head = [key, hidden, width, tokens, group, load, layer, rank]
                        copies = min(CALLS, most // each)
                        point = [*head, int(received), n, copies, local.tolist(), times[1:]]
                        record["points"].append(point)
                        del made, graph
            del w1, w2
            torch.cuda.empty_cache()
            args.out.write_text(json.dumps(record))
            print("DONE", key, len(record["points"]), round(time.time() - began, 1), flush=True)
    args.out.write_text(json.dumps(record))
    print("END kernels", round(time.time() - began, 1), flush=True)


if __name__ == "__main__":
    main()
