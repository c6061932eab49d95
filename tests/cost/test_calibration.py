"""Loading calibrations, and the arithmetic of the models in them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.calibration import (
    MAX_FILE_BYTES,
    calibration_names,
    load_calibration,
    parse_calibration,
)
from moesim.cost.collective import (
    ASSUMED_INTER_NODE_LATENCY_US,
    ASSUMED_NIC_EFFICIENCY,
    ASSUMED_PEER_US,
    CollectiveCurve,
)
from moesim.cost.curves import AffineMin, power_mean_max
from moesim.cost.datasheet import GpuFigures, datasheet_models
from moesim.cost.dense import AttentionKernel, GemmModel, causal_pairs
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.errors import FormatError, InputError, MoesimError, UnknownNameError
from moesim.model.names import load_model

HEAD = "format: moesim-calibration\nversion: 1\nname: t\ngpu: T\n"


def test_bundled_files_load_and_stay_small() -> None:
    names = calibration_names()
    assert {"h100", "h200", "gb200"} <= set(names)
    for name in names:
        calibration = load_calibration(name)
        assert calibration.name == name
        used = {c.source for c in calibration.collectives.curves}
        used |= {m.source for m in calibration.experts.values()}
        assert used <= set(calibration.sources), "every source id is explained"
    import moesim.topologies

    folder = Path(next(iter(moesim.topologies.__path__))) / "calibration"
    assert all(f.stat().st_size < 60_000 for f in folder.glob("*.yaml"))


def test_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="h100"):
        load_calibration("h10")


def test_file_path_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    with pytest.raises(InputError, match="cannot read"):
        load_calibration(path)
    path.write_text(HEAD)
    assert load_calibration(path).name == "t"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_calibration(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InputError, match="larger than"):
        load_calibration(path)


ENTRY = "  - {{kind: all_to_all, group_size: 2, {}}}\n"
EXPERT = "  - {{dtype: bf16, kernel: k, weight_bytes_per_param: 2, {}}}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no mapping"),
        ("[1, 2]", "no mapping"),
        ("a: [1", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
        (HEAD.replace("version: 1", "version: 2"), "version"),
        (HEAD.replace("moesim-calibration", "moesim-plan"), "format"),
        (HEAD + "colectives: []\n", "colectives"),
        (HEAD + "collectives:\n" + ENTRY.format("nvlink: []"), "at least one"),
        (HEAD + "collectives:\n" + ENTRY.format("nvlink: [[1, -3]]"), "greater than 0"),
        (HEAD + "collectives:\n" + ENTRY.format("nvlink: [[1, .nan]]"), "finite number"),
        (HEAD + "collectives:\n" + ENTRY.format("nvlink: [[.inf, 1]]"), "finite number"),
        (HEAD + "collectives:\n" + ENTRY.format("table: [[1, 5]]"), "2 to"),
        (HEAD + "collectives:\n" + ENTRY.format("table: [[1, 5], [1, 6]]"), "distinct"),
        (HEAD + "collectives:\n" + ENTRY.format("table: [[1, 5], [2, 0]]"), "positive"),
        (
            HEAD + "collectives:\n" + ENTRY.format("table: [[1, 5], [2, 6]], nvlink: [[1, 1]]"),
            "either",
        ),
        (HEAD + "collectives:\n" + ENTRY.format("num_nodes: 4, nvlink: [[1, 1]]"), "more nodes"),
        (HEAD + "collectives:\n" + ENTRY.replace("all_to_all", "b").format("x: 1"), "collectives"),
        (HEAD + "expert_ffn:\n" + EXPERT.format("launch_us: 1"), "needs launch_us"),
        (HEAD + "expert_ffn:\n" + EXPERT.format("table: [[1, 1, 1, 1, 1, 1]]"), "6 to"),
        (
            HEAD + "expert_ffn:\n" + EXPERT.format(f"table: {[[8, 8, 9, 4, 4, 1]] * 6}"),
            "consistent",
        ),
        (HEAD + "copies:\n  - {direction: h2d, latency_us: 3}\n", "either"),
        (HEAD + "collectives:\n" + ENTRY.format("share: 0.5, nvlink: [[1, 1]]"), "uneven"),
        (
            HEAD + "copies:\n  - {direction: reduce, pinned: false, latency_us: 3, gb_per_s: 1}\n",
            "no host memory",
        ),
    ],
)
def test_bad_files_name_the_field(text: str, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_calibration(text, where="bad.yaml")
    assert "bad.yaml" in caught.value.cause
    assert says in caught.value.cause
    assert caught.value.remedy


def test_concave_pieces_by_hand() -> None:
    # 1 MB at 100 GB/s is 10 us, at 200 GB/s 5 us: pieces cost 5 + 10 = 15 and 12 + 5 = 17.
    curve = AffineMin(((5.0, 100.0), (12.0, 200.0)))
    assert curve.time_us(1e6) == pytest.approx(15.0)
    # 2 MB: 5 + 20 = 25 and 12 + 10 = 22.
    assert curve.time_us(2e6) == pytest.approx(22.0)
    assert curve.latency_us == 5.0
    assert curve.time_us(0) == 5.0


def test_collective_is_the_slower_link_plus_overhead() -> None:
    curve = CollectiveCurve(
        "all_to_all_v",
        16,
        2,
        nvlink=AffineMin(((5.0, 100.0),)),
        nic=AffineMin(((20.0, 50.0),)),
        overhead_us=3.0,
        local_gb_per_s=1000.0,
    )
    # NVLink 5 + 10 = 15, NIC 20 + 20 = 40, local 30.
    assert curve.time_us(1e6, 1e6, 30e6) == pytest.approx(43.0)
    # Local copy of 60 MB at 1000 GB/s takes 60 us.
    assert curve.time_us(1e6, 1e6, 60e6) == pytest.approx(63.0)
    assert curve.latency_us == 23.0
    # The NIC must carry 1 MB in the 20 us after the latency: 50 GB/s.
    assert curve.effective_gb_per_s(1e6, 1e6, link="nic") == pytest.approx(50.0)
    assert curve.effective_gb_per_s(0.0, 0.0) == np.inf


TABLE = (
    HEAD
    + """
