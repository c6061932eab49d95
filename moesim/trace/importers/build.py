"""From the pieces that a source holds to one checked trace.

What engines have in common is dealt with here once: rows for dense layers, tokens that the engine
never routed, ids that do not fit, and ids stored wider than needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, MismatchError
from moesim.trace import candidates
from moesim.trace.format import MAX_EXPERTS, LoadTrace, Trace, TraceMeta, iter_chunks
from moesim.trace.importers.base import DAMAGED, ImportOptions, require_top_k
from moesim.trace.importers.choices import drop_constant_slots, without_zero_experts
from moesim.trace.importers.layers import (
    EMPTY_RECORD,
    BoolArray,
    file_layers,
    name_empty,
    select_layers,
)
from moesim.trace.importers.ranks import known_homes
from moesim.types import Array


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that one record of a source holds.

    expert_ids:   [n, L, K] any integer type; a layer of zeros or of -1 throughout is a dense one.
    where:        names the file, record and field, for errors.
    request:      a number that tokens of one request share: one for all, or [n].
    positions:    [n]; phases: [n] of 0 (prefill) and 1 (decode).
    candidate_ids, candidate_scores: [n, L, M], as in `trace.candidates`; optional.
    gate_weights: [n, L, K]; token_ids, step_ids, rank_ids: [n]; optional.
    domain:       name of the domain, or "".
    """

    expert_ids: Array
    where: str
    request: int | Array
    positions: Array
    phases: Array
    gate_weights: Array | None = None
    token_ids: Array | None = None
    step_ids: Array | None = None
    rank_ids: Array | None = None
    candidate_ids: Array | None = None
    candidate_scores: Array | None = None
    domain: str = ""


def integer_ids(array: Array, where: str, num_axes: int = 3) -> Array:
    """`array` if it is a non-empty integer array of `num_axes` axes; FormatError otherwise."""
    if array.dtype.kind not in "iu":
        raise FormatError(
            f"{where}: has type {array.dtype}, wanted whole numbers (uint8, uint16, int16, int32)",
            DAMAGED,
        )
    if array.ndim != num_axes or 0 in array.shape[1:]:
        wanted = "[tokens, layers, experts per token]" if num_axes == 3 else f"{num_axes} axes"
        raise FormatError(f"{where}: has shape {array.shape}, wanted {wanted}", DAMAGED)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def whole_counts(array: Array, where: str, num_axes: int = 3) -> Array:
    """Counts as integers: as `integer_ids`, or floats that hold whole numbers (some tools write
    them). Raises FormatError for fractions, NaN and infinities, naming the first."""
    if array.dtype.kind != "f":
        return integer_ids(array, where, num_axes)
    bad = ~(np.isfinite(array) & (array == np.floor(array)) & (np.abs(array) < 1 << 53))
    if bad.any():
        at = tuple(int(x[0]) for x in np.nonzero(bad))
        raise FormatError(
            f"{where}{list(at)} is {array[at]:g}, which is no count",
            "counts are whole numbers: sums of tokens, not averages or shares",
        )
    return integer_ids(array.astype(np.int64), where, num_axes)


