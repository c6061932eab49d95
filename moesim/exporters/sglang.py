"""SGLang: the JSON file of `--init-expert-location`.

The only key may be `physical_to_logical_map` [hidden layers, slots] (the loader passes all keys on
as arguments); slot p is on rank p // (slots / ranks). The map has a row for every hidden layer:
dense ones get slot p = expert p mod E, which nothing reads. The path must end in `.json`, or the
option's text is parsed as JSON itself. Weights are loaded straight into their slots.

Source: sglang 0.5.23 (python/sglang/srt/eplb/expert_location.py, arg_groups/parallel_hook.py for
`--ep-dispatch-algorithm`). Speculative (MTP) layers beyond the map keep their trivial order.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, MismatchError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    all_to_all,
    hidden_layers,
    id_table,
    make_plan,
    model_name,
    num_redundant,
    parse_json,
    require_all_layers,
    require_full_slots,
    rows_to_json,
)
from moesim.placement import Plan

NAME = "sglang"
TITLE = "SGLang --init-expert-location (.json)"
SUFFIX = ".json"
ACCEPTED_BY = "SGLang 0.5.23"
KEY = "physical_to_logical_map"
A2A = {"nccl": "none", "deepep": "deepep", "deepep_ll": "deepep"}
DISPATCH = {"nearest": "static", "split": "dynamic", "hash": "dynamic", "lp": "lp"}


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for uneven slots or missing MoE layers."""
    require_full_slots(plan, "SGLang")
    require_all_layers(plan, options, "SGLang")
    total = hidden_layers(plan, options)
    placement = plan.placement
    trivial = np.arange(placement.num_slots) % placement.num_experts
    table = np.tile(trivial, (total, 1))
    table[list(plan.layer_ids)] = placement.physical_to_logical
    return f'{{"{KEY}": [\n{rows_to_json(table.tolist(), " ")}\n]}}\n'.encode()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """The all-to-all is the plan's: `--moe-a2a-backend none` for NCCL. Replicas are chosen by
    `--ep-dispatch-algorithm`: the policy of the plan, or the nearest to it (`static`: same GPU,
    same node, else fixed; `dynamic`: at random; `lp`)."""
    made_for = all_to_all(plan, options)
    backend = A2A.get(made_for or "")
    if made_for is not None and backend is None:
        options.notify(f"the plan was made for all-to-all {made_for}: name SGLang's option for it")
    exchange = f" --moe-a2a-backend {backend}" if backend else ""
    dispatch = DISPATCH[plan.replica_policy]
    if backend == "none" and dispatch != "dynamic":
        options.notify(
            f"the plan was made for replicas chosen as {plan.replica_policy}, but without an"
            " all-to-all backend SGLang chooses at random (dynamic) only: plan with"
            " `replica_policy` split, or for `all_to_all` deepep"
        )
        dispatch = "dynamic"
    gpus, nodes = plan.placement.num_gpus, plan.placement.num_nodes
    several = f" --nnodes {nodes} --node-rank RANK --dist-init-addr HOST:PORT" if nodes > 1 else ""
    return [
        f"python -m sglang.launch_server --model-path {shlex.quote(model_name(plan, options))}"
        f" --tensor-parallel-size {gpus} --expert-parallel-size {gpus}{several}"
        f"{exchange} --init-expert-location {shlex.quote(str(path))}"
        f" --ep-num-redundant-experts {num_redundant(plan)}"
        f" --ep-dispatch-algorithm {dispatch}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """The MoE layers of the map; which they are comes from the model, else all of them."""
    raw = parse_json(data, options.where)
    if not isinstance(raw, dict) or set(raw) != {KEY}:
        counts = isinstance(raw, dict) and "logical_count" in raw
        what = "holds counts for SGLang's own balancer" if counts else "wrong keys"
        raise FormatError(
            f"{options.where}: {what}; wanted {KEY} alone",
            "counts are a trace: moesim trace import reads them" if counts else DAMAGED,
        )
    table = id_table(raw[KEY], options.where, KEY)
    layers = options.layer_ids
    if layers is not None and len(table) != len(layers):
        total = options.num_hidden_layers
        if len(table) <= max(layers) or (total is not None and len(table) < total):
            raise MismatchError(
                f"{options.where}: has {len(table)} layers, but the model"
                f" {total or max(layers) + 1}",
                "name the model that the file is for",
            )
        if total is not None and len(table) > total:
            options.notify(
                f"left out rows {total} to {len(table) - 1}: after the model's {total} layers come"
                " those of multi-token prediction (MTP), which no trace has"
            )
        if total is None:
            others = sorted(set(range(len(table))) - set(layers))
            shown = ", ".join(map(str, others[:8])) + " ..." * (len(others) > 8)
            options.notify(
                f"left out rows {shown}, which are not of the MoE layers asked for: dense layers,"
                " and those of multi-token prediction, have rows too"
            )
        table = table[list(layers)]
    return make_plan(table, options, "SGLang", layers)
