"""Home ranks: what is saved, by hand; optimal assignment by enumeration; capacity."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.routing import DEDUP_CODES, route
from moesim.errors import InfeasibleError, InputError
from moesim.placement import Placement
from moesim.planning.home_rank_fit import assign_homes, messages_saved


def test_saved_by_hand() -> None:
    """GPUs 0, 1 | 2, 3 with two experts each. A token chooses 0, 1 (GPU 0) and 4 (GPU 2)."""
    placement = Placement(np.arange(8, dtype=np.int32)[None], 4, 2, 8)
    ids = np.array([[[0, 1, 4]]])

    def saved(dedup: int, far: float) -> list[float]:
        found = messages_saved(ids, placement, dedup=dedup, nearest=False, far=far)
        return found[0].tolist()

    # Without deduplication both choices on GPU 0 count; a message between nodes counts 10.
    assert saved(0, 0.0) == [2, 0, 1, 0]
    assert saved(0, 10.0) == [2 + 20, 20, 1 + 10, 10]
    # Per GPU: one message for GPU 0, one for GPU 2. Per node: one for each node.
    assert saved(1, 10.0) == [1 + 10, 10, 1 + 10, 10]
    assert saved(2, 10.0) == [1 + 10, 10, 1 + 10, 10]


def test_replicas_by_share_or_nearest() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], np.int32), 2, 1, 3)
    ids = np.array([[[0]]])
    split = messages_saved(ids, placement, dedup=1, nearest=False, far=1.0)
    near = messages_saved(ids, placement, dedup=1, nearest=True, far=1.0)
    assert split.tolist() == [[0.5, 0.5]]
    assert near.tolist() == [[1.0, 1.0]]


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(2, 1), (4, 2), (6, 3)]),
    dedup=st.sampled_from(["none", "gpu"]),
)
@settings(max_examples=40, deadline=None)
def test_saved_messages_are_those_not_sent(
    build: ModuleType, seed: int, shape: tuple[int, int], dedup: str
) -> None:
    """Without replicas: messages sent from home g, and those of them between nodes, are what is
    sent in all less what is saved."""
    rng = np.random.default_rng(seed)
    gpus, nodes = shape
    trace = build.random_trace(rng, 12, 2, 3 * gpus, 4, missing=0.2)
    placement = build.random_placement(rng, 2, 3 * gpus, gpus, nodes, 3)
    code = DEDUP_CODES[dedup]
    near = messages_saved(trace.expert_ids, placement, dedup=code, nearest=False, far=0.0)
    both = messages_saved(trace.expert_ids, placement, dedup=code, nearest=False, far=1.0)
    node = placement.node_of_gpu
    batches = build.cut(trace, 12)
    for home in range(gpus):
        homes = np.full(12, home, np.int32)
        routed = route(trace, batches, placement, dedup=dedup, home=homes)  # type: ignore[arg-type]
        reached = (
            int(routed.gpu_fan_out.sum()) if dedup == "gpu" else int((trace.expert_ids >= 0).sum())
        )
        assert near[:, home].sum() == pytest.approx(reached - routed.messages.sum())
        crossing = routed.messages[..., node[:, None] != node[None]].sum()
        if nodes > 1:
            far = (both - near)[:, home].sum()
            assert far == pytest.approx(reached - crossing)


@given(seed=st.integers(0, 2**32), sizes=st.sampled_from([(1, 1, 1, 1), (2, 1, 1), (3, 1), (2, 2)]))
@settings(max_examples=40, deadline=None)
def test_assignment_is_best(seed: int, sizes: tuple[int, ...]) -> None:
    """No other way to give four tokens to two ranks of two saves more (six ways)."""
    rng = np.random.default_rng(seed)
    size = np.array(sizes)
    each = rng.integers(0, 9, (len(sizes), 2)).astype(float)
    flow = assign_homes(each * size[:, None], size, np.array([2, 2]))
    assert flow.sum(axis=1).tolist() == size.tolist()
    assert flow.sum(axis=0).tolist() == [2, 2]
    owner = np.repeat(np.arange(len(sizes)), size)
    best = max(
        sum(each[owner[t], 0 if t in first else 1] for t in range(4))
        for first in itertools.combinations(range(4), 2)
    )
    assert (flow * each).sum() == pytest.approx(best)


def test_refusals() -> None:
    with pytest.raises(InputError, match="2 requests on 3 ranks"):
        assign_homes(np.zeros((2, 3)), np.ones(2, np.int64), np.ones(2, np.int64))
    with pytest.raises(InfeasibleError, match="2 tokens for room for 3"):
        assign_homes(np.zeros((2, 3)), np.ones(2, np.int64), np.ones(3, np.int64))
