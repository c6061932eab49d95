"""The multi-token-prediction layer that drafts: time by hand, memory, the loop, acceptances."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba import njit

import moesim
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.serving.batch import BatchShape
from moesim.serving.config import ServingConfig
from moesim.serving.deployment import deploy
from moesim.serving.memory import gpu_memory
from moesim.serving.requests import Requests
from moesim.serving.run import simulate_serving
from moesim.serving.speculative import Speculation
from moesim.serving.state import RANK
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_kernel import drafting_us
from moesim.serving.step_table import tables_of


@njit
def loop_drafting_us(tables: Any, ranks: Any, drafts: int, again: float) -> float:
    return drafting_us(tables, 0, ranks, 0, len(ranks), drafts, again, np.ones(1))


@pytest.fixture(scope="module")
def cost() -> EngineStepCost:
    return EngineStepCost(deploy("DeepSeek-V3", "h200-sxm-ib", dp=8, mtp=True))


def test_time_by_hand(cost: EngineStepCost) -> None:
    """A decode step of 16 sequences per rank that verifies 2 drafts: the layer computes 48 rows per
    rank (its first draft), then 16 (the second), and both take the head. DeepSeek-V3 has 58 MoE
    layers, so that 1/58 of all their experts' and exchanges' time is the layer's; its attention is
    one of the model's 61 layers'."""
    ones = np.ones(8)
    batch = BatchShape.of(16 * ones, 16_000 * ones)
    verified = BatchShape.of(48 * ones, 48_000 * ones)
    terms = cost.attention[0]

    def layer(shape: BatchShape) -> float:
        rows = float(shape.decode_tokens[0])
        own = float(cost._drafting(np.array(rows)))
        attention = terms.decode_us(shape.decode_tokens, shape.decode_context_tokens)[0]
        parts = cost.breakdown(shape)
        tp1 = float(parts["experts"] + parts["communication"])
        return own + float(attention) + tp1 / 58

    head = float(cost._head(np.array(16.0)))
    expected = layer(verified) + layer(batch) + 2 * head
    assert float(cost.drafting_us(batch, 2, 2.0 / 2.0)) == pytest.approx(expected)
    first = layer(batch)
    assert float(cost.drafting_us(batch, 0, 1.0)) == pytest.approx(first)


def test_row_work_is_a_layer_and_a_projection(cost: EngineStepCost) -> None:
    """One rank's rows: one of 58 MoE layers (all but the dense ones' parts), and a GEMM of 7,168 by
    14,336 that joins hidden state and embedding."""
    rows = np.array([64.0])
    parts = cost._of_rows.parts(rows)
    joined = cost.calibration.dense.gemm("fp8").time_us(rows, 7168, 2 * 7168)
    layer = parts["projections"] / 61 + (parts["router"] + parts["shared_experts"]) / 58
    found = cost._of_rows.drafting_us(rows)
    small = found - joined - layer
    assert 0 < float(small[0]) < 0.1 * float(found[0]) + 30.0


def test_loop_has_the_same_time(cost: EngineStepCost) -> None:
    tables = tables_of([cost])
    rng = np.random.default_rng(0)
    for kind in range(3):
        ranks = np.zeros(8, RANK)
        ranks["decode_rows"] = rng.integers(0, 100, 8) * (kind != 1)
        ranks["decode_context"] = ranks["decode_rows"] * 1500
        ranks["prefill_rows"] = rng.integers(1, 3000, 8) * (kind > 0)
        ranks["prefill_pairs"] = ranks["prefill_rows"] * 400.0
        ranks["prefill_sequences"] = kind > 0
        names = ("decode_rows", "decode_context", "prefill_rows", "prefill_pairs")
        batch = BatchShape.of(*(ranks[name] for name in names), ranks["prefill_sequences"])
        for drafts in (0, 1, 3):
            expected = float(cost.drafting_us(batch, drafts, 1.0))
            assert loop_drafting_us(tables, ranks, drafts, 1.0) == pytest.approx(expected)


def test_memory() -> None:
    """DeepSeek-V3's layer: 256 experts of 44.04M weights, 32 per GPU in fp8 with a scale per 128 x
    128, 1.41 GB; attention, shared expert, router and projection, 0.35G weights in fp8; a cache of
    576 elements of 2 bytes beside the 61 layers'."""
    plain, drafts = (
        gpu_memory(deploy("DeepSeek-V3", "h200-sxm-ib", dp=8, mtp=mtp)) for mtp in (False, True)
    )
    model = load_model("DeepSeek-V3")
    experts = drafts.expert_weight_bytes - plain.expert_weight_bytes
    assert experts == pytest.approx(32 * 3 * 7168 * 2048, rel=0.001)
    rest = drafts.other_weight_bytes - plain.other_weight_bytes
    weights = model.mtp_params - 256 * 3 * 7168 * 2048
    assert rest == pytest.approx(weights, rel=0.001)
    assert weights / 1e9 == pytest.approx(0.34, abs=0.02)
    assert drafts.kv_bytes_per_token - plain.kv_bytes_per_token == 576 * 2
    assert drafts.kv_bytes_per_token == 62 * 576 * 2


