"""Layers of a trace without any load: which they are, and the trace without them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.trace.format import LoadTrace, Trace, drop_pages, iter_chunks

Mask = npt.NDArray[np.bool_]
AnyTrace = TypeVar("AnyTrace", bound=Trace | LoadTrace)


def loaded_layers(trace: Trace | LoadTrace) -> Mask:
    """[L]: layers in which some token chose an expert."""
    if isinstance(trace, LoadTrace):
        return np.asarray(trace.expert_load.any(axis=(0, 2)))
    if trace.expert_ids.dtype.kind == "u" or not trace.num_tokens:
        return np.ones(trace.num_layers, np.bool_)
    found = np.zeros(trace.num_layers, np.bool_)
    for part in iter_chunks(trace.num_tokens):
        found |= (np.asarray(trace.expert_ids[part]) >= 0).any(axis=(0, 2))
        drop_pages(trace.expert_ids)
        if found.all():
            break
    return found


def require_load(keep: Mask) -> Mask:
    """`keep` [L]. Raises InputError where no layer has any load."""
    if not keep.any():
        raise InputError("no layer of the trace has any load", "record some traffic")
    return keep


def only_layers(trace: AnyTrace, keep: Mask) -> AnyTrace:
    """The trace (or counts) of the layers `keep` [L]."""
    layers = np.flatnonzero(keep)
    meta = replace(trace.meta, layer_ids=tuple(trace.meta.layer_ids[i] for i in layers))
    if isinstance(trace, LoadTrace):
        return replace(trace, expert_load=trace.expert_load[:, layers], meta=meta)
    gates = trace.gate_weights
    return replace(
        trace,
        expert_ids=np.asarray(trace.expert_ids[:, layers]),
        gate_weights=None if gates is None else np.asarray(gates[:, layers]),
        meta=meta,
    )


def layers_text(layer_ids: tuple[int, ...], keep: Mask) -> str:
    """The numbers of the layers that `keep` [L] leaves out, the first six."""
    out = [layer for layer, there in zip(layer_ids, keep, strict=True) if not there]
    return ", ".join(map(str, out[:6])) + (", ..." if len(out) > 6 else "")
