"""The errors that the bundled calibrations state, recomputed from the measured tables.

Needs ../shared/data/measured, whose tables are read in place and never committed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cost.calibration import Calibration, load_calibration

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "measured"
NAMES = ("tables", "loads", "routing_bytes", "common", "fit_experts", "fit_dense")

pytestmark = pytest.mark.skipif(
    not (DATA / "h100_nccl.parquet").exists(), reason=f"no measured tables in {DATA}"
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules beside the fitting scripts, importable only while these tests run."""
    folder = str(ROOT / "verification" / "calibration")
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(folder)
        for name in NAMES:
            sys.modules.pop(name, None)


@cache
def bundled(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "topologies" / "calibration" / f"{name}.yaml").read_text())


def stated(name: str, section: str, **fields: Any) -> list[dict[str, Any]]:
    """The `fit` list of the one entry of a bundled file that has these fields."""
    found = [
        entry
        for entry in bundled(name)[section]
        if all(entry.get(key) == value for key, value in fields.items())
    ]
    assert len(found) == 1
    return found[0]["fit"]


def check(fit: dict[str, Any], predicted: np.ndarray, measured: np.ndarray) -> None:
    error = np.abs(predicted / measured - 1.0)
    assert np.median(error) == pytest.approx(fit["median_error"], abs=1e-3)
    assert np.quantile(error, 0.9) == pytest.approx(fit["p90_error"], abs=2e-3)


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_nccl(scripts: dict[str, ModuleType], gpu: str) -> None:
    calibration = load_calibration(gpu)
    points_of = scripts["tables"].nccl_points(DATA, gpu)
    assert len(points_of) == 12, "four collectives, three group sizes"
    for (kind, ranks), points in points_of.items():
        (fit,) = stated(gpu, "collectives", kind=kind, group_size=ranks, source=f"nccl_{gpu}")
        test = ~points.train
        predicted = calibration.collective(kind, ranks).time_us(points.num_bytes[test])
        check(fit, predicted, points.times_us[test])
        assert fit["median_error"] < 0.08
        assert fit["p90_error"] < 0.15


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_deepep(scripts: dict[str, ModuleType], phase: str) -> None:
    calibration = load_calibration("h100")
    normal = scripts["tables"].deepep_normal_points(DATA, phase)
    latency = scripts["tables"].deepep_ll_points(DATA, phase)
    cases = [(f"deepep_normal_{phase}", n, sms, x) for (n, sms), x in normal.items()]
    cases += [(f"deepep_ll_{phase}", n, None, x) for n, x in latency.items()]
    assert len(cases) == 28, "six SM shares and the low-latency kernel on 1, 2, 4 and 8 nodes"
    for kind, nodes, sms, data in cases:
        (fit,) = stated("h100", "collectives", kind=kind, num_nodes=nodes, num_sms=sms)
        test = ~data.points.train
        curve = calibration.collective(kind, 8 * nodes, nodes, num_sms=sms)
        predicted = curve.time_us(data.points.num_bytes[test], data.nic_bytes[test])
        check(fit, predicted, data.points.times_us[test])
        assert fit["median_error"] < 0.09


@pytest.mark.parametrize(
    ("kernel", "kind"), [("NVLinkTwoSided", "nvlink"), ("NVLinkOneSided", "nvlink_one_sided")]
)
def test_gb200(scripts: dict[str, ModuleType], kernel: str, kind: str) -> None:
    calibration = load_calibration("gb200")
    for phase in ("dispatch", "combine"):
        for ranks, points in scripts["tables"].trtllm_points(DATA, phase, kernel).items():
            (fit,) = stated("gb200", "collectives", kind=f"{kind}_{phase}", group_size=ranks)
            test = ~points.train
            curve = calibration.collective(f"{kind}_{phase}", ranks)
            check(fit, curve.time_us(points.num_bytes[test]), points.times_us[test])


def test_own_collectives_launched_eagerly(scripts: dict[str, ModuleType]) -> None:
    calibration: Calibration = load_calibration("h100")
    remote, local, us, train = scripts["tables"].own_all_to_all(DATA)
    curve = calibration.collective("all_to_all_v", 2, eager=True)
    (fit,) = bundled("h100")["overheads"]["fit"]
    check(fit, curve.time_us(remote, 0.0, local)[~train], us[~train])
    # A bidirectional 256 MiB copy between the two GPUs, which no fit saw: 986 us.
    p2p = calibration.collective("p2p", 2, eager=True).time_us(2**28)
    assert p2p == pytest.approx(986, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        ("fp8", "vllm_triton_block"),
        ("fp8", "deepgemm_masked"),
        ("fp8", "deepgemm_contiguous"),
        ("bf16", "torch_grouped_mm"),
    ],
)
def test_experts(scripts: dict[str, ModuleType], dtype: str, kernel: str) -> None:
    tables = scripts["tables"]
    points = {
        "vllm_triton_block": lambda: tables.vllm_moe_points(
            DATA, "fp8_block", "fp8moe_triton", tables.WEIGHT_BYTES["fp8"]
        ),
        "deepgemm_masked": lambda: tables.wideep_points(DATA, "decode"),
        "deepgemm_contiguous": lambda: tables.wideep_points(DATA, "prefill"),
        "torch_grouped_mm": lambda: tables.own_grouped_points(DATA),
    }[kernel]()
    model = load_calibration("h100").expert_ffn(dtype, kernel)
    recomputed = scripts["fit_experts"].regime_reports(points, model)
    written = stated("h100", "expert_ffn", dtype=dtype, kernel=kernel)
    assert len(recomputed) == len(written)
    for new, old in zip(recomputed, written, strict=True):
        assert new["regime"] == old["regime"]
        assert new["points"] == old["points"]
        assert new["median_error"] == pytest.approx(old["median_error"], abs=1e-3)
        assert new["p90_error"] == pytest.approx(old["p90_error"], abs=2e-3)
        assert old["median_error"] < 0.08


