"""Sizes of a checkpoint's tensors out of the headers of its `.safetensors` files, expert by expert.

Names are those of Hugging Face checkpoints (`model.layers.3.mlp.experts.17.up_proj.weight`,
`...experts.gate_up_proj` for all in one, scales beside them). Tensors of no kind that is known are
refused; layers for predicting further tokens and vision towers are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, plain
from moesim.model.gguf import Tensor
from moesim.model.gguf_spec import Placed
from moesim.model.spec import ModelSpec
from moesim.safetensors_file import open_safetensors
from moesim.types import IntArray

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,4})\.(.+)")
_EXPERT = re.compile(r"(?:.*\.)?experts\.(?:(\d{1,5})\.)?.+")
_LEFT_OUT = re.compile(r"(?:.*\.)?(?:mtp|visual|vision_tower|multi_modal_projector)\b.*")
_KINDS = (
    ("shared", re.compile(r".*shared_experts?(?:_gate)?\b.*")),
    ("router", re.compile(r"(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)\b.*")),
    ("attention", re.compile(r"(?:self_attn|linear_attn|attention|mixer)\b.*")),
    ("dense", re.compile(r"(?:mlp|feed_forward)\.(?:gate|up|down|gate_up)_proj\b.*")),
    ("other", re.compile(r".*norm\d?\b.*")),
)
_TOP = (("tables", re.compile(r"(?:.*\.)?(?:embed_tokens|lm_head)\b.*")),
        ("other", re.compile(r"(?:.*\.)?norm\b.*")))  # fmt: skip
_ROLES = {"experts": "ffn_up_exps", "shared": "ffn_up_shexp", "router": "ffn_gate_inp",
          "attention": "attn_q", "dense": "ffn_up", "other": "attn_norm"}  # fmt: skip
_REMEDY = "check that the folder holds one whole checkpoint and its own config.json"


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a checkpoint's files."""
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def checkpoint_sizes(folder: Path, spec: ModelSpec) -> tuple[tuple[Placed, ...], IntArray]:
    """One entry per class and layer, and [num_hidden_layers, num_experts] bytes of every expert
    (0 in layers without).

    Raises FormatError for a tensor of no kind that is known, and where experts are missing or more
    than the model has.
    """
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    experts = np.zeros((spec.num_hidden_layers, spec.num_experts), np.int64)
    for path in sorted(folder.glob("*.safetensors")):
        for name, info in open_safetensors(path).tensors.items():
            cls, layer, expert = _kind(name, str(path), spec)
            if cls == "experts" and expert is not None:
                experts[layer, expert] += info.num_bytes
            elif cls == "experts":
                experts[layer] += info.num_bytes // spec.num_experts
            if cls:
                sizes[cls, layer] += info.num_bytes
    for layer in spec.moe_layer_ids:
        if not experts[layer].all():
            missing = int((experts[layer] == 0).sum())
            raise FormatError(
                f"{folder}: {missing} of {spec.num_experts} experts of layer {layer} are not there",
                _REMEDY,
            )
    placed = [_placed(cls, layer, size) for (cls, layer), size in sorted(sizes.items())]
    return tuple(placed), experts


def _kind(name: str, where: str, spec: ModelSpec) -> tuple[str, int, int | None]:
    """Class, layer (-1: none) and expert (None: all) of a tensor; class "" for what is left out."""
    found = _LAYER.fullmatch(name)
    if _LEFT_OUT.fullmatch(name) or (found and int(found[1]) >= spec.num_hidden_layers):
        return "", -1, None
    if found is None:
        for cls, pattern in _TOP:
            if pattern.fullmatch(name):
                return ("output" if "lm_head" in name else cls), -1, None
    else:
        layer, rest = int(found[1]), found[2]
        expert = None if _KINDS[0][1].fullmatch(rest) else _EXPERT.fullmatch(rest)
        if expert is not None:
            index = None if expert[1] is None else int(expert[1])
            if layer not in spec.moe_layer_ids or (index or 0) >= spec.num_experts:
                raise FormatError(
                    f"{where}: {plain(name)} is an expert that {spec.name} does not have", _REMEDY
                )
            return "experts", layer, index
        for cls, pattern in _KINDS:
            if pattern.fullmatch(rest):
                return cls, layer, None
    raise FormatError(
        f"{where}: tensor {plain(name)} is of no kind that is known",
        "name the model's preset or config.json instead",
    )


def _placed(cls: str, layer: int, size: int) -> Placed:
    if layer < 0:
        role = {"tables": "token_embd", "output": "output"}.get(cls, "output_norm")
        kind = "tables" if role != "output_norm" else "other"
        return Placed(Tensor(f"{role}.weight", (1, 1), "", size), kind, -1, role)
    role = _ROLES[cls]
    return Placed(Tensor(f"blk.{layer}.{role}.weight", (1, 1), "", size), cls, layer, role)
