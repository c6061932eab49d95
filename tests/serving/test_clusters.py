"""Defaults of a service on every shipped cluster, and pools of different GPU types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moesim
from moesim.cluster import cluster_names, load_cluster
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.step_cost import EngineStepCost

REQUESTS = "constant:rate=5,requests=10,prompt=100,output=4"


@pytest.mark.parametrize("cluster", cluster_names())
@pytest.mark.parametrize("one_engine", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_every_shipped_cluster_serves(cluster: str, one_engine: bool, apart: bool) -> None:
    gpus = load_cluster(cluster).num_gpus
    given: dict[str, Any] = {"replicas": 1} if one_engine else {}
    if apart:
        given |= {"decode_gpus": gpus // 2}
        given |= {"decode_replicas": 1} if one_engine else {}
    served = moesim.serve(REQUESTS, model="gpt-oss-20b", cluster=cluster, gpus=gpus, **given)
    assert served.record["counts"]["finished"] == 10
    assert served.record["num_gpus"] == gpus


def test_a_mixed_cluster_gives_each_type_a_role() -> None:
    """The H100 node computes prompts, the A100 node decodes; caches move at 85% of the slower NIC,
    25 GB/s. GPT-OSS-20B caches 24 layers x 2 x 8 heads x 64 x 2 bytes = 49,152 bytes per token."""
    from moesim.serving.config import ServingConfig
    from moesim.serving.run import _transfer

    served = moesim.serve(
        REQUESTS, model="gpt-oss-20b", cluster="mixed-h100-a100", gpus=16, decode_gpus=8
    )
    record = served.record
    assert record["deployment"]["gpu"] == "h100-sxm"
    assert record["decode_deployment"]["gpu"] == "a100-sxm"
    assert "8 x h100-sxm for prompts" in record["name"]
    assert "8 x a100-sxm decoding" in record["name"]
    front = deploy("gpt-oss-20b", load_cluster("mixed-h100-a100", 8), tp=1, dp=8)
    back = deploy("gpt-oss-20b", load_cluster("mixed-h100-a100", 8, after=8), tp=1, dp=8)
    assert (front.gpu.name, back.gpu.name) == ("h100-sxm", "a100-sxm")
    _, per_token = _transfer([front, back], ServingConfig(decode=back))
    assert per_token == pytest.approx(49_152 / (0.85 * 25 * 1e3))


def test_nodes_behind_others() -> None:
    """Nodes that others touch are left out; within one node they are shared."""

    def types(gpus: int, after: int) -> list[str]:
        found = load_cluster("mixed-h100-a100", gpus, after=after).gpus
        return list(dict.fromkeys(gpu.name for gpu in found))

    assert types(8, 0) == types(4, 4) == types(8, 16) == types(4, 12) == ["h100-sxm"]
    assert types(8, 8) == types(8, 5) == types(4, 8) == ["a100-sxm"]
    assert types(16, 8) == ["a100-sxm", "h100-sxm"]


def test_prompts_and_decoding_have_their_own_all_to_all() -> None:
    """Over nodes where DeepEP was measured: its normal kernels in steps with prompt tokens, the
    low-latency ones in others; one library for both where one is named or was measured. Rows go
    once per chosen expert then, 2.1 times as many to the busiest rank as to the mean one."""

    def cost(comm: Any, cluster: str = "h200-sxm-ib") -> EngineStepCost:
        return EngineStepCost(deploy("DeepSeek-V3", cluster, dp=32, moe_comm=comm))

    both, normal, quick = (cost(comm) for comm in (None, "deepep", "deepep_ll"))
    assert both.deployment.moe_comm == "deepep_auto"
    ranks = np.ones(32)
    decode = BatchShape.of(16 * ranks, 16_000 * ranks)
    prompt = BatchShape.of(prefill_tokens=1024 * ranks)
    mixed = BatchShape.of(16 * ranks, 16_000 * ranks, prefill_tokens=1024 * ranks)
    assert float(both.step_us(decode)) == pytest.approx(float(quick.step_us(decode)))
    assert float(both.step_us(decode)) < 0.87 * float(normal.step_us(decode))
    for batch in (prompt, mixed):
        assert float(both.step_us(batch)) == pytest.approx(float(normal.step_us(batch)))
        assert float(both.step_us(batch)) < float(quick.step_us(batch))
    parts = both.breakdown(decode)
    assert float(sum(parts.values())) == pytest.approx(float(both.step_us(decode)))  # type: ignore[arg-type]
    assert cost(None, "a100-sxm-ib").deployment.moe_comm == "nccl"
    one_node = deploy("DeepSeek-V3", "h200-sxm-ib", dp=8)
    assert one_node.moe_comm == "nccl"
    assert deploy("DeepSeek-V3", "gb200-nvl72", dp=36).moe_comm == "nvlink"
