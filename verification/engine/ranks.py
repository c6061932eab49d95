"""Rank by rank, one after the other: vLLM's expert kernels on what each rank would receive.

    python ranks.py FOLDER OUT.json [--turn FILE] [--budget SECONDS] [--smoke]

Every rank of every placement is a captured CUDA graph of `fused_experts` (Triton, bf16) over the
tokens that have a choice among the rank's slots, the other choices masked by the expert map, as
under expert parallelism. A graph holds CALLS calls, each with weights of its own, and the next
graph has others, so that none finds its weights in the L2 cache. Rounds go through the ranks of all
placements in an order of their own, without a pause. All graphs are captured and timed PASSES
times: two captures of the same rank differ by what a comparison cannot tell.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from parts import Clock

ROUNDS = 10
PASSES = 2
CALLS = 6
POOL_BYTES = 16e9
CLOSE = 0.02
"""Relative error of bf16 against float32 that the check of a rank allows."""


class Weights:
    """Experts of one model on the GPU, handed out from the start again once all were."""

    def __init__(self, hidden: int, width: int, pool_bytes: float) -> None:
        self.number = int(pool_bytes // (6 * hidden * width))
        self.w1 = torch.empty(self.number, 2 * width, hidden, device="cuda", dtype=torch.bfloat16)
        self.w2 = torch.empty(self.number, hidden, width, device="cuda", dtype=torch.bfloat16)
        for tensor in (self.w1, self.w2):
            for part in tensor.split(16):
                part.normal_(0.0, 0.02)
        self.at = 0

    def take(self, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `experts` of them."""
        if self.at + experts > self.number:
            self.at = 0
        first, self.at = self.at, self.at + experts
        return self.w1[first : self.at], self.w2[first : self.at]


def received(slots: np.ndarray, each: int, rank: int) -> np.ndarray:
    """[n, K] slots of the tokens that have a choice on `rank`, which holds `each` slots."""
    return slots[(slots // each == rank).any(axis=1)]


def calls_of(ids: np.ndarray, each: int, rank: int, num_slots: int, rows, weights: Weights):
    """The calls of one rank, and what they read."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    picked = torch.from_numpy(ids.astype(np.int32)).cuda()
    share = torch.full(ids.shape, 1.0 / ids.shape[1], device="cuda", dtype=torch.float32)
    where = torch.full((num_slots,), -1, dtype=torch.int32, device="cuda")
    where[rank * each : (rank + 1) * each] = torch.arange(each, dtype=torch.int32, device="cuda")
    x = rows[: len(ids)]

    def run(w1, w2):
        return fused_experts(
            x, w1, w2, share, picked, global_num_experts=num_slots, expert_map=where
        )

    pairs = [weights.take(each) for _ in range(CALLS)]
    return [lambda a=a, b=b: run(a, b) for a, b in pairs], pairs, (picked, share, where)


def check(ids: np.ndarray, each: int, rank: int, num_slots: int, rows, weights: Weights) -> float:
    """Relative error of one call against float32 arithmetic on this rank's choices."""
    calls, pairs, (picked, share, _) = calls_of(ids, each, rank, num_slots, rows, weights)
    got = calls[0]().float()
    x, want = rows[: len(ids)].float(), torch.zeros_like(got)
    for local in range(each):
        token, k = torch.where(picked == rank * each + local)
        gate, up = (x[token] @ pairs[0][0][local].float().T).chunk(2, dim=1)
        out = (torch.nn.functional.silu(gate) * up) @ pairs[0][1][local].float().T
        want.index_add_(0, token, out * share[token, k][:, None])
    return float((got - want).norm() / want.norm())


def captured(calls, pool):
    """The graph of `calls`, its memory shared with the others."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph


def block_of(name: str) -> tuple[str, str, str]:
    """(group, phase, layer): what is compared across placements."""
    group, phase, _, layer = name.split("_")
    return group, phase, layer


def block(raw, names: list[str], rows, weights: Weights, rounds: int, rng) -> dict[str, dict]:
    """{name: {rank: [tokens, microseconds by round]}} of all placements of one block."""
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for name in names:
        group, _, plan, _ = name.split("_")
        num_slots = int(raw["slots"][list(raw["plans"]).index(f"{group}/{plan}")])
        each = num_slots // int(group)
        for rank in range(int(group)):
            ids = received(raw[name], each, rank)
            if len(ids):
                calls, *kept = calls_of(ids, each, rank, num_slots, rows, weights)
                graphs.append((name, rank, len(ids), captured(calls, pool), kept))
    found: dict[str, dict] = {name.replace("_", "/"): {} for name in names}
    for number in range(-1, rounds):
        order = rng.permutation(len(graphs))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
        marks[0].record()
        for at, mark in zip(order, marks[1:], strict=True):
            graphs[at][3].replay()
            mark.record()
        torch.cuda.synchronize()
        for at, (a, b) in zip(order, pairwise(marks), strict=True):
            name, rank, n = graphs[at][:3]
            spot = found[name.replace("_", "/")].setdefault(str(rank), [n, []])
            if number >= 0:
                spot[1].append(round(a.elapsed_time(b) / CALLS * 1e3, 3))
    return found


def model(path: Path, smoke: bool, until: float, clock: Clock) -> dict:
    """All blocks of one model, PASSES times: {"passes": [...], "check": error, "clock": rows}."""
    raw = np.load(path)
    hidden, width = (int(v) for v in raw["sizes"])
    names = [n for n in raw.files if n not in ("sizes", "plans", "slots")]
    weights = Weights(hidden, width, 3e9 if smoke else POOL_BYTES)
    most = max(len(raw[n]) for n in names)
    rows = torch.randn(most, hidden, device="cuda", dtype=torch.bfloat16)
    blocks = sorted({block_of(n) for n in names})
    if smoke:
        blocks = [b for b in blocks if b[2] == blocks[0][2]]
    slots = raw[names[-1]]
    num_slots = int(raw["slots"][-1])
    each = num_slots // int(names[-1].split("_")[0])
    error = check(received(slots, each, 1), each, 1, num_slots, rows, weights)
    print("CHECK", path.name, f"{error:.4f}", flush=True)
    if not error < CLOSE:
        raise SystemExit("ERROR the kernel does not compute this rank's experts")
    record: dict = {"check": error, "passes": [], "clock": []}
    for number in range(PASSES):
        rng, times = np.random.default_rng(number), {}
        for group, phase, layer in blocks:
            if time.time() > until:
                print("ERROR no time left", path.name, number, group, phase, layer, flush=True)
                break
            own = [n for n in names if block_of(n) == (group, phase, layer)]
            began = time.time()
            times |= block(raw, own, rows, weights, 2 if smoke else ROUNDS, rng)
            record["clock"].append([number, group, phase, layer, *clock.since(began)])
        record["passes"].append(times)
    return record


def main() -> None:
    """All files MODEL.ranks.npz of the folder; written after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--budget", type=float, default=1e9)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config

    while args.turn and not args.turn.exists():
        time.sleep(0.1)
    gc.freeze()  # every capture collects garbage
    clock = Clock()
    clock.start()
    began, record = time.time(), {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    paths = sorted(args.folder.glob("*.ranks.npz"))
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        for number, path in enumerate(paths):
            key = path.name.removesuffix(".ranks.npz")
            until = began + args.budget * (number + 1) / len(paths)
            record[key] = model(path, args.smoke, until, clock)
            args.out.write_text(json.dumps(record))
            torch.cuda.empty_cache()
            print("DONE", key, round(time.time() - began, 1), "s", flush=True)
    print("END ranks", flush=True)


if __name__ == "__main__":
    main()
