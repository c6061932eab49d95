"""Hooks on the routers of Hugging Face transformers models: the candidates of every token.

A router gives its logits over all experts; the softmax or sigmoid that its `forward` applies to
them is known by class name, so that the scores of a router that is not listed are never guessed.
Where a router takes the softmax over the chosen logits alone (GPT-OSS, Granite), candidates have
the softmax over all experts: the same order, other values. Phi-MoE's sparse mixer gives weights
against each other expert in turn; candidates have the softmax.
Class names and formulas: huggingface/transformers, src/transformers/models/*/modeling_*.py,
release 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from moesim.errors import InputError, MismatchError
from moesim.trace.capture_hooks import Layer
from moesim.types import Array

SOFTMAX = frozenset(
    f"{family}TopKRouter"
    for family in (
        "FlexOlmo", "GptOss", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeShared", "Jamba",
        "MiniMax", "Mixtral", "Olmoe", "OpenAIPrivacyFilter", "Phimoe", "Qwen2Moe", "Qwen3Moe",
        "Qwen3Next", "Qwen3OmniMoeText", "Qwen3VLMoeText", "Qwen3_5Moe",
    )
) | {"DeepseekV2TopkRouter"}  # fmt: skip
SIGMOID = frozenset(
    f"{family}TopkRouter"
    for family in (
        "DeepseekV3", "DeepseekV32", "Dots1", "ExaoneMoe", "Glm4Moe", "Glm4MoeLite", "Glm4vMoeText",
        "GlmMoeDsa", "MiMoV2Flash", "NemotronH", "SolarOpen",
    )
) | {"Llama4Router", "MiniMaxM2TopKRouter"}  # fmt: skip
LOGITS_AT = {"Llama4Router": 1}
"""Where in a router's output the logits are, if not first."""


class CandidateRecorder:
    """Records the `num_candidates` best experts of each layer's router while the block runs.

    Held until `take`: one int16 and one float16 for each (token, layer, candidate).
    Raises InputError for a model with a router that is not known, or with fewer experts.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[Layer], num_candidates: int):
        fewest = min(layer.num_experts for layer in layers)
        if not 1 < num_candidates <= fewest:
            raise InputError(
                f"`candidates` {num_candidates} of a router over {fewest} experts",
                f"give from more than its top-k to {fewest}",
            )
        self.num_candidates = num_candidates
        self._layers = layers
        self._routers = [_router(model, layer) for layer in layers]
        self._seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> CandidateRecorder:
        for number, router in enumerate(self._routers):
            self._handles.append(
                router.register_forward_hook(
                    lambda module, _, output, number=number: self._note(number, module, output)
                )
            )
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
        self._seen = [[] for _ in self._layers]

    def take(self, num_rows: int) -> tuple[Array, Array]:
        """Ids [num_rows, L, M] int16 and scores [num_rows, L, M] float16 since the last `take`, in
        the order of the calls. Raises MismatchError when a router saw another number of tokens."""
        ids = np.empty((num_rows, len(self._layers), self.num_candidates), np.int16)
        scores = np.empty(ids.shape, np.float16)
        for number, blocks in enumerate(self._seen):
            rows = sum(len(block[0]) for block in blocks)
            if rows != num_rows:
                raise MismatchError(
                    f"the router of {self._layers[number].name} scored {rows} tokens where"
                    f" {num_rows} passed the model",
                    "capture this model without candidates",
                )
            ids[:, number] = torch.cat([block[0].cpu() for block in blocks]).numpy()
            scores[:, number] = torch.cat([block[1].cpu() for block in blocks]).numpy()
        self._seen = [[] for _ in self._layers]
        return ids, scores

    def _note(self, number: int, router: torch.nn.Module, output: Any) -> None:
        name = type(router).__name__
        logits = output[LOGITS_AT.get(name, 0)] if isinstance(output, tuple) else output
        num_experts = self._layers[number].num_experts
        if logits.shape[-1] != num_experts:
            raise MismatchError(
                f"{name} gives {logits.shape[-1]} logits for {num_experts} experts",
                "capture this model without candidates",
            )
        logits = logits.detach().reshape(-1, num_experts).float()
        scores = logits.softmax(-1) if name in SOFTMAX else logits.sigmoid()
        best = scores.topk(self.num_candidates, dim=-1)
        self._seen[number].append((best.indices.to(torch.int16), best.values.half()))


def _router(model: torch.nn.Module, layer: Layer) -> torch.nn.Module:
    """The router beside the experts of a layer, or that a layer is read from."""
    modules = dict(model.named_modules())
    parent = modules[layer.name.rpartition(".")[0]]
    found = [m for m in parent.modules() if type(m).__name__ in SOFTMAX | SIGMOID]
    if len(found) != 1 or type(modules[layer.name]).__name__.startswith("Mxfp4"):
        children = ", ".join(type(child).__name__ for child in parent.children())
        raise InputError(
            f"{layer.name} has no router whose scores are known (beside it: {children:.120})",
            "capture this model without candidates",
        )
    return found[0]
