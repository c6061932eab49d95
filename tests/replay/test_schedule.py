"""Cache schedules: by hand, by invariant, and replayed on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.events import Stream
from moesim.caching.plan import CachePlan
from moesim.caching.planner import setup_of_plan
from moesim.caching.policies import POLICIES
from moesim.caching.timeline import run_timeline
from moesim.caching.timeline_kernel import StepTimes
from moesim.errors import FormatError, InputError, MismatchError
from moesim.replay.cache_schedule import plan_schedule
from moesim.replay.make_schedule import lru_schedule
from moesim.replay.schedule import StepCosts, load_schedule, predict_tokens_us
from moesim.trace.format import Trace, TraceMeta


def test_lru_by_hand() -> None:
    # One layer, 4 experts, top-1, 2 slots that start with experts 0 and 1. Choices 0 2 0 1 3:
    # 0 hits (slot 0); 2 evicts 1 (slot 1); 0 hits; 1 evicts 2 (slot 1); 3 evicts 0 (slot 0).
    schedule = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2)
    assert schedule.slots[:, 0].tolist() == [0, 1, 0, 1, 0]
    assert schedule.item.tolist() == [2, 1, 3]
    assert schedule.need.tolist() == schedule.issue.tolist() == [1, 3, 4]
    assert schedule.copies_per_token.tolist() == [0, 1, 0, 1, 1]


def test_predicted_times_by_hand() -> None:
    schedule = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2)
    # Copy 10, compute 3: a hit takes 3, a miss waits 10 first.
    assert predict_tokens_us(schedule, StepCosts(10.0, 3.0)).tolist() == [3, 13, 3, 13, 13]
    # One step ahead: the copy for step 1 is issued when step 0 starts (slot 1 is unread before),
    # so it ends at 10, step 1 at 13. Step 2 ends at 16; the copy for step 3 goes to slot 1, last
    # read by step 1, issued at step 2 (13): there at 23, step 3 ends at 26. The copy for step 4
    # goes to slot 0, read by step 2, issued at step 3 (16), behind the engine (23): 33, end 36.
    ahead = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2, lookahead=1)
    assert ahead.issue.tolist() == [0, 2, 3]
    assert predict_tokens_us(ahead, StepCosts(10.0, 3.0)).tolist() == [3, 10, 3, 10, 10]


def test_host_and_hand_over_by_hand() -> None:
    schedule = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2)
    # A copy between two kernels takes 10, and 1 before and 1 after it: a miss takes 15.
    costs = StepCosts(10.0, 3.0, hand_over_us=2.0)
    assert predict_tokens_us(schedule, costs).tolist() == [3, 15, 3, 15, 15]
    # The host takes 5 to enqueue a step and 4 a copy, and does not wait for either. Enqueued at 5,
    # 9 + 5, 19, 23 + 5, 32 + 5. Step 0 runs from 5 to 8; the copy starts at 9, step 1 ends at 22;
    # step 2 is enqueued by then: 25; the copy starts at 25, step 3 ends at 38; then 48 and 51.
    host = StepCosts(10.0, 3.0, issue_us=5.0, fetch_issue_us=4.0)
    assert predict_tokens_us(schedule, host).tolist() == [8, 14, 3, 13, 13]


def test_pinned_experts_and_staging_by_hand() -> None:
    # One layer, 5 experts, top-2, expert 4 pinned (slot 0), two slots that start with 0 and 1
    # (slots 1 and 2). {0, 4}: nothing to copy; {2, 3}: both, over 1 and 0 as the less recent first;
    # {4, 2}: nothing.
    ids = np.array([[0, 4], [2, 3], [4, 2]])[:, None]
    schedule = lru_schedule(ids, 5, 2, pinned=[[4]])
    assert schedule.initial.tolist() == [4, 0, 1]
    assert schedule.slots.tolist() == [[1, 0], [2, 1], [0, 2]]
    assert schedule.item.tolist() == [2, 3]
    # With one slot (expert 0 in slot 1) the cache keeps the later of two misses, 3, which goes
    # through staging slot 2 as slot 1 is read too; from then on slot 2 is the cache and slot 1 is
    # for staging. {3, 4}: nothing to copy; {2, 3}: 2, through slot 1, as 3 is kept again.
    tight = lru_schedule(np.array([[2, 3], [3, 4], [2, 3]])[:, None], 5, 1, pinned=[[4]])
    assert tight.initial.tolist() == [4, 0, -1]
    assert tight.slots.tolist() == [[1, 2], [2, 0], [1, 2]]
    assert tight.item.tolist() == [2, 3, 2]
    # Layers may differ: layer 0 has three slots, layer 1 two; each owns three.
    two = lru_schedule(np.array([[[0, 1], [2, 3]]]), 4, [3, 2])
    assert two.initial.tolist() == [0, 1, 2, 4, 5, -1]
    assert two.slots.tolist() == [[0, 1], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    layers=st.integers(1, 3),
    top_k=st.integers(1, 3),
    lookahead=st.integers(0, 4),
)
def test_lru_schedules_hold(seed: int, layers: int, top_k: int, lookahead: int) -> None:
    """Every schedule passes its own check; more slots never copy more (LRU has no anomaly), and
    looking ahead changes when copies start, not how many there are."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((12, layers, 6)), axis=2)[:, :, :top_k]
    counts = []
    for slots in range(top_k, 7):
        schedule = lru_schedule(experts, 6, slots, lookahead=lookahead)
        counts.append(len(schedule.item))
        assert len(lru_schedule(experts, 6, slots).item) == counts[-1]
    assert counts[-1] == 0


