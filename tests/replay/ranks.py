"""Several ranks over gloo, from one process that imports torch once and forks them.

`python ranks.py TRACE PLAN RAW MEASURED`, with nothing to import but what a container has: layers
in every variant, the synthetic layer of the calibration, a whole calibration written to RAW and a
whole validation of PLAN written to MEASURED. Prints one line when all is well.
"""

from __future__ import annotations

import os
import sys

import container
import numpy as np
import torch
import torch.distributed as dist

from moesim.replay import __main__, offload, validate
from moesim.replay.calibrate import CalibrateOptions, calibrate
from moesim.replay.calibrate_ffn import Company
from moesim.replay.engine import ReplayEngine
from moesim.replay.launch import free_port
from moesim.replay.numerics import check_layer
from moesim.replay.ops import Kernels
from moesim.replay.process import Context, joined, run_rank
from moesim.replay.routing import assign_replicas, home_ranks, rank_work
from moesim.replay.shape import ExpertShape
from moesim.trace.format import load_token_trace

CONTAINER_PART = (__main__, offload, validate)
NOT_NEEDED = {"moesim.cost", "moesim.sim"}
SHAPE = ExpertShape("tiny", 64, 32, 8, 2, "fp32")
NUM_RANKS = 4
NUM_TOKENS = 60


def variants(ctx: Context, trace_path: str) -> int:
    """Numerics and conservation for each policy, dedup and home distribution, idle ranks too."""
    trace = load_token_trace(trace_path, "test")
    placement = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, -1, 1, -1])
    count = 0
    engine = ReplayEngine(ctx, SHAPE, 3, 64, Kernels(), num_sets=1)
    every_home = {
        "even": home_ranks(NUM_TOKENS, ctx.num_ranks),
        "one rank has none": np.arange(NUM_TOKENS) % (ctx.num_ranks - 1),
        "all on the last": np.full(NUM_TOKENS, ctx.num_ranks - 1),
    }
    gates = np.asarray(trace.gate_weights[:NUM_TOKENS, 0])
    for policy in ("split", "nearest", "hash"):
        for dedup in ("gpu", "none"):
            for where, home in every_home.items():
                ids = np.asarray(trace.expert_ids[:NUM_TOKENS, 0])
                if where == "all on the last":
                    ids = np.where(ids > 3, -1, ids)
                a = assign_replicas(ids, gates, placement, home, ctx.num_ranks, policy)
                tables = engine.upload(rank_work(a, ctx.rank, dedup))
                label = f"{policy}, {dedup}, {where}"
                check_layer(engine, tables, a, ids, placement, dedup=dedup, label=label)
                count += 1
    return count


def company(ctx: Context) -> None:
    """Rows of ones, added up with weights one: each of the 70 expert rows of a rank comes home."""
    made = Company(ctx, SHAPE, 70, "embedding_bag")
    made.home.fill_(1.0)
    for buffer in (made.travelling, made.expanded, made.returned):
        buffer.fill_(float("nan"))
    out = made.around(lambda _: made.expanded.clone())(0).sum(dim=0)
    dist.all_reduce(out)
    if not torch.equal(out, torch.full_like(out, 70.0 * ctx.num_ranks)):
        raise RuntimeError(f"the synthetic layer lost or doubled rows: {out[:4].tolist()}")


def body() -> int:
    with joined("cpu", 60.0) as ctx:
        count = variants(ctx, sys.argv[1])
        company(ctx)
        options = CalibrateOptions(
            shapes=(SHAPE,), max_tokens_per_rank=64, max_bytes=1 << 16, budget_s=0.005
        )
        calibrate(ctx, options, sys.argv[3])
        replayed = validate.ValidateOptions(tokens_per_rank=(8,), num_batches=1, budget_s=0.01)
        validate.validate(ctx, [sys.argv[2]], sys.argv[1], SHAPE, replayed, sys.argv[4])
        ctx.rank0_print(f"{count} variants and a synthetic layer on {ctx.num_ranks} ranks")
    return 0


def main() -> int:
    heavy = sorted(NOT_NEEDED & set(sys.modules))
    if not {"pydantic", "yaml", "scipy", "typer"} <= container.ONLY.refused:
        print("the modules to refuse were not found", file=sys.stderr)
        return 1
    if heavy:
        print(f"{[m.__name__ for m in CONTAINER_PART]} imported {heavy}", file=sys.stderr)
        return 1
    os.environ.update(
        WORLD_SIZE=str(NUM_RANKS),
        LOCAL_WORLD_SIZE=str(NUM_RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    children = []
    for rank in range(NUM_RANKS):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(run_rank(body))
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main())
