"""Tokens that skip whole layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.routing.base import Choices, Need, Rule, Work, layer_positions, require
from moesim.trace.format import Trace


@dataclass(frozen=True, slots=True)
class SkipLayer(Rule):
    """In every `every`-th MoE layer (or in `layers`, as 1-4+7), ceil(`keep` T) tokens of a batch
    pass and the others choose no expert: those of largest first gate weight pass (`by` score), or
    `random` ones. A token that skips a layer skips its attention as well, which traces cannot
    hold: `meta.source.reroute` has the rule and its parameters alone, and times of attention stay
    those of all tokens."""

    keep: float = 0.5
    every: int = 2
    layers: str = ""
    by: Literal["score", "random"] = "score"

    NAME = "skip-layer"
    TITLE = "some tokens skip some layers"
    PAPER = (
        "Mixture-of-Depths (Raposo et al., arXiv:2404.02258), FlexiDepth (Luo et al.,"
        " arXiv:2503.23798) and Router-Tuning (He et al., arXiv:2410.13184), abstracts read"
    )
    LEFT_OUT = "their routers of layers, learned: the first gate weight stands in; attention saved"

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, f"keep {self.keep}", "give a share from 0 to 1")
        require(self.every >= 1, f"every {self.every}", "give 1 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return ("gates",) if self.by == "score" else ()

    def apply(self, work: Work) -> Choices:
        num_layers = work.trace.num_layers
        layers = layer_positions(work.trace, self.layers)
        if not self.layers:
            layers = list(range(self.every - 1, num_layers, self.every))
        keep = work.ids >= 0
        require(
            bool(layers),
            f"every {self.every} of {num_layers} MoE layers is none",
            f"give `every` from 1 to {num_layers}",
        )
        for number, rows in enumerate(work.batches):
            count = int(np.ceil(self.keep * len(rows) - 1e-9))
            for layer in layers:
                if self.by == "score":
                    assert work.gates is not None
                    key = -work.gates[rows, layer].max(axis=1)
                else:
                    key = work.rng(number, layer).random(len(rows))
                skipped = np.argsort(key, kind="stable")[count:]
                keep[rows[skipped], layer] = False
        notes = {"layers_with_skips": float(len(layers))}
        return work.kept(keep, notes)


RULE = SkipLayer