collectives:
  - {kind: all_to_all, group_size: 2, table: [[4000, 30, 1], [1000, 10, 1], [16000, 20, 2]]}
  - {kind: all_to_all, group_size: 8, table: [[1000, 40], [4000, 160]]}
overheads: {eager_collective_us: 7, local_copy_gb_per_s: 500}
"""
)


def test_tables_interpolate_in_logs_and_flag_what_lies_outside() -> None:
    calibration = parse_calibration(TABLE)
    curve = calibration.collective("all_to_all", 2)
    # Half-way between 1000 and 4000 in logs is 2000; sqrt(10 * 30) us.
    assert curve.time_us(2000) == pytest.approx(np.sqrt(300))
    # The dip at 16000 cannot be real: 30 us hold; then in proportion to size.
    assert curve.time_us(16000) == pytest.approx(30)
    assert curve.time_us(32000) == pytest.approx(60)
    assert curve.evaluate(10).time_us == pytest.approx(10)
    assert curve.evaluate(16000).in_range
    assert curve.evaluate(16001).extrapolated
    assert calibration.collectives.time_us("all_to_all", 2, 1, 2000) == curve.time_us(2000)
    assert calibration.collective("all_to_all", 2, eager=True).time_us(1000) == pytest.approx(17)


def test_group_sizes_between_are_interpolated_and_beyond_are_flagged() -> None:
    calibration = parse_calibration(TABLE)
    # 4 is half-way between 2 and 8 in logs: sqrt(10 * 40) us at 1000 bytes.
    between = calibration.collective("all_to_all", 4).evaluate(1000)
    assert between.time_us == pytest.approx(20)
    assert between.in_range
    beyond = calibration.collective("all_to_all", 16).evaluate(1000)
    assert beyond.time_us == pytest.approx(40)
    assert beyond.extrapolated


def test_stand_ins_and_unknown_kinds() -> None:
    calibration = parse_calibration(TABLE)
    uneven = calibration.collective("all_to_all_v", 2)
    assert uneven.kind == "all_to_all_v"
    assert uneven.local_gb_per_s == 500
    assert calibration.collective("all_to_all", 2).local_gb_per_s is None
    assert calibration.collective("p2p", 2).time_us(1000) == pytest.approx(10)
    with pytest.raises(UnknownNameError, match="all_gathr"):
        calibration.collective("all_gathr", 2)


def test_several_nodes_without_measurement_are_assumed() -> None:
    calibration = parse_calibration(TABLE)
    curve = calibration.collective("all_to_all", 4, num_nodes=2, nic_gb_per_s=25.0)
    # Two ranks a node: the curve of 2, two GPUs of the other node, a NIC of 25 GB/s x 0.85.
    latency = 10 + ASSUMED_INTER_NODE_LATENCY_US + 2 * ASSUMED_PEER_US
    expected = latency + 1e6 / (25e3 * ASSUMED_NIC_EFFICIENCY)
    answer = curve.evaluate(1000, 1e6)
    assert answer.time_us == pytest.approx(expected)
    assert answer.basis == "assumed"
    assert answer.extrapolated


def test_measured_nodes_are_used_and_others_flagged() -> None:
    h100 = load_calibration("h100")
    measured = h100.collective("deepep_normal_dispatch", 16, 2)
    assert measured.evaluate(1e6, 1e6).in_range
    assert measured.num_sms == 20
    assert h100.collective("deepep_normal_dispatch", 16, 2, num_sms=9).num_sms == 8
    assert h100.collective("deepep_normal_dispatch", 128, 16).evaluate(1e6, 1e6).extrapolated


def expert(**changes: object) -> ExpertGemmModel:
    fields: dict[str, object] = {
        "dtype": "bf16",
        "kernel": "k",
        "weight_bytes_per_param": 2.0,
        "launch_us": 10.0,
        "weight_gb_per_s": 2000.0,
        "tflops": 500.0,
        "sharpness": 64.0,
    }
    return ExpertGemmModel(**(fields | changes))  # type: ignore[arg-type]


def test_expert_time_by_hand() -> None:
    # h = i = 1000: 3e6 weights, 6 MB at 2000 GB/s = 3 us; a token is 6e6 flops, 0.012 us at 500
    # TFLOPS. 100 tokens are memory bound (1.2 us of arithmetic), 1000 take 12 us.
    model = expert()
    times = model.expert_time_us([0, 100, 1000], 1000, 1000)
    assert times == pytest.approx([0.0, 3.0, 12.0], rel=1e-3)
    # Idle experts cost nothing, the launch is paid once.
    assert model.layer_time_us([0, 100, 1000], 1000, 1000) == pytest.approx(25.0, rel=1e-3)
    # Without a gate there are two matrices instead of three.
    assert model.expert_time_us([1000], 1000, 1000, 2) == pytest.approx([8.0], rel=1e-3)


def test_expert_tile_half_rate_and_rows_by_hand() -> None:
    # 130 tokens fill three tiles of 64: 192; plus 8 of ramp: 200 x 0.012 = 2.4 us, times 2 with
    # q = 1: 3 + 2.4. Rows: 130 x 2 (2000 + 3000) bytes = 1.3 MB at 650 GB/s = 2 us.
    model = expert(tile_tokens=64, half_tokens=8.0, sharpness=1.0, row_gb_per_s=650.0)
    assert model.expert_time_us([130], 1000, 1000) == pytest.approx([7.4])
    # 10 input tokens x 8 rows x 1000 x 2 bytes = 160 kB at 16 GB/s = 10 us.
    assert expert(token_gb_per_s=16.0).token_overhead_us(10, 8, 1000) == pytest.approx(10.0)
    assert expert().token_overhead_us(10, 8, 1000) == 0.0


def test_expert_lookup_table_and_ranges() -> None:
    model = expert(ranges={"tokens_per_expert": (1.0, 100.0), "params_per_expert": (3e6, 3e6)})
    table = model.time_table_us(50, 1000, 1000)
    assert table.shape == (51,)
    assert np.array_equal(table[[0, 7, 50]], model.expert_time_us([0, 7, 50], 1000, 1000))
    assert model.evaluate([0, 100], 1000, 1000).in_range
    assert model.evaluate([101], 1000, 1000).extrapolated
    assert model.evaluate([1], 1000, 2000).extrapolated


def test_eager_launch_is_separate() -> None:
    assert expert().layer_launch_us(eager=True) == 10.0
    assert expert(eager_launch_us=60.0).layer_launch_us(eager=True) == 60.0
    assert expert(eager_launch_us=60.0).layer_launch_us() == 10.0


def test_expert_dtypes_and_kernels_are_found_or_named() -> None:
    h100 = load_calibration("h100")
    assert h100.expert_ffn("fp16").dtype == "bf16"
    assert h100.expert_ffn("bf16", "torch_grouped_mm").eager_launch_us is not None
    with pytest.raises(UnknownNameError, match="nvfp4"):
        h100.expert_ffn("nvfp4")
    with pytest.raises(UnknownNameError, match="torch_grouped"):
        h100.expert_ffn("bf16", "torch_grouped")


def test_a_users_expert_table_is_fitted_on_loading() -> None:
    truth = expert(sharpness=3.0)
    rows = []
    for hidden, inter in ((1024, 2048), (4096, 1024)):
        for active, each in ((4, 1), (4, 64), (8, 512), (8, 4096), (2, 8192)):
            us = float(truth.layer_time_us([each] * active, hidden, inter))
            rows.append([hidden, inter, active, active * each, each, round(us, 3)])
    entry = f"  - {{dtype: bf16, kernel: mine, weight_bytes_per_param: 2, table: {rows}}}\n"
    model = parse_calibration(HEAD + "expert_ffn:\n" + entry).expert_ffn("bf16")
    predicted = model.layer_time_us([300] * 8, 2048, 2048)
    assert predicted == pytest.approx(truth.layer_time_us([300] * 8, 2048, 2048), rel=0.1)
    assert model.ranges["tokens_per_expert"] == (1.0, 8192.0)


def test_host_copies() -> None:
    text = HEAD + "copies:\n  - {direction: h2d, floor_us: 20, latency_us: 10, gb_per_s: 50}\n"
    copy = parse_calibration(text).copy("h2d")
    # 100 kB: 10 + 2 us, below the floor; 10 MB: 10 + 200 us.
    assert copy.time_us([1e5, 1e7]) == pytest.approx([20.0, 210.0])
    with pytest.raises(UnknownNameError, match="d2h"):
        parse_calibration(text).copy("d2h")


def test_host_copies_by_memory_and_company() -> None:
    each = "  - {{direction: {}, pinned: {}, num_gpus_at_once: {}, latency_us: {}, gb_per_s: 1}}\n"
    rows = [("h2d", "true", 1, 1), ("h2d", "true", 4, 2), ("h2d", "false", 2, 9)]
    rows.append(("d2h", "false", 1, 7))
    made = parse_calibration(HEAD + "copies:\n" + "".join(each.format(*row) for row in rows))
    # Without a word: pinned, by the most GPUs at once.
    assert made.copy("h2d").time_us(0) == 2.0
    assert made.copy("h2d", num_gpus_at_once=1).time_us(0) == 1.0
    assert made.copy("h2d", pinned=False).time_us(0) == 9.0
    # Pinned memory is not answered by unpinned, nor three GPUs by four.
    with pytest.raises(UnknownNameError, match="d2h"):
        made.copy("d2h")
    with pytest.raises(UnknownNameError, match="'h2d pinned by 3'"):
        made.copy("h2d", num_gpus_at_once=3)
    with pytest.raises(UnknownNameError, match="'both unpinned by 1'"):
        made.copy("both", pinned=False)
    # A prediction for n GPUs takes the next more that were measured, else the most.
    for num_gpus, us in ((1, 1.0), (2, 2.0), (4, 2.0), (8, 2.0)):
        assert made.host_copy("h2d", num_gpus).time_us(0) == us
    with pytest.raises(UnknownNameError, match="d2h"):
        made.host_copy("d2h", 1)
    # What is lacking comes from the other; an entry of one's own stays.
    other = parse_calibration(HEAD + "copies:\n" + each.format("d2h", "true", 1, 3))
    assert made.completed_by(other).copy("d2h").time_us(0) == 3.0
    assert made.completed_by(other).copy("d2h", num_gpus_at_once=1).time_us(0) == 3.0
    assert other.completed_by(made).copy("h2d", pinned=False).time_us(0) == 9.0


def test_an_uneven_entry_answers_nothing() -> None:
    entry = "  - {{kind: all_to_all_v, group_size: 2, {}}}\n"
    uneven = entry.format("share: 0.5, table: [[1000, 5], [2000, 6]]")
    even = entry.format("table: [[1000, 8], [2000, 9]]")
    for text in (even + uneven, uneven + even):
        made = parse_calibration(HEAD + "collectives:\n" + text)
        assert made.collective("all_to_all_v", 2).time_us(1000) == pytest.approx(8)
    with pytest.raises(InputError, match="all_to_all_v"):
        parse_calibration(HEAD + "collectives:\n" + uneven).collective("all_to_all_v", 2)


def test_gemm_by_hand() -> None:
    model = GemmModel("bf16", 2.0, 3.0, 2000.0, 500.0, 64.0, 1e9, 64.0)
    # 1 x 1000 x 1000: 2 MB of weights at 2000 GB/s = 1 us (+ 4 kB), 2e6 flops = 0.004 us.
    assert model.time_us(1, 1000, 1000) == pytest.approx(4.0, rel=1e-2)
    # 10000 rows: 2e10 flops at 500 TFLOPS = 40 us, over 42 MB = 21 us.
    assert model.time_us(10000, 1000, 1000) == pytest.approx(43.0, rel=1e-3)
    assert model.time_us(0, 1000, 1000) == 0.0
    # A loop of 1000 at 100 a microsecond takes 10 us however few rows there are.
    assert GemmModel("bf16", 2.0, 3.0, 2000.0, 500.0, 64.0, 100.0, 64.0).time_us(
        1, 1000, 1000
    ) == pytest.approx(13.0, rel=1e-3)


def test_attention_by_hand() -> None:
    decode = AttentionKernel("decode", 128, "bf16", 5.0, 2000.0, 1e6, 64.0)
    # 10 sequences x 1000 tokens x 2 x 8 heads x 128 x 2 bytes = 40.96 MB at 2000 GB/s.
    assert decode.time_us(10, 1000, 32, 8) == pytest.approx(5 + 20.48)
    assert decode.time_us(10, 1000, 32, 8, window=100) == pytest.approx(5 + 2.048)
    prefill = AttentionKernel("prefill", 128, "bf16", 5.0, 1e9, 500.0, 64.0)
    # 1000 tokens: 500500 pairs x 4 x 32 x 128 flops = 8.2e9 at 500 TFLOPS = 16.4 us.
    assert prefill.time_us(1, 1000, 32, 8) == pytest.approx(5 + 16.400384)
    # With a window of 10: the first ten see 1..10 keys, the other 990 see 10 each.
    assert causal_pairs(1000, 10) == 55 + 9900


def test_attention_layers_of_both_kinds() -> None:
    dense = load_calibration("h100").dense
    v3, qwen = load_model("deepseek-v3"), load_model("qwen3-30b-a3b")
    for model in (v3, qwen):
        args = (model.attention, model.hidden_size)
        short, long = dense.decode_us(64, [1000, 8000], *args)
        assert 0 < short < long
        assert dense.prefill_us(1, 8192, *args) > 2 * dense.prefill_us(1, 2048, *args)
    spec = qwen.attention
    layer = dense.decode_us(64, 1000, spec, qwen.hidden_size)
    parts = (
        dense.gemm_us(64, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, 2048)
        + dense.gemm_us(64, 2048, spec.num_heads * spec.head_dim)
        + dense.attention_kernel("decode", spec.head_dim, "bf16").time_us(
            64, 1000, spec.num_heads, spec.num_kv_heads
        )
    )
    assert layer == pytest.approx(parts)


FIGURES = GpuFigures("x1", 2000.0, {"bf16": 300.0}, 300.0, 32.0, 5.0)


def test_datasheet_models_are_assumed_and_complete() -> None:
    models = datasheet_models(FIGURES)
    curve = models.collective("all_to_all", 8)
    # 10 us + 1 MB / (300 GB/s x 0.65).
    assert curve.time_us(1e6) == pytest.approx(10 + 1e3 / 195)
    assert curve.basis == "assumed"
    # A ring all-reduce of S bytes over 8 ranks sends 2 S 7 / 8.
    assert models.collective("all_reduce", 8).time_us(1e6) == pytest.approx(10 + 1.75e3 / 195)
    # 64 experts x 3 x 2048 x 768 x 2 bytes at 1700 GB/s, arithmetic negligible at one token.
    weights = 64 * 3 * 2048 * 768 * 2 / 1.7e6
    time = models.expert_ffn("bf16").layer_time_us([1] * 64, 2048, 768)
    assert time == pytest.approx(30 + weights, rel=0.1)
    assert models.dense.basis == "assumed"
    assert models.expert_ffn("nvfp4").tflops == pytest.approx(180.0), "no fp4 units: bf16 rate"


def test_no_nvlink_means_pcie() -> None:
    pcie = datasheet_models(GpuFigures("p", 864.0, {"bf16": 181.0}, 0.0, 32.0))
    assert pcie.collective("all_to_all", 2).time_us(1e6) == pytest.approx(10 + 1e3 / (32 * 0.85))


@pytest.mark.parametrize(
    "bad",
    [
        GpuFigures("z", 0.0, {"bf16": 1.0}, 1.0, 1.0),
        GpuFigures("z", 1.0, {"fp8": 1.0}, 1.0, 1.0),
        GpuFigures("z", 1.0, {"bf16": 1.0}, 1.0, -1.0),
    ],
)
def test_datasheet_models_refuse_nonsense(bad: GpuFigures) -> None:
    with pytest.raises(InputError, match="must be positive"):
        datasheet_models(bad)


def test_missing_parts_come_from_another_calibration() -> None:
    gb200 = load_calibration("gb200").completed_by(datasheet_models(FIGURES))
    assert gb200.collective("nvlink_dispatch", 64).basis == "measured"
    assert not gb200.collective("all_to_all", 8).group_measured
    assert gb200.expert_ffn("nvfp4").basis == "measured"
    assert gb200.copy("h2d").basis == "assumed"
    h100 = load_calibration("h100").completed_by(datasheet_models(FIGURES))
    assert h100.collective("all_to_all_v", 8).basis == "measured"
    assert h100.expert_ffn("bf16").basis == "measured"
    assert h100.expert_ffn("nvfp4").basis == "assumed"


def test_h200_says_what_it_borrowed() -> None:
    h200, h100 = load_calibration("h200"), load_calibration("h100")
    assert h200.collective("all_to_all", 8).basis == "measured"
    mine, theirs = h200.expert_ffn("bf16"), h100.expert_ffn("bf16")
    assert mine.basis == "assumed"
    assert mine.tflops == theirs.tflops
    assert mine.weight_gb_per_s == pytest.approx(theirs.weight_gb_per_s * 4800 / 3350, rel=1e-3)


def test_smooth_maximum() -> None:
    a, b = np.array([3.0, 0.0, 1e300]), np.array([4.0, 0.0, 1e300])
    assert power_mean_max(a, b, 2.0)[0] == pytest.approx(5.0)
    assert power_mean_max(a, b, 2.0)[1] == 0.0
    assert np.isfinite(power_mean_max(a, b, 8.0)[2])
    assert power_mean_max(a, b, 1.0)[0] == pytest.approx(7.0)


@pytest.mark.parametrize("name", ["name with: colon", "\x1b[31mred", "!!python/name:os.system"])
def test_hostile_names_cannot_forge_lines(name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: load_calibration(name),
        lambda: load_calibration("h100").collective(name, 2),
        lambda: load_calibration("h100").expert_ffn(name),
    ]
    for call in calls:
        with pytest.raises(MoesimError) as caught:
            call()
        assert caught.value.cause.isprintable()


def test_the_documented_file_loads_and_the_documented_errors_are_the_files() -> None:
    """docs/calibration.md: its example is a valid file, its table what the files state."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "calibration.md").read_text()
    example = parse_calibration(text.split("```yaml\n")[1].split("```")[0])
    assert example.collective("all_to_all", 8).time_us(114688) == pytest.approx(17.9)
    assert example.collective("all_to_all", 8).local_gb_per_s is None
    assert example.copy("h2d").time_us(1048576) == pytest.approx(35.6)
    # The six rows are those of an H100: its experts must come out near the bundled fit.
    mine = example.expert_ffn("bf16")
    bundled = load_calibration("h100").expert_ffn("bf16", "torch_grouped_mm")
    counts = [512] * 32
    assert mine.layer_time_us(counts, 7168, 2048) == pytest.approx(
        bundled.layer_time_us(counts, 7168, 2048), rel=0.2
    )

    folder = str(root / "verification" / "calibration")
    sys.path.insert(0, folder)
    try:
        errors_table = importlib.import_module("errors_table")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("errors_table", None)
    files = list((root / "topologies" / "calibration").glob("*.yaml"))
    assert errors_table.table(files) in text
    assert errors_table.engine_table(files) in (root / "docs" / "step-time.md").read_text()


@pytest.mark.parametrize(
    "name", [n for n in calibration_names() if n.split("-")[-1] in ("vllm", "sglang", "trtllm")]
)
@pytest.mark.parametrize("group", [2, 4, 8])
def test_large_all_reduces_of_engines_are_nccls(name: str, group: int) -> None:
    """Beyond their own kernels' sizes engines call NCCL: the same bytes take the same time
    (over PCIe within 15%)."""
    own = load_calibration(name).collective("all_reduce", group)
    nccl = load_calibration(name.rsplit("-", 1)[0]).collective("all_reduce", group)
    assert own.time_us(128 * 2**20) == pytest.approx(
        nccl.time_us(128 * 2**20), rel=0.15 if name.startswith("rtx") else 0.1
    )
