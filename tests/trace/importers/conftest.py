"""Small routing tables, and the options that importers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim.trace.importers.base import ImportOptions

Draw = Callable[..., np.ndarray]


@pytest.fixture
def draw() -> Draw:
    """draw(tokens, layers, top_k, experts, seed) -> distinct ids [tokens, layers, top_k]."""

    def make(
        tokens: int, layers: int = 3, top_k: int = 2, experts: int = 8, seed: int = 0
    ) -> np.ndarray:
        rng = np.random.default_rng(seed)
        order = rng.random((tokens, layers, experts)).argsort(axis=2)
        return order[:, :, :top_k].astype(np.int32)

    return make


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def options(notes: list[str]) -> Callable[..., ImportOptions]:
    """options(**fields) -> ImportOptions whose notices land in `notes`."""

    def make(**fields: Any) -> ImportOptions:
        return ImportOptions(notify=notes.append, **fields)

    return make
