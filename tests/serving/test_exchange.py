"""Exchanges of a MoE layer: the busiest receiver, low-latency buffers, GPUs of different speed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.cost.calibration import load_calibration
from moesim.cost.step import build_step_model
from moesim.errors import InfeasibleError, InputError
from moesim.model.names import load_model
from moesim.placement import Placement, Plan
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory, low_latency_buffer_bytes, require_fit
from moesim.serving.moe_cost import MoeCost
from moesim.serving.moe_load import MoeLoad
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_parts import Sources


def test_low_latency_buffers_by_hand() -> None:
    """DeepSeek-V3, 256 experts and 32 redundant ones, 128 rows per rank: a combine message is
    7,168 x 2 + 56 x 4 = 14,560 bytes; two buffers to send and two to receive of 288 x 128 messages:
    2.147 GB, which vLLM's cache has less. SGLang takes them from beside its fraction, and its
    default is 128 rows. With more rows they grow, and where they leave no cache they are named."""
    asked = {"dp": 16, "redundant_experts": 32}
    assert deploy("DeepSeek-V3", "h200-sxm-ib", engine="sglang", **asked).dispatch_tokens == 128
    made = deploy("DeepSeek-V3", "h200-sxm-ib", dispatch_tokens=128, **asked)
    assert made.moe_comm == "deepep_auto"
    assert low_latency_buffer_bytes(made) == 4 * 288 * 128 * 14_560
    memory = gpu_memory(made)
    assert memory.exchange_bytes == pytest.approx(2.147e9, rel=0.001)
    normal = gpu_memory(replace(made, moe_comm="deepep"))
    assert normal.exchange_bytes == 0
    assert normal.kv_cache_bytes - memory.kv_cache_bytes == pytest.approx(memory.exchange_bytes)
    with pytest.raises(InfeasibleError, match=r"268\.. of them buffers .* for 16000 rows") as error:
        require_fit(replace(made, dispatch_tokens=16_000))
    assert "lower `dispatch_tokens` to" in error.value.remedy


def moe(deployment: Deployment, inclusion: np.ndarray | None = None) -> MoeCost:
    cost = EngineStepCost(deployment)._of_moe
    if inclusion is not None:
        cost = MoeCost(deployment, cost.calibration, Sources([]))
        cost.__dict__["load"] = MoeLoad(inclusion, "by hand")
    return cost


def test_rows_beyond_the_buffers_go_in_rounds() -> None:
    """640 rows per rank with room for 256: two full rounds and one of 128."""
    cost = moe(deploy("DeepSeek-V3", "h200-sxm-ib", dp=16, moe_comm="deepep_ll"))
    once = [cost._all_to_all_us(np.array([16.0 * n]), "deepep_ll")[0] for n in (256, 128)]
    both = cost._in_rounds(np.array([16 * 640.0, 16 * 256.0, 16 * 100.0]))
    assert both[0] == pytest.approx(2 * once[0] + once[1])
    assert both[1] == pytest.approx(once[0])
    assert both[2] < once[1]


def test_the_busiest_rank_receives_by_hand() -> None:
    """8 experts on 4 ranks of 2 nodes, a token takes 2. Expert 0 gets every token and the others an
    equal share of the rest, 1/7 each. Rank 0 receives 1 + 1/7 copies of a token, the mean is 0.5:
    16/7 times as many. Once per rank: rank 0 gets each token once, the others 1 - (6/7)^2 = 13/49:
    1 / ((1 + 3 x 13/49) / 4) = 196/88."""
    from moesim.model.names import load_model

    spec = load_model("Mixtral-8x7B")
    cluster = load_cluster("h200-sxm-ib", 4)
    made = deploy(spec, cluster, tp=1, dp=4, moe_comm="nccl")
    cost = moe(made, np.array([[1.0, *[1 / 7] * 7]]))
    assert cost._receives_more(2, once=False)[0] == pytest.approx(16 / 7)
    assert cost._receives_more(2, once=True)[0] == pytest.approx(196 / 88)
    even = moe(made, np.full((1, 8), 0.25))
    assert even._receives_more(2, once=True) == (pytest.approx(1.0), pytest.approx(1.0))
    tokens = np.array([4096.0])
    assert cost._all_to_all_us(tokens, "nccl") > 1.5 * even._all_to_all_us(tokens, "nccl")


def experts_us(deployment: Deployment, rows: float = 4096.0) -> float:
    cost = EngineStepCost(deployment)
    batch = BatchShape.of(prefill_tokens=np.full(deployment.dp, rows))
    return float(cost.breakdown(batch)["experts"])


def test_old_and_new_gpus_in_one_expert_group() -> None:
    """8 H100s and 8 A100s: with experts in equal shares the A100s are waited for, as slow as a
    group of A100s alone but for their launches; a plan that gives the H100s three times as many
    experts is faster. Attention is as on an A100 everywhere, and that is said."""
    mixed = deploy("Qwen3-30B-A3B", "mixed-h100-a100", dp=16)
    assert len(EngineStepCost(mixed)._of_moe.ranks.models) == 2
    slow = experts_us(deploy("Qwen3-30B-A3B", "a100-sxm-ib", dp=16))
    fast = experts_us(deploy("Qwen3-30B-A3B", "h100-sxm-ib", dp=16))
    even = experts_us(mixed)
    assert fast < even <= slow * 1.001
    table = np.full((1, 16, 12), -1, np.int64)
    table[:, :8] = np.arange(96).reshape(8, 12)
    table[:, 8:, :4] = np.arange(96, 128).reshape(8, 4)
    layers = mixed.model.num_moe_layers
    placement = Placement(np.repeat(table.reshape(1, -1), layers, axis=0), 16, 2, 128)
    planned = replace(mixed, plan=Plan("Qwen3-30B-A3B", tuple(range(layers)), placement))
    assert fast < experts_us(planned) < 0.9 * even
    assert any("attention as on a100-sxm" in note for note in EngineStepCost(mixed).notes)


def test_a_slow_gpu_slows_the_service() -> None:
    """GPU 3 at half its rates: its experts and its rank's attention take up to twice as long, links
    and launches as before, as in `plan` and `simulate`."""
    cluster = load_cluster("h200-sxm-ib", 8)
    nominal = deploy("Qwen3-30B-A3B", cluster, tp=1, dp=8)
    slowed = deploy("Qwen3-30B-A3B", cluster.with_speed(3, 0.5), tp=1, dp=8)
    assert (nominal.speed, slowed.speed) == (1.0, 0.5)
    batch = BatchShape.of(64 * np.ones(8), 64 * 8000 * np.ones(8))
    before, after = (EngineStepCost(d).breakdown(batch) for d in (nominal, slowed))
    assert after["communication"] == pytest.approx(before["communication"])
    assert 1.5 < float(after["attention"] / before["attention"]) <= 2.0
    assert 1.0 < float(after["experts"] / before["experts"]) <= 2.0
    assert after["host"] == pytest.approx(before["host"])


def test_deepep_version_2_by_hand() -> None:
    """Its README has 90 GB/s at EP 8 x 2 on H100s with a rank's own half counted: 45 over the NIC,
    after version 1's 56.96 us. 8,192 rows of 7,392 bytes to the other node: 56.96 + 1,345.7."""
    curve = load_calibration("h100").collective("deepep_v2_dispatch", 16, 2)
    sent = 8192 * 7168 * (1 + 4 / 128)
    assert curve.time_us(0.0, sent) == pytest.approx(56.96 + sent / 45e3)
    assert curve.basis == "assumed"
    assert curve.source.startswith("deepep_v2")


@pytest.mark.parametrize("name", ["nixl", "nixl_ep", "deepep_nvshmem", "pplx", "mori", "uccl-ep"])
def test_exchanges_without_published_times_are_refused_by_name(name: str) -> None:
    cluster, model = load_cluster("h200-sxm-ib", 16), load_model("deepseek-v3")
    with pytest.raises(InputError, match=f"the exchange '{name}'") as error:
        build_step_model(cluster, model, all_to_all=name)  # type: ignore[arg-type]
    assert "deepep_ll" in error.value.remedy
    with pytest.raises(InputError, match=f"the exchange '{name}'"):
        deploy(model, "h200-sxm-ib", dp=16, moe_comm=name)  # type: ignore[arg-type]
