"""Kernels that choose their tile by the mean tokens a slot, and row moves by fan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster import load_cluster
from moesim.cost.calibration import calibration_names, load_calibration, parse_calibration
from moesim.cost.copies import CopyModel
from moesim.cost.curves import AffineMin
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting_tiles import TileCases, fit_tiles
from moesim.cost.routing import Routed
from moesim.cost.step import build_step_model
from moesim.errors import FormatError
from moesim.modelspec import AttentionSpec, ModelSpec

# h = i = 1000: 6e6 flops a token, 1 us for 100 tokens at 600 TFLOPS; weights 6 MB, 3 us at
# 2000 GB/s; sharpness 64: a maximum.
PLAIN = ExpertGemmModel("bf16", "k", 2.0, 10.0, 2000.0, 600.0, tile_tokens=256, sharpness=64.0)
TILED = replace(
    PLAIN,
    pad_share=0.5,
    few=replace(PLAIN, tflops=300.0, tile_tokens=128),
    few_up_to=128.0,
)


def test_two_tiles_by_hand() -> None:
    # 300 tokens, larger tile: two tiles are 512, half of the padding counts: 406 -> 4.06 us.
    # Smaller tile: three of 128 are 384, at half the rate: 7.68 us.
    assert TILED.expert_time_us([300], 1000, 1000, mean_tokens=129) == pytest.approx([4.06])
    assert TILED.expert_time_us([300], 1000, 1000, mean_tokens=128.9) == pytest.approx([7.68])
    # A layer of [300, 0, 90, 0]: mean 97.5, smaller tile: 7.68 + max(3, 2.56) + 10 us of launch.
    # [300, 300, 0, 0]: mean 150, larger tile: 2 x 4.06 + 10.
    assert TILED.layer_time_us([300, 0, 90, 0], 1000, 1000) == pytest.approx(20.68)
    assert TILED.layer_time_us([300, 300, 0, 0], 1000, 1000) == pytest.approx(18.12)


def test_a_token_more_can_take_less_time() -> None:
    """The anomaly of INV-9 that docs/calibration.md names: mean 128 against 129."""
    slower = TILED.layer_time_us([256, 256, 0, 0], 1000, 1000)
    faster = TILED.layer_time_us([260, 256, 0, 0], 1000, 1000)
    assert (slower, faster) == (pytest.approx(20.24), pytest.approx(10 + 3 + 3.86))


@settings(max_examples=60, deadline=None)
@given(a=st.floats(0, 1e5), b=st.floats(0, 1e5), mean=st.one_of(st.none(), st.floats(0, 1e4)))
def test_time_grows_with_an_experts_tokens(a: float, b: float, mean: float | None) -> None:
    """INV-9 at a given tile, and where only the expert's own tokens are known."""
    models = [TILED, *(m for m in load_calibration("h200-torch").experts.values())]
    for model in models:
        low, high = model.expert_time_us(sorted((a, b)), 2048, 1024, mean_tokens=mean)
        assert low <= high * (1 + 1e-12)


def test_fit_finds_both_tiles() -> None:
    rng = np.random.default_rng(0)
    truth = replace(TILED, row_gb_per_s=3000.0, few=replace(TILED.few, row_gb_per_s=3000.0))
    counts = [
        rng.multinomial(int(mean * 16), rng.dirichlet(np.full(16, 2.0))).tolist()
        for mean in (1, 4, 16, 40, 64, 100, 128, 140, 200, 300, 500, 900, 1500, 3000)
        for _ in range(3)
    ]
    times = [float(truth.layer_time_us(c, 1000, 1000)) for c in counts]
    cases = TileCases.of(counts, [1000] * len(counts), [1000] * len(counts), times)
    assert cases.predict_us(truth) == pytest.approx(times)
    found = fit_tiles(cases, truth)
    errors = np.abs(cases.predict_us(found) / times - 1)
    assert np.median(errors) < 0.01
    assert np.percentile(errors, 90) < 0.03
    assert found.tflops == pytest.approx(600, rel=0.05)
    assert found.few is not None
    assert found.few.tflops == pytest.approx(300, rel=0.05)
    assert found.pad_share == pytest.approx(0.5, abs=0.1)


HEAD = "format: moesim-calibration\nversion: 1\nname: t\ngpu: T\n"
EXPERTS = """expert_ffn:
- {dtype: bf16, kernel: k, weight_bytes_per_param: 2, launch_us: 10, weight_gb_per_s: 2000,
   tflops: 600, sharpness: 64, tile_tokens: 256, pad_share: 0.5,
   few: {mean_tokens: 128, tflops: 300, tile_tokens: 128}}
- {dtype: bf16, kernel: k 1000x1000, shape: [1000, 1000], weight_bytes_per_param: 2, launch_us: 20,
   weight_gb_per_s: 2000, tflops: 600, sharpness: 64}
collectives:
- {kind: all_to_all_v, group_size: 2, nvlink: [[5, 2]]}
"""