def test_round_trip_and_wrong_files(tmp_path) -> None:
    schedule = lru_schedule(np.array([[[0, 1]], [[2, 3]], [[0, 3]]]), 4, 2)
    schedule.save(tmp_path / "s.npz")
    again = load_schedule(tmp_path / "s.npz")
    for name in ("experts", "slots", "issue", "need", "item", "slot", "initial"):
        np.testing.assert_array_equal(getattr(again, name), getattr(schedule, name))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:300])
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", meta=np.array("{}"), experts=np.zeros(1))
    np.savez(tmp_path / "pickle.npz", meta=np.array([{}], dtype=object))
    for name in ("cut.npz", "text.npz", "other.npz", "pickle.npz"):
        with pytest.raises(FormatError):
            load_schedule(tmp_path / name)
    with pytest.raises(InputError, match="no schedule at"):
        load_schedule(tmp_path / "none.npz")


def test_schedules_that_cheat_are_refused() -> None:
    schedule = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2)
    with pytest.raises(FormatError, match="step 1 reads a slot without its expert"):
        replace(
            schedule,
            item=schedule.item[1:],
            issue=schedule.issue[1:],
            need=schedule.need[1:],
            slot=schedule.slot[1:],
        )
    with pytest.raises(FormatError, match="issued before needed"):
        replace(schedule, need=schedule.need - 1)
    with pytest.raises(FormatError, match="step 1 reads"):
        replace(schedule, need=np.array([2, 3, 4]))
    with pytest.raises(FormatError, match="slot goes outside"):
        replace(schedule, slot=schedule.slot + 5)
    with pytest.raises(InputError, match="a cache of 1 experts, 0 of them pinned, top-k 2"):
        lru_schedule(np.zeros((2, 1, 2), int), 4, 1)


def test_offload_on_the_cpu(inputs, tmp_path) -> None:
    """Outputs are right at every cache size, and fewer slots mean more copies."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from moesim.replay.offload import OffloadOptions, offload
    from moesim.replay.process import Context, Watchdog

    alone = Context(0, 1, 0, torch.device("cpu"), 60.0, Watchdog(60.0, print))
    options = OffloadOptions(num_tokens=30, warm_tokens=4, num_layers=3, reps=2)
    record = offload(alone, inputs.shape, str(inputs.trace), [], options, str(tmp_path / "o.json"))
    assert len(record["results"]) == 6
    assert max(r["relative_error"] for r in record["results"]) < 1e-5
    copies = [r["copies_per_token"] for r in record["results"]]
    assert copies[0] == copies[1] > copies[2] > copies[4] > 0
    assert (tmp_path / "o.json").exists()
    short = replace(inputs.shape, hidden_size=1 << 16, moe_intermediate_size=1 << 16)
    with pytest.raises(InputError, match=r"needs .* GB"):
        offload(alone, short, str(inputs.trace), [], options, None)


def test_experts_at_the_rows_asked_for(inputs) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from moesim.replay.calibrate import CalibrateOptions, calibrate
    from moesim.replay.process import Context, Watchdog

    alone = Context(0, 1, 0, torch.device("cpu"), 60.0, Watchdog(60.0, print))
    options = CalibrateOptions((inputs.shape,), sections=("ffn",), ffn_rows=(1, 3), budget_s=0.001)
    rows = calibrate(alone, options, None)["tables"]["ffn"]
    assert {r["tokens"] / r["local_experts"] for r in rows} == {1, 3}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), slots=st.integers(3, 8))
def test_same_misses_as_the_cache_simulator(seed: int, slots: int) -> None:
    """A cache plan's schedule copies what the cache simulator counts as misses, when both start
    with the same content: lowest experts first, brought in by a first token per slot."""
    from moesim.caching.simulate import CacheSettings, hit_curves

    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((40, 2, 8)), axis=2)[:, :, :3].astype(np.int16)
    filling = np.full((slots, 2, 3), -1, np.int16)
    filling[:, :, 0] = np.arange(slots)[:, None]
    every = np.concatenate([filling, ids])
    num = len(every)
    meta = TraceMeta("m", 8, 3, (0, 1))
    zeros = np.zeros(num, np.int32)
    trace = Trace(every, zeros, np.arange(num, dtype=np.int32), zeros.astype(np.uint8), meta)
    tokens = np.arange(num)
    stream = Stream(tokens, np.arange(num + 1), zeros, np.arange(num) == 0, 1)
    curves = hit_curves(trace, stream, CacheSettings("lru"))
    plan = CachePlan("m", "gpu", 8, (0, 1), (slots, slots), ((), ()))
    schedule = plan_schedule(plan, ids, (0, 1))
    misses = curves.accesses.sum() - curves.hits[:, slots].sum() - 2 * slots
    assert len(schedule.item) == misses


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    policy=st.sampled_from(list(POLICIES)),
    slots=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    num_pinned=st.integers(0, 2),
    lookahead=st.integers(0, 3),
)
def test_every_policy_copies_what_the_timeline_fetches(
    seed: int, policy: str, slots: list[int], num_pinned: int, lookahead: int
) -> None:
    """A warm plan of any policy, with pinned experts and with fewer slots than a token chooses
    experts: each token's copies are the fetches of the cache's own timeline (layers, experts and
    requests the same), the schedule passes its own check, and a prefetcher changes none of it."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((30, 2, 8)), axis=2)[:, :, :3].astype(np.int16)
    ids[rng.random(ids.shape) < 0.1] = -1
    gates = rng.random(ids.shape).astype(np.float32)
    starts = np.arange(30) % 10 == 0
    frequency = rng.random((2, 8))
    pinned = tuple(tuple(rng.permutation(8)[:num_pinned].tolist()) for _ in range(2))
    plan = CachePlan("m", "gpu", 8, (0, 1), tuple(slots), pinned, policy=policy)
    schedule = plan_schedule(
        plan, ids, (0, 1), lookahead=lookahead, gates=gates, starts=starts, frequency=frequency
    )
    request = np.cumsum(starts).astype(np.int32)
    trace = Trace(
        ids,
        request,
        np.arange(30, dtype=np.int32) % 10,
        np.ones(30, np.uint8),
        TraceMeta("m", 8, 3, (0, 1)),
        gate_weights=gates,
    )
    stream = Stream(np.arange(30), np.arange(31), np.zeros(30, np.int32), starts, 1)
    flat = np.ones(2)
    times = StepTimes(
        np.ones((2, 2)), flat, flat, np.ones((2, 8)), np.zeros((2, 8)), np.zeros(2), 0.0
    )
    run = run_timeline(trace, stream, setup_of_plan(plan, frequency), times)
    assert schedule.copies_per_token.tolist() == run.fetched.sum(axis=1).tolist()
    assert schedule.label.startswith(f"{policy}, ")


