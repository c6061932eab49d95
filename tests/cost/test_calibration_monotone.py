"""INV-9 of the calibrated models: more bytes, tokens or context never take less time."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.calibration import Calibration, load_calibration, parse_calibration
from moesim.cost.datasheet import GpuFigures, datasheet_models
from moesim.model.names import load_model

GPUS = ("h100", "h200", "gb200", "datasheet")
size = st.floats(0, 1e11)


@cache
def calibration(name: str) -> Calibration:
    figures = GpuFigures("d", 2000.0, {"bf16": 300.0, "fp8": 600.0}, 300.0, 32.0)
    if name == "datasheet":
        return datasheet_models(figures)
    return load_calibration(name)


@pytest.mark.parametrize("name", GPUS)
@given(a=size, b=size, nic=size, data=st.data())
@settings(max_examples=60, deadline=None)
def test_collectives_grow_with_bytes(
    name: str, a: float, b: float, nic: float, data: st.DataObject
) -> None:
    """INV-9, for every kind, also between and beyond the measured groups and nodes."""
    model = calibration(name)
    kind = data.draw(st.sampled_from(model.collectives.kinds))
    nodes = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    curve = model.collective(kind, nodes * data.draw(st.integers(1, 8)), nodes)
    low, high = sorted((a, b))
    assert curve.time_us(low, nic) <= curve.time_us(high, nic)
    assert curve.time_us(nic, low) <= curve.time_us(nic, high)
    assert curve.time_us(0.0, 0.0) == pytest.approx(curve.latency_us)
    assert curve.effective_gb_per_s(high, nic) > 0 or high < 1  # less than a byte


@pytest.mark.parametrize("name", ["h100", "h200", "datasheet"])
@given(
    a=st.floats(0, 1e6),
    b=st.floats(0, 1e6),
    hidden=st.integers(64, 16384),
    inter=st.integers(16, 16384),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_experts_grow_with_tokens(
    name: str, a: float, b: float, hidden: int, inter: int, data: st.DataObject
) -> None:
    """INV-9, and additivity: a layer is its launch plus its experts one by one."""
    model = data.draw(st.sampled_from(list(calibration(name).experts.values())))
    low, high = model.expert_time_us(sorted((a, b)), hidden, inter)
    assert low <= high * (1 + 1e-12)
    layer = model.layer_time_us([a, 0.0, b], hidden, inter)
    assert layer == pytest.approx(model.layer_launch_us() + low + high)


@pytest.mark.parametrize("name", ["h100", "h200", "datasheet"])
@given(
    rows=st.tuples(st.floats(1, 1e5), st.floats(1, 1e5)),
    n=st.integers(1, 65536),
    k=st.integers(1, 65536),
    dtype=st.sampled_from(["bf16", "fp8"]),
)
@settings(max_examples=40, deadline=None)
def test_gemms_grow_with_each_side(
    name: str, rows: tuple[float, float], n: int, k: int, dtype: str
) -> None:
    gemm = calibration(name).dense.gemm(dtype)
    low, high = sorted(rows)
    assert gemm.time_us(low, n, k) <= gemm.time_us(high, n, k)
    assert gemm.time_us(low, n, k) <= gemm.time_us(low, n + 1, k + 1)


@pytest.mark.parametrize("name", ["h100", "h200", "datasheet"])
@pytest.mark.parametrize("which", ["deepseek-v3", "qwen3-30b-a3b"])
@given(
    tokens=st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)), batch=st.integers(1, 512)
)
@settings(max_examples=30, deadline=None)
def test_attention_grows_with_context_and_batch(
    name: str, which: str, tokens: tuple[int, int], batch: int
) -> None:
    model = load_model(which)
    args = (model.attention, model.hidden_size)
    dense = calibration(name).dense
    low, high = sorted(tokens)
    for layer in (dense.decode_us, dense.prefill_us):
        assert layer(batch, low, *args) <= layer(batch, high, *args)
        assert layer(batch, low, *args) <= layer(batch + 1, low, *args)


@given(
    st.lists(
        st.tuples(st.floats(1, 1e9), st.floats(0.1, 1e6)),
        min_size=2,
        max_size=20,
        unique_by=lambda row: row[0],
    ),
    st.tuples(size, size),
)
@settings(max_examples=60, deadline=None)
def test_any_table_grows_with_size(
    rows: list[tuple[float, float]], sizes: tuple[float, float]
) -> None:
    """INV-9 for a user's own table, however noisy its times are."""
    text = (
        "format: moesim-calibration\nversion: 1\nname: t\ngpu: T\ncollectives:\n"
        f"  - {{kind: all_to_all, group_size: 2, table: {[list(row) for row in rows]}}}\n"
    )
    curve = parse_calibration(text).collective("all_to_all", 2)
    low, high = sorted(sizes)
    assert curve.time_us(low) <= curve.time_us(high) * (1 + 1e-9)
    assert np.isfinite(curve.time_us(high))