def assemble(
    segments: Sequence[Segment],
    options: ImportOptions,
    source: dict[str, Any],
    *,
    moe_only: bool = False,
) -> Trace:
    """One trace from `segments`, in their order; `moe_only` as for `select_layers`.

    Drops dense layers, slots of fused shared experts and tokens that no layer routed, with a
    notice. Raises FormatError (names
    the record) for ids out of range, an expert chosen twice, or records of different shapes, and
    MismatchError when layers or experts per token do not fit the model that was named.
    """
    nothing = FormatError(
        f"{', '.join(map(str, source.get('files', ['the files'])))}: no routed tokens",
        EMPTY_RECORD,
    )
    segments = _limited([s for s in segments if len(s.expert_ids)], options)
    if not segments:
        raise nothing
    shape = segments[0].expert_ids.shape[1:]
    for part in segments:
        if part.expert_ids.shape[1:] != shape:
            raise FormatError(
                f"{part.where}: is for {_shape_text(part.expert_ids.shape[1:])}, but"
                f" {segments[0].where} for {_shape_text(shape)}",
                "import runs of different models apart",
            )
    segments = drop_constant_slots(known_homes(segments, options), options)
    shape = segments[0].expert_ids.shape[1:]
    if options.top_k not in (None, shape[1]):
        raise MismatchError(
            f"{segments[0].where}: records {shape[1]} experts per token, but the model has"
            f" {options.top_k}",
            "name the model that was recorded",
        )
    empty = _empty_layers([s.expert_ids for s in segments])
    layer_idx, layer_ids = select_layers(
        shape[0], empty, options, segments[0].where, moe_only=moe_only
    )
    segments = without_zero_experts(segments, options)
    kept = [_routed(part, layer_idx, empty[layer_idx]) for part in segments]
    dropped = sum(len(s.expert_ids) for s in segments) - sum(int(keep.sum()) for keep, _ in kept)
    if dropped:
        options.notify(f"dropped {dropped} tokens that no layer routed (all ids zero or -1)")
    num_experts = _num_experts(segments, [ids for _, ids in kept], options)
    _check_top_k(int(shape[1]), num_experts, segments[0].where)
    for part, (keep, ids) in zip(segments, kept, strict=True):
        _check(part.where, np.flatnonzero(keep), ids, num_experts, layer_ids)
    parts = [(s, keep, ids) for s, (keep, ids) in zip(segments, kept, strict=True) if len(ids) > 0]
    if not parts:
        raise nothing
    signed = any(int(ids.min()) < 0 for _, _, ids in parts)
    dtype = np.int16 if signed else np.uint8 if num_experts <= 256 else np.uint16
    names = [s.domain or options.domain for s, _, _ in parts]
    domains = tuple(dict.fromkeys(n for n in names if n))
    if domains and not all(names):
        domains = (*domains, "other")
    return Trace(
        expert_ids=np.concatenate([ids.astype(dtype) for _, _, ids in parts]),
        request_ids=np.concatenate(
            [np.broadcast_to(s.request, keep.shape)[keep].astype(np.int32) for s, keep, _ in parts]
        ),
        positions=np.concatenate([s.positions[keep].astype(np.int32) for s, keep, _ in parts]),
        phases=np.concatenate([s.phases[keep].astype(np.uint8) for s, keep, _ in parts]),
        gate_weights=_gates(parts, layer_idx, layer_ids),
        **_candidates(parts, layer_idx, num_experts),
        token_ids=_optional(parts, "token_ids", np.int32),
        step_ids=_optional(parts, "step_ids", np.int32),
        rank_ids=_optional(parts, "rank_ids", np.int32),
        domain_ids=np.concatenate(
            [
                np.full(int(keep.sum()), domains.index(name or "other"), np.int16)
                for name, (_, keep, _) in zip(names, parts, strict=True)
            ]
        )
        if domains
        else None,
        meta=TraceMeta(
            model=options.model,
            num_experts=num_experts,
            top_k=int(shape[1]),
            layer_ids=layer_ids,
            domains=domains,
            license=options.license,
            source={"kind": "imported", **source},
        ),
    )


def assemble_load(
    load: npt.NDArray[np.int64],
    options: ImportOptions,
    source: dict[str, Any],
    where: str,
    layer_ids: tuple[int, ...] | None = None,
    top_k: int | None = None,
    moe_only: bool = False,
) -> LoadTrace:
    """A load trace from counts [S, L, E]; `moe_only` as for `select_layers`.

    Drops steps without load and, unless `layer_ids` says which layers these are, dense layers
    (no load in any step). Raises FormatError for negative counts or no load at all.
    """
    if load.ndim != 3 or 0 in load.shape[1:]:
        raise FormatError(
            f"{where}: has shape {load.shape}, wanted [steps, layers, experts]", DAMAGED
        )
    if load.size and load.min() < 0:
        step, layer, expert = (int(x[0]) for x in np.nonzero(load < 0))
        raise FormatError(
            f"{where}: step {step}, layer {layer}, expert {expert}: negative count", DAMAGED
        )
    busy = load.any(axis=(1, 2))
    if not busy.any():
        raise FormatError(f"{where}: no step has any load", EMPTY_RECORD)
    if not busy.all():
        options.notify(f"dropped {int((~busy).sum())} steps without any load")
    load = load[busy]
    if options.max_tokens is not None:
        load = load[: options.max_tokens]
    empty = np.asarray(~load.any(axis=(0, 2)))
    if layer_ids is None:
        layer_idx, layer_ids = select_layers(
            load.shape[1], empty, options, where, moe_only=moe_only
        )
        load = load[:, layer_idx]
    else:
        file_layers(layer_ids, options, where)
        name_empty([layer_ids[i] for i in np.flatnonzero(empty)], options)
    num_experts = load.shape[2]
    if options.num_experts is not None and options.num_experts != num_experts:
        raise MismatchError(
            f"{where}: counts {num_experts} experts, but the model has {options.num_experts}",
            "name the model that was recorded",
        )
    chosen = top_k or require_top_k(options, "counts do not say it")
    _check_top_k(chosen, num_experts, where)
    return LoadTrace(
        expert_load=np.ascontiguousarray(load, np.int64),
        meta=TraceMeta(
            model=options.model,
            num_experts=num_experts,
            top_k=chosen,
            layer_ids=layer_ids,
            license=options.license,
            source={"kind": "imported", **source},
        ),
    )


