"""Rank by rank, one after the other: vLLM's expert kernels on what each rank would receive.

    python ranks.py FOLDER OUT.json [--turn FILE]

Every rank of every placement is a captured CUDA graph of `fused_experts` (Triton, bf16) over the
tokens that have a choice among the rank's slots, the other choices masked by the expert map, as
under expert parallelism. Rounds go through all of them in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

ROUNDS = 10
INNER = 4
"""Replays of a graph between two events."""


def graph_of(slots, group, rank, hidden, weights):
    """The captured graph of one rank, and how many tokens it receives."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w1, w2, num_slots = weights
    each = num_slots // group
    mine = (slots // each == rank).any(axis=1)
    ids = torch.from_numpy(slots[mine].astype(np.int32)).cuda()
    n = len(ids)
    if n == 0:
        return None, 0
    x = torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16)
    share = torch.full(ids.shape, 1.0 / ids.shape[1], device="cuda", dtype=torch.float32)
    where = torch.full((num_slots,), -1, dtype=torch.int32, device="cuda")
    where[rank * each : (rank + 1) * each] = torch.arange(each, dtype=torch.int32, device="cuda")

    def run():
        return fused_experts(
            x, w1[:each], w2[:each], share, ids, global_num_experts=num_slots, expert_map=where
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return (graph, kept, x, ids, share, where), n


def main() -> None:
    """All files MODEL.ranks.npz of the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--turn", type=Path)
    args = parser.parse_args()
    import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config

    while args.turn and not args.turn.exists():
        time.sleep(0.1)
    record = {}
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        for path in sorted(args.folder.glob("*.ranks.npz")):
            began = time.time()
            raw = np.load(path)
            hidden, width = (int(v) for v in raw["sizes"])
            names = [n for n in raw.files if n not in ("sizes", "plans", "slots")]
            rows = record.setdefault(path.name.removesuffix(".ranks.npz"), {})
            most = 40
            w1 = torch.randn(most, 2 * width, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
            w2 = torch.randn(most, hidden, width, device="cuda", dtype=torch.bfloat16) * 0.02
            blocks = sorted({tuple(n.split("_")[i] for i in (0, 1, 3)) for n in names})
            for group, phase, layer in blocks:
                graphs = []
                for name in names:
                    g, p, plan, at = name.split("_")
                    if (g, p, at) != (group, phase, layer):
                        continue
                    slots = raw[name]
                    num = int(raw["slots"][list(raw["plans"]).index(f"{group}/{plan}")])
                    for rank in range(int(group)):
                        made, n = graph_of(slots, int(group), rank, hidden, (w1, w2, num))
                        key = f"{group}/{phase}/{plan}/{layer}"
                        graphs.append((key, rank, made, n))
                times = {}
                for number in range(-1, ROUNDS):
                    marks = []
                    for key, rank, made, n in graphs:
                        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        if made is not None:
                            made[0].replay()
                            a.record()
                            for _ in range(INNER):
                                made[0].replay()
                            b.record()
                        marks.append((key, rank, made, n, a, b))
                    torch.cuda.synchronize()
                    for key, rank, made, n, a, b in marks:
                        if number >= 0:
                            us = a.elapsed_time(b) / INNER * 1e3 if made is not None else 0.0
                            spot = times.setdefault(key, {}).setdefault(rank, [n, []])
                            spot[1].append(round(us, 3))
                rows.update(times)
                del graphs
            print("DONE", path.name, round(time.time() - began, 1), "s", flush=True)
            args.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
