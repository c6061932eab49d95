"""From a caching plan to the schedule that the replay follows.

Above the cache simulator, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moesim.caching.plan import CachePlan
from moesim.caching.planner import setup_of_plan
from moesim.caching.timeline import policy_state
from moesim.cost.calibration import Calibration
from moesim.errors import InputError, MismatchError
from moesim.replay.make_schedule import follow, lowest_first, token_events, token_stream
from moesim.replay.schedule import Schedule, StepCosts
from moesim.replay.shape import ExpertShape
from moesim.types import FloatArray


def plan_schedule(
    plan: CachePlan,
    experts: npt.NDArray[np.integer],
    layer_ids: tuple[int, ...],
    *,
    lookahead: int = 0,
    gates: npt.NDArray[np.floating] | None = None,
    starts: npt.NDArray[np.bool_] | None = None,
    frequency: FloatArray | None = None,
) -> Schedule:
    """The copies of `plan` for one token after another; experts [T, L, K], -1 where none.

    layer_ids: [L] absolute numbers of the layers of `experts`, some of the plan's. The plan's slots
    and pinned experts are kept, and its policy decides as in `moesim cache`. `lookahead` stands in
    for its prefetcher: a perfect one that many steps ahead, 0 for none. gates: [T, L, K] weights of
    the choices. starts: [T] first tokens of requests. frequency: [L of the plan, E] share of the
    tuning tokens that chose each expert, with which the caches start warm; without it they start
    with their lowest experts. Ignored: layers on the CPU, bits, NVMe.

    Raises MismatchError for layers or experts that are not the plan's, InputError for a static
    cache without `frequency`.
    """
    missing = sorted(set(layer_ids) - set(plan.layer_ids))
    if missing or experts.max(initial=0) >= plan.num_experts:
        what = f"layer {missing[0]}" if missing else f"{int(experts.max()) + 1} experts"
        raise MismatchError(
            f"the trace has {what}, the cache plan has not", "give the trace of the plan's model"
        )
    if plan.policy == "static" and frequency is None:
        raise InputError(
            "a static cache holds the experts that were most frequent, and these are not known",
            "give frequency, the share of the tuning tokens that chose each expert",
        )
    rows = [plan.layer_ids.index(layer) for layer in layer_ids]
    part = replace(
        plan,
        layer_ids=tuple(layer_ids),
        slots=tuple(plan.slots[i] for i in rows),
        pinned=tuple(plan.pinned[i] for i in rows),
        cpu_layers=(),
        bits=None,
        nvme=(),
    )
    shape = (len(rows), plan.num_experts)
    known = np.zeros(shape) if frequency is None else frequency[rows]
    setup = setup_of_plan(part, known)
    order = lowest_first(setup.slots, setup.pinned) if frequency is None else None
    rule, asked, state = policy_state(
        setup,
        token_events(experts, plan.num_experts, gates),
        token_stream(len(experts), starts),
        experts,
        order,
    )
    return follow(plan.policy, rule, asked, state, experts, part.pinned, lookahead)


def calibrated_costs(shape: ExpertShape, calibration: Calibration, schedule: Schedule) -> StepCosts:
    """What one GPU's calibration says of a schedule of one token per step.

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
