"""Two-batch overlap: a step as two halves, one computing while the other communicates.

DeepSeek's serving (github.com/deepseek-ai/profile-data, README), SGLang's
--enable-two-batch-overlap, vLLM's --enable-dbo with its thresholds (`dbo_prefill_token_threshold`
512 and `dbo_decode_token_threshold` 32, tokens of a rank). Both halves' attention, dense layers
and experts run one after the other, every expert's weights read twice, beside both halves'
dispatches and combines; the longer of the two counts, and one exchange that nothing hides. While
kernels that send with SMs run, the rest has that share of the GPU less (DeepEP's default of 20 SMs,
of an H100's 132, and version 2's 12 for two nodes; its low-latency kernels take none, README
"hook-based overlapping").

Ignored: that a half's own order may leave gaps, and that memory traffic of the two adds up.
`moesim simulate --schedule two-batch` has the order task by task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.choices import MoeComm

PREFILL_THRESHOLD = 512.0
DECODE_THRESHOLD = 32.0
SM_SHARE = 20 / 132
SM_SHARE_V2 = 12 / 132


def thresholds(overlap: str) -> tuple[float, float]:
    """Tokens of a rank, on average, from which a step with prompt tokens, and one without, is cut
    in two."""
    return (
        PREFILL_THRESHOLD if overlap in ("prefill", "both") else np.inf,
        DECODE_THRESHOLD if overlap in ("decode", "both") else np.inf,
    )


def sm_share(comm: MoeComm) -> float:
    """Share of the GPU that sending takes."""
    return {"deepep_ll": 0.0, "deepep_v2": SM_SHARE_V2}.get(comm, SM_SHARE)


def overlapped_us(
    compute_us: FloatArray, comm_us: FloatArray, share: FloatArray, num_layers: int
) -> FloatArray:
    """Time of both halves: their computing and their communication, each summed."""
    busy = compute_us + share * np.minimum(compute_us, comm_us)
    return np.asarray(np.maximum(busy, comm_us) + comm_us / (2 * num_layers), np.float64)
