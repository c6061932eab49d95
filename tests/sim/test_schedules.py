"""Schedules against arithmetic: each case says what the time must be and why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, UnknownNameError
from moesim.sim.breakdown import breakdown
from moesim.sim.collectives.base import Stage
from moesim.sim.engine import CATEGORIES, Engine
from moesim.sim.event import run_event, run_step
from moesim.sim.schedules.co_scheduled import CoScheduled
from moesim.sim.schedules.pipelined import Pipelined, pipeline_us
from moesim.sim.schedules.registry import SCHEDULES, check_exchange, get_schedule
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.schedules.shared_overlap import SharedOverlap
from moesim.sim.schedules.two_batch import TwoBatch
from moesim.sim.work import Chunk, HomeWork, StepWork

GPUS = 2


def stage(us: float, layers: int, link: int, *, within_node: bool = False) -> Stage:
    """A collective of `us` in every layer of one batch, on a link of its own."""
    sizes = np.zeros((1, layers, 2))
    sizes[:, :, link] = us
    return Stage("", np.full((1, layers), us), 0.0, sizes, np.ones(2), within_node)


def work(
    *,
    layers: int = 1,
    chunks: int = 1,
    attention: float = 0.0,
    gate: float = 0.0,
    shared: float = 0.0,
    dispatch: tuple[float, ...] = (0.0,),
    experts: float = 0.0,
    combine: tuple[float, ...] = (0.0,),
    dense: float = 0.0,
    descend: float = 0.0,
    ascend: float = 0.0,
) -> StepWork:
    """A step in which every GPU and every chunk has the same times. Of two stages the one on link
    1 is within nodes: second in dispatch, first in combine."""

    def home(share: float) -> HomeWork:
        every = np.ones((layers, GPUS)) * share
        parts = (attention, gate, shared, dense, descend, ascend)
        a, g, s, d, down, up = (every * p for p in parts)
        return HomeWork(a, g, s, d[0], down, up)

    def stages(times: tuple[float, ...], intra: int) -> list[Stage]:
        if len(times) == 1:
            return [stage(times[0], layers, 0)]
        return [
            stage(us, layers, int(i == intra), within_node=i == intra) for i, us in enumerate(times)
        ]

    one = Chunk(
        0,
        np.full((layers, GPUS), experts),
        stages(dispatch, 1),
        stages(combine, 0),
        home(1.0 / chunks),
    )
    return StepWork(layers, GPUS, 1, home(1.0), (one,) * chunks)


def us(schedule, step: StepWork) -> float:
    return run_step(Engine(2), schedule, step).us


def test_sequential_is_the_sum() -> None:
    """3 layers of 2 + 1 + 4 + 5 + 6 + 5 = 23, and 7 of dense layers before: 76."""
    step = work(
        layers=3, attention=2, gate=1, shared=4, dispatch=(5,), experts=6, combine=(5,), dense=7
    )
    assert us(Sequential(), step) == 76


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        pytest.param(4, 1 + 5 + 6 + 5, id="hidden under a longer dispatch"),
        pytest.param(9, 1 + 9 + 6 + 5, id="delays the experts by what it is longer"),
    ],
)
def test_shared_experts_under_dispatch(shared: float, expected: float) -> None:
    step = work(gate=1, shared=shared, dispatch=(5,), experts=6, combine=(5,))
    assert us(SharedOverlap(), step) == expected
    assert us(Sequential(), step) == 1 + shared + 16


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_pipeline_formula(chunks: int, comm: int, compute: int) -> None:
    """PipeMoE's T(r) for equal chunks, whatever the proportions."""
    step = work(chunks=chunks, dispatch=(comm,), experts=compute, combine=(comm,))
    assert us(Pipelined(chunks), step) == pytest.approx(pipeline_us(chunks, comm, compute))


@pytest.mark.parametrize(
    ("chunks", "comm", "compute", "expected"),
    [
        pytest.param(4, 3, 1, 24, id="communication: 2 r t_d"),
        pytest.param(4, 1, 3, 14, id="experts: 2 t_d + r t_e"),
        pytest.param(1, 5, 7, 17, id="one chunk: both, (r + 1) t_d + t_e"),
        pytest.param(2, 4, 5, 18, id="between: 2 t_d + r t_e = 18 over 17 and 16"),
    ],
)
def test_pipeline_by_hand(chunks: int, comm: float, compute: float, expected: float) -> None:
    assert pipeline_us(chunks, comm, compute) == expected
    step = work(chunks=chunks, dispatch=(comm,), experts=compute, combine=(comm,))
    assert us(Pipelined(chunks), step) == expected


