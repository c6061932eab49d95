"""Adjacent layers that share experts (ReXMoE): placed once, refused where that is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moesim
from moesim.cluster import load_cluster
from moesim.errors import FormatError, InfeasibleError, InputError, MismatchError
from moesim.model.names import load_model
from moesim.planning import baselines
from moesim.planning.pools import folded, unfolded
from moesim.solvers.base import Problem, Solution, among_holders, run_solver
from moesim.solvers.objective import PlacementCost
from moesim.solvers.registry import find_solver
from moesim.trace.format import Trace, TraceMeta, load_token_trace, load_trace, save_trace
from moesim.trace.ops import SliceSpec, slice_trace

SMALL = {"batch_tokens": 256, "phase": "decode"}


@pytest.fixture(scope="module")
def pooled() -> Trace:
    """The bundled sample as if each two of its 8 layers shared their experts."""
    trace = load_token_trace("sample:debian-olmoe", "a test")
    return replace(trace, meta=replace(trace.meta, layers_per_pool=2))


def test_a_pool_is_as_many_batches_of_one_layer() -> None:
    """Two layers, one batch: the pool has two batches, the layers' loads in turn. Experts 0 and 1
    have 4 and 0 tokens in layer 0, 0 and 2 in layer 1."""
    counts = np.array([[[4, 0], [0, 2]]], np.float32)
    problem = folded(Problem(counts, np.array([1, 1]), 1), 2)
    assert problem.counts.tolist() == [[[4, 0]], [[0, 2]]]


@pytest.mark.parametrize("name", ["linear", "greedy", "eplb"])
def test_the_pools_cost_is_the_layers_mean(name: str) -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 50, (5, 6, 8)).astype(np.float32)
    problem = Problem(counts, np.full(4, 3), 1)
    pools = folded(problem, 3)
    placement = run_solver(find_solver(name), pools).placement
    layers = unfolded(placement, 3)
    table = layers.physical_to_logical.reshape(2, 3, -1)
    assert (table == table[:, :1]).all()
    alone, together = PlacementCost(pools), PlacementCost(problem)
    assert alone.layer_values(placement).mean() == pytest.approx(
        together.layer_values(layers).mean(), rel=1e-6
    )


@pytest.mark.parametrize("objective", ["balance", "time"])
def test_a_plan_places_a_pool_once(pooled: Trace, objective: str) -> None:
    made = moesim.plan(
        pooled, gpus=8, solver="greedy", objective=objective, redundant_experts=8, **SMALL
    )
    table = made.plan.placement.physical_to_logical
    assert (table[0::2] == table[1::2]).all()
    assert not (table[0] == table[2]).all()
    assert made.plan.bound <= made.plan.objective_value * (1 + 1e-6)
    again = moesim.simulate(pooled, plan=made.plan, compare=["eplb"], steps=2, **SMALL)
    assert set(again.results) == {"plan", "eplb"}


def test_a_pool_is_stored_once(pooled: Trace) -> None:
    """8 layers of 32 experts per GPU are above its 80 GB, 4 pools of 32 below: an expert of 400 MB
    makes it 102 and 51 GB."""
    spec = load_model("debian-olmoe")
    wider = round(400e6 / spec.expert_bytes())
    large = replace(spec, moe_intermediate_size=spec.moe_intermediate_size * wider)
    alone = replace(pooled, meta=replace(pooled.meta, layers_per_pool=1))
    with pytest.raises(InfeasibleError, match="32 experts per layer x 8 layers"):
        moesim.plan(alone, gpus=2, model=large, solver="linear", **SMALL)
    moesim.plan(pooled, gpus=2, model=large, solver="linear", **SMALL)


def test_other_layers_in_a_pool_are_refused(pooled: Trace) -> None:
    alone = replace(pooled, meta=replace(pooled.meta, layers_per_pool=1))
    plan = moesim.plan(alone, gpus=8, solver="greedy", objective="balance", **SMALL).plan
    with pytest.raises(MismatchError, match="layers 0 to 1 share their experts"):
        moesim.simulate(pooled, plan=plan, steps=1)


def test_who_knows_no_pools_refuses_by_name(pooled: Trace) -> None:
    with pytest.raises(MismatchError, match="moesim cache takes each layer's for its own"):
        moesim.cache(pooled)
    with pytest.raises(MismatchError, match="moesim balance"):
        moesim.balance(pooled, gpus=8)
    with pytest.raises(MismatchError, match="`offload`"):
        moesim.plan(pooled, gpus=8, offload=True)
    with pytest.raises(InputError, match="exflow, which follows tokens"):
        moesim.plan(pooled, gpus=8, solver="exflow")
    with pytest.raises(InputError, match="`robust`"):
        moesim.plan(pooled, gpus=8, robust="domains")


def test_a_slice_keeps_pools_whole(pooled: Trace, tmp_path: Path) -> None:
    save_trace(slice_trace(pooled, SliceSpec(layer_ids=(2, 3))), tmp_path / "t.npz")
    assert load_trace(tmp_path / "t.npz").meta.layers_per_pool == 2
    with pytest.raises(InputError, match="cut through pools of 2 layers"):
        slice_trace(pooled, SliceSpec(layer_ids=(1, 2)))


def test_layers_that_do_not_divide_are_refused(pooled: Trace, tmp_path: Path) -> None:
    save_trace(replace(pooled, meta=replace(pooled.meta, layers_per_pool=3)), tmp_path / "t.npz")
    with pytest.raises(FormatError, match="layers_per_pool"):
        load_trace(tmp_path / "t.npz")


def test_traces_without_pools_are_the_same_bytes_as_before() -> None:
    assert "pool" not in TraceMeta("m", 4, 2, (0, 1)).to_json()


def test_a_comparison_says_that_the_clock_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(solver: object, problem: Problem) -> Solution:
        return replace(among_holders(find_solver("linear"), problem), status="time_limit")

    monkeypatch.setattr(baselines, "among_holders", late)
    notices: list[str] = []
    cluster = load_cluster("h100-sxm-ib", 2)
    baselines.place_by_counts("lns", np.ones((1, 2, 4)), np.array([2, 2]), cluster, notices=notices)
    assert notices == [
        "lns stopped at its time limit of 60 s: on another or busier machine it may place otherwise"
    ]
