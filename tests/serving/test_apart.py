"""Attention and experts on GPUs of their own: the ping-pong pipeline, memory, errors."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim
from moesim.errors import InfeasibleError, InputError
from moesim.serving.apart import ping_pong_us, spread_of
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory, require_fit
from moesim.serving.step_cost import EngineStepCost


def event_by_event(stages: list[float], parts: int, layers: int) -> float:
    """Every part goes through all stages of every layer; a stage serves one at a time, first come
    first served, lower parts first at one instant."""
    free = [0.0] * len(stages)
    events = [(0.0, part, 0) for part in range(parts)]
    end = 0.0
    while events:
        at, part, step = heapq.heappop(events)
        if step == layers * len(stages):
            end = max(end, at)
            continue
        stage = step % len(stages)
        free[stage] = max(free[stage], at) + stages[stage]
        heapq.heappush(events, (free[stage], part, step + 1))
    return end


def test_hand_worked() -> None:
    """Attention 3, experts 2, exchange 1 each way: a part alone takes 7 a layer. Two parts keep
    nothing busy all the time: 2 layers of 7, and the second part 3 behind: 17. Three parts keep
    attention busy: 7 + 9 for the second layer, the last part 2 x 3 behind: 22 = 6 x 3 + 4."""
    one = ping_pong_us(np.array(6.0), np.array(4.0), np.array(4.0), 1, 2)
    assert one == 14
    assert ping_pong_us(np.array(6.0), np.array(4.0), np.array(4.0), 2, 2) == 17
    assert ping_pong_us(np.array(6.0), np.array(4.0), np.array(4.0), 3, 2) == 22


@given(
    a=st.integers(1, 50),
    e=st.integers(1, 50),
    x=st.integers(0, 50),
    parts=st.integers(1, 6),
    layers=st.integers(1, 5),
)
def test_it_is_the_event_simulation(a: int, e: int, x: int, parts: int, layers: int) -> None:
    found = ping_pong_us(
        np.array(float(a * layers)),
        np.array(float(e * layers)),
        np.array(2.0 * x * layers),
        parts,
        layers,
    )
    assert found == pytest.approx(event_by_event([a, x, e, x], parts, layers))


def test_who_sends_where() -> None:
    """12 GPUs of attention and 4 of experts on nodes of 8: the experts share the second node with 4
    of the 12, so that 8 of 12 pairs cross the network; 4 GPUs receive what 12 send."""
    apart = deploy("DeepSeek-V3", "h200-sxm-ib", dp=12, expert_gpus=4, expert_dtype="nvfp4")
    assert spread_of(apart) == (4, 4, 1, 1.0, pytest.approx(8 / 12))
    together = deploy("DeepSeek-V3", "h200-sxm-ib", dp=16)
    assert spread_of(together) == (16, 16, 2, 15 / 16, 1 / 2)


def test_experts_leave_attention_their_memory() -> None:
    """DeepSeek-V3's 58 layers x 256 experts of 44.04M weights, on 16 GPUs 16 experts each: 40.9 GB
    in fp8, which attention's GPUs have for their cache instead."""
    together = gpu_memory(deploy("DeepSeek-V3", "h200-sxm-ib", dp=16))
    apart = gpu_memory(deploy("DeepSeek-V3", "h200-sxm-ib", dp=16, expert_gpus=16))
    assert apart.expert_weight_bytes == 0
    more = apart.kv_cache_bytes - together.kv_cache_bytes
    assert more / 1e9 > 58 * 16 * 3 * 7168 * 2048 / 1e9
    assert apart.expert_pool_bytes > together.expert_weight_bytes
    few = deploy("DeepSeek-V3", "h200-sxm-ib", dp=12, expert_gpus=4)
    with pytest.raises(InfeasibleError, match="GB for experts of its own"):
        require_fit(few)


def cost(**options: int) -> EngineStepCost:
    return EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", **options))


def test_a_step_is_never_slower_cut_and_grows_with_its_rows() -> None:
    apart = cost(dp=8, expert_gpus=8)
    whole = cost(dp=8, expert_gpus=8, micro_batches=1)
    rows = np.repeat(np.array([1.0, 8, 64, 256, 1024])[:, None], 8, axis=1)
    batch = BatchShape.of(decode_tokens=rows, decode_context_tokens=rows * 2000)
    cut, uncut = apart.step_us(batch), whole.step_us(batch)
    assert (cut <= uncut).all()
    assert cut[-1] < 0.9 * uncut[-1]
    assert (np.diff(cut) >= 0).all()
    parts = apart.breakdown(batch)
    assert sum(parts.values()) == pytest.approx(cut)
    assert (parts["overlap"] <= 0).all()


def test_pools_of_different_gpus() -> None:
    """Attention on H100s, experts on the A100s behind them: each computes with its own kernels."""
    mixed = deploy("Qwen3-30B-A3B", "mixed-h100-a100", dp=8, expert_gpus=8)
    holder = mixed.cluster.gpus[mixed.slowest_of(mixed.expert_ranks[0])]
    assert (mixed.gpu.name, holder.name) == ("h100-sxm", "a100-sxm")
    batch = BatchShape.of(decode_tokens=np.full(8, 256.0))
    alone = deploy("Qwen3-30B-A3B", "h100-sxm-ib", dp=8, expert_gpus=8)
    slow, fast = (EngineStepCost(d).breakdown(batch) for d in (mixed, alone))
    assert slow["experts"] > fast["experts"]
    assert slow["attention"] == pytest.approx(fast["attention"])


def test_wrong_pools() -> None:
    def made(**options: int | str) -> Deployment:
        given: dict[str, Any] = {"dp": 4, "expert_gpus": 4, **options}
        return deploy("Qwen3-30B-A3B", "h200-sxm-ib", **given)

    assert made().parallelism == "tp1 dp4 + ep4"
    assert made().num_gpus == 8
    for options, text in (
        ({"pp": 2, "expert_gpus": 8}, "pipeline stages"),
        ({"ep": 3, "moe_tp": 1}, "is not the 4 GPUs"),
        ({"moe_comm": "all_gather"}, "GPUs of their own"),
        ({"two_batch_overlap": "both"}, "overlap anyway"),
        ({"micro_batches": 0}, "`micro_batches` is 0"),
    ):
        with pytest.raises(InputError, match=text):
            made(**options)


def test_serve() -> None:
    """A service of one engine of 6 + 2 GPUs; decoding engines alone have a pool of experts."""
    drawn = "poisson:rate=4,requests=40,prompt=200,output=20"
    asked = {"model": "Qwen3-30B-A3B", "cluster": "h200-sxm-ib", "seed": 1}
    result = moesim.serve(drawn, gpus=8, replicas=1, expert_gpus=2, micro_batches=2, **asked)
    one = result.record["deployment"]
    assert (one["dp"], one["ep"], one["expert_gpus"], one["micro_batches"]) == (6, 2, 2, 2)
    assert "1 x tp1 dp6 + ep2" in result.record["name"]
    assert any("experts apart" in line for line in result.record["predictions"])
    pools = moesim.serve(
        drawn, gpus=16, replicas=1, decode_gpus=8, decode_replicas=1, expert_gpus=2, **asked
    )
    assert "1 x tp1 dp8 ep8;" in pools.record["name"]
    assert "1 x tp1 dp6 + ep2" in pools.record["name"]