def test_the_best_number_of_chunks() -> None:
    """Collectives of 2 + 24 / r us and experts of 1 + 24 / r: T(1) = 77, T(2) = max(56, 55, 54),
    T(3) = max(60, 49, 47), so two chunks."""
    times = {
        r: us(
            Pipelined(r),
            work(chunks=r, dispatch=(2 + 24 / r,), experts=1 + 24 / r, combine=(2 + 24 / r,)),
        )
        for r in (1, 2, 3)
    }
    assert times == pytest.approx({1: 77, 2: 56, 3: 60})


def test_co_scheduling_by_hand() -> None:
    """Two chunks, 4 between nodes, 1 within, experts 2. Between nodes: 0-4 and 4-8 there, 8-12 and
    12-16 back; within: 4-5, 8-9, and 7-8, 11-12; experts 5-7 and 9-11. Ends at 16 = 2 r x 4: the
    network never rests. On one stream the collectives alone are 2 x (4 + 1 + 1 + 4) = 20."""
    step = work(chunks=2, dispatch=(4, 1), experts=2, combine=(1, 4))
    assert us(CoScheduled(2), step) == 16
    assert us(Pipelined(2), step) >= 20


def test_two_batches_by_hand() -> None:
    """Halves of attention 4, dispatch 3, experts 4, combine 3, two layers.

    Compute: A 0-4, B 4-8, A's experts 8-12 (dispatched 4-7), B's 12-16 (8-11); layer 1: A's
    attention 16-20 (combined 12-15), B's 20-24 (16-19), A's experts 24-28, B's 28-32; B's combine
    ends at 35. Kernels take 32 of 35, only the last combine shows. In sequence, with halves that
    take half: 2 x (8 + 6 + 8 + 6) = 56 for the whole step."""
    step = work(layers=2, chunks=2, attention=8, dispatch=(3,), experts=4, combine=(3,))
    run = run_step(Engine(2), TwoBatch(), step)
    assert run.us == 35
    split = breakdown(run)
    assert split.us[0, CATEGORIES.index("combine")] == 3
    assert split.us[0, CATEGORIES.index("dispatch")] == 0
    assert split.overlapped_us[0] == 4 * 3 + 3 * 3
    assert split.waiting_us[0] == 0


def test_reduced_dimension_by_hand() -> None:
    """Descent 1 before the dispatch, ascent 2 after the combine, in each of two layers:
    2 x (3 + 1 + 4 + 5 + 4 + 2) = 38 (BigMac's order)."""
    step = work(layers=2, attention=3, descend=1, dispatch=(4,), experts=5, combine=(4,), ascend=2)
    assert us(Sequential(), step) == 38


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"context-coherent"}))
def test_real_steps(name, trace, batches, models_of, linear_of) -> None:
    """Every schedule moves the same bytes, serves every choice (INV-1), takes at least
    the busiest GPU's kernels, and at most its own parts one after the other."""
    library = "bi-level" if name == "co-scheduled" else None
    models = models_of(16, all_to_all=library)
    placement = linear_of(models)
    schedule = get_schedule(name, 2)
    result = run_event(models, schedule, trace, batches, placement)
    plain = run_event(models, Sequential(), trace, batches, placement)
    np.testing.assert_allclose(result.link_bytes, plain.link_bytes, rtol=1e-12)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    kernels = (result.gpu_busy * result.step_us[:, None]).max(axis=1)
    assert (result.step_us >= kernels * (1 - 1e-12)).all()
    total = result.parts_us.sum(axis=1) + result.waiting_us
    np.testing.assert_allclose(total, result.step_us, rtol=1e-9)


def test_names() -> None:
    with pytest.raises(UnknownNameError, match="pipelind"):
        get_schedule("pipelind")
    for chunks in (0, -1, 65):
        with pytest.raises(InputError):
            get_schedule("pipelined", chunks)


def test_co_scheduling_needs_stages(models_of) -> None:
    with pytest.raises(InputError, match="one stage"):
        check_exchange(get_schedule("co-scheduled"), models_of(8).exchange)
