"""Expert memory in the event simulation, against the cache simulator and its timeline."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.caching.events import Stream, decode_stream
from moesim.caching.policies import POLICIES
from moesim.caching.rates import HostSpec, build_rates
from moesim.caching.simulate import CacheSettings, expert_frequency, layer_choices, run_policy
from moesim.caching.timeline import Setup, StepTimes, run_timeline
from moesim.errors import MismatchError
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.sim.links import asymptotic_gb_per_s
from moesim.sim.offload.run import GpuCache, OffloadRun
from moesim.sim.stragglers import GpuSpeeds, SlowWindow
from moesim.sim.timeline import StepTimeline

SIZE = 4e6
"""Bytes of an expert: 80 us at 50 GB/s."""


def toys() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("cache_toys", Path(__file__).parents[1] / "cache" / "toys.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOYS = toys()


def times(layers: int, experts: int, load_us: float = 100.0, tokens: int = 8) -> StepTimes:
    """Gate after 20 us, 10 us an expert on the GPU, 40 us a token on the CPU."""
    n = np.arange(tokens + 1)
    return StepTimes(
        np.full((layers, tokens + 1), 20e-6),
        np.where(n > 0, 10e-6, 0.0),
        40e-6 * n,
        np.full((layers, experts), load_us * 1e-6),
        np.zeros((layers, experts)),
        np.where(n > 0, 5e-6, 0.0),
    )


def setup(layers: int, experts: int, capacity: int, **changes) -> Setup:
    base = {
        "slots": np.full(layers, capacity),
        "pinned": np.zeros((layers, experts), bool),
        "cpu_layers": np.zeros(layers, bool),
        "frequency": np.zeros((layers, experts)),
        "warm": False,
    }
    return Setup(**(base | changes))


def caches_of(models, setups, table, predicted=None, nvme=None, size=SIZE) -> list[GpuCache]:
    layers, experts = setups[0].pinned.shape
    rates = build_rates(load_model("debian-moe"), models.cluster.gpus[0], HostSpec())
    far = np.zeros((layers, experts), bool) if nvme is None else nvme
    return [
        GpuCache(
            one, table, rates, np.full((layers, experts), size), far,
            np.zeros((10**4, layers, 0), np.int16) if predicted is None else predicted,
        )
        for one in setups
    ]  # fmt: skip


def on_one_gpu(trace) -> Placement:
    row = np.arange(trace.num_experts, dtype=np.int32)
    return Placement(np.tile(row, (trace.num_layers, 1)), 1, 1, trace.num_experts)


def on_gpus(trace, gpus: int) -> Placement:
    return replace(on_one_gpu(trace), num_gpus=gpus)


@pytest.fixture(scope="module")
def one_gpu(models_of):
    return models_of(1, home=False)


def simulated(models, trace, stream, setups, table, placement=None, **more):
    run = OffloadRun(
        models, trace, stream, placement or on_one_gpu(trace),
        caches_of(models, setups, table, **more),
    )  # fmt: skip
    return run, run.run()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(("warm", "batch"), [(False, 1), (True, 3)])
def test_misses_are_the_cache_simulators(one_gpu, policy, warm, batch) -> None:
    """Every event of every layer has as many fetches here as misses in the one-pass simulation of
    the same batches."""
    trace = TOYS.random_trace(7, num_requests=6, tokens=25, layers=3)
    requests = TOYS.all_requests(trace)
    stream = decode_stream(requests, batch, seed=1)
    frequency = expert_frequency(trace, requests)
    config = CacheSettings(policy, warm=warm, lookahead=3)
    for capacity in (2, 5):
        one = setup(3, 8, capacity, frequency=frequency, warm=warm, policy=policy, lookahead=3)
        run, _ = simulated(one_gpu, trace, stream, [one], times(3, 8))
        for layer in range(3):
            depths = run_policy(layer_choices(trace, stream, layer, frequency), config)
            misses = run.memories[0].counts.fetched[:, layer].tolist()
            assert misses == depths.misses_per_event(capacity).tolist()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(0, 8),
    depth=st.integers(0, 2),
    cpu=st.sampled_from(["none", "auto"]),
    policy=st.sampled_from(list(POLICIES)),
    batch=st.integers(1, 3),
    load=st.integers(3, 30).map(lambda n: 10.0 * n) | st.floats(30.0, 300.0),
)
@example(seed=0, slots=0, depth=1, cpu="none", policy="static", batch=1, load=30.0)
@example(seed=1, slots=1, depth=0, cpu="none", policy="lfu", batch=3, load=40.0)
def test_inv8_alone_it_is_the_closed_form(
    one_gpu, seed, slots, depth, cpu, policy, batch, load
) -> None:
    """INV-8 for caches: one GPU with nobody beside it has the times, hits, prefetch hits, fetches,
    CPU executions, waste and waiting of `moesim.caching.timeline`, step by step. Loads of whole
    tens let gates, copies and kernels meet at one instant, as in the example: gates are 20 us after
    a layer begins, kernels 10 us per token."""
    trace = TOYS.random_trace(seed, num_requests=3, tokens=12, layers=3)
    requests = TOYS.all_requests(trace)
    stream = decode_stream(requests, batch, seed=seed)
    rng = np.random.default_rng(seed)
    predicted = rng.integers(-1, 8, (stream.num_steps, 3, 2)).astype(np.int16)
    predicted[predicted[..., 0] == predicted[..., 1]] = -1
    table = times(3, 8, load)
    table.gpu_s[:] = 10e-6 * np.arange(len(table.gpu_s))
    one = setup(
        3, 8, slots, depth=depth, width=2, cpu=cpu, policy=policy,
        frequency=expert_frequency(trace, requests), warm=bool(seed % 2),
    )  # fmt: skip
    closed = run_timeline(trace, stream, one, table, predicted)
    run, result = simulated(one_gpu, trace, stream, [one], table, predicted=predicted)
    counts = run.memories[0].counts
    for name in ("hits", "staged", "fetched", "on_cpu", "wasted"):
        assert getattr(counts, name).tolist() == getattr(closed, name).tolist(), name
    np.testing.assert_allclose(result.step_us, closed.step_s * 1e6, rtol=1e-9)
    np.testing.assert_allclose(counts.stall_us, closed.wait_s * 1e6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gate", "kernel"), [(20, 10), (12, 7), (23, 10)])
def test_a_copy_that_could_begin_at_the_gate_has_not_begun(one_gpu, gate, kernel) -> None:
    """A load takes a gate and a kernel, 20 + 10 us: layer 0 fetches expert 0 (20-50) and computes
    it until 60; the prefetch of 1 for layer 1 runs 50-80. Layer 1 begins at 60, so its gate is at
    80 as well: the prefetch of 0, next in the queue, is dropped there, and expert 2 is fetched from
    80 to 110, done at 120, tail 125. Had the prefetch begun, expert 2 would come at 140. With the
    other numbers rounding puts the end of the first prefetch just before the gate."""
    trace, stream = one_step([[[0], [2]]], 3)
    predicted = np.array([[[-1, -1], [1, 0]]], np.int16)
    load = gate + kernel
    one, table = setup(2, 3, 0, depth=1, width=2), times(2, 3, float(load))
    table.gate_s[:] = gate * 1e-6
    table.gpu_s[1:] = kernel * 1e-6
    closed = run_timeline(trace, stream, one, table, predicted)
    run, result = simulated(one_gpu, trace, stream, [one], table, predicted=predicted)
    expected = gate + 3 * load + kernel + 5
    assert closed.step_s * 1e6 == pytest.approx([expected])
    assert result.step_us == pytest.approx([expected])
    assert closed.wasted.tolist() == run.memories[0].counts.wasted.tolist() == [[0, 1]]
    assert run.memories[0].copies.bytes_moved[0] == pytest.approx(3 * SIZE)


def test_inv8_on_a_bundled_trace(one_gpu) -> None:
    """The same with real routing, a warm cache, the learned predictor and the CPU."""
    from moesim.caching.plan import Prefetch
    from moesim.caching.rates import step_times
    from moesim.caching.workload import Request, make_workload
    from moesim.trace.format import load_token_trace

    trace = load_token_trace("sample:debian-moe", "a test")
    model = load_model("debian-moe")
    work = make_workload(trace, Request(hbm_gb=2.0, max_steps=64))
    rates = build_rates(model, one_gpu.cluster.gpus[0], HostSpec())
    size = float(model.expert_bytes())
    table = step_times(rates, 1, 2048, np.full((12, 64), size))
    guess = work.guess(work.held_out, Prefetch("previous-layer", 1, 2, 0.1))
    one = setup(
        12, 64, 16, depth=1, width=2, cpu="auto", policy="lfru", frequency=work.frequency, warm=True
    )
    closed = run_timeline(trace, work.held_out, one, table, guess)
    run, result = simulated(one_gpu, trace, work.held_out, [one], table, predicted=guess, size=size)
    np.testing.assert_allclose(result.step_us, closed.step_s * 1e6, rtol=1e-9)
    counts = run.memories[0].counts
    assert counts.hits.tolist() == closed.hits.tolist()
    assert counts.staged.sum() > 0
    assert counts.on_cpu.sum() > 0
    assert run.memories[0].copies.busy_us == pytest.approx(closed.link_s * 1e6)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "score", "activation", "static"])
def test_two_gpus_have_the_caches_of_their_own_experts(models_of, policy) -> None:
    """Experts 0-3 on GPU 0, 4-7 on GPU 1: each one's misses are those of a cache that sees its own
    experts alone."""
    models = models_of(2, home=False)
    trace = TOYS.random_trace(3, num_requests=6, tokens=25, layers=2)
    requests = TOYS.all_requests(trace)
    stream = decode_stream(requests, 3, seed=1)
    frequency = expert_frequency(trace, requests)
    setups = []
    for gpu in range(2):
        mask = (np.arange(8) // 4 == gpu)[None, :]
        setups.append(setup(2, 8, 2, frequency=frequency * mask, warm=True, policy=policy))
    run, _ = simulated(models, trace, stream, setups, times(2, 8), on_gpus(trace, 2))
    ids = np.asarray(trace.expert_ids)
    for gpu, memory in enumerate(run.memories):
        own = replace(trace, expert_ids=np.where((ids // 4) == gpu, ids, -1).astype(np.int16))
        for layer in range(2):
            depths = run_policy(
                layer_choices(own, stream, layer, setups[gpu].frequency),
                CacheSettings(policy, warm=True),
            )
            assert memory.counts.fetched[:, layer].tolist() == depths.misses_per_event(2).tolist()


def one_step(choices: list[list[list[int]]], experts: int) -> tuple:
    """A trace of one decode step: [tokens][layers][k]."""
    trace = TOYS.make_trace([np.array([token]) for token in choices], experts)
    stream = decode_stream(TOYS.all_requests(trace), len(choices))
    return trace, stream


def test_two_gpus_share_a_root_by_hand(models_of) -> None:
    """Two L40S behind one PCIe switch miss one expert of 16 MB each, at the same moment. Alone a
    copy takes its start plus 16 MB at the GPU's own PCIe rate, which is 85 % of 32 GB/s = 27.2
    GB/s, as much as the uplink that both share. So each gets half of it: 2 x 16 MB / 27.2 GB/s =
    1,176.5 us instead of 588.2 us, after the same start."""
    models = models_of(2, home=False, cluster="l40s-pcie")
    trace, stream = one_step([[[0]], [[1]]], 2)
    size = 16e6
    rates = build_rates(load_model("debian-moe"), models.cluster.gpus[0], HostSpec())
    alone = float(rates.transfer_s(size)) * 1e6
    table = times(1, 2, alone)
    setups = [setup(1, 2, 1), setup(1, 2, 1)]
    run, _ = simulated(models, trace, stream, setups, table, on_gpus(trace, 2), size=size)
    copy = size / (asymptotic_gb_per_s(rates.calibration.copy("h2d").curve) * 1e3)
    assert copy == pytest.approx(size / 27.2e3, rel=1e-6)
    for memory in run.memories:
        assert memory.copies.busy_us == pytest.approx(alone - copy + 2 * copy, rel=1e-6)
        assert memory.counts.stall_us.sum() == pytest.approx(alone + copy, rel=1e-6)
    by_class = dict.fromkeys(models.links.classes, 0.0)
    for name, carried in zip(models.links.classes, run.engine.network.bytes, strict=True):
        by_class[name] += float(carried)
    assert by_class["host"] == pytest.approx(2 * 2 * size)
    assert run.engine.network.peak_used.max() <= 1 + 1e-9


def test_gpus_with_roots_of_their_own_do_not_share(models_of) -> None:
    """Two H100, each with its own PCIe branch, 256 GB/s of DRAM between them: as if alone."""
    models = models_of(2, home=False)
    trace, stream = one_step([[[0]], [[1]]], 2)
    table = times(1, 2, 500.0)
    setups = [setup(1, 2, 1), setup(1, 2, 1)]
    run, _ = simulated(models, trace, stream, setups, table, on_gpus(trace, 2))
    assert [m.copies.busy_us for m in run.memories] == pytest.approx([500.0, 500.0])


def test_nvme_is_a_link_of_the_host(models_of) -> None:
    """Four L40S of one socket read one expert of 12 MB each from two drives of 6.5 GB/s, 13 GB/s
    together. Alone: 80 us and 12 MB at 6 GB/s = 2,000 us. Together they need 4 x 12 MB / 13 GB/s =
    3,692.3 us after the 80 us."""
    models = models_of(4, home=False, cluster="l40s-pcie")
    trace, stream = one_step([[[0]], [[1]], [[2]], [[3]]], 4)
    size = 12e6
    rates = build_rates(load_model("debian-moe"), models.cluster.gpus[0], HostSpec())
    table = times(1, 4, float(rates.nvme_s(size)) * 1e6)
    assert table.load_s[0, 0] == pytest.approx(2080e-6)
    setups = [setup(1, 4, 1) for _ in range(4)]
    far = np.ones((1, 4), bool)
    run, result = simulated(
        models, trace, stream, setups, table, on_gpus(trace, 4), nvme=far, size=size
    )
    for memory in run.memories:
        assert memory.copies.busy_us == pytest.approx(80 + 4 * size / 13e3, rel=1e-6)
    figures = result.extra["offload"]
    assert figures["bytes_from_nvme"] == 4 * size
    assert figures["bytes_from_dram"] == 0
    assert figures["accesses"] == figures["fetched"] == 4


def test_experts_on_nvme_without_nvme(models_of) -> None:
    models = models_of(1, home=False)
    routes = replace(models.cluster.host_routes(), nvme_to_gpu=None, nvme_to_dram=None)
    trace, stream = one_step([[[0]]], 2)

    class Bare:
        name, speed_factor = "bare", models.cluster.speed_factor
        num_nodes, gpus = 1, models.cluster.gpus

        def host_routes(self):
            return routes

    bare = replace(models, cluster=Bare())
    with pytest.raises(MismatchError, match="has none"):
        simulated(bare, trace, stream, [setup(1, 2, 1)], times(1, 2), nvme=np.ones((1, 2), bool))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(0, 2),
    cpu=st.sampled_from(["none", "auto"]),
    gpus=st.sampled_from([1, 2, 4]),
)
def test_inv1_inv3_every_access_once_and_every_byte_counted(
    models_of, seed, depth, cpu, gpus
) -> None:
    """INV-1: each distinct expert of a GPU, layer and step is a hit, staged, fetched or computed by
    the CPU, once. INV-3: the GPUs' PCIe links carry what was copied, and none is overfull."""
    models = models_of(gpus, home=False, cluster="l40s-pcie", all_to_all="nccl")
    trace = TOYS.random_trace(seed, num_requests=5, tokens=8, layers=3)
    requests = TOYS.all_requests(trace)
    stream = decode_stream(requests, 3, seed=seed)
    rng = np.random.default_rng(seed)
    predicted = rng.integers(-1, 8, (stream.num_steps, 3, 2)).astype(np.int16)
    predicted[predicted[..., 0] == predicted[..., 1]] = -1
    one = setup(3, 8, 2, depth=depth, width=2, cpu=cpu)
    run, result = simulated(
        models, trace, stream, [one] * gpus, times(3, 8, 200.0), on_gpus(trace, gpus),
        predicted=predicted,
    )  # fmt: skip
    ids = np.asarray(trace.expert_ids)[stream.token_idx]
    steps = np.repeat(np.arange(stream.num_steps), np.diff(stream.indptr))
    for g, memory in enumerate(run.memories):
        c = memory.counts
        served = c.hits + c.staged + c.fetched + c.on_cpu
        for s in range(stream.num_steps):
            for layer in range(3):
                asked = {e for e in ids[steps == s, layer].ravel() if e * gpus // 8 == g}
                assert served[s, layer] == len(asked)
    assert run.engine.network.peak_used.max() <= 1 + 1e-9
    copied = sum(m.copies.bytes_moved.sum() for m in run.memories)
    host = np.array(models.links.classes) == "nvme"
    assert run.engine.network.bytes[host].sum() == 0
    moved = sum(
        int((m.counts.staged + m.counts.fetched + m.counts.wasted).sum()) for m in run.memories
    )
    assert copied <= moved * SIZE + 1e-6
    assert copied >= (moved - 2 * gpus * 3) * SIZE
    assert result.extra["offload"]["bytes_to_hbm"] == copied


def test_a_slow_gpu_computes_slower_and_copies_as_fast(one_gpu) -> None:
    """Half speed: gate 40 us, the expert arrives at 140 and takes 20, the tail 10: 170 us instead
    of 20 + 100 + 10 + 5 = 135."""
    trace, stream = one_step([[[0]]], 2)
    caches = caches_of(one_gpu, [setup(1, 2, 1)], times(1, 2))
    plain = OffloadRun(one_gpu, trace, stream, on_one_gpu(trace), caches).run()
    slow = OffloadRun(
        one_gpu, trace, stream, on_one_gpu(trace), caches,
        speed=GpuSpeeds(1, (SlowWindow(0, 0.5),)),
    ).run()  # fmt: skip
    assert plain.step_us.tolist() == pytest.approx([135.0])
    assert slow.step_us.tolist() == pytest.approx([170.0])


def test_waiting_is_not_work(one_gpu) -> None:
    """In the step above the GPU computes 35 us of 135 and waits 100."""
    trace, stream = one_step([[[0]]], 2)
    caches = caches_of(one_gpu, [setup(1, 2, 1)], times(1, 2))
    result = OffloadRun(one_gpu, trace, stream, on_one_gpu(trace), caches).run()
    assert result.gpu_busy[0, 0] == pytest.approx(35 / 135)
    assert result.waiting_us[0] == pytest.approx(100.0)
    assert result.extra["offload"]["stall_us"] == pytest.approx(100.0)


def test_rows_of_copies_and_cpu(one_gpu) -> None:
    """Layer 1 of two: expert 0 is fetched (20-120 us), expert 1 of layer 1 prefetched behind it
    (120-220), and the links carry both."""
    trace, stream = one_step([[[0], [1]]], 2)
    predicted = np.array([[[-1], [1]]], np.int16)
    caches = caches_of(one_gpu, [setup(2, 2, 0, depth=1, width=1)], times(2, 2), predicted)
    line = StepTimeline(one_gpu.links, 1, 1)
    OffloadRun(one_gpu, trace, stream, on_one_gpu(trace), caches, timeline=line).run()
    rows = {e["name"]: e for e in line.events if e["cat"] == "offload"}
    assert rows["fetch layer 0 expert 0"]["ts"] == pytest.approx(20)
    assert rows["fetch layer 0 expert 0"]["dur"] == pytest.approx(100)
    assert rows["prefetch layer 1 expert 1"]["ts"] == pytest.approx(120)
    links = {one_gpu.links.names[e["tid"]] for e in line.events if e["cat"] == "link"}
    assert "dram:0->host:0" in links
    assert "host copies" in line.to_json()


def test_same_bytes(one_gpu) -> None:
    """INV-6, timeline included."""
    trace = TOYS.random_trace(5, layers=3)
    stream: Stream = decode_stream(TOYS.all_requests(trace), 2)
    caches = caches_of(one_gpu, [setup(3, 8, 3, cpu="auto")], times(3, 8))
    lines = []
    for _ in range(2):
        line = StepTimeline(one_gpu.links, 1, 3)
        OffloadRun(one_gpu, trace, stream, on_one_gpu(trace), caches, timeline=line).run()
        lines.append(line.to_json())
    assert lines[0] == lines[1]