def test_acceptance_by_place(small: ModuleType) -> None:
    """Of the first token 0.8, of the second 0.5 where the first was: 1 + 0.8 + 0.8 x 0.5 = 2.2
    tokens per step, 1.2 of 2 drafts accepted."""
    speculation = Speculation((0.8, 0.5), 2, 0.0, fixed=True)
    assert speculation.expected() == pytest.approx([1.0, 1.8, 2.2])
    assert Speculation(0.5, 3).expected() == pytest.approx([1.0, 1.5, 1.75, 1.875])
    requests = small.at_once([8] * 64, [500] * 64)
    result = small.serve(requests, small.tables(1000.0), speculation=speculation)
    assert result.metrics["drafts_accepted_share"] == pytest.approx(0.6, abs=0.01)


def test_a_service_that_drafts_by_its_own_layer() -> None:
    """What the layer takes is in each step: slower steps than with free drafts, and fewer of them
    than without drafting."""
    requests = Requests.of(np.zeros(8), np.full(8, 512), np.full(8, 64))
    plain = deploy("DeepSeek-V3", "h200-sxm-ib", dp=8)
    own = replace(plain, mtp=True)
    free = ServingConfig(speculation=Speculation(0.85, 1, 0.0, fixed=True))
    none = simulate_serving(plain, requests).metrics
    without, drafted = (simulate_serving(d, requests, free).metrics for d in (plain, own))
    assert without["tpot_mean"] < drafted["tpot_mean"] < none["tpot_mean"]
    assert none["tpot_mean"] / drafted["tpot_mean"] > 1.4


def test_serve_takes_the_layer_where_the_model_has_one() -> None:
    drawn = "poisson:rate=4,requests=20,prompt=200,output=20"
    asked: dict[str, Any] = {"cluster": "h200-sxm-ib", "gpus": 8, "speculate": (0.85, 0.7)}
    own = moesim.serve(drawn, model="DeepSeek-V3", drafts=2, **asked).record
    assert own["defaults"]["drafting"] == "multi-token-prediction layer"
    assert own["deployment"]["mtp"] is True
    assert any(line.startswith("drafting: one multi") for line in own["predictions"])
    other = moesim.serve(drawn, model="DeepSeek-V3", draft_share=0.1, **asked).record
    assert other["deployment"]["mtp"] is False
    none = moesim.serve(drawn, model="Qwen3-30B-A3B", **asked).record
    assert none["defaults"]["drafting"] == "0.05 of a step per token"


def test_wrong_drafting() -> None:
    with pytest.raises(InputError, match="has no multi-token-prediction layer"):
        deploy("Qwen3-30B-A3B", "h200-sxm-ib", dp=8, mtp=True)
    with pytest.raises(InputError, match="of at most 1"):
        Speculation((0.8, 0.7), 1)
    made = deploy("DeepSeek-V3", "h200-sxm-ib", dp=8, mtp=True)
    one = Requests.of([0.0], [8], [8])
    with pytest.raises(InputError, match="no speculation"):
        simulate_serving(made, one)
    with pytest.raises(InputError, match="`draft_share` as well"):
        simulate_serving(made, one, ServingConfig(speculation=Speculation(0.7, 2)))
