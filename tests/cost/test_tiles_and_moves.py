"""Kernels that work tile by tile in waves, and row moves by fan."""

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
from moesim.cost.fitting_tiles import LARGE, SMALL, TileCases, fit_tiles
from moesim.cost.routing import Routed
from moesim.cost.step import build_step_model
from moesim.cost.tile_waves import Tile, TileWaves
from moesim.errors import FormatError
from moesim.model.names import AttentionSpec, ModelSpec

# h = i = 1000: an expert is a GEMM of 2000 columns and one of 1000, both 1000 deep. In bf16 a small
# tile, 100 columns wide, reads 0.2 MB. Ten run at once: a wave reads 2 MB, at 1000 GB/s 2 us; its
# 2 x 100 x 100 x 1000 x 10 flops are 0.2e9, at 200 TFLOPS 1 us, so memory counts.
# A large tile is 200 x 200: 4 MB a wave, 4 us; 0.8e9 flops, also 4 us.
TILED = ExpertGemmModel(
    "bf16",
    "k",
    2.0,
    10.0,
    1000.0,
    200.0,
    sharpness=64.0,
    waves=TileWaves(10, (Tile(100, 100, 128.0, empty_adds=0.5), Tile(200, 200)), 0.5),
)
LARGE_US = 4.0 * 2 ** (1 / 64)  # memory and arithmetic alike: the smooth maximum of 4 and 4


def test_waves_by_hand() -> None:
    # [250, 0, 150, 0]: mean 100, small tiles, 3 + 2 rows of them. 20 and 10 columns of tiles: 100
    # and 50 tiles, 10 and 5 waves of 2 us: 30 us. Of 500 rows 100 are empty: x (1 + 0.5 x 0.2).
    assert TILED.slots_time_us([250, 0, 150, 0], 1000, 1000) == pytest.approx(33)
    # One full row of tiles: 20 and 10 tiles, 2 waves and 1.
    assert TILED.slots_time_us([100, 0, 0, 0], 1000, 1000) == pytest.approx(6)
    # [300, 300]: large tiles, 2 + 2 rows of them, 10 and 5 columns: 4 waves and 2.
    assert TILED.slots_time_us([300, 300], 1000, 1000) == pytest.approx(6 * LARGE_US)
    # [150, 120]: one row each: 20 and 10 tiles, 2 waves and 1.
    assert TILED.slots_time_us([150, 120], 1000, 1000) == pytest.approx(3 * LARGE_US)
    # [150]: 10 and 5 tiles: the second GEMM fills half a wave, which counts 0.5 + 0.5 x 0.5.
    assert TILED.slots_time_us([150], 1000, 1000) == pytest.approx(1.75 * LARGE_US)
    assert TILED.layer_time_us([100, 0, 0, 0], 1000, 1000) == pytest.approx(16)
    # Without a gate both GEMMs have 10 columns of tiles: [100] is 1 wave and 1.
    assert TILED.slots_time_us([100, 0, 0, 0], 1000, 1000, 2) == pytest.approx(4)


def test_an_expert_by_itself_by_hand() -> None:
    # Its own tokens choose the tile, waves count in fractions, its last tile as half full.
    # 100 tokens: 3 waves of 2 us, x 1.25; 150: 1 + 0.5 waves of the large tile.
    # 129 tokens would be 1.5 waves too, 6.07 us, but 128 take 2 x 6 + 1.5: never less for more.
    times = TILED.expert_time_us([0, 100, 128, 129, 400, 600], 1000, 1000)
    assert times == pytest.approx([0, 7.5, 13.5, 13.5, 13.5, 4.5 * LARGE_US])


def test_a_token_more_can_take_less_time() -> None:
    """The anomaly of INV-9 that docs/calibration.md names: mean 128 against 129."""
    # 6 rows of small tiles, 18 waves of 2 us, 88 of 600 rows empty; 4 rows of large ones, 6 waves.
    slower = TILED.layer_time_us([256, 256, 0, 0], 1000, 1000)
    faster = TILED.layer_time_us([260, 256, 0, 0], 1000, 1000)
    assert slower == pytest.approx(10 + 36 * (1 + 0.5 * 88 / 600))
    assert faster == pytest.approx(10 + 6 * LARGE_US)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(0, 1e5), b=st.floats(0, 1e5))