def test_offline_policies_by_hand() -> None:
    """One layer, 3 experts, two slots that start with the soonest used, 1 and 2. Choices 1 2 0 1 2:
    the optimum copies 0, never used again, through staging slot 2 and keeps the others; Belady has
    to admit it, in the place of 2 (used last), and copies 2 once more."""
    plan = CachePlan("m", "gpu", 3, (0,), (2,), ((),), policy="optimum")
    ids = np.array([1, 2, 0, 1, 2])[:, None, None]
    schedule = plan_schedule(plan, ids, (0,), frequency=np.ones((1, 3)))
    assert schedule.initial.tolist() == [1, 2, -1]
    assert schedule.slots[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert schedule.item.tolist() == [0]
    forced = plan_schedule(replace(plan, policy="belady"), ids, (0,), frequency=np.ones((1, 3)))
    assert forced.slots[:, 0].tolist() == [0, 1, 1, 0, 1]
    assert forced.item.tolist() == [0, 2]


def test_static_by_hand() -> None:
    """4 experts, two slots that hold the most frequent, 1 and 3, for good: each other expert is
    copied whenever a token chooses it, through staging slot 2."""
    plan = CachePlan("m", "gpu", 4, (0,), (2,), ((),), policy="static")
    ids = np.array([0, 1, 0, 3, 2])[:, None, None]
    schedule = plan_schedule(plan, ids, (0,), frequency=np.array([[0.1, 0.9, 0.2, 0.8]]))
    assert schedule.initial.tolist() == [1, 3, -1]
    assert schedule.slots[:, 0].tolist() == [2, 0, 2, 1, 2]
    assert schedule.item.tolist() == [0, 0, 2]
    with pytest.raises(InputError, match="are not known"):
        plan_schedule(plan, ids, (0,))


def test_lru_schedules_need_torch_and_numpy_alone() -> None:
    """In an engine's container, without numba, the same schedule comes out."""
    code = (
        "import container, sys; import numpy as np\n"
        "from moesim.replay.make_schedule import lru_schedule\n"
        "made = lru_schedule(np.array([0, 2, 0, 1, 3])[:, None, None], 4, 2)\n"
        "assert 'numba' not in sys.modules\n"
        "print(made.slots[:, 0].tolist(), made.item.tolist())"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout.split("\n")[0] == "[0, 1, 0, 1, 0] [2, 1, 3]", done.stderr


def test_plans_that_cannot_be_replayed_are_refused() -> None:
    ids = np.zeros((1, 1, 1), int)
    lru = CachePlan("m", "gpu", 4, (3,), (2,), ((),))
    with pytest.raises(MismatchError, match="layer 2"):
        plan_schedule(lru, ids, (2,))
    with pytest.raises(MismatchError, match="5 experts"):
        plan_schedule(lru, ids + 4, (3,))
