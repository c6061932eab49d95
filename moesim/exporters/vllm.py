"""vLLM as released: a config file for `vllm serve --config`.

No released vLLM (checked up to 0.33.0) loads a placement. It places experts by
`--expert-placement-strategy`: `linear` (rank r holds experts r*E/G and on) or `round_robin` (rank r
holds experts r, r+G, ...), the same in all layers; its own load balancer moves experts at run time
and starts from linear. So only plans that are one of the two can be exported; a plan without
replicas that is neither can be made linear by reordering the checkpoint (see megatron.py), and one
with replicas needs the branch of pull request 41141 (see vllm_pr41141.py).

vLLM falls back from round_robin to linear, with no more than a log line, unless the model has
several expert groups, and only for the DeepEP low-latency and NIXL backends.

Source: vllm 0.33.0 (vllm/config/parallel.py, vllm/model_executor/layers/fused_moe/
expert_map_manager.py).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, MismatchError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    make_plan,
    model_name,
    require_full_slots,
    require_single_copies,
)
from moesim.placement import Plan

NAME = "vllm"
TITLE = "vLLM as released: linear or round_robin placement (.yaml for --config)"
SUFFIX = ".yaml"
ACCEPTED_BY = "vLLM 0.33.0"
STRATEGY = "expert-placement-strategy"


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for every plan that is neither linear nor round-robin."""
    require_full_slots(plan, "vLLM")
    require_single_copies(
        plan,
        "vLLM as released",
        "export to vllm-pr41141, or let vLLM's own balancer replicate: --enable-eplb",
    )
    strategy = _strategy(plan)
    if strategy == "round_robin":
        options.notify(
            "vLLM takes round_robin only for models with expert groups on the DeepEP low-latency or"
            " NIXL backend, and falls back to linear otherwise"
        )
    return (
        f"enable-expert-parallel: true\n{STRATEGY}: {strategy}\n"
        f"data-parallel-size: {plan.placement.num_gpus}\ntensor-parallel-size: 1\n"
    ).encode()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """Expert parallel ranks are data parallel ranks times tensor parallel ranks."""
    return [
        f"vllm serve {shlex.quote(model_name(plan, options))} --config {shlex.quote(str(path))}"
    ]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """The placement that vLLM makes of the strategy; experts come from the model."""
    import yaml

    try:
        raw = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError):
        raise FormatError(f"{options.where}: not YAML of plain data", DAMAGED) from None
    if not isinstance(raw, dict):
        raise FormatError(f"{options.where}: no mapping", DAMAGED)
    strategy = raw.get(STRATEGY, "linear")
    if strategy not in ("linear", "round_robin"):
        raise FormatError(f"{options.where}: {STRATEGY} is {strategy!r:.40}", DAMAGED)
    if raw.get("enable-eplb"):
        raise FormatError(
            f"{options.where}: enable-eplb moves experts at run time", "there is no fixed placement"
        )
    gpus = _size(raw, "data-parallel-size", options) * _size(raw, "tensor-parallel-size", options)
    if options.num_experts is None or options.layer_ids is None:
        raise InputError(
            f"{options.where}: says neither how many experts nor which layers there are",
            "give `model`, or `num_experts` and `layer_ids`",
        )
    if options.num_experts % gpus:
        raise MismatchError(
            f"{options.where}: {options.num_experts} experts do not divide over {gpus} GPUs",
            "name the model that the file is for",
        )
    row = _order(strategy, options.num_experts, gpus)
    return make_plan(np.tile(row, (len(options.layer_ids), 1)), options, "vLLM", num_gpus=gpus)


def _order(strategy: str, num_experts: int, num_gpus: int) -> npt.NDArray[np.int64]:
    """[E]: the expert in each slot."""
    experts = np.arange(num_experts)
    if strategy == "linear":
        return experts
    return experts.reshape(-1, num_gpus).T.reshape(-1)


def _strategy(plan: Plan) -> str:
    placement = plan.placement
    shape = (placement.num_layers, placement.num_gpus, placement.slots_per_gpu)
    held = np.sort(placement.physical_to_logical.reshape(shape), axis=2)
    for strategy in ("linear", "round_robin"):
        order = _order(strategy, placement.num_experts, placement.num_gpus).reshape(shape[1:])
        if (held == np.sort(order, axis=1)).all():
            return strategy
    raise MismatchError(
        "no released vLLM loads a placement: it knows linear and round_robin, and this plan is"
        " neither",
        "reorder the checkpoint so that linear placement is this plan: moesim export PLAN --to"
        " megatron --apply CHECKPOINT --out NEW; or export to vllm-pr41141",
    )


def _size(raw: dict[Any, Any], name: str, options: ReadOptions) -> int:
    value = raw.get(name, 1)
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise FormatError(f"{options.where}: {name} must be a whole number", DAMAGED)
    return value
