"""Warm-up rows: tokens that an engine ran through the model before any request came.

Engines run dummy batches to size buffers and to record CUDA graphs. All tokens of such a batch are
the same, so they are all routed alike, which real text never is for long: in routing traces of
GPT-OSS-20B, DeepSeek-V2-Lite and the bundled model no two neighbouring tokens are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.trace.format import LoadTrace, Trace, drop_pages

MIN_RUN = 32


def warmup_tokens(trace: Trace, min_run: int = MIN_RUN) -> npt.NDArray[np.bool_]:
    """[T]: tokens in a run of at least `min_run` whose ids are equal in every layer.

    A run is counted over neighbouring rows, whatever request they belong to.
    """
    ids = trace.expert_ids
    out = np.zeros(len(ids), np.bool_)
    if len(ids) < min_run:
        return out
    same = np.ones(len(ids) - 1, np.bool_)
    for start in range(0, len(same), 1 << 16):
        part = slice(start, min(start + (1 << 16), len(same)))
        block = np.asarray(ids[part.start : part.stop + 1])
        same[part] = (block[1:] == block[:-1]).all(axis=(1, 2))
        drop_pages(ids)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        if last - first + 1 >= min_run:
            out[first : last + 1] = True
    return out


def warmup_steps(load: LoadTrace, min_run: int = MIN_RUN) -> npt.NDArray[np.bool_]:
    """[S]: steps in which at least `min_run` tokens all went to the same experts.

    That is so when every layer has load on `top_k` experts only, and the same on each.
    """
    counts, top_k = load.expert_load, load.meta.top_k
    busy = (counts > 0).sum(axis=2)
    peak = counts.max(axis=2)
    alike = (busy == top_k) & (peak * top_k == counts.sum(axis=2)) & (peak >= min_run)
    return np.asarray(alike.all(axis=1) & (top_k < counts.shape[2]))
