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
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    check_row,
    make_plan,
    model_name,
    parse_json,
    require_all_layers,
    require_full_slots,
)
from moesim.placement import EMPTY, Plan

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


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """Neither DYNAMIC_EPLB nor EXPERT_MAP_RECORD may be set."""
    config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    return [
        f"vllm serve {shlex.quote(model_name(plan, options))} --data-parallel-size"
        f" {plan.placement.num_gpus} --enable-expert-parallel"
        f" --additional-config {shlex.quote(config)}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """Layers in the order of `layer_id`, devices in that of `device_id`; a device with fewer
    experts than others has empty slots at its end."""
    where = options.where
    raw = parse_json(data, where)
    layers = raw.get("layer_list") if isinstance(raw, dict) else None
    if not isinstance(layers, list) or not layers or raw.get("moe_layer_count") != len(layers):
        raise FormatError(f"{where}: layer_list must have moe_layer_count layers", DAMAGED)
    order, ids = _order(layers, "layer_id", f"{where}: layer_list", options.layer_ids)
    table = [_devices(layers[i], f"{where}: layer_list[{i}]") for i in order]
    counts = {len(devices) for devices in table}
    if len(counts) > 1:
        raise FormatError(
            f"{where}: layers have different numbers of devices: {sorted(counts)[:3]}", DAMAGED
        )
    size = max(len(experts) for devices in table for experts in devices)
    sizes = {len(experts) for devices in table for experts in devices}
    if len(sizes) > 1:
        options.notify(
            f"devices hold {min(sizes)} to {size} experts: those with fewer have empty slots"
        )
    array = np.full((len(table), counts.pop(), size), EMPTY, np.int64)
    for layer, devices in enumerate(table):
        for device, experts in enumerate(devices):
            array[layer, device, : len(experts)] = experts
    return make_plan(
        array.reshape(len(table), -1), options, "vllm-ascend", ids, num_gpus=array.shape[1]
    )


def _order(
    items: list[Any], field: str, where: str, known: tuple[int, ...] | None = None
) -> tuple[list[int], tuple[int, ...] | None]:
    """(places of `items` in ascending order of their `field`, the layers' numbers or None).

    The field counts from 0, or, for layers, is the absolute number of the MoE layers `known`.
    Raises FormatError for numbers that are neither, twice there, or only partly there.
    """
    numbers: list[Any] = [item.get(field) if isinstance(item, dict) else None for item in items]
    if any(type(number) is not int for number in numbers):
        raise FormatError(f"{where}: every entry must have a whole number {field}", DAMAGED)
    order = sorted(range(len(items)), key=lambda i: numbers[i])
    ascending = [numbers[i] for i in order]
    if ascending == list(range(len(items))):
        return order, None
    if known is not None and ascending == list(known):
        return order, known
    raise FormatError(
        f"{where}: {field} is not each of 0 to {len(items) - 1} once ({ascending[:4]!s:.60}, ...)",
        DAMAGED,
    )


def _devices(layer: Any, where: str) -> list[list[int]]:
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        raise FormatError(f"{where}: device_list must be a list of devices", DAMAGED)
    if layer.get("device_count", len(devices)) != len(devices):
        raise FormatError(
            f"{where}: device_count is {layer['device_count']!r:.20}, but device_list has"
            f" {len(devices)} devices",
            DAMAGED,
        )
    order, _ = _order(devices, "device_id", f"{where}: device_list")
    return [
        check_row(devices[i].get("device_expert"), where, f"device_list[{i}].device_expert")
        for i in order
    ]
