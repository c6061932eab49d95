"""One step as numbers: what every rank computes and every collective carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.sim.collectives.base import Stage
from moesim.sim.home import HomeTimes
from moesim.sim.network import Flow
from moesim.types import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class HomeWork:
    """`HomeTimes` of one step or chunk: dense_us is [G], all others are [L, G]."""

    attention_us: FloatArray
    gate_us: FloatArray
    shared_us: FloatArray
    dense_us: FloatArray
    descend_us: FloatArray
    ascend_us: FloatArray

    @staticmethod
    def of(times: HomeTimes, batch: int) -> HomeWork:
        attention = times.attention_us[batch]

        def every_layer(values: FloatArray) -> FloatArray:
            return np.broadcast_to(values[batch], attention.shape)

        return HomeWork(
            attention,
            every_layer(times.gate_us),
            every_layer(times.shared_us),
            times.dense_us[batch],
            every_layer(times.descend_us),
            every_layer(times.ascend_us),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The routed part of a share of a step's tokens: expert_us [L, G]; dispatch and combine are
    stages of which this chunk is batch `batch`; `home` is what its own tokens cost at home."""

    batch: int
    expert_us: FloatArray
    dispatch: Sequence[Stage]
    combine: Sequence[Stage]
    home: HomeWork


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """One step: `home` for all tokens together, `chunks` for each share of them (usually one);
    `gather` ends a step of the context-coherent schedule."""

    num_layers: int
    num_gpus: int
    num_tokens: int
    home: HomeWork
    chunks: tuple[Chunk, ...]
    gather: Flow | None = None
