"""Hooks that read the routing out of Hugging Face transformers models.

In transformers 5 nearly every MoE layer ends in one call, `experts(hidden_states, top_k_index,
top_k_weights)`, made after bias, grouping, normalisation and scaling; a pre-hook there sees what
the experts see. The modules that take something else are handled by class name in `SPECIAL`.
Class names and call signatures: huggingface/transformers, src/transformers/models/*/modeling_*.py
and src/transformers/integrations/mxfp4.py, releases 5.0 to 5.23.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
import torch

from moesim.errors import InputError, MismatchError
from moesim.types import Array

Routing = tuple[torch.Tensor, torch.Tensor]
"""Expert ids [rows, k] (-1 for none) and their weights [rows, k]."""

INDEX_NAMES = frozenset({"top_k_index", "router_indices", "selected_experts"})
"""Names of the second argument of the experts' forward."""


@dataclass(slots=True)
class Layer:
    """One MoE layer: where its routing is read and what was read so far.

    layer_id is absolute; decoder layers of an encoder-decoder model count on from the encoder's.
    `blocks` holds (ids, weights) of each call since the last `take`.
    """

    name: str
    layer_id: int
    num_experts: int
    in_encoder: bool
    module: torch.nn.Module
    read: Callable[[Layer, Any], None]
    on_output: bool = False
    blocks: list[Routing] = field(default_factory=list)

    def add(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        ids = ids.detach().reshape(-1, ids.shape[-1])
        ids = torch.where((ids >= 0) & (ids < self.num_experts), ids, -1).to(torch.int16)
        self.blocks.append((ids, weights.detach().reshape(-1, weights.shape[-1]).float()))


def find_layers(model: torch.nn.Module) -> list[Layer]:
    """The MoE layers of `model`, in order of depth.

    Raises InputError when there is none, or when two modules claim the same layer number (a model
    with two towers, of which the trace format can hold one).
    """
    layers: list[Layer] = []
    parents = dict(model.named_modules())
    encoder_depth = _encoder_depth(model)
    for name, module in parents.items():
        special = SPECIAL.get(type(module).__name__)
        if special is not None:
            read, on_output = special, type(module).__name__ == "Llama4Router"
        elif _takes_top_k(module):
            read, on_output = _read_top_k, False
        else:
            continue
        numbers = re.findall(r"\.(\d+)\.", f".{name}.")
        if not numbers:
            raise InputError(f"module {name} has no layer number", "report the architecture")
        in_encoder = encoder_depth > 0 and ".decoder." not in f".{name}"
        hooked = parents[name.rpartition(".")[0]] if read is _read_mxfp4 else module
        layers.append(
            Layer(
                name,
                int(numbers[0]) + (0 if in_encoder else encoder_depth),
                _num_experts(module),
                in_encoder,
                hooked,
                read,
                on_output,
            )
        )
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no MoE layer that can be captured",
            "capture needs experts that are called with (hidden_states, top_k_index,"
            " top_k_weights), as in transformers 5, or one of " + ", ".join(sorted(SPECIAL)),
        )
    layers.sort(key=lambda layer: layer.layer_id)
    for a, b in pairwise(layers):
        if a.layer_id == b.layer_id:
            raise InputError(
                f"{a.name} and {b.name} are both layer {a.layer_id}",
                "give a model with one MoE module a layer, such as the text model alone",
            )
    return layers


