"""vllm-ascend: the JSON file of `expert_map_path` (static EPLB of model runner V1).

`moe_layer_count` and a `layer_list` of MoE layers, counted from 0 among MoE layers, each with a
`device_list` of `device_expert` lists: the experts in the slots of that device. All devices hold
the same number. The number of redundant experts follows from the file.

Source: vllm-ascend 0.23.0 (vllm_ascend/eplb/core/eplb_utils.py, eplb/adaptor/vllm_adaptor.py,
ascend_config.py) and vllm-project/vllm-ascend@182b75e (docs/source/user_guide/feature_guide/
expert_parallelism_load_balancer.md), which schedules static EPLB for removal in 0.25.1 and says
that model runner V2 refuses it.
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
    ExportOptions,
    ReadOptions,
    check_row,
    make_plan,
    model_name,
    parse_json,
    require_all_layers,
    require_full_slots,
)
from moesim.placement import Plan

NAME = "vllm-ascend"
TITLE = "vllm-ascend expert_map_path (.json)"
SUFFIX = ".json"
ACCEPTED_BY = "vllm-ascend 0.23.0, model runner V1"


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for uneven slots or missing MoE layers."""
    require_full_slots(plan, "vllm-ascend")
    require_all_layers(plan, options, "vllm-ascend")
    placement = plan.placement
    layers = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_gpus, placement.slots_per_gpu
    ).tolist()
    record = {
        "moe_layer_count": placement.num_layers,
        "layer_list": [
            {
                "layer_id": index,
                "device_count": placement.num_gpus,
                "device_list": [
                    {"device_id": device, "device_expert": experts}
                    for device, experts in enumerate(devices)
                ],
            }
            for index, devices in enumerate(layers)
        ],
    }
    return (json.dumps(record) + "\n").encode()


def launch(plan: Plan, path: Path) -> list[str]:
    """Neither DYNAMIC_EPLB nor EXPERT_MAP_RECORD may be set."""
    config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    return [
        f"vllm serve {shlex.quote(model_name(plan))} --data-parallel-size"
        f" {plan.placement.num_gpus} --enable-expert-parallel"
        f" --additional-config {shlex.quote(config)}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """Devices are in the file; absolute layer numbers are not."""
    where = options.where
    raw = parse_json(data, where)
    layers = raw.get("layer_list") if isinstance(raw, dict) else None
    if not isinstance(layers, list) or not layers or raw.get("moe_layer_count") != len(layers):
        raise FormatError(f"{where}: layer_list must have moe_layer_count layers", DAMAGED)
    table = [_devices(layer, f"{where}: layer_list[{i}]") for i, layer in enumerate(layers)]
    shapes = {np.shape(row) for row in table}
    if len(shapes) > 1:
        raise FormatError(f"{where}: layers have different devices: {sorted(shapes)[:3]}", DAMAGED)
    array = np.array(table)
    return make_plan(array.reshape(len(table), -1), options, "vllm-ascend", num_gpus=array.shape[1])


def _devices(layer: Any, where: str) -> list[list[int]]:
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        raise FormatError(f"{where}: device_list must be a list of devices", DAMAGED)
    out: list[list[int]] = []
    for index, device in enumerate(devices):
        experts = device.get("device_expert") if isinstance(device, dict) else None
        experts = check_row(experts, where, f"device_list[{index}].device_expert")
        if out and len(experts) != len(out[0]):
            raise FormatError(
                f"{where}: device_list[{index}] has {len(experts)} experts, device_list[0]"
                f" {len(out[0])}",
                DAMAGED,
            )
        out.append(experts)
    return out
