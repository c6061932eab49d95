"""Small traces, models and clusters whose simulated times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.sim.collectives.registry import build_exchange
from moesim.sim.home import HomeModel
from moesim.sim.prepare import Models
from moesim.trace.batches import Batches, draw_batches, index_requests
from moesim.trace.format import Trace, TraceMeta

NUM_EXPERTS, TOP_K, LAYERS = 64, 8, 3


def make_trace(num_tokens: int = 1200, *, skew: float = 0.8, seed: int = 1) -> Trace:
    """Decode tokens whose experts follow a power law, so that loads are uneven."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(NUM_EXPERTS) + 1.0) ** -skew
    noise = rng.gumbel(size=(num_tokens, LAYERS, NUM_EXPERTS))
    ids = np.argsort(-(np.log(weight) + noise), axis=2)[:, :, :TOP_K]
    gates = np.sort(rng.random((num_tokens, LAYERS, TOP_K)), axis=2)[:, :, ::-1]
    per_request = 40
    return Trace(
        expert_ids=ids.astype(np.uint8),
        request_ids=(np.arange(num_tokens) // per_request).astype(np.int32),
        positions=(np.arange(num_tokens) % per_request).astype(np.int32),
        phases=np.ones(num_tokens, np.uint8),
        meta=TraceMeta("debian-moe", NUM_EXPERTS, TOP_K, tuple(range(LAYERS))),
        gate_weights=gates.astype(np.float32),
    )


def make_models(
    num_gpus: int = 8,
    *,
    all_to_all: str | None = None,
    home: bool = True,
    cluster: str = "h100-sxm-ib",
    policy: str = "split",
    model_name: str = "debian-moe",
) -> Models:
    built = load_cluster(cluster, num_gpus)
    model = load_model(model_name)
    step, links, exchange = build_exchange(all_to_all, built, model, phase="decode")
    ranks = HomeModel(built, model, tuple(range(LAYERS))) if home else None
    return Models(built, step, links, exchange, ranks, policy)  # type: ignore[arg-type]


def linear(models: Models, layers: int = LAYERS) -> Placement:
    row = np.arange(NUM_EXPERTS, dtype=np.int32)
    return Placement(
        np.tile(row, (layers, 1)), models.num_gpus, models.cluster.num_nodes, NUM_EXPERTS
    )


def decode_batches(trace: Trace, size: int = 256, count: int = 3) -> Batches:
    index, _ = index_requests(trace, "decode")
    return draw_batches(index, "decode", size, count, 5)


@pytest.fixture(scope="session")
def trace() -> Trace:
    return make_trace()


@pytest.fixture(scope="session")
def models_of() -> Callable[..., Models]:
    return make_models


@pytest.fixture(scope="session")
def linear_of() -> Callable[..., Placement]:
    return linear


@pytest.fixture(scope="session")
def trace_of() -> Callable[..., Trace]:
    return make_trace


@pytest.fixture(scope="session")
def batches(trace: Trace) -> Batches:
    return decode_batches(trace)


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., Batches]:
    return lambda trace, count, size=256: decode_batches(trace, size, count)
