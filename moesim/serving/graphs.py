"""Rows that an engine computes where CUDA graphs replay a step: those of the next size captured.

vLLM captures 1, 2, 4, every 8th size up to 256 and every 16th up to 512, or up to twice the most
sequences where that is less (vllm/config/vllm.py, `_set_cudagraph_sizes`, 0.23 to 0.33), and pads a
step to the next of them. The added rows hold what earlier steps left there, so they choose experts
of their own like other tokens (reports/recommend-on-gpu measured it); attention and the output head
leave them out. With data parallelism all ranks compute as many rows as the largest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moesim.kernels import kernel
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment

FINE, COARSE, CHANGE = 8.0, 16.0, 256.0


def graph_limit(deployment: Deployment) -> float:
    """The largest step that is padded; 0 where the engine pads none, and where experts are on GPUs
    of their own, which none of the engines does."""
    engine = deployment.engine
    if deployment.expert_gpus is not None:
        return 0.0
    return float(min(engine.graph_rows, 2 * deployment.max_sequences, deployment.max_batch_tokens))


@kernel(allocates=False)
def graph_rows(rows: float, limit: float) -> float:
    """Rows computed for `rows` of the largest rank; as many where no graph is that large."""
    if rows <= 0.0 or rows > limit:
        return rows
    if rows <= 4.0:
        return 1.0 if rows <= 1.0 else (2.0 if rows <= 2.0 else 4.0)
    step = FINE if rows <= CHANGE else COARSE
    return max(rows, min(limit, math.ceil(rows / step) * step))


def computed_rows(rows: FloatArray, limit: float) -> FloatArray:
    """The same for steps [..., D] of D ranks: what every rank computes."""
    if limit <= 0:
        return rows
    largest = rows.max(axis=-1)
    step = np.where(largest <= CHANGE, FINE, COARSE)
    padded = np.minimum(limit, np.ceil(largest / step) * step)
    small = np.where(largest <= 1, 1.0, np.where(largest <= 2, 2.0, 4.0))
    padded = np.maximum(np.where(largest <= 4, small, padded), largest)
    inside = (largest > 0) & (largest <= limit)
    return np.where(inside[..., None], padded[..., None], rows)