def test_skewed_loads_are_predicted_from_balanced_ones(scripts: dict[str, ModuleType]) -> None:
    """Additivity over experts, tested: the model saw balanced loads only, yet its errors on
    power-law loads are unbiased and no larger than twice those on balanced ones."""
    tables = scripts["tables"]
    points = tables.vllm_moe_points(DATA, "fp8_block", "fp8moe_triton", tables.WEIGHT_BYTES["fp8"])
    model = load_calibration("h100").expert_ffn("fp8", "vllm_triton_block")
    ratio = points.fit.predict_us(model) / points.fit.times_us
    skewed = points.frame["distribution"].str.startswith("power_law").to_numpy()
    held = ~points.train
    assert abs(np.median(ratio[skewed]) - 1) < 0.03
    assert np.median(np.abs(ratio[skewed] - 1)) < 2 * np.median(np.abs(ratio[held & ~skewed] - 1))


def test_dense_gemm(scripts: dict[str, ModuleType]) -> None:
    points = scripts["tables"].gemm_points(DATA, "bfloat16")
    m, n, k = (points.frame[c].to_numpy(dtype=float) for c in "mnk")
    predicted = load_calibration("h100").dense.gemm_us(m, n, k)
    fits = {fit["regime"]: fit for fit in stated("h100", "gemm", dtype="bf16")}
    regimes = {
        "m up to 64": m <= 64,
        "m 65 to 1024": (m > 64) & (m <= 1024),
        "m above 1024": m > 1024,
    }
    for name, of in regimes.items():
        held = of & ~points.train
        check(fits[name], predicted[held], points.times_us[held])


def test_latent_attention_of_all_heads(scripts: dict[str, ModuleType]) -> None:
    from moesim.model.names import load_model

    model = load_model("deepseek-v3")
    dense = load_calibration("h100").dense
    for phase, layer in (("decode", dense.decode_us), ("prefill", dense.prefill_us)):
        for (dense_dtype, kv_dtype), points in scripts["tables"].mla_points(DATA, phase).items():
            frame = points.frame
            held = (frame["num_heads"] == 128).to_numpy() & ~points.train
            tokens = frame["step"] + 1 if phase == "decode" else frame["isl"]
            predicted = layer(
                frame["batch_size"].to_numpy()[held],
                tokens.to_numpy()[held],
                model.attention,
                model.hidden_size,
                dense_dtype=dense_dtype,
                kv_dtype=kv_dtype,
            )
            fits = stated("h100", "mla", phase=phase, dense_dtype=dense_dtype, kv_dtype=kv_dtype)
            fit = next(f for f in fits if f["regime"] == "all 128 heads")
            check(fit, predicted, points.times_us[held])


def test_the_loads_behind_the_tables_have_the_stated_totals(
    scripts: dict[str, ModuleType],
) -> None:
    loads = scripts["loads"]
    # 4 tokens, top-2 of 8: stride 4, token t takes t and t + 4, so rank 0 of 2 has one each.
    assert loads.balanced_counts(4, 8, 2, 2).tolist() == [1, 1, 1, 1]
    # Two tokens spread over the stride: t = 0 takes 0 and 4, t = 1 takes 2 and 6.
    assert loads.balanced_counts(2, 8, 2, 1).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    for draw in loads.power_law_counts(64, 128, 8, 1, 1.2):
        assert draw.sum() == 64 * 8
        assert draw.max() <= 64
    for draw in loads.power_law_counts(1024, 256, 8, 8, 1.01):
        assert draw.sum() >= 1024, "rank 0 has the largest load, so at least the mean"
    raised = loads.raise_lowest(np.array([[0, 3, 1, 5]]), np.array([4]))
    assert sorted(raised[0].tolist()) == [2, 3, 3, 5]
    # Top-1 of 8 experts on 8 GPUs: one of the seven others with probability 7/8.
    assert scripts["routing_bytes"].expected_other_groups(8, 1, 8) == pytest.approx(7 / 8)
    assert scripts["routing_bytes"].trtllm_other_ranks(64, 8) == pytest.approx(8 - 1 / 8)
