"""TensorRT-LLM: the YAML file of `moe_config.load_balancer`.

`num_slots`, `initial_global_assignments` (absolute layer -> expert in each slot) and
`layer_updates_per_iter`, which 0 keeps static. Slot p is on rank p // (num_slots / ep_size). Every
MoE layer needs an entry, every expert a slot in it.

Source: NVIDIA/TensorRT-LLM@0004396 (tensorrt_llm/llmapi/llm_args.py, MoeLoadBalancerConfig and
MoeConfig) and @2a595f8 (examples/wide_ep/ep_load_balancer/README.md). The WIDEEP backend that the
launch lines name is that of releases up to 1.2; later ones balance in their common backends.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    check_row,
    make_plan,
    model_name,
    mtp_layer_ids,
    require_all_layers,
    require_full_slots,
)
from moesim.placement import Plan, in_order

NAME = "tensorrt-llm"
TITLE = "TensorRT-LLM moe_config.load_balancer (.yaml)"
SUFFIX = ".yaml"
WRITES_MTP = True
ACCEPTED_BY = "TensorRT-LLM main@0004396 (2026), and 1.x with the WIDEEP backend"
ASSIGNMENTS = "initial_global_assignments"
KEYS = {"num_slots", ASSIGNMENTS, "layer_updates_per_iter"}


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for uneven slots or missing MoE layers."""
    require_full_slots(plan, "TensorRT-LLM")
    require_all_layers(plan, options, "TensorRT-LLM")
    placement = plan.placement
    lines = [f"num_slots: {placement.num_slots}", "layer_updates_per_iter: 0", f"{ASSIGNMENTS}:"]
    for layer, row in zip(plan.layer_ids, placement.physical_to_logical.tolist(), strict=True):
        lines.append(f"  {layer}: {json.dumps(row)}")
    mtp = mtp_layer_ids(options)
    row = json.dumps(in_order(placement).tolist())
    planned = options.mtp_rows
    written = sorted({*(mtp or ()), *planned})
    lines += [
        f"  {layer}: {json.dumps(planned[layer]) if layer in planned else row}" for layer in written
    ]
    unplanned = [layer for layer in written if layer not in planned]
    if unplanned:
        options.notify(
            f"layers {', '.join(map(str, unplanned))} are for multi-token prediction (MTP): the"
            " plan does not have them, so their experts are placed in order"
        )
    elif mtp is None and not planned:
        options.notify(
            "no rows for multi-token-prediction (MTP) layers, whose number is not known: a server"
            " that speculates with them stops with a KeyError of that layer; `mtp_layers` writes"
            " them"
        )
    return ("\n".join(lines) + "\n").encode()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """The options file that names the exported one, and the server."""
    gpus = plan.placement.num_gpus
    return [
        "cat > extra_llm_api_options.yaml <<'EOF'",
        "enable_attention_dp: true",
        "moe_config:",
        "  backend: WIDEEP",
        f"  load_balancer: {json.dumps(str(path))}",
        "EOF",
        f"trtllm-serve {shlex.quote(model_name(plan, options))} --tp_size {gpus} --ep_size {gpus}"
        " --extra_llm_api_options extra_llm_api_options.yaml",
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """Layers are in the file; the number of GPUs is not."""
    raw = _parse(data, options.where)
    assignments = raw.get(ASSIGNMENTS)
    if not isinstance(assignments, dict) or not assignments:
        raise FormatError(
            f"{options.where}: has no {ASSIGNMENTS}, as files for online balancing do not",
            "give the file of an offline configuration",
        )
    num_slots = raw.get("num_slots")
    for layer, row in assignments.items():
        if type(layer) is not int or not 0 <= layer < 1 << 16:
            raise FormatError(f"{options.where}: {ASSIGNMENTS}: {layer!r:.40} is no layer", DAMAGED)
        check_row(row, options.where, f"{ASSIGNMENTS}[{layer}]")
        if len(row) != num_slots:
            raise FormatError(
                f"{options.where}: {ASSIGNMENTS}[{layer}] has {len(row)} slots, num_slots is"
                f" {num_slots!r:.20}",
                DAMAGED,
            )
    layers = tuple(sorted(assignments))
    table = np.array([assignments[layer] for layer in layers])
    return make_plan(table, options, "TensorRT-LLM", layers)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError):
        raise FormatError(f"{where}: not YAML of plain data", DAMAGED) from None
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: no mapping", DAMAGED)
    unknown = set(map(str, raw)) - KEYS
    if unknown:
        raise FormatError(f"{where}: unknown key {min(unknown):.40}", DAMAGED)
    return raw