class RoutingRecorder:
    """Records the routing of a model's MoE layers while the `with` block runs.

    `take` hands over what was recorded since the last `take`. What is held until then is one
    int16 and one float32 for each (token, layer, choice), on the model's own device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = find_layers(model)
        self._handles: list[Any] = []

    @property
    def num_experts(self) -> int:
        return max(layer.num_experts for layer in self.layers)

    def __enter__(self) -> RoutingRecorder:
        for layer in self.layers:
            self._handles.append(_register(layer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self.layers:
            layer.blocks = []

    def take(self, num_rows: int, in_encoder: bool = False) -> tuple[Array, Array]:
        """Ids [num_rows, L, K] int16 and weights [num_rows, L, K] float32, in order of the calls.

        Rows are tokens in the order in which the model flattens them: batch, then position. L are
        all layers; those of the other half of an encoder-decoder model hold -1 and 0, as do the
        choices that a token did not make. K is the largest top-k of the layers.
        Raises MismatchError when a layer saw another number of tokens.
        """
        parts: list[tuple[Array, Array] | None] = []
        for layer in self.layers:
            if layer.in_encoder is not in_encoder:
                parts.append(None)
                continue
            rows = sum(len(ids) for ids, _ in layer.blocks)
            if rows != num_rows:
                raise MismatchError(
                    f"{layer.name} routed {rows} tokens where {num_rows} passed the model",
                    "this architecture does not send every token through its router: not supported",
                )
            parts.append(
                (
                    torch.cat([ids.cpu() for ids, _ in layer.blocks]).numpy(),
                    torch.cat([weights.cpu() for _, weights in layer.blocks]).numpy(),
                )
            )
            layer.blocks = []
        top_k = max(p[0].shape[1] for p in parts if p is not None) if any(parts) else 1
        ids = np.full((num_rows, len(parts), top_k), -1, np.int16)
        weights = np.zeros((num_rows, len(parts), top_k), np.float32)
        for number, part in enumerate(parts):
            if part is not None:
                ids[:, number, : part[0].shape[1]] = part[0]
                weights[:, number, : part[0].shape[1]] = part[1]
        weights[ids < 0] = 0
        return ids, weights


def _register(layer: Layer) -> Any:
    if layer.on_output:
        return layer.module.register_forward_hook(lambda _, args, out: layer.read(layer, out))
    return layer.module.register_forward_pre_hook(
        lambda _, args, kwargs: layer.read(layer, (*args, *kwargs.values())), with_kwargs=True
    )


def _takes_top_k(module: torch.nn.Module) -> bool:
    if not type(module).__name__.endswith("Experts"):
        return False
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return len(names) >= 3 and names[1] in INDEX_NAMES


def _num_experts(module: torch.nn.Module) -> int:
    """Experts with weights: ids beyond them (identity or skip experts) are no experts to place."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 3:
            return int(weight.shape[0])
    return int(module.num_experts)  # type: ignore[arg-type]


def _encoder_depth(model: torch.nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return 0
    return int(getattr(config, "encoder_layers", None) or config.num_layers)


def _read_top_k(layer: Layer, args: Any) -> None:
    """(hidden_states, ids [rows, k], weights [rows, k] or, scattered, [rows, experts])."""
    ids, weights = args[1], args[2]
    if weights.shape[-1] != ids.shape[-1]:
        weights = weights.gather(-1, ids.clamp(0, weights.shape[-1] - 1))
    layer.add(ids, weights)


def _read_llama4(layer: Layer, output: Any) -> None:
    """Llama-4 scales the inputs of all experts by scores that are 0 but for the chosen ones; its
    router gives (scores [rows, experts], logits [rows, experts])."""
    scores, logits = output
    ids = torch.topk(logits, layer.module.top_k, dim=-1).indices  # type: ignore[arg-type]
    layer.add(ids, scores.gather(-1, ids))


def _read_switch(layer: Layer, args: Any) -> None:
    """Switch: (hidden_states, one-hot [rows, 1, experts], weights [rows, 1]); the row of a token
    beyond an expert's capacity is zero."""
    mask, weights = args[1].reshape(-1, args[1].shape[-1]), args[2]
    ids = torch.where(mask.sum(-1) > 0, mask.argmax(-1), -1)
    layer.add(ids[:, None], weights.reshape(-1, 1))


def _read_nllb(layer: Layer, args: Any) -> None:
    """NLLB: (hidden_states, mask, weights [rows, experts]) with at most two weights above 0; those
    of a choice beyond an expert's capacity are 0."""
    weights, ids = torch.topk(args[2], 2, dim=-1)
    layer.add(torch.where(weights > 0, ids, -1), weights)


def _read_mxfp4(layer: Layer, args: Any) -> None:
    """GPT-OSS with MXFP4 kernels: releases differ in what the experts are given (ids, or the
    kernel's own routing data), so the router is run again on what the layer is given."""
    hidden = args[0]
    router: Any = layer.module.router
    logits = torch.nn.functional.linear(
        hidden.reshape(-1, hidden.shape[-1]), router.weight, router.bias
    )
    values, ids = torch.topk(logits, router.top_k, dim=-1)
    layer.add(ids, torch.softmax(values, dim=-1))


SPECIAL: dict[str, Callable[[Layer, Any], None]] = {
    "Llama4Router": _read_llama4,
    "SwitchTransformersExperts": _read_switch,
    "NllbMoeExperts": _read_nllb,
    "Mxfp4GptOssExperts": _read_mxfp4,
}
"""Modules that do not take (hidden_states, top_k_index, top_k_weights), by class name."""
