"""Streams, dependencies, order of simultaneous events, queues, and what can go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.sim.breakdown import breakdown
from moesim.sim.engine import CATEGORIES, Engine, Program
from moesim.sim.network import Flow

LINKS = 2


def collective(us: float, category: str = "dispatch", link: int = 0) -> Flow:
    return Flow(category, category, np.array([link]), np.array([us]), np.array([us]), 0.0, us)


def test_a_layer_by_hand() -> None:
    """Two GPUs: attention 3 and 5, dispatch 4, experts 6 and 2, combine 1. The dispatch waits for
    the slower attention, 5 + 4 = 9, the combine for the slower experts, 9 + 6 = 15, end 16.

    GPU 0 computes 9, GPU 1 computes 7; 5 of communication; they wait 16 - 9 - 5 = 2 and 4.
    """
    program = Program(2)
    attention = program.kernels("attention", [3, 5])
    sent = program.collective(collective(4), after=attention)
    experts = program.kernels("compute", [6, 2], after=[sent])
    program.collective(collective(1, "combine"), after=experts)
    run = Engine(LINKS).run(program)
    assert run.us == 16
    split = breakdown(run)
    kinds = dict(zip(CATEGORIES, split.us.T.tolist(), strict=True))
    assert kinds["attention"] == [3, 5]
    assert kinds["compute"] == [6, 2]
    assert kinds["dispatch"] == [4, 4]
    assert kinds["combine"] == [1, 1]
    assert split.waiting_us.tolist() == [2, 4]


def test_streams_overlap_and_stay_in_order() -> None:
    """A kernel of 10 beside a collective of 4 on the other stream, then a kernel of 1 that needs
    both: 11. Of the collective nothing shows."""
    program = Program(1)
    program.kernels("shared", [10])
    sent = program.collective(collective(4))
    program.kernels("compute", [1], after=[sent])
    run = Engine(LINKS).run(program)
    assert run.us == 11
    split = breakdown(run)
    assert split.overlapped_us.tolist() == [4]
    assert split.us[0, CATEGORIES.index("dispatch")] == 0
    assert split.waiting_us.tolist() == [0]


def test_a_gpu_without_work_has_no_task() -> None:
    program = Program(3)
    tasks = program.kernels("compute", [0, 2, 0])
    assert [t.gpu for t in tasks] == [1]
    assert Engine(LINKS).run(program).us == 2


def test_an_empty_program_takes_no_time() -> None:
    assert Engine(LINKS).run(Program(4)).us == 0


def test_steps_follow_each_other_on_one_clock() -> None:
    engine = Engine(LINKS)
    for start in (0.0, 5.0, 10.0):
        program = Program(1)
        program.kernels("compute", [5])
        run = engine.run(program)
        assert (run.start_us, run.end_us) == (start, start + 5)


def test_a_step_can_be_cut_off() -> None:
    """At 3 of 10 us: unfinished, its kernel never ends, and the next step starts at 3 with an
    empty network (INV-4)."""
    engine = Engine(LINKS)
    program = Program(1)
    kernel = program.kernels("compute", [10])[0]
    program.collective(collective(20))
    run = engine.run(program, until_us=3)
    assert not run.finished
    assert engine.now_us == 3
    assert kernel.end_us == -1
    follow = Program(1)
    follow.collective(collective(4))
    assert engine.run(follow).end_us == 7
    assert engine.network.bytes[0] == pytest.approx(3 + 4)


def test_tasks_that_wait_for_each_other_are_an_error() -> None:
    program = Program(1)
    first = program.kernels("compute", [1])[0]
    second = program.kernels("compute", [1], after=[first])[0]
    second.followers.append(first)
    first.waits += 1
    with pytest.raises(RuntimeError, match="cycle"):
        Engine(LINKS).run(program)


def test_a_link_that_stays_down_is_named() -> None:
    engine = Engine(LINKS)
    engine.network.set_room([0], 0.0)
    program = Program(1)
    program.collective(collective(4))
    with pytest.raises(RuntimeError, match="dispatch"):
        engine.run(program)


def test_simultaneous_events_in_launch_order() -> None:
    """Three kernels end at the same instant; what they release starts in launch order, so the
    first of two transfers that share a link is always the same one."""
    started = []
    program = Program(3)
    kernels = program.kernels("compute", [2, 2, 2])
    for kernel in kernels:
        program.kernels("shared", [1 if g == kernel.gpu else 0 for g in range(3)], after=[kernel])
    Engine(LINKS).run(program)
    started = [t.gpu for t in program.tasks if t.category == "shared" and t.start_us == 2]
    assert started == [0, 1, 2]


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 110), (2.0, 115)])
def test_more_bandwidth_can_be_slower(rate: float, expected: float) -> None:
    """Where INV-9 ends, as with Graham's anomalies: a kernel of 100 us waits for A (10 us of link
    1). C (10 us of link 0) comes before B (5 us of link 1) on a second stream. Normally B starts at
    10, when A is done. With link 0 twice as fast B starts at 5 and takes half of link 1 from A,
    which ends at 15 instead of 10."""
    program = Program(1)
    first = program.collective(collective(10, link=1))
    program.kernels("compute", [100], after=[first])
    program.collective(collective(10 / rate, link=0), stream="other")
    program.collective(collective(5, link=1), stream="other")
    assert Engine(LINKS).run(program).us == expected


def waits(service: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Waiting times in a GPU's stream: GPU 1 times the arrivals, GPU 0 serves them in order."""
    program = Program(2)
    pairs = []
    for gap, work in zip(gaps.tolist(), service.tolist(), strict=True):
        arrival = program.kernels("gate", [0, gap])
        pairs.append((arrival[0], program.kernels("compute", [work, 0], after=arrival)[0]))
    Engine(LINKS).run(program)
    return np.array([served.start_us - arrived.end_us for arrived, served in pairs])


@pytest.mark.parametrize(
    ("deterministic", "expected"),
    [
        pytest.param(False, 0.6 / (1 - 0.6), id="M/M/1"),
        pytest.param(True, 0.6 / (2 * (1 - 0.6)), id="M/D/1"),
    ],
)
def test_waiting_times_of_a_stream(deterministic: bool, expected: float) -> None:
    """Pollaczek and Khinchine: mean wait rho s (1 + c^2) / (2 (1 - rho)) with c = 1 for exponential
    and 0 for fixed service; s = 1, rho = 0.6: 1.5 and 0.75."""
    rng = np.random.default_rng(11)
    count = 40_000
    service = np.ones(count) if deterministic else rng.exponential(1.0, count)
    wait = waits(service, rng.exponential(1 / 0.6, count))
    assert wait.mean() == pytest.approx(expected, rel=0.06)
