"""Step cost: parts by hand on a made-up calibration, sums, monotonicity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.calibration import Calibration, load_calibration
from moesim.cost.collective import CollectiveCurve, CollectiveModel
from moesim.cost.curves import AffineMin
from moesim.cost.dense import AttentionKernel, DenseModel, GemmModel
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.model.names import load_model
from moesim.serving.batch import BatchShape, chunk_pairs
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.engines import ENGINES
from moesim.serving.row_cost import SMALL_KERNEL_US, SMALL_KERNELS
from moesim.serving.step_cost import EngineStepCost

SHARP = 64.0  # a maximum, near enough
QUIET = replace(
    ENGINES["vllm"], name="quiet", step_host_us=0.0, sequence_host_us=0.0, eager_layer_us=0.0
)


def toy_calibration(scale: float = 1.0) -> Calibration:
    """Round figures; `scale` multiplies every rate."""
    gemm = GemmModel("bf16", 2.0, 1.0, 1000.0 * scale, 100.0 * scale, SHARP, 1e9)
    decode = AttentionKernel("decode", 128, "bf16", 5.0, 1000.0 * scale, 1e6, SHARP)
    prefill = AttentionKernel("prefill", 128, "bf16", 7.0, 1e6, 100.0 * scale, SHARP)
    expert = ExpertGemmModel("bf16", "toy", 2.0, 10.0, 1000.0 * scale, 1e6, sharpness=SHARP)
    reduce = [
        CollectiveCurve("all_reduce", n, 1, AffineMin(((3.0, 100.0 * scale),))) for n in (2, 4, 8)
    ]
    gather = [
        CollectiveCurve("all_gather", n, 1, AffineMin(((2.0, 100.0 * scale),))) for n in (2, 4, 8)
    ]
    return Calibration(
        name="toy",
        gpu="toy",
        collectives=CollectiveModel([*reduce, *gather]),
        experts={("bf16", "toy"): expert},
        copies={},
        dense=DenseModel(
            {"bf16": gemm},
            {("decode", 128, "bf16"): decode, ("prefill", 128, "bf16"): prefill},
        ),
    )


def toy(tp: int = 1, scale: float = 1.0, **more: object) -> Deployment:
    return deploy(
        "Mixtral-8x7B",
        engine=QUIET,
        tp=tp,
        max_batch_tokens=2048,
        max_sequences=64,
        calibration=toy_calibration(scale),
        **more,  # type: ignore[arg-type]
    )


def gemm_us(m: float, n: float, k: float) -> float:
    moved = 2.0 * (n * k + m * k + m * n) / (1000.0 * 1e3)
    return 1.0 + max(moved, 2.0 * m * n * k / (100.0 * 1e6))


def test_decode_step_of_mixtral_by_hand() -> None:
    # 32 layers, hidden 4096, 32 query and 8 KV heads of 128, 8 experts of width 14336.
    cost = EngineStepCost(toy())
    parts = cost.breakdown(BatchShape.of(4, 4000))
    projections = gemm_us(4, 48 * 128, 4096) + gemm_us(4, 4096, 32 * 128)
    assert parts["projections"] == pytest.approx(32 * projections, rel=1e-3)
    # Keys and values of 4,000 tokens: 2 x 8 x 128 x 2 bytes each, at 1000 GB/s; launch 5.
    attention = 5.0 + 4000 * 2 * 8 * 128 * 2 / (1000.0 * 1e3)
    assert parts["attention"] == pytest.approx(32 * attention, rel=1e-3)
    assert parts["router"] == pytest.approx(32 * gemm_us(4, 8, 4096), rel=1e-3)
    assert parts["head"] == pytest.approx(
        gemm_us(4, 32000, 4096) + SMALL_KERNELS * SMALL_KERNEL_US, rel=1e-3
    )
    assert parts["communication"] == 0.0
    assert parts["host"] == 0.0
    # Experts: launch 10 and up to 8 active ones of 3 x 4096 x 14336 weights, 2 bytes, 1000 GB/s.
    one = 3 * 4096 * 14336 * 2 / (1000.0 * 1e3)
    active = (float(parts["experts"]) / 32 - 10.0) / one
    assert 2.0 <= active <= 8.0
    assert sum(float(v) for v in parts.values()) == pytest.approx(
        float(cost.step_us(BatchShape.of(4, 4000)))
    )


def test_prefill_attention_and_collectives_by_hand() -> None:
    cost = EngineStepCost(toy(tp=2))
    parts = cost.breakdown(BatchShape.of(prefill_tokens=1024))
    # 1024 x 1025 / 2 pairs, 4 x 16 heads x 128 operations each at 100 TFLOPS; launch 7.
    pairs = 1024 * 1025 / 2
    attention = 7.0 + pairs * 4 * 16 * 128 / (100.0 * 1e6)
    assert parts["attention"] == pytest.approx(32 * attention, rel=1e-3)
    # All-reduce of 1024 rows of 4096 x 2 bytes at 100 GB/s after 3 us: attention of every layer and
    # the embedding, then the experts of every layer.
    one = 3.0 + 1024 * 4096 * 2 / (100.0 * 1e3)
    assert parts["communication"] == pytest.approx((32 + 1 + 32) * one, rel=1e-3)


def test_a_gathered_layer_sums_the_rows_of_all_ranks() -> None:
    # Two DP ranks of 512 prompt tokens, top-2, hidden 4096, summed at 100 GB/s. Gathered, every
    # rank sums over all 1,024 tokens; with an all-to-all over its own 512.
    base = toy_calibration()
    expert = base.experts["bf16", "toy"]
    curve = CollectiveCurve("reduce_scatter", 2, 1, AffineMin(((2.0, 100.0),)))
    curves = [*base.collectives.curves, curve, replace(curve, kind="all_to_all")]
    base = replace(base, collectives=CollectiveModel(curves))
    batch = BatchShape.of(prefill_tokens=np.array([512.0, 512.0]))
    for comm, tokens in (("all_gather", 1024), ("nccl", 512)):
        times = []
        for rate in (None, 100.0):
            kernels = {("bf16", "toy"): replace(expert, token_gb_per_s=rate)}
            deployment = replace(
                toy(tp=1, dp=2, moe_comm=comm), calibration=replace(base, experts=kernels)
            )
            times.append(float(EngineStepCost(deployment).breakdown(batch)["experts"]))
        summed = tokens * 2 * 4096 * 2 / (100.0 * 1e3)
        assert times[1] - times[0] == pytest.approx(32 * summed, rel=1e-3)


def test_kernels_of_one_shape_go_before_the_engines_table() -> None:
    # bf16 experts of 2048 x 1408 were measured in vLLM, those cut in two (2048 x 704) were not.
    measured = load_calibration("h200-vllm-engine").expert_ffn("bf16", "vllm_ep", (2048, 1408))
    whole = deploy("DeepSeek-V2-Lite", "h200-sxm-ib", tp=1, dp=2, expert_dtype="bf16")
    cut = deploy("DeepSeek-V2-Lite", "h200-sxm-ib", tp=2, ep=1, expert_dtype="bf16")
    assert whole.moe_tp == 1
    assert EngineStepCost(whole)._of_moe.ranks.models[0] == measured
    assert EngineStepCost(cut)._of_moe.ranks.models[0].shape is None
    public = load_calibration("h200-vllm").expert_ffn("bf16", "vllm_tp")
    assert EngineStepCost(cut)._of_moe.ranks.models[0] == public


def test_a_chunk_has_the_pairs_of_its_cached_tokens() -> None:
    # A prompt of 6 in chunks of 4 and 2: 10 pairs, then 2 x 4 + 3 = 11, together 6 x 7 / 2 = 21.
    assert chunk_pairs(4) == 10
    assert chunk_pairs(2, 4) == 11
    assert chunk_pairs(6) == 21


def test_a_window_limits_what_a_decode_step_reads() -> None:
    # GPT-OSS: every other layer sees 128 tokens only.
    deployment = deploy("GPT-OSS-20B", engine=QUIET, tp=1)
    full, windowed = sorted(EngineStepCost(deployment).attention, key=lambda terms: terms.window)
    assert (full.window, windowed.window) == (0, 128)
    assert (full.num_layers, windowed.num_layers) == (12, 12)
    one = np.array([1.0])
    assert windowed.decode_us(one, np.array([128.0])) == windowed.decode_us(one, np.array([1e5]))
    assert full.decode_us(one, np.array([1e5])) > full.decode_us(one, np.array([128.0]))
    # A prompt of 1,000 tokens: 128 x 129 / 2 + 872 x 128 pairs instead of 500,500.
    short = replace(full, window=128).prefill_us(np.array([1000.0]), np.array([500_500.0]))
    same = full.prefill_us(np.array([1000.0]), np.array([128 * 129 / 2 + 872 * 128.0]))
    assert short == pytest.approx(same)


@pytest.mark.parametrize(
    ("model", "dense_dtype", "kernels"),
    [
        # 48 layers, all MoE, grouped attention: 2 norms, 2 of routing, 2 of attention.
        ("Qwen3-30B-A3B", "bf16", 48 * (2 + 2 + 2)),
        # In fp8 the inputs of two GEMMs are quantised.
        ("Qwen3-30B-A3B", "fp8", 48 * (2 + 2 + 4)),
        # 61 layers, 58 of them MoE, latent attention measured whole; an activation and two
        # quantised inputs of the 58 shared experts and 3 dense layers.
        ("DeepSeek-V3", "fp8", 61 * 2 + 58 * 2 + 61 * 3),
    ],
)
def test_small_kernels_are_counted_by_what_a_layer_has(
    model: str, dense_dtype: str, kernels: int
) -> None:
    quiet = replace(QUIET, kernel_us=0.0)
    cost = EngineStepCost(deploy(model, engine=quiet, tp=8, dense_dtype=dense_dtype))
    slow = cost.with_engine(replace(quiet, kernel_us=1.5))
    decode = BatchShape.of(4, 400)
    assert slow.step_us(decode) - cost.step_us(decode) == pytest.approx(1.5 * kernels)


def test_rotary_embedding_and_cache_write_are_counted_by_token() -> None:
    """Qwen3-30B-A3B on TP8: 32 / 8 query heads and ceil(4 / 8) key heads of 128, in and out in
    bf16: (4 + 1) x 128 x 2 x 2 bytes = 2,560; at 2 TB/s 1.28 ns, and 3 ns for the cache, in each of
    48 layers: 205.44 ns a token. Latent attention is measured with them."""
    tokens = 1000
    prefill = BatchShape.of(prefill_tokens=tokens)
    found = {}
    for model in ("Qwen3-30B-A3B", "DeepSeek-V3"):
        none = replace(QUIET, rotary_gb_per_s=None, cache_write_ns=0.0)
        plain = EngineStepCost(deploy(model, engine=none, tp=8))
        engine = replace(QUIET, rotary_gb_per_s=2000.0, cache_write_ns=3.0)
        more = EngineStepCost(deploy(model, engine=engine, tp=8))
        parts = [cost.breakdown(prefill)["elementwise"] for cost in (plain, more)]
        found[model] = float(parts[1] - parts[0])
    assert found["Qwen3-30B-A3B"] == pytest.approx(0.20544 * tokens, rel=1e-3)
    assert found["DeepSeek-V3"] == 0.0


def test_host_time_is_added_and_so_are_gaps_of_a_prefill_step() -> None:
    """32 layers of 50 us each where the step has prompt tokens that no graph replays."""
    engine = replace(QUIET, step_host_us=100.0, sequence_host_us=3.0, eager_layer_us=50.0)
    quiet = EngineStepCost(toy())
    slow = quiet.with_engine(engine)
    decode = BatchShape.of(4, 400)
    assert slow.step_us(decode) == pytest.approx(quiet.step_us(decode) + 100.0 + 4 * 3.0)
    prefill = BatchShape.of(prefill_tokens=600)
    assert slow.step_us(prefill) == pytest.approx(quiet.step_us(prefill) + 32 * 50 + 100.0 + 3.0)


def test_a_prefill_step_takes_at_least_what_its_layers_take_to_enqueue() -> None:
    """32 layers of 5,000 us where the GPU has less to do; what the step adds otherwise."""
    quiet = EngineStepCost(toy())
    engine = replace(QUIET, step_host_us=7.0, prompt_step_us=500.0, enqueue_layer_us=5000.0)
    slow = quiet.with_engine(engine)
    small, large = (BatchShape.of(prefill_tokens=n, prefill_pairs=n * n / 2) for n in (600, 8000))
    assert float(quiet.step_us(small)) < 159_000
    assert slow.step_us(small) == pytest.approx(160_000 + 7.0)
    gpu = max(float(quiet.step_us(large)) + 500.0, 160_000.0)
    assert slow.step_us(large) == pytest.approx(gpu + 7.0)
    assert slow.one_us([0.0], [0.0], [600.0], [180_000.0], [0.0]) == pytest.approx(160_000 + 7.0)
    decode = BatchShape.of(4, 400)
    assert slow.step_us(decode) == pytest.approx(quiet.step_us(decode) + 7.0)


@pytest.mark.parametrize(
    "shape",
    [
        {"tp": 8},
        {"dp": 8},
        {"dp": 4, "tp": 2, "ep": 8},
        {"tp": 8, "ep": 8},
        {"dp": 4, "tp": 2, "ep": 2, "moe_tp": 4},
    ],
)
def test_one_step_by_plain_numbers_equals_the_arrays(shape: dict[str, int]) -> None:
    cost = EngineStepCost(deploy("Qwen3-30B-A3B", **shape))  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    ranks = cost.deployment.dp
    for _ in range(20):
        decode = rng.integers(0, 40, ranks) * 1.0
        context = decode * rng.integers(1, 4000, ranks)
        prompt = rng.integers(0, 3, ranks) * 512.0
        pairs, count = chunk_pairs(prompt), (prompt > 0) * 1.0
        batch = BatchShape.of(decode, context, prompt, pairs, count)
        one = cost.one_us(*(a.tolist() for a in (decode, context, prompt, pairs, count)))
        assert one == pytest.approx(float(cost.step_us(batch)))
        assert one == pytest.approx(sum(float(v) for v in cost.breakdown(batch).values()))


@pytest.fixture(scope="module")
def costs() -> dict[float, EngineStepCost]:
    return {scale: EngineStepCost(toy(tp=2, scale=scale)) for scale in (1.0, 2.0)}


@settings(max_examples=60, deadline=None)
@given(
    decode=st.integers(0, 60),
    context=st.integers(1, 8000),
    prompt=st.integers(0, 1900),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4000), st.integers(0, 100)),
)
def test_more_tokens_never_faster_and_more_bandwidth_never_slower(
    costs: dict[float, EngineStepCost],
    decode: int,
    context: int,
    prompt: int,
    more: tuple[int, int, int],
) -> None:
    """INV-9 for whole steps."""
    few = BatchShape.of(decode, decode * context, prompt)
    many = BatchShape.of(
        decode + more[0], (decode + more[0]) * (context + more[1]), prompt + more[2]
    )
    assert costs[1.0].step_us(few) <= costs[1.0].step_us(many) + 1e-6
    assert costs[2.0].step_us(many) <= costs[1.0].step_us(many) + 1e-6


def test_steps_on_the_bundled_calibrations_grow_with_tokens() -> None:
    for name, engine in (("DeepSeek-V3", "sglang"), ("GPT-OSS-120B", "vllm")):
        cost = EngineStepCost(deploy(name, engine=engine, tp=8))
        rows = np.unique(np.geomspace(1, 8000, 60).astype(int))[:, None] * 1.0
        decode = cost.step_us(BatchShape.of(np.minimum(rows, 1000), rows * 500))
        prefill = cost.step_us(BatchShape.of(prefill_tokens=rows))
        assert np.all(np.diff(decode) >= -1e-6)
        assert np.all(np.diff(prefill) >= -1e-6)


def test_an_empty_step_costs_nothing_and_the_basis_is_assumed() -> None:
    cost = EngineStepCost(toy())
    assert cost.step_us(BatchShape.of()) == 0.0
    assert cost.one_us([0.0], [0.0], [0.0], [0.0], [0.0]) == 0.0
    assert cost.basis == "assumed"


def test_skewed_routing_over_few_gpus_costs_more_than_even() -> None:
    from moesim.serving.moe_load import ExpertSlots, assumed_load, layer_us

    model = load_model("Qwen3-30B-A3B")
    kernel = ExpertGemmModel("bf16", "toy", 2.0, 0.0, 1e6, 100.0)
    gpu = np.arange(128) * 8 // 128
    times = []
    for skew in (0.0, 0.6, 1.2):
        load = assumed_load(128, 8, skew)
        assert load.inclusion.sum(axis=1) == pytest.approx(8.0)
        expert = np.tile(np.arange(128), (len(load.inclusion), 1))
        slots = ExpertSlots(gpu, expert, np.ones(expert.shape))
        one = np.zeros(8, np.int64)
        times.append(layer_us(load, [kernel], one, slots, 8192, 1024, 8, (2048, 768, 3)))
    assert times == sorted(times)
    assert model.top_k == 8


def test_parts_beside_and_around_the_experts_by_hand() -> None:
    # Two dense parts of width 4096 in each of 32 MoE layers: up 2 x 4096 wide, down, two GEMMs;
    # latent experts of 1024: a projection each way, timed as one GEMM of 2048 columns.
    model = replace(
        load_model("Mixtral-8x7B"),
        dense_intermediate_size=4096,
        moe_dense_ffns=2,
        expert_hidden_size=1024,
    )
    deployment = replace(toy(), model=model)
    parts = EngineStepCost(deployment).breakdown(BatchShape.of(4, 4000))
    ffn = gemm_us(4, 2 * 4096, 4096) + gemm_us(4, 4096, 4096)
    assert parts["dense_ffn"] == pytest.approx(64 * ffn, rel=1e-3)
    assert parts["latent_projections"] == pytest.approx(32 * gemm_us(4, 2048, 4096), rel=1e-3)
    # Of 8 real and 8 zero experts a token's two choices are one real one.
    zero = replace(load_model("Mixtral-8x7B"), num_zero_experts=8)
    half = EngineStepCost(replace(toy(), model=zero)).breakdown(BatchShape.of(4, 4000))
    one = replace(load_model("Mixtral-8x7B"), top_k=1)
    same = EngineStepCost(replace(toy(), model=one)).breakdown(BatchShape.of(4, 4000))
    assert half["experts"] == same["experts"]
