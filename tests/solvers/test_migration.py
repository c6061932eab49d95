"""Moving to a better placement: renaming, seats, prices, and never worse than staying."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import MismatchError
from moesim.placement import Placement
from moesim.planning.migrate import (
    Migration,
    check_same_shape,
    migrate,
    num_moved,
    relabel,
    seat,
    slots_in_use,
)
from moesim.planning.tuning import batch_counts
from moesim.solvers.base import Problem, Traffic
from moesim.solvers.objective import PlacementCost
from moesim.trace.batches import Batches


def quiet_traffic(tokens: int, layers: int, gpus: int) -> Traffic:
    """Tokens that choose nothing: messages cost nothing, so that load alone decides."""
    return Traffic(
        expert_ids=np.full((tokens, layers, 1), -1, np.int16),
        home=np.zeros(tokens, np.int32),
        batch_idx=np.zeros(tokens, np.int32),
        indptr=np.zeros(gpus * gpus + 1, np.int64),
        link_idx=np.zeros(0, np.int32),
        link_group=np.zeros(1, np.int8),
        link_scale=np.ones(1),
        time_us=np.zeros((2, 3, 4)),
        dedup=1,
    )


def problem_of(counts: np.ndarray, gpus: int, per_gpu: int, nodes: int = 1) -> Problem:
    """An expert of n tokens takes n microseconds."""
    table = np.arange(int(counts.max()) + 2, dtype=np.float64)[None]
    return Problem(
        counts=counts.astype(np.float32),
        capacity=np.full(gpus, per_gpu),
        num_nodes=nodes,
        objective="time",
        expert_us=table,
        traffic=quiet_traffic(4, counts.shape[1], gpus),
    )


def place(rows: list[list[int]], gpus: int, nodes: int, experts: int) -> Placement:
    return Placement(np.array(rows, np.int32), gpus, nodes, experts)


def moved(old: Placement, new: Placement) -> int:
    """Experts that a GPU of `new` holds and did not hold in `old`."""
    shape = (old.num_layers, old.num_gpus, -1)
    a, b = (p.physical_to_logical.reshape(shape) for p in (old, new))
    return sum(
        len(set(b[layer, g].tolist()) - set(a[layer, g].tolist()))
        for layer in range(shape[0])
        for g in range(shape[1])
    )


def run(
    problem: Problem, old: Placement, new: Placement, expert_us: float, steps: float
) -> Migration:
    return migrate(
        problem,
        old,
        new,
        moving_us=lambda p: expert_us * moved(old, p),
        price_us=expert_us,
        steps=steps,
    )


def test_a_swap_is_made_when_it_pays_by_hand() -> None:
    """One layer, loads 5 5 1 1 on two GPUs. In use: {0, 1} and {2, 3}, 10 us per step. One swap
    gives 6 us: 2 experts move. At 30 us each they take 60, and 4 us are saved per step: worth it
    in 20 steps (80), not in 10 (40)."""
    counts = np.array([[[5, 5, 1, 1]]])
    problem = problem_of(counts, 2, 2)
    old, new = place([[0, 1, 2, 3]], 2, 1, 4), place([[2, 0, 3, 1]], 2, 1, 4)
    stays = run(problem, old, new, 30.0, 10)
    assert stays.moved_experts == 0
    assert np.array_equal(stays.placement.physical_to_logical, old.physical_to_logical)
    goes = run(problem, old, new, 30.0, 20)
    assert (goes.stay_us, goes.step_us, goes.move_us) == (10.0, 6.0, 60.0)
    assert goes.moved_experts == 2
    assert goes.saved_us == pytest.approx(4 * 20 - 60)
    assert goes.changed_layers == 1


def test_only_layers_that_pay_move() -> None:
    """Layer 0 as above; layer 1 is even already, though the new placement differs there."""
    counts = np.array([[[5, 5, 1, 1], [3, 3, 3, 3]]])
    old = place([[0, 1, 2, 3], [0, 1, 2, 3]], 2, 1, 4)
    new = place([[0, 2, 1, 3], [0, 2, 1, 3]], 2, 1, 4)
    found = run(problem_of(counts, 2, 2), old, new, 1.0, 100)
    assert found.changed_layers == 1
    assert found.placement.physical_to_logical[1].tolist() == [0, 1, 2, 3]


def test_without_time_a_layer_moves_wholly_or_not_at_all() -> None:
    """Both layers gain 4 us by a move of two experts; the search itself has no time."""
    counts = np.array([[[5, 5, 1, 1], [5, 5, 1, 1]]])
    old = place([[0, 1, 2, 3], [0, 1, 2, 3]], 2, 1, 4)
    new = place([[0, 2, 1, 3], [0, 2, 1, 3]], 2, 1, 4)
    problem = replace(problem_of(counts, 2, 2), stop=lambda: True)
    found = run(problem, old, new, 1.0, 100)
    assert found.unsearched == found.changed_layers == 2
    assert (found.stay_us, found.step_us) == (20.0, 12.0)
    assert run(problem, old, new, 1000.0, 100).moved_experts == 0


def test_renaming_gpus_and_nodes_saves_moves() -> None:
    """The new placement is the old one with nodes exchanged and GPUs within them: nothing moves."""
    old = place([[0, 1, 2, 3, 4, 5, 6, 7]], 4, 2, 8)
    new = place([[6, 7, 4, 5, 3, 2, 0, 1]], 4, 2, 8)
    problem = problem_of(np.ones((1, 1, 8)), 4, 2, nodes=2)
    tables = [p.physical_to_logical.reshape(1, 4, 2).astype(np.int64) for p in (new, old)]
    named = relabel(tables[0], tables[1], problem)
    assert num_moved(named[0], tables[1][0], 8) == 0
    assert np.array_equal(seat(named[0], tables[1][0], 8), tables[1][0])


def test_renaming_keeps_unlike_gpus_apart() -> None:
    """GPU 1 is slow: its few experts may not be taken for GPU 0's."""
    counts = np.ones((1, 1, 4))
    problem = Problem(
        counts=counts.astype(np.float32),
        capacity=np.array([2, 2]),
        num_nodes=1,
        speed=np.array([1.0, 0.5]),
    )
    old, new = np.array([[[0, 1], [2, 3]]]), np.array([[[2, 3], [0, 1]]])
    assert np.array_equal(relabel(new, old, problem), new)


