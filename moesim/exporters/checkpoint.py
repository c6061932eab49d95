"""Renumbering the experts of a safetensors checkpoint, so that linear placement is the plan.

Works on folders of `.safetensors` files with Hugging Face or Megatron-Core names and a full set of
experts. In every layer of the plan, the expert that the plan puts in slot j becomes expert j:

- tensors of one expert (`experts.7.`, `experts.local_experts.7.`, `experts.linear_fc1.weight7`)
  are renamed; their bytes stay where they are;
- tensors of all experts (`experts.gate_up_proj` [E, ...] and the like, block_sparse_moe's
  `input_linear.weight`, grouped GEMM's `weight1`) have their E parts reordered;
- router weights and biases (`gate.weight`, `router.weight`, `e_score_correction_bias`,
  `expert_bias`, ...) have their E rows reordered.

Types do not matter, since whole rows are moved as bytes. Other layers, multi-token-prediction
layers and all other files are copied. Routing limited to expert groups stays the same only if the
plan moves whole groups: anything else is refused where config.json tells of groups. Refused as
well: layers with tables of expert ids (hash routing), and layers without a full set of experts.

Source of names: huggingface/transformers (modeling files of the models that moesim has presets
for), NVIDIA/Megatron-LM@d98e8a6 (megatron/core/transformer/moe/experts.py, router.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, MismatchError
from moesim.exporters.base import ExportOptions
from moesim.exporters.megatron import require_permutation
from moesim.files import atomic_directory
from moesim.placement import Plan
from moesim.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors, write_header

INDEX = "model.safetensors.index.json"
Order = npt.NDArray[np.int64]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_ONE_EXPERT = re.compile(r"(.*(?:^|\.)experts\.(?:local_experts\.)?)(\d+)(\..+)$")
_GROUPED = re.compile(r"(.*(?:^|\.)experts\.linear_fc\d\.[a-z_]*[a-z_])(\d+)$")
_ALL_EXPERTS = re.compile(r"(?:^|\.)experts\.|(?:^|\.)moe\.(?:input|output)_linear\.|"
                          r"block_sparse_moe\.(?:input|output)_linear\.")  # fmt: skip
_ROUTER = re.compile(
    r"(?:^|\.)(?:gate|router)(?:\.\w+)*\.(?:weight|bias)$|"
    r"(?:^|\.)(?:e_score_correction_bias|expert_bias|local_tokens_per_expert)$"
)
_ATTENTION = re.compile(r"(?:^|\.)(?:self_)?attn|attention|shared_expert")
_HASHED = re.compile(r"(?:^|\.)(?:tid2eid|hash_\w*table\w*)$")


@dataclass(frozen=True, slots=True)
class _Move:
    """What becomes of one tensor: a new name, or a new order of its E parts, or neither."""

    name: str
    order: Order | None = None


def permute_checkpoint(plan: Plan, source: Path, target: Path, options: ExportOptions) -> int:
    """Write the checkpoint in `source`, renumbered, to the new folder `target`.

    Returns the number of tensors that were renamed or reordered. Raises MismatchError when plan
    and checkpoint do not fit, FormatError for damaged files, InputError for paths.
    """
    require_permutation(plan)
    if not source.is_dir():
        raise InputError(f"{source} is not a folder", "name the checkpoint's folder")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{source} has no .safetensors files", "convert the checkpoint to safetensors first"
        )
    _check_groups(plan, source, options)
    shards = [open_safetensors(file) for file in files]
    moves = _plan_moves(plan, shards, source)
    changed = sum(m.order is not None or m.name != name for name, m in moves.items())
    with atomic_directory(target) as folder:
        for shard in shards:
            _write_shard(shard, moves, folder / shard.path.name)
        for file in source.iterdir():
            if file.suffix == ".safetensors":
                continue
            if file.name == INDEX:
                (folder / INDEX).write_text(_index(file, moves), encoding="utf-8")
            elif file.is_dir():
                shutil.copytree(file, folder / file.name)
            else:
                shutil.copy2(file, folder / file.name)
    return changed


def _plan_moves(plan: Plan, shards: list[SafetensorsFile], source: Path) -> dict[str, _Move]:
    """The move of every tensor of the checkpoint, by its old name."""
    num_experts = plan.placement.num_experts
    orders = {
        layer: row.astype(np.int64)
        for layer, row in zip(plan.layer_ids, plan.placement.physical_to_logical, strict=True)
    }
    places = {layer: np.argsort(order) for layer, order in orders.items()}
    moves: dict[str, _Move] = {}
    experts: dict[int, dict[str, set[int]]] = {layer: {} for layer in orders}
    routers: set[int] = set()
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in moves:
                raise FormatError(f"{shard.path}: tensor {name:.80} is in two files", _WHOLE)
            found = _LAYER.search(name)
            layer = int(found[1]) if found and not name.startswith("mtp.") else -1
            if not found or layer not in orders:
                moves[name] = _Move(name)
                continue
            inside = found[2]
            prefix = name[: len(name) - len(inside)]
            one = _ONE_EXPERT.match(inside) or _GROUPED.match(inside)
            if one:
                number = int(one[2])
                tail = one[3] if one.re is _ONE_EXPERT else ""
                if number >= num_experts:
                    raise MismatchError(
                        f"{shard.path}: {name:.80}: the plan has {num_experts} experts",
                        "name the checkpoint that the plan was made for",
                    )
                experts[layer].setdefault(f"{one[1]}*{tail}", set()).add(number)
                moves[name] = _Move(f"{prefix}{one[1]}{places[layer][number]}{tail}")
            elif _HASHED.search(inside):
                raise MismatchError(
                    f"{shard.path}: {name:.80} holds expert ids, which renumbering would break",
                    "leave this layer out of the plan",
                )
            elif _ALL_EXPERTS.search(inside):
                moves[name] = _Move(name, _all_experts_order(info, orders[layer], shard, name))
                if moves[name].order is not None:
                    experts[layer].setdefault(inside, set()).update(range(num_experts))
            elif _ROUTER.search(inside) and not _ATTENTION.search(inside):
                moves[name] = _Move(name, _router_order(info, orders[layer], shard, name))
                routers.add(layer)
            else:
                moves[name] = _Move(name)
    for layer, kinds in experts.items():
        _check_layer(layer, kinds, layer in routers, num_experts, source)
    return moves


def _check_layer(
    layer: int, kinds: Mapping[str, set[int]], has_router: bool, num_experts: int, source: Path
) -> None:
    if not kinds or not has_router:
        raise MismatchError(
            f"{source}: layer {layer} of the plan has no {'router' if kinds else 'experts'} in the"
            " checkpoint",
            "name the checkpoint that the plan was made for (Hugging Face or Megatron-Core names)",
        )
    for kind, numbers in kinds.items():
        if len(numbers) != num_experts:
            raise MismatchError(
                f"{source}: layer {layer} has {len(numbers)} of {num_experts} tensors {kind:.60}",
                "merge the expert parallel ranks into one checkpoint first",
            )


def _all_experts_order(
    info: TensorInfo, order: Order, shard: SafetensorsFile, name: str
) -> Order | None:
    """The order of the E parts of a tensor of all experts; None for one number for all of them."""
    if info.shape in ((), (1,)):
        return None
    flat = name.endswith((".weight1", ".weight2"))
    if (not flat and info.shape[0] % len(order)) or info.num_bytes % len(order):
        raise MismatchError(
            f"{shard.path}: {name:.80} has shape {info.shape}, which does not divide into"
            f" {len(order)} experts",
            "name the checkpoint that the plan was made for",
        )
    return order


def _router_order(
    info: TensorInfo, order: Order, shard: SafetensorsFile, name: str
) -> Order | None:
    rows = next((length for length in info.shape if length != 1), 1)
    if rows != len(order):
        raise MismatchError(
            f"{shard.path}: {name:.80} has shape {info.shape}, but the plan has {len(order)}"
            " experts",
            "name the checkpoint that the plan was made for",
        )
    return order


def _write_shard(shard: SafetensorsFile, moves: Mapping[str, _Move], target: Path) -> None:
    names = sorted(shard.tensors, key=lambda name: shard.tensors[name].start)
    header = {moves[name].name: shard.tensors[name] for name in names}
    with target.open("wb") as out:
        write_header(out, header, shard.metadata)
        for name in names:
            order = moves[name].order
            parts = shard.chunks(name) if order is None else shard.rows(name, order)
            for part in parts:
                out.write(part)


def _index(file: Path, moves: Mapping[str, _Move]) -> str:
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
        weight_map = {moves[name].name: shard for name, shard in raw["weight_map"].items()}
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        raise FormatError(f"{file}: does not list the tensors of the checkpoint", _WHOLE) from None
    return json.dumps({**raw, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def _check_groups(plan: Plan, source: Path, options: ExportOptions) -> None:
    """Refuse plans that tear expert groups apart which routing is limited to."""
    groups = options.spec.n_group if options.spec is not None else 1
    config = source / "config.json"
    if config.is_file():
        try:
            raw = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise FormatError(f"{config}: not JSON", _WHOLE) from None
        for owner in (raw, raw.get("text_config")) if isinstance(raw, dict) else ():
            found = owner.get("n_group") if isinstance(owner, dict) else None
            groups = found if type(found) is int else groups
    num_experts = plan.placement.num_experts
    if groups <= 1 or num_experts % groups:
        return
    size = num_experts // groups
    old = plan.placement.physical_to_logical.reshape(-1, groups, size) // size
    torn = (old != old[:, :, :1]).any(axis=(1, 2))
    if torn.any():
        raise MismatchError(
            f"{source}: routing is limited to {groups} groups of {size} experts, and layer"
            f" {plan.layer_ids[int(np.flatnonzero(torn)[0])]} of the plan tears them apart, which"
            " would change the model's output",
            "plan with whole groups together, or use an engine that loads placements",
        )


_WHOLE = "check that the checkpoint is whole"
