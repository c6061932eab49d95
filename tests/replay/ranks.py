"""Run by torchrun from test_ranks.py: layers on several ranks, every variant checked."""

from __future__ import annotations

import sys

import numpy as np

from moesim.replay.engine import Engine
from moesim.replay.numerics import check_layer
from moesim.replay.ops import Kernels
from moesim.replay.process import joined, run_rank
from moesim.replay.routing import assign_replicas, home_ranks, rank_work
from moesim.replay.shape import ExpertShape
from moesim.trace.format import load_token_trace


def body() -> int:
    trace = load_token_trace(sys.argv[1], "test")
    shape = ExpertShape("tiny", 64, 32, 8, 2, "fp32")
    placement = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, -1, 1, -1])
    count = 0
    with joined("cpu", 60.0) as ctx:
        placement = np.resize(placement, ctx.num_ranks * 4)
        placement = np.where(np.arange(len(placement)) < 12, placement, -1)
        engine = Engine(ctx, shape, 4, 64, Kernels(), num_sets=1)
        every_home = {
            "even": home_ranks(60, ctx.num_ranks),
            "one rank has none": np.arange(60) % (ctx.num_ranks - 1),
            "all on the last": np.full(60, ctx.num_ranks - 1),
        }
        for policy in ("split", "nearest", "hash"):
            for dedup in ("gpu", "none"):
                for where, home in every_home.items():
                    ids = np.asarray(trace.expert_ids[:60, 0])
                    if where == "all on the last":
                        ids = np.where(ids > 3, -1, ids)
                    gates = np.asarray(trace.gate_weights[:60, 0])
                    a = assign_replicas(ids, gates, placement, home, ctx.num_ranks, policy)
                    tables = engine.upload(rank_work(a, ctx.rank, dedup))
                    label = f"{policy}, {dedup}, {where}"
                    check_layer(engine, tables, a, ids, placement, dedup=dedup, label=label)
                    count += 1
        ctx.rank0_print(f"{count} variants on {ctx.num_ranks} ranks")
    return 0


if __name__ == "__main__":
    sys.exit(run_rank(body))
