"""When attention and experts apart pay: `python verification/serving/apart.py` prints the tables of
reports/experts-apart/README.md.

Decoding alone, as every source measures it: the most rows in flight that keep a time per output
token, per GPU. Together is the better of plain steps and two-batch overlap, apart the best split of
an engine's GPUs in eighths, each with the best of its exchanges and sizes of engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import MoesimError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import require_fit
from moesim.serving.static import LoadTest, run_load_test
from moesim.serving.step_cost import EngineStepCost

MOST_ROWS = 2048


class Case(NamedTuple):
    """A model on a cluster, in engines of these sizes, with `context` cached tokens a sequence."""

    model: str
    cluster: str
    sizes: tuple[int, ...]
    context: int
    exchanges: tuple[str, ...]
    options: dict[str, Any]


class Best(NamedTuple):
    """Output tokens/s per GPU of a deployment, its rows per attention rank and time of a step."""

    tokens_per_s: float
    rows: int
    step_ms: float
    name: str
    exchange: str


def most(deployment: Deployment, context: int, limit_ms: float) -> Best | None:
    """The most rows of a rank whose step keeps the limit and whose cache fits; None where none."""
    try:
        room = require_fit(deployment).kv_token_capacity // context
    except MoesimError:
        return None
    cost = EngineStepCost(deployment)
    rows = np.arange(1, min(room, MOST_ROWS) + 1, dtype=np.float64)
    if not len(rows):
        return None
    wide = np.repeat(rows[:, None], deployment.dp, axis=1)
    step = cost.step_us(BatchShape.of(wide, wide * context)) / 1e3
    kept = np.flatnonzero(step <= limit_ms)
    if not len(kept):
        return None
    at = kept[-1]
    rate = rows[at] * deployment.dp / step[at] * 1e3 / deployment.num_gpus
    name = deployment.parallelism
    return Best(float(rate), int(rows[at]), float(step[at]), name, deployment.moe_comm)


def together(case: Case) -> Iterator[Deployment]:
    for gpus, exchange, overlap in product(case.sizes, case.exchanges, ("off", "decode")):
        yield deploy(
            case.model,
            case.cluster,
            dp=gpus,
            moe_comm=exchange,  # type: ignore[arg-type]
            two_batch_overlap=overlap,  # type: ignore[arg-type]
            **case.options,
        )


def apart(case: Case) -> Iterator[Deployment]:
    for gpus, exchange, eighths, parts in product(
        case.sizes, case.exchanges, range(1, 8), (2, 3, 4)
    ):
        experts = gpus * eighths // 8
        yield deploy(
            case.model,
            case.cluster,
            dp=gpus - experts,
            expert_gpus=experts,
            micro_batches=parts,
            moe_comm=exchange,  # type: ignore[arg-type]
            **case.options,
        )


def best(found: Iterator[Deployment], context: int, limit_ms: float) -> Best | None:
    made = [b for d in found if (b := most(d, context, limit_ms)) is not None]
    return max(made, default=None)


IB, LARGE = ("deepep", "deepep_ll"), ("nvlink", "nvlink_one_sided")
FP4 = {"expert_dtype": "nvfp4"}
CASES = (
    Case("DeepSeek-V3", "h200-sxm-ib", (16, 32, 64), 4096, IB, {}),
    Case("DeepSeek-V3", "h200-sxm-ib", (64,), 4096, IB, {}),
    Case("DeepSeek-V3", "h200-sxm-ib", (16, 32, 64), 16384, IB, {}),
    Case("Qwen3-235B-A22B", "h200-sxm-ib", (8, 16, 32), 4096, IB, {}),
    Case("DeepSeek-V3", "gb200-nvl72", (8, 16, 32), 4096, LARGE, {}),
    Case("DeepSeek-V3", "gb200-nvl72", (8, 16, 32), 4096, LARGE, FP4),
    Case("DeepSeek-V3", "gb200-nvl72", (8, 16, 32), 16384, LARGE, FP4),
)
LIMITS_MS = (50.0, 100.0)


def published() -> None:
    """The deployments of MegaScale-Infer and of the plug-in of vLLM, as far as they are known."""
    mixtral: tuple[dict[str, Any], ...] = (
        {"tp": 8},
        *({"dp": 8, "expert_gpus": 8, "micro_batches": m} for m in (2, 3, 4)),
    )
    for options in mixtral:
        made = deploy("Mixtral-8x22B", "a100-sxm-ib", max_sequences=4096, **options)
        print(made.name, most(made, 650, 150.0))
    qwen: tuple[dict[str, Any], ...] = (
        {"dp": 8},
        {"dp": 4, "expert_gpus": 4, "micro_batches": 2},
    )
    for options in qwen:
        made = deploy("Qwen3.5-122B-A10B", "h200-sxm-ib", **options)
        test = run_load_test(EngineStepCost(made), LoadTest(1024, 128, 32))
        rate = test.output_tokens_per_s
        print(f"{made.name}: TPOT {test.mean_tpot_ms:.1f} ms, {rate:,.0f} output tokens/s")


def main() -> None:
    names = ("model", "cluster", "engines of", "context", "limit", "together")
    print("|", " | ".join([*names, "tokens/s per GPU", "apart", "", "gain"]), "|")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for limit in LIMITS_MS:
            one = best(together(case), case.context, limit)
            two = best(apart(case), case.context, limit)
            row = [case.model + (" nvfp4" if case.options else ""), case.cluster]
            row += [", ".join(map(str, case.sizes)), f"{case.context:,}", f"{limit:.0f} ms"]
            row += (
                [f"{one.name} {one.exchange}", f"{one.tokens_per_s:,.0f}"] if one else ["none", ""]
            )
            row += (
                [f"{two.name} {two.exchange}", f"{two.tokens_per_s:,.0f}"] if two else ["none", ""]
            )
            gain = two.tokens_per_s / one.tokens_per_s - 1 if one and two else float("nan")
            print("| " + " | ".join([*row, f"{gain:+.0%}"]) + " |", flush=True)
    published()


if __name__ == "__main__":
    main()
