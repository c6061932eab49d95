"""Candidates of a router: for each token and layer the M experts that it scored highest.

`candidate_ids` [T, L, M] and `candidate_scores` [T, L, M] float16, K < M <= E, in descending order
of score; -1 with score 0 ends a row that has fewer. The scores are the router's own, after its
softmax or sigmoid and before any bias, grouping, normalisation or scaling, so that the experts a
token chose need not be the first K.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import FormatError
from moesim.types import Array

NAMES = ("candidate_ids", "candidate_scores")
SCORE_DTYPES = ("float16",)
LAYER_ARRAYS = ("expert_ids", "gate_weights", *NAMES)
"""Arrays that have an axis of layers."""

_REMEDY = "moesim trace capture --candidates writes them; docs/trace-format.md says how they look"


def check_shapes(
    ids: Array | None, scores: Array | None, chosen: Array, num_experts: int, where: str
) -> None:
    """Raise FormatError unless both are there or neither, alike, and K < M <= E."""
    if ids is None and scores is None:
        return
    if ids is None or scores is None:
        has, lacks = NAMES if scores is None else reversed(NAMES)
        raise FormatError(f"{where}: holds {has} but no {lacks}", "write both, or neither")
    top_k = chosen.shape[2]
    if ids.ndim != 3 or ids.shape[:2] != chosen.shape[:2] or ids.shape != scores.shape:
        raise FormatError(
            f"{where}: candidate_ids {ids.shape} and candidate_scores {scores.shape} do not fit"
            f" expert_ids {chosen.shape}",
            _REMEDY,
        )
    if not top_k < ids.shape[2] <= num_experts:
        raise FormatError(
            f"{where}: {ids.shape[2]} candidates of {num_experts} experts, of which a token"
            f" chooses {top_k}",
            f"give from {top_k + 1} to {num_experts} candidates",
        )


def check_values(ids: Array, scores: Array, num_experts: int, first_token: int, where: str) -> None:
    """Raise FormatError for the first token whose candidates [n, L, M] cannot be: an id outside the
    experts or twice, a score that is not finite or above the one before, or a score or an id after
    the end of a row."""
    wide = ids.astype(np.int32)
    ordered = np.sort(wide, axis=2)
    twice = np.zeros(wide.shape, bool)
    twice[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    rising = np.zeros(wide.shape, bool)
    rising[..., 1:] = scores[..., 1:] > scores[..., :-1]
    empty = wide == -1
    stray = empty & (scores != 0)
    stray[..., 1:] |= empty[..., :-1] & ~empty[..., 1:]
    for bad, text in (
        ((wide >= num_experts) | (wide < -1), f"a candidate outside 0..{num_experts - 1}"),
        (twice, "a candidate twice"),
        (~np.isfinite(scores), "a score that is not finite"),
        (scores < 0, "a score below 0"),
        (rising, "candidates that are not in descending order of score"),
        (stray, "a candidate or a score after the last candidate"),
    ):
        if bad.any():
            t, layer, _ = (int(x[0]) for x in np.nonzero(bad))
            raise FormatError(f"{where}: token {first_token + t}, layer {layer}: {text}", _REMEDY)


def num_missed(chosen: Array, candidates: Array) -> int:
    """(token, layer) pairs of [n, L, K] and [n, L, M] with a choice outside the candidates."""
    found = np.ones(chosen.shape, bool)
    for k in range(chosen.shape[2]):
        one = chosen[..., k].astype(np.int32)
        found[..., k] = (one < 0) | (candidates == one[..., None]).any(axis=2)
    return int((~found).any(axis=2).sum())
