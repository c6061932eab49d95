"""What the cost model says of a replayed step, phase by phase.

Dispatch, experts and combine come from `moesim.cost.step`; the row moves around them, which that
model leaves out because no placement changes them much, come from the same calibration. Above the
cost model, so never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cost.calibration import Calibration
from moesim.cost.routing import Routed
from moesim.cost.step import StepModel, build_step_model
from moesim.errors import InputError
from moesim.model.names import AttentionSpec, ModelSpec
from moesim.replay.shape import ExpertShape
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster

PHASES = ("permute", "dispatch", "compute", "combine", "unpermute")


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """phase_us: [L, G, 5] in the order of `PHASES`; layer_us: [L], the slowest rank of each."""

    phase_us: FloatArray
    layer_us: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class LayerPredictor:
    """Predictions for one model on the GPUs of one calibration.

    A layer is permute, dispatch, compute, combine and unpermute; dispatch and combine wait for the
    slowest rank. "graph": every operation follows the one before it at once. "eager": none starts
    before the host has enqueued it, which takes the calibration's issue times, one after another.
    Ignored: what the host does between operations, and clocks that drop under load.
    """

    shape: ExpertShape
    calibration: Calibration
    step: StepModel

    def predict(self, result: Mapping[str, Any], mode: str) -> Predicted:
        """`result`: one entry of a measured record's `results` (its loads and messages alone)."""
        slots = np.asarray(result["slot_rows"], np.int64)
        messages = np.asarray(result["messages"], np.int64)
        operations = self._operations(slots, messages, int(result["tokens_per_rank"]))
        if mode == "eager":
            return _eager(operations, self.calibration.issue_us)
        phases = np.stack([sum(us for _, us in ops) for ops in operations], axis=2)
        return Predicted(phases, _layers(phases))

    def _operations(
        self, slots: IntArray, messages: IntArray, tokens: int
    ) -> list[list[tuple[str, FloatArray]]]:
        """For each phase, its operations: what the host calls them, and [L, G] device time."""
        num_gpus = messages.shape[1]
        own = np.einsum("lgg->lg", messages)
        sent, received = messages.sum(axis=2) - own, messages.sum(axis=1) - own
        rows = slots.reshape(len(slots), num_gpus, -1).sum(axis=2)
        remote = messages.copy()
        remote[:, np.arange(num_gpus), np.arange(num_gpus)] = 0
        nothing = np.zeros((1, len(slots)), np.int64)
        routed = Routed(
            slots[None].astype(np.int32),
            remote[None].astype(np.int32),
            nothing,
            nothing,
            np.array([tokens * num_gpus]),
        )
        cost = self.step.cost(routed)
        everywhere = np.ones((1, num_gpus))
        dispatch, combine = (
            self._in_layer(us[0])[:, None] * everywhere
            for us in (cost.dispatch_us, cost.combine_us)
        )
        arrived, home = own + received, np.full_like(own, tokens)
        return [
            [("permute", self._move("permute", own + sent, home))],
            [("collective", dispatch)],
            [
                ("permute", self._move("permute", rows, arrived)),
                ("ffn", cost.compute_us[0]),
                ("reduce", self._move("reduce", rows, arrived)),
                ("permute", self._move("permute", own, own)),
            ],
            [("collective", combine)],
            [("reduce", self._move("reduce", own + sent, home))],
        ]

    def _move(self, direction: str, many: IntArray, few: IntArray) -> FloatArray:
        """[L, G] time of gathering `many` rows from `few`, or summing `many` into `few`."""
        row_bytes = float(self.shape.row_bytes)
        return self._in_layer(self.calibration.copy(direction).rows_us(many, few, row_bytes))

    def _in_layer(self, alone_us: FloatArray) -> FloatArray:
        """Time between the other operations of a layer."""
        return np.maximum(alone_us - self.calibration.in_layer_saves_us, 0.0)


def build_predictor(
    shape: ExpertShape, calibration: Calibration, cluster: Cluster, dedup: str
) -> LayerPredictor:
    """The predictor of one model.

    Raises InputError when the calibration lacks the row moves, UnknownNameError when it lacks the
    element type.
    """
    missing = [name for name in ("permute", "reduce") if name not in calibration.copies]
    if missing:
        raise InputError(
            f"calibration {calibration.name} has no {missing[0]} times, which every replayed layer"
            " needs",
            "give one that moesim calibrate made",
        )
    spec = ModelSpec(
        name=shape.name,
        source="replay",
        num_hidden_layers=1,
        moe_layer_ids=(0,),
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.moe_intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        vocab_size=1,
        attention=AttentionSpec("gqa", 1, 1, 64),
        expert_dtype=shape.dtype,
    )
    step = build_step_model(
        cluster,
        spec,
        all_to_all="nccl",
        dedup="none" if dedup == "none" else "gpu",
        calibration=calibration,
    )
    row = float(shape.row_bytes)
    step = replace(step, dispatch_bytes=row, combine_bytes=row)
    return LayerPredictor(shape, calibration, step)


def _layers(phases: FloatArray) -> FloatArray:
    """[L]: phases of the slowest rank each, since both collectives wait for all ranks."""
    return np.asarray(phases.max(axis=1).sum(axis=1), np.float64)


def _eager(
    operations: list[list[tuple[str, FloatArray]]], issue_us: Mapping[str, float]
) -> Predicted:
    """Play the step as one of many without a pause: an operation starts when the one before has
    ended on its rank, the host has enqueued it, and, for a collective, every rank is there. Every
    rank's host is alike. Where the GPUs are slower the host is always ahead; where the host is
    slower it is what is waited for. Its calls take `issue_us`, stretched so that a layer's add up
    to `issue_us["layer"]` where that was measured."""
    names = [name for ops in operations for name, _ in ops]
    known = sum(issue_us.get(name, 0.0) for name in names)
    stretch = issue_us.get("layer", known) / known if known > 0 else 1.0
    num_layers, num_gpus = operations[0][0][1].shape
    phases = np.zeros((num_layers, num_gpus, len(PHASES)))
    now, host = np.zeros(num_gpus), 0.0
    for layer in [*range(num_layers), *range(num_layers)]:  # the step before, then this one
        for index, ops in enumerate(operations):
            began = now.copy()
            for name, us in ops:
                host += issue_us.get(name, 0.0) * stretch
                now = np.maximum(now, host)
                if name == "collective":
                    now = np.full(num_gpus, now.max())
                now = now + us[layer]
            phases[layer, :, index] = now - began
    return Predicted(phases, phases.sum(axis=2).max(axis=1))
