"""From a caching plan to the schedule that the replay follows.

Above the cache simulator, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.caching.plan import CachePlan
from moesim.cost.calibration import Calibration
from moesim.errors import MismatchError, UnknownNameError
from moesim.replay.schedule import Schedule, StepCosts, lru_schedule
from moesim.replay.shape import ExpertShape

REPLAYED_POLICIES = ("lru",)


def plan_schedule(
    plan: CachePlan,
    experts: npt.NDArray[np.integer],
    layer_ids: tuple[int, ...],
    *,
    lookahead: int = 0,
) -> Schedule:
    """The copies of `plan` for one token after another; experts [T, L, K], -1 where none.

    layer_ids: [L] absolute numbers of the layers of `experts`, some of the plan's. The plan's slots
    and pinned experts are kept. `lookahead` stands in for its prefetcher: a perfect one that many
    steps ahead, 0 for none. Ignored: layers on the CPU, bits, NVMe, the warm start.
    Raises UnknownNameError for a policy other than LRU, MismatchError for layers or experts that
    are not the plan's, InputError where a token's experts do not fit.
    """
    if plan.policy not in REPLAYED_POLICIES:
        raise UnknownNameError(
            "replayed cache policy",
            plan.policy,
            REPLAYED_POLICIES,
            "make the plan with --policy lru to replay it",
        )
    missing = sorted(set(layer_ids) - set(plan.layer_ids))
    if missing or experts.max(initial=0) >= plan.num_experts:
        what = f"layer {missing[0]}" if missing else f"{int(experts.max()) + 1} experts"
        raise MismatchError(
            f"the trace has {what}, the cache plan not", "give the trace of the plan's model"
        )
    rows = [plan.layer_ids.index(layer) for layer in layer_ids]
    return lru_schedule(
        experts,
        plan.num_experts,
        [plan.slots[i] for i in rows],
        lookahead=lookahead,
        pinned=[plan.pinned[i] for i in rows],
    )


def calibrated_costs(shape: ExpertShape, calibration: Calibration, schedule: Schedule) -> StepCosts:
    """What one GPU's calibration says of a schedule of one token a step.

    A copy is gate and up, then down, as the replay sends them, by the copy measured for one GPU
    where there is one. A step gathers the token's row for each expert and runs the experts, all
    launched call by call.
    """
    link = calibration.host_copy("h2d", 1)
    copy = link.time_us(shape.expert_bytes * 2 / 3) + link.time_us(shape.expert_bytes / 3)
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    model = calibration.expert_ffn(shape.dtype, shape=sizes)
    tokens = np.zeros(schedule.slots_per_layer or schedule.num_slots)
    tokens[: shape.top_k] = 1
    step = float(model.layer_time_us(tokens, *sizes))
    if "permute" in calibration.copies:
        gather = calibration.copy("permute")
        step += float(gather.rows_us(shape.top_k, 1, shape.row_bytes))
    issue = calibration.issue_us
    return StepCosts(
        copy_us=float(copy),
        step_us=step,
        issue_us=issue.get("permute", 0.0) + issue.get("ffn", 0.0),
        fetch_issue_us=issue.get("fetch", 0.0),
        hand_over_us=calibration.hand_over_us,
    )