def test_time_grows_with_an_experts_tokens(a: float, b: float) -> None:
    """INV-9 where only the expert's own tokens are known."""
    models = [TILED, *(m for m in load_calibration("h200-torch").experts.values())]
    for model in models:
        low, high = model.expert_time_us(sorted((a, b)), 2048, 1024)
        assert low <= high * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.lists(st.integers(0, 900), min_size=3, max_size=3), min_size=1, max_size=4)
)
def test_waves_against_counting_tiles(loads: list[list[int]]) -> None:
    """Tile after tile, in plain loops."""
    waves = TILED.waves
    assert waves is not None
    for load, found in zip(loads, TILED.slots_time_us(loads, 1000, 1000), strict=True):
        small = sum(load) // 3 <= 128
        rows, columns, full_us = (100, 100, 2.0) if small else (200, 200, LARGE_US)
        total = 0.0
        for width in (2000, 1000):
            tiles = sum(
                1 for n in load for _ in range(0, n, rows) for _ in range(0, width, columns)
            )
            full, rest = divmod(tiles, waves.at_once)
            share = rest / waves.at_once
            total += full_us * (full + (share + 0.5 * (1 - share) if rest else 0.0))
        if small and sum(load):
            room = rows * sum(-(-n // rows) for n in load)
            total *= 1 + 0.5 * (1 - sum(load) / room)
        assert found == pytest.approx(total)


def test_fit_finds_the_waves() -> None:
    rng = np.random.default_rng(0)
    sizes = [(2048, 1024), (4096, 2048)]
    tiles = (replace(SMALL, empty_adds=0.3), LARGE)
    truth = ExpertGemmModel(
        "bf16", "k", 2.0, 30.0, 3000.0, 600.0, sharpness=64.0, row_gb_per_s=3000.0,
        waves=TileWaves(66, tiles, 0.6),
    )  # fmt: skip
    counts = [
        rng.multinomial(int(mean * 16), rng.dirichlet(np.full(16, 2.0))).tolist()
        for mean in (1, 4, 16, 40, 64, 100, 128, 140, 200, 300, 500, 900, 1500, 3000)
        for _ in range(4)
    ]
    shapes = [sizes[k % 2] for k in range(len(counts))]
    times = [float(truth.layer_time_us(c, *s)) for c, s in zip(counts, shapes, strict=True)]
    cases = TileCases.of(counts, [s[0] for s in shapes], [s[1] for s in shapes], times)
    assert cases.predict_us(truth) == pytest.approx(times)
    found = fit_tiles(cases, replace(truth, waves=None), num_sms=132)
    assert np.abs(cases.predict_us(found) / times - 1).max() < 0.01
    assert (found.tflops, found.weight_gb_per_s) == pytest.approx((600, 3000), rel=0.02)
    assert found.waves is not None
    assert found.waves.at_once == 66
    assert found.waves.wave_share == pytest.approx(0.6, abs=0.05)
    assert found.waves.tiles[0].empty_adds == pytest.approx(0.3, abs=0.02)


HEAD = "format: moesim-calibration\nversion: 1\nname: t\ngpu: T\n"
EXPERTS = """expert_ffn:
- {dtype: bf16, kernel: k, weight_bytes_per_param: 2, launch_us: 10, weight_gb_per_s: 1000,
   tflops: 200, sharpness: 64,
   waves: {at_once: 10, wave_share: 0.5, tiles: [
     {rows: 100, columns: 100, mean_tokens: 128, empty_adds: 0.5}, {rows: 200, columns: 200}]}}
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
    assert made.expert_ffn("bf16") == TILED
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
        (EXPERTS.replace("wave_share: 0.5", "wave_share: 1.5"), "wave_share"),
        (EXPERTS.replace("mean_tokens: 128, ", ""), "mean_tokens must ascend"),
        (EXPERTS.replace("rows: 200, columns: 200", "rows: 200, columns: 0"), "columns"),
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
    # Half the width: the general entry, tile by GPU: means 97.5 and 150. Both GEMMs have 1000
    # columns, one 1000 deep and one 500: 3 + 1 rows of 10 small tiles, 4 waves of 2 and of 1 us, 10
    # of 400 rows empty; 2 + 2 rows of 5 large tiles, 2 waves of 4 and of 2 us.
    other = build_step_model(cluster, spec(1000, 500), calibration=calibration)
    want = [10 + 12 * (1 + 0.5 * 10 / 400), 10 + 3 * LARGE_US]
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
