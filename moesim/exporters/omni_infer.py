"""omni-infer (OmniPlacement): the `.npy` array of `pattern_path`.

int32 [devices, MoE layers, experts], 1 where a device holds an expert. Devices may hold different
numbers of experts. The array has no order of slots within a device: omni-infer sorts them by
expert, and so does reading the file back.

Source: omni-ai-npu/omni-infer@c8bc2bb (omni/accelerators/placement/omni_planner/expert_mapping.py,
config.yaml and the patterns that ship with it) and its guide on the `additional_config` form of
later versions.
"""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, MismatchError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    make_plan,
    model_name,
    require_all_layers,
)
from moesim.placement import EMPTY, Plan
from moesim.trace.format import read_npy

NAME = "omni-infer"
TITLE = "omni-infer pattern_path (.npy)"
SUFFIX = ".npy"
ACCEPTED_BY = "omni-infer@c8bc2bb (August 2025) and later"


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for missing MoE layers."""
    require_all_layers(plan, options, "omni-infer")
    if plan.placement.double_replicas:
        raise MismatchError(
            "omni-infer's array says which experts a device has, but the plan has devices with an"
            " expert twice",
            "plan again with moesim plan, which makes no such plans",
        )
    options.notify("the file has no order of slots within a device: they are sorted by expert")
    placement = plan.placement
    pattern = np.zeros((placement.num_gpus, placement.num_layers, placement.num_experts), np.int32)
    layer, slot = np.nonzero(placement.physical_to_logical != EMPTY)
    expert = placement.physical_to_logical[layer, slot]
    pattern[placement.gpu_of_slot[slot], layer, expert] = 1
    out = io.BytesIO()
    np.save(out, pattern, allow_pickle=False)
    return out.getvalue()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """The pattern's path is best absolute; `max_moe_layer_num` must equal its second axis."""
    config = {
        "enable_omni_placement": True,
        "omni_placement_config": {
            "pattern_path": str(path),
            "max_moe_layer_num": plan.placement.num_layers,
            "enable_dynamic": False,
            "enable_dump": False,
        },
    }
    return [
        f"vllm serve {shlex.quote(model_name(plan, options))} --data-parallel-size"
        f" {plan.placement.num_gpus} --enable-expert-parallel"
        f" --additional-config {shlex.quote(json.dumps(config))}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """Slots of a device in order of experts; devices with fewer get empty slots at the end."""
    where = options.where
    pattern = read_npy(io.BytesIO(data), len(data), where)
    if pattern.ndim != 3 or 0 in pattern.shape or pattern.dtype.kind not in "iufb":
        raise FormatError(
            f"{where}: has shape {pattern.shape} of {pattern.dtype}, wanted"
            " [devices, layers, experts] of 0 and 1",
            DAMAGED,
        )
    if not np.isin(pattern, (0, 1)).all():
        raise FormatError(f"{where}: has values other than 0 and 1", DAMAGED)
    num_gpus, num_layers, _ = pattern.shape
    held = pattern.sum(axis=2, dtype=np.int64)
    slots = max(1, int(held.max()))
    table = np.full((num_layers, num_gpus, slots), EMPTY, np.int64)
    gpu, layer, expert = np.nonzero(pattern)
    rank = np.arange(len(gpu)) - np.repeat(
        np.cumsum(held.reshape(-1)) - held.reshape(-1), held.reshape(-1)
    )
    table[layer, gpu, rank] = expert
    return make_plan(table.reshape(num_layers, -1), options, "omni-infer", num_gpus=num_gpus)
