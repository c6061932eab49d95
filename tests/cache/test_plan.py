"""Caching plans: memory, choice, bound, JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.caching.compare import compare, offline_bound, sweep_hbm
from moesim.caching.memory import WORKSPACE_BYTES, check_host, memory_budget
from moesim.caching.plan import CachePlan, Prefetch, load_cache_plan, parse_cache_plan
from moesim.caching.planner import plan_cache
from moesim.caching.rates import HostSpec, build_rates, step_times
from moesim.caching.workload import Request, make_workload
from moesim.cluster.gpus import load_gpu
from moesim.errors import FormatError, InfeasibleError, InputError, MismatchError
from moesim.jobs.cache import CacheOptions, run_cache
from moesim.model.names import AttentionSpec, ModelSpec
from moesim.placement import Placement, Plan

EXPERT_MB = 2 * 3 * 4096 * 4096 / 1e6
"""bf16, three matrices of 4096 x 4096: 100.7 MB."""


def toy_model(**changes) -> ModelSpec:  # type: ignore[no-untyped-def]
    base = {
        "name": "toy",
        "source": "made up",
        "num_hidden_layers": 3,
        "moe_layer_ids": (0, 1, 2),
        "hidden_size": 4096,
        "moe_intermediate_size": 4096,
        "num_experts": 8,
        "top_k": 2,
        "vocab_size": 1000,
        "attention": AttentionSpec("gqa", 32, 8, 128),
    }
    return ModelSpec(**(base | changes))


@pytest.fixture(scope="module")
def toy(toys: ModuleType):  # type: ignore[no-untyped-def]
    trace = toys.random_trace(0, num_requests=16, tokens=40, layers=3)
    return trace, toy_model()


def request_for(model: ModelSpec, slots: float, **changes) -> Request:  # type: ignore[no-untyped-def]
    """A request whose memory holds that many experts of 100.7 MB, 100 tokens of context."""
    fixed = model.non_expert_bytes() + model.kv_bytes(100) + WORKSPACE_BYTES
    hbm = (fixed + slots * model.expert_bytes()) / 1e9
    return Request(hbm, context_tokens=100, **changes)


def test_memory_by_hand() -> None:
    """1 GB of workspace, dense weights and a KV cache of 3 layers x 2 x 8 x 128 elements of 2
    bytes per token leave room for 5 slots and a half."""
    model = toy_model()
    kv = 100 * 3 * 2 * 8 * 128 * 2
    fixed = model.non_expert_bytes() + kv + 1_000_000_000
    found = memory_budget(model, (fixed + 5.5 * EXPERT_MB * 1e6) / 1e9, 1, 100, EXPERT_MB * 1e6)
    assert (found.kv_bytes, found.num_slots, found.num_experts) == (kv, 5, 24)
    assert not found.everything_fits
    with pytest.raises(InfeasibleError, match="2 experts of one token"):
        memory_budget(model, (fixed + 1.5 * EXPERT_MB * 1e6) / 1e9, 1, 100, EXPERT_MB * 1e6)
    with pytest.raises(InputError):
        memory_budget(model, float("nan"), 1, 100, 1e6)
    assert check_host(24, 1.0, 10.0, EXPERT_MB * 1e6) == 9
    with pytest.raises(InfeasibleError, match="NVMe"):
        check_host(24, 1.0, 1.0, EXPERT_MB * 1e6)


def test_rates_by_hand() -> None:
    """L40S without calibration: 85% of 64/2 GB/s of PCIe 4.0 for the copy; the CPU reads 100.7 MB
    at 100 GB/s after 50 us; NVMe at 6 GB/s bounds the transfer from it."""
    model, gpu = toy_model(), load_gpu("l40s")
    rates = build_rates(model, gpu, HostSpec(dram_gb_per_s=100, cpu_us=50, cpu_tflops=1.5))
    assert rates.basis == "assumed"
    num_bytes = model.expert_bytes()
    link = num_bytes / (gpu.pcie_gb_per_s * 0.85 * 1e9)
    assert float(rates.transfer_s(num_bytes)) == pytest.approx(link, rel=0.02)
    assert rates.cpu_s(np.array([0, 1, 1000]), num_bytes) == pytest.approx(
        [0, 50e-6 + num_bytes / 100e9, 50e-6 + 1000 * 2 * num_bytes / 2 / 1.5e12]
    )
    assert float(rates.nvme_s(num_bytes)) == pytest.approx(80e-6 + num_bytes / 6e9)
    times = step_times(rates, 4, 100, num_bytes)
    assert times.gate_s.shape == (3, 5)
    assert (np.diff(times.gate_s[:, 1:], axis=1) >= 0).all()
    assert (times.host_s == 0).all()
    with pytest.raises(InputError):
        HostSpec(dram_gb_per_s=0)


def test_plan_fits_and_beats_baselines_on_what_it_chose(toy) -> None:  # type: ignore[no-untyped-def]
    trace, model = toy
    request = request_for(model, 9, max_steps=200)
    work = make_workload(trace, request)
    rates = build_rates(model, load_gpu("l40s"), HostSpec())
    planned = plan_cache(work, rates, request)
    plan = planned.plan
    assert planned.memory.num_slots == 9
    staging = plan.prefetch.depth * plan.prefetch.width if plan.prefetch else 0
    assert plan.num_slots + staging <= 9
    assert 0 < planned.timeline.hit_rate < 1
    best = max(speed for _, speed in planned.candidates)
    assert best > 0
    rows = {row.name: row for row in compare(work, planned, model.expert_bytes())}
    bound = offline_bound(work, planned.times, cpu=plan.cpu == "auto")
    for row in rows.values():
        if row.name != "offline optimum, misses fetched":
            assert row.tokens_per_s <= bound.tokens_per_s(9) * (1 + 1e-9)
            assert row.hit_rate + row.prefetch_hit_rate <= 1
    assert rows["this plan"].hit_rate <= bound.hit_rate(9)


@pytest.mark.parametrize("cpu", ["on", "off"])
@pytest.mark.parametrize("prefetch", ["none", "oracle", "previous-layer"])
def test_inv10_no_plan_beats_the_bound(toy, cpu: str, prefetch: str) -> None:  # type: ignore[no-untyped-def]
    """INV-10 in time: with the CPU or without, however good the prediction."""
    trace, model = toy
    rates = build_rates(model, load_gpu("l40s"), HostSpec())
    for slots in (3, 8, 16, 23):
        request = request_for(model, slots, max_steps=100, cpu=cpu, prefetch=prefetch)
        work = make_workload(trace, request)
        planned = plan_cache(work, rates, request)
        bound = offline_bound(work, planned.times, cpu=cpu == "on")
        assert planned.timeline.tokens_per_s <= bound.tokens_per_s(slots) * (1 + 1e-9)
        assert planned.plan.cpu == ("auto" if cpu == "on" else "none")
        if prefetch != "none" and slots > 3:
            assert planned.plan.prefetch is not None
            assert planned.plan.prefetch.predictor == prefetch


def test_everything_fits(toy) -> None:  # type: ignore[no-untyped-def]
    trace, model = toy
    request = request_for(model, 30, max_steps=50)
    work = make_workload(trace, request)
    planned = plan_cache(work, build_rates(model, load_gpu("l40s"), HostSpec()), request)
    assert planned.memory.everything_fits
    assert planned.plan.num_slots == 24
    assert planned.timeline.hit_rate == 1.0
    assert planned.timeline.transfers_per_token == 0.0


def test_experts_beyond_dram_live_on_nvme(toy) -> None:  # type: ignore[no-untyped-def]
    """1.1 GB of DRAM hold 10 of 24 experts; the other 14 are the least missed ones, so the plan
    is no slower than one that leaves them to chance, and slower than one with all in DRAM."""
    trace, model = toy
    request = request_for(model, 9, max_steps=100, prefetch="none")
    work = make_workload(trace, request)
    gpu = load_gpu("l40s")
    small = plan_cache(work, build_rates(model, gpu, HostSpec(dram_gb=1.1)), request)
    large = plan_cache(work, build_rates(model, gpu, HostSpec()), request)
    assert small.plan.nvme_mask().sum() == 14
    assert large.plan.nvme == ()
    assert small.timeline.tokens_per_s < large.timeline.tokens_per_s


def test_sweep_grows_with_memory_and_stays_below_the_bound(toy) -> None:  # type: ignore[no-untyped-def]
    trace, model = toy
    request = request_for(model, 9, max_steps=60, prefetch="none", cpu="off", policy="lru")
    work = make_workload(trace, request)
    rates = build_rates(model, load_gpu("l40s"), HostSpec())
    planned = plan_cache(work, rates, request)
    bound = offline_bound(work, planned.times, cpu=False)
    found = sweep_hbm(work, rates, request, planned, bound, num_points=4)
    assert np.isclose(found.hbm_gb, request.hbm_gb).any()
    assert found.slots[-1] == 24
    best = found.speed["offline bound"]
    assert (np.diff(best) >= -1e-9).all()
    own = found.speed["this plan"]
    assert (own[np.isfinite(own)] <= best[np.isfinite(own)] * (1 + 1e-9)).all()


def test_mixed_bits_save_memory(toy) -> None:  # type: ignore[no-untyped-def]
    """Two bits on average and 0.5 for scales: slots of 3.5 / 16 of the bf16 expert, so all fit
    where 9 did."""
    trace, model = toy
    request = request_for(model, 9, max_steps=50)
    bits = np.tile(np.array([1, 1, 1, 2, 2, 3, 3, 3]), (3, 1))
    work = make_workload(trace, request)
    planned = plan_cache(
        work, build_rates(model, load_gpu("l40s"), HostSpec()), replace(request, bits=bits)
    )
    assert planned.memory.slot_bytes == round(model.expert_bytes() * 3.5 / 16)
    assert planned.plan.bits is not None
    assert planned.memory.everything_fits
    with pytest.raises(InputError, match="bits have shape"):
        plan_cache(
            work,
            build_rates(model, load_gpu("l40s"), HostSpec()),
            replace(request, bits=bits[:2]),
        )


def test_same_seed_same_plan(toy) -> None:  # type: ignore[no-untyped-def]
    """INV-6."""
    trace, model = toy
    request = request_for(model, 9, max_steps=60)
    rates = build_rates(model, load_gpu("l40s"), HostSpec())
    a, b = (plan_cache(make_workload(trace, request), rates, request).plan for _ in range(2))
    assert json.dumps(a.to_dict()) == json.dumps(b.to_dict())


def test_refusals(toy, toys: ModuleType) -> None:  # type: ignore[no-untyped-def]
    trace, _ = toy
    options = CacheOptions(machine="l40s", model="mixtral-8x7b")
    with pytest.raises(MismatchError, match="top-2"):
        run_cache(trace, options)
    with pytest.raises(InputError, match="names no model"):
        run_cache(replace(trace, meta=replace(trace.meta, model="")), replace(options, model=None))
    single = toys.random_trace(0, num_requests=1, layers=3)
    with pytest.raises(InputError, match="1 request"):
        make_workload(single, Request(8.0))


def example_plan() -> CachePlan:
    return CachePlan(
        model="toy",
        gpu="l40s",
        num_experts=4,
        layer_ids=(1, 2),
        slots=(1, 2),
        pinned=((0,), ()),
        policy="lfru",
        cpu="auto",
        cpu_layers=(2,),
        prefetch=Prefetch("learned", 2, 3, 0.2),
        bits=((1, 2, 3, 3), (2, 2, 2, 2)),
        nvme=((3,), ()),
        memory={"hbm_bytes": 1},
        predicted={"tokens_per_s": 1.5},
        provenance={"seed": 0},
    )


def test_json_round_trip(tmp_path: Path) -> None:
    plan = example_plan()
    again = parse_cache_plan(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    plan.save(tmp_path / "cache.json")
    assert load_cache_plan(tmp_path / "cache.json").to_dict() == plan.to_dict()
    assert '"slots": [1, 2]' in (tmp_path / "cache.json").read_text()
    placement = Placement(np.array([[0, 1, 2, 3]] * 2, np.int32), 1, 1, 4)
    Plan("toy", (1, 2), placement, cache=plan.to_dict()).save(tmp_path / "plan.json")
    assert load_cache_plan(tmp_path / "plan.json").to_dict() == plan.to_dict()
    Plan("toy", (1, 2), placement).save(tmp_path / "bare.json")
    with pytest.raises(FormatError, match="no cache"):
        load_cache_plan(tmp_path / "bare.json")
    with pytest.raises(InputError, match="cannot read"):
        load_cache_plan(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        load_cache_plan(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("format", "other", "format"),
        ("version", 2, "version"),
        ("num_experts", 0, "num_experts"),
        ("slots", [1], "slots"),
        ("slots", [1, -2], "slots"),
        ("slots", [4, 4], "slots"),
        ("pinned", [[0, 0], []], "distinct"),
        ("pinned", [[7], []], "below 4"),
        ("pinned", "all", "pinned"),
        ("nvme", [[9], []], "nvme"),
        ("nvme", [[1]], "nvme"),
        ("policy", "fifo", "fifo"),
        ("policy", 3, "policy"),
        ("cpu", "maybe", "cpu"),
        ("cpu_layers", [7], "cpu_layers"),
        ("prefetch", {"predictor": "psychic", "depth": 1, "width": 1}, "prefetch"),
        ("prefetch", {"predictor": "learned", "depth": 0, "width": 1}, "prefetch"),
        ("prefetch", {"predictor": "learned", "depth": 1, "width": 1, "min_score": "x"}, "score"),
        ("memory", [], "memory"),
        ("layer_ids", ["a"], "layer_ids"),
    ],
)
def test_every_field_is_checked(field: str, value: object, says: str) -> None:
    raw = example_plan().to_dict()
    if field == "memory":
        value = [1]
    raw[field] = value
    with pytest.raises(InputError, match=says):
        parse_cache_plan(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(sorted(example_plan().to_dict())), value=json_values)
def test_hostile_json_gives_an_input_error_or_a_plan(field: str, value: object) -> None:
    raw = example_plan().to_dict()
    raw[field] = value
    try:
        plan = parse_cache_plan(raw)
    except InputError:
        return
    assert plan.num_slots <= plan.num_experts * len(plan.layer_ids)