def to_logical(
    physical_load: npt.NDArray[np.int64], physical_to_logical: npt.NDArray[np.int64], where: str
) -> npt.NDArray[np.int64]:
    """[..., L, P] counts of slots to [..., L, E] counts of experts; E is the largest id plus one.

    Replicas of one expert are added up. The map has passed `check_map`. Raises FormatError when
    the two do not fit.
    """
    if physical_to_logical.ndim != 2 or physical_load.shape[-2:] != physical_to_logical.shape:
        raise FormatError(
            f"{where}: counts have shape {physical_load.shape}, but the map of slots to experts"
            f" {physical_to_logical.shape}",
            DAMAGED,
        )
    num_experts = int(physical_to_logical.max()) + 1
    out = np.zeros((*physical_load.shape[:-1], num_experts), np.int64)
    for layer in range(physical_to_logical.shape[0]):
        for slot, expert in enumerate(physical_to_logical[layer]):
            out[..., layer, expert] += physical_load[..., layer, slot]
    return out


def check_map(physical_to_logical: npt.NDArray[np.int64], where: str) -> None:
    """Raise FormatError, naming layer and slot, unless every slot of [L, P] holds an expert."""
    bad = (physical_to_logical < 0) | (physical_to_logical >= MAX_EXPERTS)
    if bad.any():
        layer, slot = (int(x[0]) for x in np.nonzero(bad))
        raise FormatError(
            f"{where}: layer {layer}, slot {slot}: {physical_to_logical[layer, slot]} is no expert",
            DAMAGED,
        )


def _limited(segments: list[Segment], options: ImportOptions) -> list[Segment]:
    if options.max_tokens is None:
        return segments
    out, left = [], options.max_tokens
    for part in segments:
        if left <= 0:
            options.notify(f"stopped after {options.max_tokens} tokens")
            break
        out.append(part if len(part.expert_ids) <= left else _head(part, left))
        left -= len(part.expert_ids)
    return out


def _head(part: Segment, count: int) -> Segment:
    cut: dict[str, Any] = {
        f.name: value[:count]
        for f in fields(part)
        if isinstance(value := getattr(part, f.name), np.ndarray)
    }
    return replace(part, **cut)


def _empty_layers(arrays: list[Array]) -> BoolArray:
    """[L]: layers whose ids are all zero, or all -1, for every token.

    With one expert per token, a layer that always chose expert 0 looks the same as an empty one.
    """
    zero = np.logical_and.reduce([(a == 0).all(axis=(0, 2)) for a in arrays])
    minus = np.logical_and.reduce([(a == -1).all(axis=(0, 2)) for a in arrays])
    return zero | minus


def _routed(
    part: Segment, layer_idx: npt.NDArray[np.int64], empty_layers: BoolArray
) -> tuple[BoolArray, Array]:
    """(which tokens were routed at all [n], their ids [kept, L, K], -1 in empty layers)."""
    ids = part.expert_ids[:, layer_idx]
    empty = (ids == -1).all(axis=(1, 2))
    if ids.shape[1] * ids.shape[2] > 2:
        empty |= (ids == 0).all(axis=(1, 2))
    kept = ids[~empty]
    if empty_layers.any():
        kept = kept.astype(np.int32)
        kept[:, empty_layers] = -1
    return ~empty, kept


def _check_top_k(top_k: int, num_experts: int, where: str) -> None:
    if top_k > num_experts:
        raise MismatchError(
            f"{where}: {top_k} experts per token, but there are {num_experts}",
            "name the model that was recorded",
        )


def _num_experts(segments: list[Segment], kept: list[Array], options: ImportOptions) -> int:
    if options.num_experts is not None:
        return options.num_experts
    largest = 0
    for part, ids in zip(segments, kept, strict=True):
        largest = max(largest, int(ids.max(initial=0)))
        if largest >= MAX_EXPERTS:
            raise FormatError(
                f"{part.where}: expert id {largest} is larger than any model has", DAMAGED
            )
    options.notify(
        f"took {largest + 1} experts, the largest id seen plus one; `num_experts` or `model` says"
        " how many there are"
    )
    return max(1, largest + 1)


