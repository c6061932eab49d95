"""vLLM with pull request 41141 (offline EPLB): its `eplb_initial_mapping` record.

JSONL with one record: `num_redundant_experts`, `num_slots`, and `initial_global_assignments`, which
maps each MoE layer, counted from 0 among MoE layers, to the expert in each slot. The server loads
weights in linear order and moves them once before the first request. This is the format of the
pull request's first revisions (April and May 2026). Its later revision takes load statistics
instead (`read_stats_path`) and computes the placement itself, so no plan can be handed to it.

Source: vllm-project/vllm@63727bf (vllm/distributed/eplb/eplb_state.py, `_load_initial_mapping`;
tools/eplb/generate_static_mapping.py). Of several records in a file the last one counts.
"""

from __future__ import annotations

import json
import shlex
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
    model_name,
    num_redundant,
    parse_json,
    require_all_layers,
    require_full_slots,
)
from moesim.placement import Plan

NAME = "vllm-pr41141"
TITLE = "vLLM with pull request 41141: eplb_initial_mapping (.jsonl)"
SUFFIX = ".jsonl"
ACCEPTED_BY = "vLLM pull request 41141 up to revision 63727bf; no release up to 0.33.0"
RECORD = "eplb_initial_mapping"
ASSIGNMENTS = "initial_global_assignments"


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for uneven slots or missing MoE layers."""
    require_full_slots(plan, "vLLM")
    require_all_layers(plan, options, "vLLM")
    record = {
        "record_type": RECORD,
        "version": 1,
        "num_redundant_experts": num_redundant(plan),
        "num_slots": plan.placement.num_slots,
        ASSIGNMENTS: {
            str(i): row for i, row in enumerate(plan.placement.physical_to_logical.tolist())
        },
    }
    return (json.dumps(record) + "\n").encode()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """Rebalancing at run time is off, so that the plan stays as it is."""
    config = {
        "num_redundant_experts": num_redundant(plan),
        "initial_mapping_path": str(path),
        "disable_online_rebalancing": True,
    }
    return [
        f"vllm serve {shlex.quote(model_name(plan, options))} --data-parallel-size"
        f" {plan.placement.num_gpus} --enable-expert-parallel --enable-eplb"
        f" --eplb-config {shlex.quote(json.dumps(config))}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """The last `eplb_initial_mapping` record of the file."""
    record = None
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        found = parse_json(line, f"{options.where}: line {number}")
        if isinstance(found, dict) and found.get("record_type") == RECORD:
            record, where = found, f"{options.where}: line {number}"
    if record is None:
        raise FormatError(f"{options.where}: has no {RECORD} record", DAMAGED)
    if record.get("version") != 1:
        raise FormatError(f"{where}: version is {record.get('version')!r:.20}, wanted 1", DAMAGED)
    rows = record.get(ASSIGNMENTS)
    if not isinstance(rows, dict) or not rows:
        raise FormatError(f"{where}: {ASSIGNMENTS} must be an object of layers", DAMAGED)
    table = []
    for layer in range(len(rows)):
        if str(layer) not in rows:
            raise FormatError(f"{where}: {ASSIGNMENTS} has no layer {layer}", DAMAGED)
        row = rows[str(layer)]
        check_row(row, where, f"{ASSIGNMENTS}[{layer}]")
        if len(row) != record.get("num_slots"):
            raise FormatError(
                f"{where}: {ASSIGNMENTS}[{layer}] has {len(row)} slots, num_slots is"
                f" {record.get('num_slots')!r:.20}",
                DAMAGED,
            )
        table.append(row)
    return make_plan(np.array(table), options, "vLLM")