def test_file_with_tiles_shapes_and_fans() -> None:
    copies = "copies:\n" + "".join(
        f"- {{direction: reduce, fan: {fan}, latency_us: {latency}, gb_per_s: 1}}\n"
        for fan, latency in ((8, 1), (1, 9))
    )
    made = parse_calibration(HEAD + EXPERTS + copies)
    assert made.expert_ffn("bf16") == replace(TILED, few=replace(TILED.few, pad_share=1.0))
    assert made.expert_ffn("bf16", shape=(1000, 1000)).launch_us == 20.0
    assert made.expert_ffn("bf16", shape=(1000, 2000)).launch_us == 10.0
    move = made.copy("reduce")
    assert [fan for fan, _ in move.fans] == [8.0]
    assert float(move.time_us(0)) == 9.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            EXPERTS.split("- {dtype: bf16, kernel: k,")[0]
            + "- {dtype: bf16, kernel: k 1000x1000"
            + EXPERTS.split("kernel: k 1000x1000")[1],
            "must be for any shape",
        ),
        ("copies:\n- {direction: reduce, fan: 8, latency_us: 1, gb_per_s: 1}\n", "one of fan 1"),
        ("copies:\n" + 2 * "- {direction: h2d, latency_us: 1, gb_per_s: 1}\n", "one entry a fan"),
        (EXPERTS.replace("pad_share: 0.5", "pad_share: 1.5"), "pad_share"),
        (EXPERTS.replace("mean_tokens: 128, ", ""), "mean_tokens"),
    ],
)
def test_wrong_entries_are_refused(text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_calibration(HEAD + text)


def spec(hidden: int, width: int) -> ModelSpec:
    return ModelSpec(
        name="m",
        source="test",
        num_hidden_layers=1,
        moe_layer_ids=(0,),
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=4,
        top_k=1,
        vocab_size=1,
        attention=AttentionSpec("gqa", 1, 1, 64),
        expert_dtype="bf16",
    )


def test_step_model_takes_the_shapes_entry_and_the_layers_tile() -> None:
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    calibration = parse_calibration(HEAD + EXPERTS)
    tokens = np.array([[[300, 0, 90, 0, 300, 300, 0, 0]]], np.int32)
    none = np.zeros((1, 1), np.int64)
    routed = Routed(tokens, np.zeros((1, 1, 2, 2), np.int32), none, none, np.array([990]))
    own = build_step_model(cluster, spec(1000, 1000), calibration=calibration)
    assert own.experts[0].launch_us == 20.0
    # Plain entry: 20 us, then max(3 us, tokens / 100) each.
    assert own.compute_us(routed)[0, 0] == pytest.approx([26, 26], rel=3e-3)
    # Half the width halves weights and work: the general entry, tile by GPU: means 97.5 and 150.
    other = build_step_model(cluster, spec(1000, 500), calibration=calibration)
    want = [10 + 3.84 + 1.5, 10 + 2 * 2.03]
    assert other.compute_us(routed)[0, 0] == pytest.approx(want)


def test_row_moves_by_hand() -> None:
    # 1 us a row on the larger side and 3 on the smaller, 1000-byte rows; so fan f costs
    # (1 + 3 / f) us a row, (1 + 3 / f) / (1 + 1 / f) us for 1000 bytes: 2 at fan 1, 11 / 9 at 8.
    curves = {
        fan: AffineMin(((1e-9, 1e-3 * (1 + 1 / fan) / (1 + 3 / fan) * 1000),)) for fan in (1, 2, 8)
    }
    move = CopyModel("reduce", curves[1], fans=((2.0, curves[2]), (8.0, curves[8])))
    many, few = np.array([80, 80, 80, 80, 0]), np.array([80, 40, 20, 10, 0])
    assert move.rows_us(many, few, 1000.0) == pytest.approx([320, 200, 140, 110, 0])
    # Beyond the largest fan nothing was measured: its curve holds. Without fans bytes tell.
    assert move.rows_us(80, 1, 1000.0) == pytest.approx(110)
    assert CopyModel("reduce", curves[1]).rows_us(80, 20, 1000.0) == pytest.approx(200)


def test_own_measurements_are_bundled() -> None:
    assert "h200-torch" in calibration_names()
    made = load_calibration("h200-torch")
    assert made.gpu == "NVIDIA H200"
    shapes = {m.shape for m in made.experts.values()}
    assert {None, (4096, 14336), (2048, 1024), (2048, 768), (2880, 2880), (2048, 1408)} == shapes
    assert [fan for fan, _ in made.copy("reduce").fans] == [2.0, 8.0]
    assert {"collective", "ffn", "permute", "reduce"} <= set(made.issue_us)
    assert made.collective("all_to_all_v", 2).basis == "measured"
