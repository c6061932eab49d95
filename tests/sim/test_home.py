"""Home ranks of models whose layers are not all alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.cluster import load_cluster
from moesim.model.names import load_model
from moesim.sim.home import HomeModel, HomeTimes, Rows


def times(model, *, tokens: float = 16.0) -> HomeTimes:
    one = np.full((1, 8), tokens)
    rows = Rows(one, one, np.full((1, 8), 1000.0), one)
    cluster = load_cluster("h100-sxm-ib", 8)
    return HomeModel(cluster, model, model.moe_layer_ids[:2]).times(rows, "decode")


def test_layers_of_nemotron_are_counted_once_each() -> None:
    """Its MoE layers mix no tokens; Mamba and attention layers come once a step, with the head.

    Taking the attention layers out, or the Mamba layers, takes out what they cost, and no more.
    """
    model = load_model("Nemotron-3-Nano")
    whole = times(model)
    assert not whole.attention_us.any()
    assert whole.shared_us.all()
    spec = model.attention
    attention = next(k for k in spec.kinds if k.caches).layer_ids
    without = replace(
        model,
        attention=replace(
            spec,
            absent_layer_ids=tuple(sorted({*spec.absent_layer_ids, *attention})),
            kinds=tuple(kind for kind in spec.kinds if not kind.caches),
        ),
    )
    mamba = replace(
        model,
        attention=replace(
            spec,
            absent_layer_ids=tuple(sorted({*spec.absent_layer_ids, *spec.linear_layer_ids})),
            linear_layer_ids=(),
            kinds=tuple(kind for kind in spec.kinds if kind.caches),
        ),
    )
    neither = replace(
        model,
        attention=replace(
            spec,
            absent_layer_ids=tuple(range(model.num_hidden_layers)),
            linear_layer_ids=(),
            kinds=tuple(replace(kind, layer_ids=()) for kind in spec.kinds if kind.caches),
        ),
    )
    parts = [times(part).dense_us for part in (without, mamba, neither)]
    np.testing.assert_allclose(whole.dense_us - parts[0], parts[1] - parts[2], rtol=1e-9)
    assert (parts[0] > parts[2]).all()
    assert (parts[1] > parts[2]).all()


def test_dense_parts_and_latent_projections_stand_beside_the_experts() -> None:
    model = load_model("Mixtral-8x7B")
    plain = times(model).shared_us
    beside = times(replace(model, dense_intermediate_size=4096, moe_dense_ffns=2)).shared_us
    alone = times(replace(model, num_shared_experts=1, shared_intermediate_size=4096)).shared_us
    np.testing.assert_allclose(beside - plain, 2 * (alone - plain), rtol=1e-9)
    assert (times(replace(model, expert_hidden_size=1024)).shared_us > plain).all()
