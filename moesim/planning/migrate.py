"""From a placement in use to a better one, with as few experts moved as the gain is worth.

What a new placement saves in every step is set against what it takes to move the weights, spread
over the steps until the next move. Three things keep moves few: GPUs (and nodes) of the new
placement are renamed so that each keeps as much as possible of what it holds, which costs nothing
(INV-5 of the design); experts that stay on a GPU stay in their slot; and for every layer the search
starts both from the new placement and from the one in use, every moved expert having a price, so
that moves which gain less than they cost are not made or taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import MismatchError
from moesim.placement import EMPTY, Placement
from moesim.solvers.base import Problem, pack_table
from moesim.solvers.objective import PlacementCost
from moesim.types import Array, Progress

Table = npt.NDArray[np.int64]
MovingTime = Callable[[Placement], float]
"""Microseconds that it takes to get from the placement in use to another one."""


@dataclass(frozen=True, slots=True, eq=False)
class Migration:
    """A placement to move to, and what was weighed.

    step_us, stay_us: microseconds of a step, all layers, on tuning data after and without the move;
    move_us: of moving the weights. moved_experts: weights of one expert of one layer that a GPU
    fetches. changed_layers: of `num_layers`. steps: between two moves. unsearched: layers for which
    there was no time to look for cheaper moves than all or none.
    """

    placement: Placement
    step_us: float
    stay_us: float
    move_us: float
    moved_experts: int
    changed_layers: int
    steps: float
    unsearched: int = 0

    @property
    def saved_us(self) -> float:
        """Saved in `steps` steps, less the move; never negative."""
        return (self.stay_us - self.step_us) * self.steps - self.move_us


def check_same_shape(old: Placement, problem: Problem) -> None:
    """Raise MismatchError unless `old` places the problem's layers, experts and slots."""
    sizes = {
        "MoE layers": (old.num_layers, problem.num_layers),
        "experts": (old.num_experts, problem.num_experts),
        "GPUs": (old.num_gpus, problem.num_gpus),
        "nodes": (old.num_nodes, problem.num_nodes),
    }
    for name, (have, want) in sizes.items():
        if have != want:
            raise MismatchError(
                f"the plan in use has {have} {name}, the new one is to have {want}",
                "give the plan that runs on these GPUs with this model, or leave out `old_plan`",
            )
    have_slots, want_slots = slots_in_use(old), problem.capacity
    if old.slots_per_gpu != int(want_slots.max()) or (have_slots > want_slots).any():
        raise MismatchError(
            f"the plan in use has {old.slots_per_gpu} slots per GPU, the new one"
            f" {int(want_slots.max())}, or their GPUs differ",
            "leave out `slots` and `redundant_experts` to keep the slots that there are",
        )


def slots_in_use(placement: Placement) -> npt.NDArray[np.int64]:
    """[G] slots of each GPU up to the last that holds an expert in some layer."""
    filled = (placement.physical_to_logical != EMPTY).reshape(
        placement.num_layers, placement.num_gpus, -1
    )
    last = np.arange(1, filled.shape[2] + 1) * filled
    return last.max(axis=(0, 2)).astype(np.int64)


def migrate(
    problem: Problem,
    old: Placement,
    new: Placement,
    *,
    moving_us: MovingTime,
    price_us: float,
    steps: float,
    progress: Progress | None = None,
) -> Migration:
    """The placement with the least step time plus moving time over `steps` steps that is found.

    problem: of objective time, so that both are microseconds. price_us: moving time of one expert
    where many move, used while searching. The final choice takes layers in order of gain a moved
    expert for as long as `moving_us`, the time on the links, is worth it; none is a choice, so the
    result is never predicted to be worse than staying. Layers that the time limit leaves out move
    wholly or not at all; compiling the search, with the first layer, does not count against it.
    Raises MismatchError where shapes differ.
    """
    check_same_shape(old, problem)
    cost = PlacementCost(problem)
    before = _table(problem, old)
    target = relabel(_table(problem, new), before, problem)
    price = price_us / steps
    old_us = cost.layer_values(old)
    best_us, best_moves = old_us.copy(), np.zeros(problem.num_layers, np.int64)
    best = before.copy()
    ends, unsearched = np.inf, 0
    for layer in range(problem.num_layers):
        candidates = [target[layer]]
        if problem.stop() or time.monotonic() > ends:
            unsearched += 1
        else:
            candidates += _searched(problem, cost, layer, before[layer], target[layer], price)
            if layer == 0:
                ends = time.monotonic() + problem.time_limit_s
        for slots in candidates:
            value = cost.layer_value(slots, layer)
            moves = num_moved(slots, before[layer], problem.num_experts)
            if value + price * moves < best_us[layer] + price * best_moves[layer]:
                best_us[layer], best_moves[layer] = value, moves
                best[layer] = seat(slots, before[layer], problem.num_experts)
        if progress is not None:
            progress(layer + 1, problem.num_layers)
    gain = old_us - best_us
    order = np.argsort(-gain / np.maximum(best_moves, 1), kind="stable")
    chosen = before.copy()
    placement, total_us, move_us, taken = old, float(old_us.sum()), 0.0, 0
    best_total = total_us
    step_us = total_us
    for rank, layer in enumerate(order[gain[order] > 0], start=1):
        chosen[layer] = best[layer]
        total_us -= float(gain[layer])
        trial = _placement(problem, chosen)
        took = moving_us(trial)
        if total_us + took / steps < best_total:
            best_total, placement, step_us, move_us, taken = (
                total_us + took / steps,
                trial,
                total_us,
                took,
                rank,
            )
    return Migration(
        placement,
        step_us,
        float(old_us.sum()),
        move_us,
        int(best_moves[order[:taken]].sum()),
        taken,
        steps,
        unsearched,
    )


