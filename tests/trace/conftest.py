"""Small traces, and where the real ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.trace.format import Trace, TraceMeta

MakeTrace = Callable[..., Trace]
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def make_trace() -> MakeTrace:
    """make_trace(lengths=(5, 3), ...) -> a random prefill trace of requests of these lengths;
    keyword arguments replace arrays or fields of its meta."""

    def make(
        lengths: tuple[int, ...] = (5, 3, 4),
        layers: int = 3,
        top_k: int = 2,
        experts: int = 8,
        seed: int = 0,
        gates: bool = False,
        **changed: Any,
    ) -> Trace:
        rng = np.random.default_rng(seed)
        num_tokens = sum(lengths)
        order = rng.random((num_tokens, layers, experts)).argsort(axis=2)
        fields: dict[str, Any] = {
            "model": "toy",
            "num_experts": experts,
            "top_k": top_k,
            "layer_ids": tuple(range(1, layers + 1)),
            "domains": ("even", "odd"),
            "license": "CC0-1.0",
            "source": {"kind": "test"},
        }
        requests = np.repeat(np.arange(len(lengths)), lengths)
        arrays: dict[str, Any] = {
            "expert_ids": order[:, :, :top_k].astype(np.uint8),
            "request_ids": requests.astype(np.int32),
            "positions": np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
            "phases": np.zeros(num_tokens, np.uint8),
            "domain_ids": (requests % 2).astype(np.int16),
        }
        if gates:
            weights = np.sort(rng.random((num_tokens, layers, top_k)), axis=2)[..., ::-1]
            arrays["gate_weights"] = (weights / weights.sum(axis=2, keepdims=True)).astype(
                np.float32
            )
        for name, value in changed.items():
            (fields if name in fields else arrays)[name] = value
        return Trace(meta=TraceMeta(**fields), **arrays)

    return make


@pytest.fixture(scope="session")
def real_trace() -> Callable[[str], Trace]:
    """real_trace(name): a bundled sample or a trace of ../shared/data; skips if it is missing."""
    from moesim.trace.format import load_token_trace

    def load(name: str) -> Trace:
        if name.startswith("sample:"):
            return load_token_trace(name, "a test")
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"../shared/data/{name} is not here")
        return load_token_trace(path, "a test")

    return load
