"""When attention and experts apart pay: `python verification/serving/apart.py` prints the tables of
reports/experts-apart/README.md.

Decoding alone, as every source measures it: the most rows in flight that keep a time per output
token, found by bisection, at equal numbers of GPUs. Together is the better of plain steps and
two-batch overlap, each with the better of its exchanges; apart is the best split of the GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import MoesimError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import require_fit
from moesim.serving.step_cost import EngineStepCost

MOST_ROWS = 1024


class Case(NamedTuple):
    """A model on GPUs of a cluster, with `context` cached tokens per sequence."""

    model: str
    cluster: str
    gpus: int
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
    for exchange in case.exchanges:
        for overlap in ("off", "decode"):
            yield deploy(
                case.model,
                case.cluster,
                dp=case.gpus,
                moe_comm=exchange,  # type: ignore[arg-type]
                two_batch_overlap=overlap,  # type: ignore[arg-type]
                **case.options,
            )


def apart(case: Case, splits: Sequence[int], parts: Sequence[int]) -> Iterator[Deployment]:
    for exchange in case.exchanges:
        for experts in splits:
            for micro_batches in parts:
                yield deploy(
                    case.model,
                    case.cluster,
                    dp=case.gpus - experts,
                    expert_gpus=experts,
                    micro_batches=micro_batches,
                    moe_comm=exchange,  # type: ignore[arg-type]
                    **case.options,
                )


def best(found: Iterator[Deployment], context: int, limit_ms: float) -> Best | None:
    made = [b for d in found if (b := most(d, context, limit_ms)) is not None]
    return max(made, default=None)


IB, LARGE = ("deepep", "deepep_ll"), ("nvlink", "nvlink_one_sided")
FP4 = {"expert_dtype": "nvfp4"}
CASES = (
    Case("DeepSeek-V3", "h200-sxm-ib", 32, 4096, IB, {}),
    Case("DeepSeek-V3", "h200-sxm-ib", 64, 4096, IB, {}),
    Case("DeepSeek-V3", "h200-sxm-ib", 32, 16384, IB, {}),
    Case("Qwen3-235B-A22B", "h200-sxm-ib", 32, 4096, IB, {}),
    Case("DeepSeek-V3", "gb200-nvl72", 32, 4096, LARGE, {}),
    Case("DeepSeek-V3", "gb200-nvl72", 32, 4096, LARGE, FP4),
    Case("DeepSeek-V3", "gb200-nvl72", 32, 16384, LARGE, FP4),
)
LIMITS_MS = (50.0, 100.0)


def main() -> None:
    print("| model | GPUs | context | limit | together | tokens/s per GPU | apart | | gain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        splits = range(case.gpus // 8, case.gpus, case.gpus // 8)
        for limit in LIMITS_MS:
            one = best(together(case), case.context, limit)
            two = best(apart(case, splits, (2, 3, 4)), case.context, limit)
            row = [case.model + (" nvfp4" if case.options else ""), f"{case.gpus} {case.cluster}"]
            row += [f"{case.context:,}", f"{limit:.0f} ms"]
            row += (
                [f"{one.name} {one.exchange}", f"{one.tokens_per_s:,.0f}"] if one else ["none", ""]
            )
            row += (
                [f"{two.name} {two.exchange}", f"{two.tokens_per_s:,.0f}"] if two else ["none", ""]
            )
            gain = two.tokens_per_s / one.tokens_per_s - 1 if one and two else float("nan")
            print("| " + " | ".join([*row, f"{gain:+.0%}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
