"""Latent attention over the keys that an indexer chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.cost.dense import IndexedModule
from moesim.model.names import load_model
from moesim.serving.attention_us import AttentionTerms
from moesim.serving.deployment import deploy
from moesim.serving.step_cost import EngineStepCost

TERMS = AttentionTerms(
    num_layers=1,
    window=0,
    decode_launch_us=10.0,
    us_per_seen=0.01,
    extra_tokens=0.0,
    prefill_launch_us=20.0,
    us_per_row=0.1,
    us_per_pair=0.001,
    sharpness=50.0,
    chosen=100,
    index_decode_us=5.0,
    us_per_indexed=0.001,
    index_prefill_us=30.0,
    us_per_choosing_row=0.5,
    us_per_index_pair=0.0002,
)


def test_times_of_one_key_and_of_a_row() -> None:
    """GLM-5: 32 index heads x 128 wide are 8,192 operations per key, at 512 TFLOPS 16 ps. Of 64
    heads cut over 8 a rank has 8, padded to 64: 2 x 64 x (2 x 512 + 64) x 2,048 = 285.2 million
    operations per row, at 500 TFLOPS 570.4 ns, and 0.1 us beside."""
    spec = load_model("GLM-5").attention
    module = IndexedModule("prefill", "bf16", 100.0, 512.0, 500.0, row_us=0.1, min_heads=64)
    assert module.index_us(spec) == pytest.approx(16e-6)
    assert module.chosen_us(spec, 8) == pytest.approx(0.1 + 0.5704, rel=1e-3)
    assert module.chosen_us(spec, 8) == module.chosen_us(spec, 64) < module.chosen_us(spec, 128)


def test_decodes_see_what_is_chosen_and_index_all() -> None:
    """Two sequences with 1,000 tokens together: 10 + 0.01 x 200 + 5 + 0.001 x 1,000 = 18 us; with
    150 tokens together all are seen: 10 + 1.5 + 5 + 0.15 = 16.65 us."""
    both = TERMS.decode_us(np.array([2.0, 2.0]), np.array([1000.0, 150.0]))
    assert both == pytest.approx([18.0, 16.65])
    assert TERMS.one_us(2, 1000, 0, 0) == pytest.approx(18.0)


def test_prompts_choose_where_they_are_longer_than_what_is_chosen() -> None:
    """100 tokens have 5,050 pairs and see all: 20 + 10 us of rows, over 5.05 of pairs. 200 tokens
    have 20,100: 20 + 30 + 0.5 x 200 + 0.0002 x 20,100 = 154.02 us."""
    rows, pairs = np.array([100.0, 200.0]), np.array([5050.0, 20100.0])
    assert TERMS.prefill_us(rows, pairs) == pytest.approx([30.0, 154.02], rel=1e-3)
    for n, p, time in zip(rows, pairs, TERMS.prefill_us(rows, pairs), strict=True):
        assert TERMS.one_us(0, 0, n, p) == pytest.approx(time)


def test_layers_that_share_a_choice_have_no_indexer() -> None:
    """GLM-5.2: 21 of 78 layers index; GLM-5 with as many layers indexes in all, and takes longer.
    Where no kernel was measured, all keys are seen."""
    shared, own = (EngineStepCost(deploy(m, "h200-sxm-ib", tp=8)) for m in ("GLM-5.2", "GLM-5"))
    assert [term.num_layers for term in shared.attention] == [21, 57]
    assert [term.num_layers for term in own.attention] == [78]
    assert shared.attention[1].us_per_indexed == shared.attention[1].us_per_index_pair == 0.0
    assert own.one_us([4], [40_000.0], [0.0], [0.0], [0]) > shared.one_us(
        [4], [40_000.0], [0.0], [0.0], [0]
    )
    assert any("attention to chosen keys: measured" in part for part in own.rests_on)
    elsewhere = EngineStepCost(deploy("GLM-5", "b200-ib", tp=8))
    assert [term.chosen for term in elsewhere.attention] == [0]


def test_long_contexts_cost_less_than_with_all_keys() -> None:
    """At 100,000 cached tokens per sequence, the 2,048 that are chosen cost less to read."""
    cost = EngineStepCost(deploy("GLM-5", "h200-sxm-ib", tp=8, engine="sglang"))
    model = cost.deployment.model
    full = replace(model, attention=replace(model.attention, chosen_keys=0))
    every = EngineStepCost(deploy(full, "h200-sxm-ib", tp=8, engine="sglang"))
    step = [8], [800_000.0], [0.0], [0.0], [0]
    assert cost.one_us(*step) < every.one_us(*step)