def _searched(
    problem: Problem, cost: PlacementCost, layer: int, before: Table, target: Table, price: float
) -> list[Table]:
    """[G, S] tables of one layer found by making, or taking back, moves by their price."""
    from moesim.solvers.kernels.moves import Move, search_moves

    held = np.zeros((problem.num_gpus, problem.num_experts + 1), bool)
    held[np.arange(problem.num_gpus)[:, None], before] = True
    held[:, -1] = True
    counts = cost.layer_counts(layer)
    move = Move(held, price * cost.grains(counts))
    out = []
    for start in (before, target):
        slots = start.copy()
        search_moves(cost.placed(counts, slots), cost.costs(counts), move)
        out.append(slots)
    return out


def num_moved(slots: Table, before: Table, num_experts: int) -> int:
    """Experts in `slots` [G, S] that their GPU did not hold in `before`; num_experts is empty."""
    return sum(
        len(set(now.tolist()) - set(then.tolist()) - {num_experts})
        for now, then in zip(slots, before, strict=True)
    )


def seat(slots: Table, before: Table, num_experts: int) -> Table:
    """`slots` [G, S] with every expert that stays on its GPU in its old slot. Empty slots that were
    at the end of a GPU with fewer slots stay there."""
    out = before.copy()
    for gpu, (now, then) in enumerate(zip(slots, before, strict=True)):
        coming = sorted(set(now.tolist()) - set(then.tolist()) - {num_experts})
        wanted = set(now.tolist())
        free = [s for s, expert in enumerate(then.tolist()) if expert not in wanted]
        free += [s for s, expert in enumerate(then.tolist()) if expert == num_experts]
        out[gpu, free] = num_experts
        for s, expert in zip(sorted(set(free)), coming, strict=False):
            out[gpu, s] = expert
    return out


def relabel(new: Array, old: Array, problem: Problem) -> Table:
    """`new` [L, G, S] with its GPUs renamed, in every layer, so that most experts stay.

    Nodes are renamed as wholes and GPUs within their node, only among GPUs of equal slots, speed
    and type: assignment problems (H. W. Kuhn, The Hungarian Method, 1955), on the experts that
    two GPUs share.
    """
    from scipy.optimize import linear_sum_assignment

    layers, gpus, _ = new.shape
    nodes, per_node = problem.num_nodes, gpus // problem.num_nodes
    kind = np.stack([problem.capacity, problem.speed, problem.gpu_type], axis=1)
    unlike = (kind[:, None] != kind[None]).any(axis=2)
    out = np.empty_like(new)
    for layer in range(layers):
        has = np.zeros((2, gpus, problem.num_experts + 1))
        for i, table in enumerate((new[layer], old[layer])):
            has[i, np.arange(gpus)[:, None], table] = 1
        shared = has[0, :, :-1] @ has[1, :, :-1].T
        shared[unlike] = -1e6
        blocks = shared.reshape(nodes, per_node, nodes, per_node).transpose(0, 2, 1, 3)
        inside = [
            [linear_sum_assignment(-blocks[a, b]) for b in range(nodes)] for a in range(nodes)
        ]
        worth = np.array(
            [[blocks[a, b][inside[a][b]].sum() for b in range(nodes)] for a in range(nodes)]
        )
        for a, b in zip(*linear_sum_assignment(-worth), strict=True):
            source, target = inside[a][b]
            out[layer, b * per_node + target] = new[layer, a * per_node + source]
    return out


def _table(problem: Problem, placement: Placement) -> Table:
    """[L, G, S] with the number of experts for empty slots."""
    table = placement.physical_to_logical.reshape(problem.num_layers, problem.num_gpus, -1)
    return np.where(table == EMPTY, problem.num_experts, table).astype(np.int64)


def _placement(problem: Problem, table: Table) -> Placement:
    return pack_table(problem, np.where(table == problem.num_experts, EMPTY, table))
