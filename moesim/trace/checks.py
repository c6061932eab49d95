"""Whether the arrays of a trace are what the format says: types, shapes, values."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from moesim.errors import FormatError
from moesim.trace import candidates
from moesim.trace.npyio import CHUNK_TOKENS, REMEDY, drop_pages, iter_chunks
from moesim.types import Array

PREFILL, DECODE = 0, 1
TOKEN_DTYPES: dict[str, str] = {
    "request_ids": "int32",
    "positions": "int32",
    "phases": "uint8",
    "token_ids": "int32",
    "domain_ids": "int16",
    "step_ids": "int32",
    "rank_ids": "int32",
}
REQUIRED_ARRAYS = ("request_ids", "positions", "phases")
ID_DTYPES = ("uint8", "uint16", "int16")
GATE_DTYPES = ("float16", "float32")


def check_load(raw: dict[str, Array], want: tuple[int, int], where: str) -> None:
    """Type and shape of counts, of (layers, experts) `want`."""
    load = raw["expert_load"]
    if load.dtype != np.int64 or load.ndim != 3 or load.shape[1:] != want or load.shape[0] < 1:
        raise FormatError(
            f"{where}: expert_load is {load.dtype} {load.shape}, wanted int64 [S, {want[0]},"
            f" {want[1]}]",
            REMEDY,
        )
    both = sorted(set(raw) & {*candidates.LAYER_ARRAYS, *TOKEN_DTYPES})
    if both:
        raise FormatError(
            f"{where}: holds expert_load and {both[0]}, counts and tokens", "write one of them"
        )


def check_arrays(
    raw: dict[str, Array], sizes: tuple[int, int, int], where: str
) -> dict[str, Array]:
    """The arrays of a token trace, once their types and shapes are what (layers, top-k, experts)
    `sizes` say."""
    missing = [n for n in ("expert_ids", *REQUIRED_ARRAYS) if n not in raw]
    if missing:
        raise FormatError(f"{where}: array {missing[0]} is missing", REMEDY)
    ids = raw["expert_ids"]
    _check_dtype(ids, "expert_ids", ID_DTYPES, where)
    want, num_experts = sizes[:2], sizes[2]
    if ids.ndim != 3 or ids.shape[1:] != want:
        raise FormatError(
            f"{where}: expert_ids has shape {ids.shape}, but meta says [T, {want[0]}, {want[1]}]",
            REMEDY,
        )
    gates = raw.get("gate_weights")
    if gates is not None:
        _check_dtype(gates, "gate_weights", GATE_DTYPES, where)
        if gates.shape != ids.shape:
            raise FormatError(
                f"{where}: gate_weights has shape {gates.shape}, expert_ids {ids.shape}", REMEDY
            )
    listed, scores = (raw.get(name) for name in candidates.NAMES)
    candidates.check_shapes(listed, scores, ids, num_experts, where)
    if listed is not None and scores is not None:
        _check_dtype(listed, "candidate_ids", ID_DTYPES, where)
        _check_dtype(scores, "candidate_scores", candidates.SCORE_DTYPES, where)
    for name, dtype in TOKEN_DTYPES.items():
        array = raw.get(name)
        if array is None:
            continue
        _check_dtype(array, name, (dtype,), where)
        if array.shape != ids.shape[:1]:
            raise FormatError(
                f"{where}: {name} has shape {array.shape}, wanted ({ids.shape[0]},)", REMEDY
            )
    return {n: raw[n] for n in (*candidates.LAYER_ARRAYS, *TOKEN_DTYPES) if n in raw}


def _check_dtype(array: Array, name: str, allowed: tuple[str, ...], where: str) -> None:
    if array.dtype.newbyteorder("=").name not in allowed or not array.dtype.isnative:
        raise FormatError(
            f"{where}: {name} has type {array.dtype}, wanted {' or '.join(allowed)}", REMEDY
        )


def check_values(arrays: dict[str, Array], num_experts: int, num_domains: int, where: str) -> None:
    """One bounded pass: ids in range, no expert twice for a token, finite gates, known domains."""
    gates = arrays.get("gate_weights")
    for part in iter_chunks(len(arrays["expert_ids"])):
        _check_choices(np.asarray(arrays["expert_ids"][part]), num_experts, part.start, where)
        if gates is not None and not np.isfinite(gates[part]).all():
            raise FormatError(f"{where}: gate_weights are not all finite", REMEDY)
        drop_pages(arrays["expert_ids"], gates)
    listed, scores = (arrays.get(name) for name in candidates.NAMES)
    _check_candidates(listed, scores, num_experts, where)
    for name in ("request_ids", "positions"):
        if arrays[name].size and arrays[name].min() < 0:
            raise FormatError(f"{where}: {name} has negative values", REMEDY)
    phases, domains = arrays["phases"], arrays.get("domain_ids")
    if phases.size and phases.max() > DECODE:
        raise FormatError(f"{where}: phases must be 0 (prefill) or 1 (decode)", REMEDY)
    if domains is None or not domains.size:
        return
    low, high = int(domains.min()), int(domains.max())
    if low < 0 or high >= max(1, num_domains):
        raise FormatError(
            f"{where}: domain_ids go from {low} to {high}, but meta.domains has {num_domains}"
            " names",
            REMEDY,
        )


def _check_choices(ids: Array, num_experts: int, first: int, where: str) -> None:
    """Expert ids [T, L, K] in range and different; `first` is the number of their first token."""
    bad = ids >= num_experts
    if ids.dtype.kind == "i":
        bad |= ids < -1
    if bad.any():
        t, layer, k = (int(x[0]) for x in np.nonzero(bad))
        raise FormatError(
            f"{where}: token {first + t}, layer {layer}: expert id {int(ids[t, layer, k])} is"
            f" outside 0..{num_experts - 1}",
            REMEDY,
        )
    for a, b in combinations(range(ids.shape[2]), 2):
        same = (ids[:, :, a] == ids[:, :, b]) & (ids[:, :, a] != -1)
        if same.any():
            t, layer = (int(x[0]) for x in np.nonzero(same))
            raise FormatError(
                f"{where}: token {first + t}, layer {layer}: expert {int(ids[t, layer, a])} is"
                " chosen twice",
                REMEDY,
            )


def _check_candidates(
    listed: Array | None, scores: Array | None, num_experts: int, where: str
) -> None:
    if listed is None or scores is None:
        return
    num_tokens, _, num_candidates = listed.shape
    for part in iter_chunks(num_tokens, max(1, CHUNK_TOKENS // num_candidates)):
        candidates.check_values(
            np.asarray(listed[part]), np.asarray(scores[part]), num_experts, part.start, where
        )
        drop_pages(listed, scores)