def _check(
    where: str,
    token_idx: npt.NDArray[np.int64],
    ids: Array,
    num_experts: int,
    layer_ids: tuple[int, ...],
) -> None:
    """Ids within range and no expert twice for a token; `token_idx` gives the rows' numbers."""
    top_k = ids.shape[2]
    for part in iter_chunks(len(ids)):
        block = ids[part]
        bad = (block >= num_experts) | (block < -1)
        if bad.any():
            t, layer, k = (int(x[0]) for x in np.nonzero(bad))
            raise FormatError(
                f"{where}: token {token_idx[part.start + t]}, layer {layer_ids[layer]}: expert id"
                f" {int(block[t, layer, k])} is outside 0..{num_experts - 1}",
                "check `num_experts` or `model`; ids from the number of experts on are fused"
                " shared experts, or experts without computation (`zero_experts`)",
            )
        ordered = np.sort(block, axis=2)
        same = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != -1)
        if top_k > 1 and same.any():
            t, layer, k = (int(x[0]) for x in np.nonzero(same))
            raise FormatError(
                f"{where}: token {token_idx[part.start + t]}, layer {layer_ids[layer]}: expert"
                f" {int(ordered[t, layer, k])} is chosen twice",
                "the record is damaged or padded; if this layer is dense, give `layer_ids`",
            )


def _gates(
    parts: list[tuple[Segment, BoolArray, Array]],
    layer_idx: npt.NDArray[np.int64],
    layer_ids: tuple[int, ...],
) -> Array | None:
    given = [s.gate_weights for s, _, _ in parts]
    if any(g is None for g in given):
        return None
    out = []
    for part, keep, ids in parts:
        gates = np.asarray(part.gate_weights)
        if gates.shape != part.expert_ids.shape:
            raise FormatError(
                f"{part.where}: weights have shape {gates.shape}, ids {part.expert_ids.shape}",
                DAMAGED,
            )
        gates = np.where(ids == -1, 0, gates[keep][:, layer_idx])
        with np.errstate(over="ignore"):
            gates = gates.astype(np.float16 if gates.dtype == np.float16 else np.float32)
        if not (finite := np.isfinite(gates)).all():
            token, layer, _ = (int(x[0]) for x in np.nonzero(~finite))
            raise FormatError(
                f"{part.where}: token {np.flatnonzero(keep)[token]}, layer {layer_ids[layer]}:"
                f" a weight is {gates[~finite][0]}",
                DAMAGED,
            )
        out.append(gates)
    return np.concatenate(out)


def _candidates(
    parts: list[tuple[Segment, BoolArray, Array]],
    layer_idx: npt.NDArray[np.int64],
    num_experts: int,
) -> dict[str, Any]:
    """The candidates of the tokens and layers that are kept, where all records have them alike."""
    out: dict[str, list[Array]] = {name: [] for name in candidates.NAMES}
    for part, keep, _ in parts:
        ids, scores = part.candidate_ids, part.candidate_scores
        if ids is None and scores is None:
            return {}
        if ids is not None:
            ids = integer_ids(ids, f"{part.where}: candidate_ids")
        candidates.check_shapes(ids, scores, part.expert_ids, num_experts, part.where)
        assert ids is not None
        assert scores is not None
        ids = ids[keep][:, layer_idx]
        scores = np.asarray(scores)[keep][:, layer_idx].astype(np.float16)
        candidates.check_values(ids, scores, num_experts, 0, part.where)
        out["candidate_ids"].append(ids.astype(np.int16))
        out["candidate_scores"].append(scores)
    if len({ids.shape[2] for ids in out["candidate_ids"]}) > 1:
        raise FormatError(
            "records with different numbers of candidates", "import them apart, then merge"
        )
    return {name: np.concatenate(blocks) for name, blocks in out.items()}


def _optional(
    parts: list[tuple[Segment, BoolArray, Array]], name: str, dtype: type
) -> Array | None:
    given = [getattr(s, name) for s, _, _ in parts]
    if any(g is None for g in given):
        return None
    return np.concatenate([np.asarray(getattr(s, name))[k].astype(dtype) for s, k, _ in parts])


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} layers x {shape[1]} experts"
