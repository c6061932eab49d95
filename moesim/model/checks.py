"""Checks of the numbers in a model's description."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.errors import FormatError
from moesim.model.dtypes import TENSOR_CLASSES, WEIGHT_BYTES, bytes_per

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec

MAX_LAYERS = 4096
MAX_EXPERTS = 32767
MAX_SIZE = 1 << 24
"""Upper limits of layer count, expert count (trace ids are int16 at the smallest) and any width."""
MAX_PARAMS = 1 << 50


def check_int(owner: str, field: str, value: object, low: int, high: int) -> None:
    """FormatError that names the field unless `value` is a whole number in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(
            f"{owner}: {field} is {type(value).__name__} {value!r:.60}, not a whole number",
            f"give {field} as an integer from {low} to {high}",
        )
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**20 else "a number of over 20 digits"
        raise FormatError(
            f"{owner}: {field} is {shown}, outside {low} to {high}",
            f"give {field} as an integer from {low} to {high}",
        )


def check_layer_ids(owner: str, field: str, ids: object, num_layers: int) -> None:
    """FormatError that names the field unless `ids` is an increasing tuple of layers."""
    if not isinstance(ids, tuple):
        raise FormatError(f"{owner}: {field} is not a tuple", f"give {field} as a tuple of layers")
    previous = -1
    for layer in ids:
        check_int(owner, field, layer, 0, num_layers - 1)
        if layer <= previous:
            raise FormatError(
                f"{owner}: {field} is not strictly increasing at layer {layer}",
                f"list every layer of {field} once, in order",
            )
        previous = layer


def check_spec(spec: ModelSpec) -> None:
    """Raise FormatError that names the field of `spec` that cannot be, UnknownNameError for a
    type."""
    owner = f"model {spec.name!r:.80}"
    check_int(owner, "num_hidden_layers", spec.num_hidden_layers, 1, MAX_LAYERS)
    check_int(owner, "num_experts", spec.num_experts, 1, MAX_EXPERTS)
    check_int(owner, "ffn_matrices", spec.ffn_matrices, 2, 3)
    for field in ("hidden_size", "moe_intermediate_size", "top_k", "vocab_size", "n_group"):
        check_int(owner, field, getattr(spec, field), 1, MAX_SIZE)
    check_int(owner, "topk_group", spec.topk_group, 1, spec.n_group)
    for field in (
        "num_shared_experts", "shared_intermediate_size", "dense_intermediate_size",
        "expert_hidden_size", "num_zero_experts", "moe_dense_ffns", "mtp_layers",
    ):  # fmt: skip
        check_int(owner, field, getattr(spec, field), 0, MAX_SIZE)
    check_int(owner, "mtp_moe_layers", spec.mtp_moe_layers, 0, spec.mtp_layers)
    for field in ("mtp_params", "other_params"):
        check_int(owner, field, getattr(spec, field), 0, MAX_PARAMS)
    _check_layers(spec, owner)
    _check_choices(spec, owner)
    if bool(spec.num_shared_experts) != bool(spec.shared_intermediate_size):
        raise FormatError(
            f"{owner}: num_shared_experts {spec.num_shared_experts} does not fit "
            f"shared_intermediate_size {spec.shared_intermediate_size}",
            "give both or neither",
        )
    bytes_per(WEIGHT_BYTES, spec.expert_dtype)
    bytes_per(WEIGHT_BYTES, spec.dense_dtype)
    for name, value in spec.stored:
        if name not in TENSOR_CLASSES or not 0 < value <= 8:
            raise FormatError(
                f"{owner}: stored has {name!r:.40}: {value!r:.40}",
                f"give bytes per weight up to 8 of: {', '.join(TENSOR_CLASSES)}",
            )


def _check_layers(spec: ModelSpec, owner: str) -> None:
    layers = spec.num_hidden_layers
    for field in ("moe_layer_ids", "hash_layer_ids", "no_ffn_layer_ids"):
        check_layer_ids(owner, field, getattr(spec, field), layers)
    attention = spec.attention
    for field in ("window_layer_ids", "linear_layer_ids", "absent_layer_ids"):
        check_layer_ids(owner, field, getattr(attention, field), layers)
    seen: set[int] = set()
    for kind in attention.kinds:
        check_layer_ids(owner, f"layers of {kind.name!r:.60}", kind.layer_ids, layers)
        if seen & set(kind.layer_ids):
            raise FormatError(
                f"{owner}: layers of {kind.name!r:.60} are of another kind too",
                "give every layer one kind",
            )
        seen |= set(kind.layer_ids)
    if not spec.moe_layer_ids:
        raise FormatError(f"{owner}: no layer has experts", "list its MoE layers")
    if set(spec.hash_layer_ids) - set(spec.moe_layer_ids):
        raise FormatError(
            f"{owner}: hash_layer_ids has layers without experts", "list MoE layers only"
        )
    if set(spec.no_ffn_layer_ids) & set(spec.moe_layer_ids):
        raise FormatError(
            f"{owner}: no_ffn_layer_ids has layers with experts", "list the others only"
        )
    if (spec.num_dense_layers or spec.moe_dense_ffns) and not spec.dense_intermediate_size:
        raise FormatError(
            f"{owner}: has dense layers but dense_intermediate_size is 0",
            "give the width of the dense layers",
        )


def _check_choices(spec: ModelSpec, owner: str) -> None:
    if spec.top_k > spec.num_experts + spec.num_zero_experts:
        raise FormatError(
            f"{owner}: top_k {spec.top_k} is more than num_experts {spec.num_experts}",
            "a token cannot choose more experts than there are: check the experts per token",
        )
    if spec.num_experts % spec.n_group:
        raise FormatError(
            f"{owner}: n_group {spec.n_group} does not divide num_experts {spec.num_experts}",
            "expert groups have equal sizes: check n_group",
        )
    reachable = spec.topk_group * (spec.num_experts // spec.n_group) + spec.num_zero_experts
    if spec.top_k > reachable:
        raise FormatError(
            f"{owner}: top_k {spec.top_k} is more than the {reachable} experts in "
            f"topk_group {spec.topk_group} groups",
            "check topk_group and n_group",
        )
