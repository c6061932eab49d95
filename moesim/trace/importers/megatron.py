"""Megatron-Core's routing records: RouterReplay lists and router trace files.

`RouterReplay.get_recorded_data()` is a list with one tensor [tokens, K] for each MoE layer; saved
with `torch.save` it is one micro-batch. `RoutingMetadata.get_routing_indices()` stacks the same to
[tokens, layers, K]. A `.pt` file may hold either, or a list of such micro-batches. The router
tracer (`--moe-routing-trace-path`) writes `router_trace_rankN.jsonl`, one record for each step and
layer with `top_indices` [tokens, K]; records of `block` other than "decoder" (multi-token
prediction) are left out. None of them name requests: the tokens of one micro-batch, or of one step
on one rank, are taken as one request, so decode batches drawn from it mean little.

Source: NVIDIA/Megatron-LM@d98e8a6 (megatron/core/transformer/moe/router_replay.py, router_trace.py,
megatron/core/inference/contexts/routing_metadata.py). Layer numbers of the tracer are those of
`decoder.layers.N` on that pipeline stage. Ignored: hidden-state and logit side files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field, unknown_phases
from moesim.trace.importers.build import Segment, assemble, integer_ids
from moesim.trace.importers.layers import file_layers
from moesim.trace.importers.ranks import Copies, without_ranks
from moesim.trace.importers.records import count_of, first_record, iter_records, nested_ids
from moesim.trace.importers.torch_file import load_pt
from moesim.types import Array

NAME = "megatron"
TITLE = "Megatron-Core RouterReplay lists (.pt) and router_trace_rank*.jsonl"


def detect(path: Path) -> bool:
    """A `.pt` file of tensors in lists, or JSONL records with `top_indices`.

    Files named as SGLang's recorder names them are not opened: they can be large.
    """
    if path.suffix == ".pt":
        if path.name.startswith("expert_distribution_recorder_"):
            return False
        try:
            content = load_pt(path)
        except (InputError, FormatError):
            return False
        while isinstance(content, list) and content:
            content = content[0]
        return isinstance(content, np.ndarray) and content.dtype.kind in "iu"
    if path.suffix not in (".jsonl", ".ndjson"):
        return False
    record = first_record(path)
    return isinstance(record, dict) and "top_indices" in record and "layer" in record


def read(paths: Sequence[Path], options: ImportOptions) -> Trace:
    """All files in order; the tracer's rank files are merged step by step."""
    source = {"format": NAME, "files": [p.name for p in paths]}
    options.notify("Megatron does not name requests: each micro-batch of a rank is one request")
    jsonl = [path.suffix != ".pt" for path in paths]
    if any(jsonl) and not all(jsonl):
        raise InputError("RouterReplay lists and router traces together", "import each kind apart")
    if all(jsonl):
        return _read_traces(paths, options, source)
    segments: list[Segment] = []
    for path in paths:
        for where, ids in _micro_batches(load_pt(path), str(path), options):
            segments.append(_segment(ids, where, len(segments), len(segments), None, options))
    return assemble(segments, options, source, moe_only=True)


def _segment(
    ids: Array, where: str, request: int, step: int, rank: int | None, options: ImportOptions
) -> Segment:
    count = len(ids)
    return Segment(
        ids,
        where,
        request,
        np.arange(count),
        unknown_phases(count, options),
        step_ids=np.full(count, step),
        rank_ids=None if rank is None else np.full(count, rank),
    )


def _without_unrun(content: list[Any], where: str, options: ImportOptions) -> list[Any]:
    """`content` without trailing None: MTP layers register last and do not run in inference."""
    used = len(content)
    while used and content[used - 1] is None:
        used -= 1
    if 0 < used < len(content) and isinstance(content[0], np.ndarray):
        options.notify(
            f"{where}: the last {len(content) - used} of {len(content)} layers recorded nothing:"
            " multi-token-prediction (MTP) layers that did not run"
        )
        return content[:used]
    return content


def _micro_batches(content: Any, where: str, options: ImportOptions) -> list[tuple[str, Array]]:
    """(where, ids [tokens, layers, K]) of each micro-batch in a `.pt` file."""
    if isinstance(content, np.ndarray):
        return [(where, integer_ids(content, where))]
    if not isinstance(content, list) or not content:
        raise FormatError(
            f"{where}: holds {type(content).__name__}, wanted a list of tensors", DAMAGED
        )
    content = _without_unrun(content, where, options)
    if all(isinstance(item, np.ndarray) and item.ndim == 2 for item in content):
        shapes = {item.shape for item in content}
        if len(shapes) > 1:
            raise FormatError(
                f"{where}: layers have different shapes: {sorted(shapes)[:4]}", DAMAGED
            )
        return [(where, integer_ids(np.stack(content, axis=1), where))]
    out: list[tuple[str, Array]] = []
    for index, item in enumerate(content):
        here = f"{where}: item {index}"
        if item is None:
            raise FormatError(
                f"{here}: recorded nothing", "set the action to RECORD before running"
            )
        if not isinstance(item, list | np.ndarray):
            raise FormatError(f"{here}: holds {type(item).__name__}, wanted tensors", DAMAGED)
        out += _micro_batches(item, here, options)
    return out


def _read_traces(paths: Sequence[Path], options: ImportOptions, source: dict[str, Any]) -> Trace:
    tables: dict[tuple[int, int], dict[int, tuple[str, Array]]] = {}
    skipped = 0
    for path in paths:
        for where, record in iter_records(path):
            if not isinstance(record, dict):
                raise FormatError(f"{where}: no object", DAMAGED)
            if record.get("block", "decoder") != "decoder":
                skipped += 1
                continue
            step, rank, layer = (_need(record, name, where) for name in ("step", "rank", "layer"))
            ids = nested_ids(record.get("top_indices"), f"{where}: top_indices")
            if ids.ndim != 2:
                if ids.size:
                    raise bad_field(where, "top_indices", "rows of expert ids, one for each token")
                continue
            found = tables.setdefault((step, rank), {})
            if layer in found:
                raise FormatError(
                    f"{where}: step {step} of rank {rank} has layer {layer} already"
                    f" ({found[layer][0]})",
                    "import runs apart",
                )
            found[layer] = (where, ids)
    if skipped:
        options.notify(f"left out {skipped} records of multi-token-prediction layers")
    layers = tuple(sorted({layer for found in tables.values() for layer in found}))
    segments: list[Segment] = []
    copies = Copies()
    for (step, rank), found in sorted(tables.items()):
        where = found[min(found)][0]
        missing = [layer for layer in layers if layer not in found]
        if missing:
            raise FormatError(
                f"{where}: step {step} of rank {rank} lacks layer {missing[0]}", DAMAGED
            )
        shapes = {ids.shape for _, ids in found.values()}
        if len(shapes) > 1:
            raise FormatError(
                f"{where}: top_indices of step {step} have different shapes: {sorted(shapes)[:4]}",
                "ranks of different pipeline stages cannot be merged",
            )
        ids = np.stack([found[layer][1] for layer in layers], axis=1)
        if not copies.is_copy(step, rank, ids):
            segments.append(_segment(ids, where, len(segments), step, rank, options))
    copies.report(options)
    segments = without_ranks(segments) if copies.count else segments
    file_layers(layers, options, str(paths[0]))
    return assemble(segments, replace(options, layer_ids=layers or None), source)


def _need(record: dict[str, Any], name: str, where: str) -> int:
    value = count_of(record, name, where)
    if value is None:
        raise bad_field(where, name, "there")
    return value
