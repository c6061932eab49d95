"""Faster links and faster arithmetic: rates are multiplied, latencies stay."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.cost.calibration import load_calibration
from moesim.cost.scaled import faster_calibration, faster_step
from moesim.cost.step import build_step_model


def test_network_by_hand(build: ModuleType) -> None:
    # 10 us + bytes / 1 GB/s becomes 10 us + bytes / 2 GB/s; NICs 20 us + bytes / 1 GB/s.
    twice = faster_calibration(build.toy_calibration(), network=2.0)
    curve = twice.collective("all_to_all", 4, 2)
    assert float(curve.time_us(100_000.0)) == pytest.approx(10 + 50)
    assert float(curve.time_us(0.0, 100_000.0)) == pytest.approx(20 + 100)
    assert curve.latency_us == 20.0


def test_compute_by_hand(build: ModuleType) -> None:
    # Weights of 600,000 bytes at 1,000 GB/s and 100 tokens of 600,000 flops at 10 TFLOPS:
    # 0.6 + 6 us; 0.3 + 3 us at twice the rates. The launch of 5 us stays.
    twice = faster_calibration(build.toy_calibration(), compute=2.0).expert_ffn("bf16")
    assert float(twice.expert_time_us(100, 1000, 100)) == pytest.approx(3.3)
    assert twice.layer_launch_us() == 5.0


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_every_kernel_and_link_gets_quicker_and_none_by_more(name: str) -> None:
    plain = load_calibration(name)
    fast = faster_calibration(plain, network=1.25, compute=1.25, host_link=1.25)
    tokens = np.array([1.0, 100.0, 3000.0])
    for key, model in plain.experts.items():
        before = model.expert_time_us(tokens, 4096, 1536)
        after = fast.experts[key].expert_time_us(tokens, 4096, 1536)
        np.testing.assert_allclose(after, before / 1.25)
    for dtype, gemm in plain.dense.gemms.items():
        before, after = (
            gemm.time_us(512, 4096, 4096),
            fast.dense.gemms[dtype].time_us(512, 4096, 4096),
        )
        assert before / 1.25 <= after < before
    size = np.array([1e4, 1e8])
    for curve in plain.collectives.curves:
        found = fast.collective(
            curve.kind, curve.group_size, curve.num_nodes, num_sms=curve.num_sms
        )
        own = plain.collective(curve.kind, curve.group_size, curve.num_nodes, num_sms=curve.num_sms)
        assert np.all(found.time_us(size, size) <= own.time_us(size, size))
        assert np.all(found.time_us(size, size) >= own.time_us(size, size) / 1.25 - 1e-9)
    copy = plain.copy("h2d")
    assert float(fast.copy("h2d").time_us(1e9)) < float(copy.time_us(1e9))


def test_every_host_copy_is_faster_over_a_faster_host_link() -> None:
    plain = load_calibration("h200x4-torch")
    fast = faster_calibration(plain, host_link=2.0)
    for direction, pinned, gpus in (("h2d", False, 4), ("d2h", True, 1), ("both", True, 4)):
        before, after = (
            c.copy(direction, pinned=pinned, num_gpus_at_once=gpus) for c in (plain, fast)
        )
        assert after.time_us(1e8) < 0.6 * before.time_us(1e8)
    assert fast.copy("both").time_us(1e8) < plain.copy("both").time_us(1e8)
    assert fast.copy("reduce").time_us(1e8) == plain.copy("reduce").time_us(1e8)


def test_a_step_model_on_a_faster_network(build: ModuleType) -> None:
    step = build_step_model(
        build.small_cluster(), build.toy_model(1, 4, 2), calibration=build.toy_calibration()
    )
    assert faster_step(step, 1.0) is step
    twice = faster_step(step, 2.0)
    group = np.array([[200_000.0, 0.0, 0.0]])
    assert step.collective_us(step.dispatch, group)[0] == pytest.approx(210.0)
    assert twice.collective_us(twice.dispatch, group)[0] == pytest.approx(110.0)
    np.testing.assert_array_equal(step.expert_tables_us(4), twice.expert_tables_us(4))