def test_seats_by_hand() -> None:
    """Expert 2 stays in its slot though the search moved it; 7 takes the free one; 9 is empty."""
    before = np.array([[1, 2, 9], [3, 4, 5]])
    slots = np.array([[2, 7, 9], [5, 4, 3]])
    assert seat(slots, before, 9).tolist() == [[7, 2, 9], [3, 4, 5]]
    assert num_moved(slots, before, 9) == 1


def test_a_replica_moves_to_where_load_has_gone() -> None:
    """Expert 0 had two replicas; now expert 3 is the hot one. Giving it 0's second slot takes one
    move. Loads 2 2 2 12: in use GPU 1 has 3 and half of 0, 13; after, 0 and 1 on GPU 0 with half
    of 3 are 10, GPU 1 has 2 and half of 3, 8."""
    counts = np.array([[[2, 2, 2, 12]]])
    old = place([[0, 1, 2, 0, 3, -1]], 2, 1, 4)
    problem = problem_of(counts, 2, 3)
    found = run(problem, old, old, 1.0, 1000)
    assert found.step_us < found.stay_us
    assert found.placement.replica_count[0, 3] == 2
    assert found.moved_experts <= 2


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(2, 1), (4, 1), (4, 2)]),
    spare=st.integers(0, 2),
    price=st.sampled_from([0.0, 0.5, 5.0, 500.0]),
    steps=st.sampled_from([1.0, 10.0, 1000.0]),
)
@settings(max_examples=40, deadline=None)
def test_never_worse_than_staying(
    build: ModuleType, seed: int, shape: tuple[int, int], spare: int, price: float, steps: float
) -> None:
    """Predicted cost and move together are never above the cost of staying; what is said of the
    placement is true of it."""
    rng = np.random.default_rng(seed)
    gpus, nodes = shape
    experts = 2 * gpus
    counts = rng.integers(0, 20, (5, 3, experts))
    problem = problem_of(counts, gpus, 2 + spare, nodes)
    old, new = (build.random_placement(rng, 3, experts, gpus, nodes, 2 + spare) for _ in "ab")
    found = run(problem, old, new, price, steps)
    assert found.saved_us >= -1e-6 * found.stay_us * steps
    cost = PlacementCost(problem)
    assert found.step_us == pytest.approx(cost.layer_values(found.placement).sum(), rel=1e-5)
    assert found.stay_us == pytest.approx(cost.layer_values(old).sum(), rel=1e-5)
    assert found.moved_experts == moved(old, found.placement)
    assert found.move_us == pytest.approx(price * found.moved_experts)


def test_nothing_moves_from_the_best(build: ModuleType) -> None:
    """Even load: any other placement gains nothing, so nothing moves even where moving is free."""
    old = place([[0, 1, 2, 3]], 2, 1, 4)
    new = place([[0, 2, 1, 3]], 2, 1, 4)
    found = run(problem_of(np.ones((2, 1, 4)), 2, 2), old, new, 0.0, 1e9)
    assert found.moved_experts == 0
    assert found.placement is old


@pytest.mark.parametrize(
    ("rows", "gpus", "nodes", "experts", "what"),
    [
        ([[0, 1, 2, 3]] * 2, 2, 1, 4, "2 MoE layers, the new one is to have 1"),
        ([[0, 1, 2, 0]], 2, 1, 3, "3 experts, the new one is to have 4"),
        ([[0, 1, 2, 3]], 4, 1, 4, "4 GPUs, the new one is to have 2"),
        ([[0, 1, 2, 3]], 2, 2, 4, "2 nodes, the new one is to have 1"),
        ([[0, 1, 2, 3, 0, 1]], 2, 1, 4, "3 slots per GPU, the new one 2"),
    ],
)
def test_other_shapes_are_refused(
    rows: list[list[int]], gpus: int, nodes: int, experts: int, what: str
) -> None:
    problem = problem_of(np.ones((1, 1, 4)), 2, 2)
    with pytest.raises(MismatchError, match=what):
        check_same_shape(place(rows, gpus, nodes, experts), problem)


def test_slots_in_use() -> None:
    """GPU 0 uses its last slot in one layer, GPU 1 never does."""
    placement = place([[0, -1, 1, 2, 3, -1], [0, 1, -1, 2, 3, -1]], 2, 1, 4)
    assert slots_in_use(placement).tolist() == [3, 2]


def test_counts_helper_matches(build: ModuleType) -> None:
    """The problem's counts are those of the trace's batches (INV-1)."""
    trace = build.random_trace(np.random.default_rng(0), 30, 2, 6, 2)
    counts = batch_counts(trace, Batches(np.arange(30), np.array([0, 10, 30]), "prefill", 20))
    assert counts.sum(axis=2).tolist() == [[20.0, 20.0], [40.0, 40.0]]
