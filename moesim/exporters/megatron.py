"""Megatron-Core, and any engine that places experts in order: a permutation of the experts.

Megatron-Core loads no placement: rank r of G holds experts r*E/G and on. A plan without replicas is
the same as a renumbering of experts in each layer: the expert that the plan puts in slot j becomes
expert j, which means reordering the expert weights and the rows of the router (and of its biases).
The model's output does not change, but for ties in the router and the order of sums.
`checkpoint.py` applies it to safetensors checkpoints; an optimiser's state must be dropped or
permuted in the same way.

The file is JSON: `format: "moesim-expert-permutation"`, `version: 1`, `num_experts`, `num_gpus`,
`num_nodes`, and `layers`, which gives for each absolute layer the old expert at each new place.

Source: NVIDIA/Megatron-LM@d98e8a6 (megatron/core/transformer/moe/experts.py for names and the
order of local experts, router.py for the rows).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import FormatError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    check_row,
    make_plan,
    parse_json,
    require_full_slots,
    require_single_copies,
    rows_to_json,
)
from moesim.numerals import is_index
from moesim.placement import Plan

NAME = "megatron"
TITLE = "Megatron-Core: permutation of experts and router rows (.json; --apply CHECKPOINT)"
SUFFIX = ".json"
ACCEPTED_BY = "any engine with linear placement, through --apply (names of Megatron-LM@d98e8a6)"
FORMAT = "moesim-expert-permutation"
VERSION = 1


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for plans with replicas or uneven slots."""
    require_permutation(plan)
    placement = plan.placement
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.model,
        "num_experts": placement.num_experts,
        "num_gpus": placement.num_gpus,
        "num_nodes": placement.num_nodes,
    }
    rows = ",\n".join(
        f'  "{layer}": {rows_to_json([row], "")}'
        for layer, row in zip(plan.layer_ids, placement.physical_to_logical.tolist(), strict=True)
    )
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{text},\n "layers": {{\n{rows}\n }}\n}}\n'.encode("utf-8", "backslashreplace")


def require_permutation(plan: Plan) -> None:
    """Refuse what a renumbering of experts cannot express."""
    require_single_copies(
        plan, "Megatron-Core", "plan again without redundant experts (as many slots as experts)"
    )
    require_full_slots(plan, "Megatron-Core")


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """Reordering the checkpoint, then training or serving it as ever."""
    return [
        f"moesim export PLAN --to {NAME} --apply CHECKPOINT --out CHECKPOINT-permuted",
        f"torchrun ... --load CHECKPOINT-permuted --expert-model-parallel-size"
        f" {plan.placement.num_gpus}  # {shlex.quote(str(path))} is the same permutation as a file",
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """Everything is in the file."""
    where = options.where
    raw = parse_json(data, where)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise FormatError(f'{where}: is not of format "{FORMAT}", version {VERSION}', DAMAGED)
    sizes = {}
    for name in ("num_experts", "num_gpus", "num_nodes"):
        if type(raw.get(name)) is not int or not 1 <= raw[name] <= 1 << 15:
            raise FormatError(f"{where}: {name} must be a whole number", DAMAGED)
        sizes[name] = raw[name]
    layers = raw.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise FormatError(f"{where}: layers must be an object of layers", DAMAGED)
    table = {}
    for layer, row in layers.items():
        if not is_index(layer) or len(layer) > 5:
            raise FormatError(f"{where}: layers: {layer!r:.40} is no layer", DAMAGED)
        check_row(row, where, f"layers[{layer}]")
        if sorted(row) != list(range(sizes["num_experts"])):
            raise FormatError(f"{where}: layers[{layer}] is no permutation", DAMAGED)
        table[int(layer)] = row
    ids = tuple(sorted(table))
    known = replace(
        options,
        num_nodes=sizes["num_nodes"],
        num_experts=sizes["num_experts"],
        model=options.model or str(raw.get("model", "")),
    )
    return make_plan(
        np.array([table[layer] for layer in ids]), known, "Megatron-Core", ids, sizes["num_gpus"]
    )
