"""Ids in a record that are no routed expert: fused shared experts, padding, zero computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.trace.importers.base import ImportOptions
from moesim.types import Array

if TYPE_CHECKING:
    from moesim.trace.importers.build import Segment

PADDING = (-1, 255, 32767, 65535)
"""Ids of slots that an engine's buffer never wrote: -1, and the largest of uint8, int16, uint16."""
MIN_CELLS = 32
"""Tokens times layers from which on one id throughout is no chance."""


def drop_constant_slots(segments: Sequence[Segment], options: ImportOptions) -> list[Segment]:
    """`segments` without the slots of K that hold one id, which is no routed expert, in every
    token of every layer that is not empty. A notice names them."""
    top_k = segments[0].expert_ids.shape[2]
    drop = constant_slots([part.expert_ids for part in segments], options.num_experts)
    if not drop or len(drop) == top_k:
        return list(segments)
    named = ", ".join(map(str, sorted(set(drop.values()))))
    options.notify(
        f"left out {len(drop)} of {top_k} ids per token, which are {named} throughout: slots of"
        " fused shared experts, not routed ones"
    )
    keep = [slot for slot in range(top_k) if slot not in drop]
    return [
        replace(
            part,
            expert_ids=part.expert_ids[:, :, keep],
            gate_weights=None if part.gate_weights is None else part.gate_weights[:, :, keep],
        )
        for part in segments
    ]


def constant_slots(tables: Sequence[Array], num_experts: int | None) -> dict[int, int]:
    """Slot -> id, for the slots of K whose one id in `tables` [n, L, K] is no routed expert."""
    found = {}
    for slot in range(tables[0].shape[2]):
        value = _constant(tables, slot)
        beyond = value is not None and num_experts is not None and value >= num_experts
        if value is not None and (value in PADDING or beyond):
            found[slot] = value
    return found


def _constant(tables: Sequence[Array], slot: int) -> int | None:
    """The one id in a slot of all layers that are not empty, or None."""
    found: int | None = None
    count = 0
    for ids in tables:
        busy = ~((ids == 0).all(axis=(0, 2)) | (ids == -1).all(axis=(0, 2)))
        column = ids[:, busy, slot]
        if not column.size:
            continue
        first = int(column.flat[0])
        if (found is not None and first != found) or not (column == first).all():
            return None
        found = first
        count += column.size
    return found if count >= MIN_CELLS else None


def without_zero_experts(segments: Sequence[Segment], options: ImportOptions) -> list[Segment]:
    """`segments` with choices of zero-computation experts (ids from num_experts on) as -1.

    Such an expert hands its input on: it has no weights to place and costs nothing
    (LongCat-Flash, arXiv:2509.01322, section 2.1). Needs num_experts and zero_experts.
    """
    real, zero = options.num_experts, options.zero_experts
    if not zero or real is None:
        return list(segments)
    out, count = [], 0
    for part in segments:
        none = (part.expert_ids >= real) & (part.expert_ids < real + zero)
        count += int(none.sum())
        ids = np.where(none, -1, part.expert_ids.astype(np.int32))
        out.append(replace(part, expert_ids=ids))
    options.notify(
        f"{count} choices are of zero-computation experts ({real}..{real + zero - 1}): no expert is"
        " to be placed for them"
    )
    return out
