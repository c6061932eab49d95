"""The file that a plug-in replays: routing, the order of its rows, and the placement.

A `.npz` of `table` [L, T, K] uint8 or int16 (what the router is to answer in each of the trace's
layers), `layer_of` [M] (the trace layer of each MoE layer of the model), `prefill_order`,
`prefill_starts`, `decode_order`, `decode_starts` (see `schedule`), `physical_to_logical` [M, P]
where there is a placement, and `meta`, JSON.

placement "none": the engine's own. "renumbered": a plan without replicas; the table holds slots
instead of experts, so that the engine's linear placement is the plan. "eplb": the table holds
logical experts, and the engine's load balancer maps them to the plan's slots.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moesim.engine.schedule import PhaseRows, RowSchedule
from moesim.errors import FormatError, InputError, MismatchError
from moesim.trace.npyio import read_archive

if TYPE_CHECKING:
    from moesim.placement import Plan
    from moesim.trace.format import Trace

FORMAT = "moesim-engine-replay"
VERSION = 1
Kind = Literal["none", "renumbered", "eplb"]
_ARRAYS = ("table", "layer_of", "prefill_order", "prefill_starts", "decode_order", "decode_starts")
_DAMAGED = "write it again with moesim engine replay"


@dataclass(frozen=True, eq=False)
class Content:
    """What a plug-in replays; shapes as above. `moe_layer_ids` [M]: the model's MoE layers by their
    number among all layers. num_experts: logical experts; num_gpus: of the plan, 1 without."""

    table: npt.NDArray[np.integer]
    layer_of: npt.NDArray[np.int64]
    prefill: PhaseRows
    decode: PhaseRows
    physical_to_logical: npt.NDArray[np.int32] | None
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    num_gpus: int
    placement: Kind
    seed: int
    about: dict[str, Any]

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self.table.shape[2])

    @property
    def num_slots(self) -> int:
        """Physical experts of a layer."""
        if self.physical_to_logical is None:
            return self.num_experts
        return int(self.physical_to_logical.shape[1])

    def schedule(self, rank: int) -> RowSchedule:
        """Rows for one data-parallel rank."""
        return RowSchedule(self.prefill, self.decode, self.seed * 1_000_003 + rank)

    def layer(self, layer_id: int) -> int:
        """Index of a MoE layer among the model's; MismatchError for a layer that is none."""
        if layer_id not in self.moe_layer_ids:
            raise MismatchError(
                f"the engine has experts in layer {layer_id}, the replay in {self.moe_layer_ids}",
                "start the engine with the model folder that was written beside the replay",
            )
        return self.moe_layer_ids.index(layer_id)


def build_content(
    trace: Trace,
    moe_layer_ids: tuple[int, ...],
    *,
    plan: Plan | None = None,
    repeat_layers: bool = False,
    seed: int = 0,
) -> Content:
    """The content for a model whose MoE layers are `moe_layer_ids`.

    Model layers take the trace's layers in order. A trace of fewer layers is refused unless
    `repeat_layers` (then layer l takes trace layer l modulo their number); of a trace of more, the
    first are taken. Gate weights are ignored: every choice weighs 1/K, which costs the same.

    Raises MismatchError where trace, plan and model do not belong together, InputError for tokens
    that chose fewer than K experts, or one expert twice.
    """
    layers = _layer_of(trace, len(moe_layer_ids), repeat_layers)
    ids: npt.NDArray[np.integer] = (
        np.asarray(trace.expert_ids).transpose(1, 0, 2).astype(np.int16, order="C")
    )
    ids = ids[: int(layers.max()) + 1]
    _check_ids(ids)
    placement: Kind = "none"
    slots = None
    if plan is not None:
        _check_plan(plan, trace)
        slots = np.ascontiguousarray(plan.placement.physical_to_logical[layers], np.int32)
        placement = "eplb"
        if plan.placement.num_slots == plan.placement.num_experts:
            placement = "renumbered"
            slot_of = np.argsort(plan.placement.physical_to_logical, axis=1).astype(np.int16)
            ids = np.stack([slot_of[layer][ids[layer]] for layer in range(len(ids))])
    if trace.num_experts <= 256:
        ids = ids.astype(np.uint8)
    return Content(
        table=ids,
        layer_of=layers,
        prefill=_phase(trace, "prefill"),
        decode=_phase(trace, "decode"),
        physical_to_logical=slots,
        moe_layer_ids=moe_layer_ids,
        num_experts=trace.num_experts,
        num_gpus=1 if plan is None else plan.placement.num_gpus,
        placement=placement,
        seed=seed,
        about={"model": trace.meta.model, "trace": trace.content_hash()},
    )


def save_content(content: Content, path: str | os.PathLike[str]) -> None:
    """Write the `.npz`; not compressed, so that workers start quickly."""
    from moesim.files import atomic_path

    meta = {
        "format": FORMAT,
        "version": VERSION,
        "moe_layer_ids": list(content.moe_layer_ids),
        "num_experts": content.num_experts,
        "num_gpus": content.num_gpus,
        "placement": content.placement,
        "seed": content.seed,
        "about": content.about,
    }
    arrays: dict[str, Any] = {
        "table": content.table,
        "layer_of": content.layer_of,
        "prefill_order": content.prefill.order,
        "prefill_starts": content.prefill.starts,
        "decode_order": content.decode.order,
        "decode_starts": content.decode.starts,
    }
    if content.physical_to_logical is not None:
        arrays["physical_to_logical"] = content.physical_to_logical
    with atomic_path(path) as target:
        np.savez(target, meta=np.array(json.dumps(meta)), **arrays)


def load_content(path: str | os.PathLike[str]) -> Content:
    """Read what `save_content` wrote. Raises InputError or FormatError."""
    where = Path(path)
    if not where.is_file():
        raise InputError(f"no replay file {where}", "set MOESIM_REPLAY to the replay.npz written")
    try:
        raw = read_archive(where)
        meta = json.loads(str(raw.pop("meta")))
    except FormatError as error:
        raise FormatError(error.cause, _DAMAGED) from None
    except (ValueError, KeyError) as error:
        raise FormatError(f"{where}: not a replay file: {error}", _DAMAGED) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise FormatError(f"{where}: format is not {FORMAT}", _DAMAGED)
    if meta.get("version") != VERSION:
        raise FormatError(f"{where}: version {meta.get('version')!r}, wanted {VERSION}", _DAMAGED)
    missing = [name for name in _ARRAYS if name not in raw]
    unknown = set(raw) - set(_ARRAYS) - {"physical_to_logical"}
    if missing or unknown:
        raise FormatError(
            f"{where}: arrays missing {missing}, not understood {sorted(unknown)}", _DAMAGED
        )
    return Content(
        table=raw["table"],
        layer_of=raw["layer_of"],
        prefill=PhaseRows(raw["prefill_order"], raw["prefill_starts"]),
        decode=PhaseRows(raw["decode_order"], raw["decode_starts"]),
        physical_to_logical=raw.get("physical_to_logical"),
        moe_layer_ids=tuple(meta["moe_layer_ids"]),
        num_experts=meta["num_experts"],
        num_gpus=meta["num_gpus"],
        placement=meta["placement"],
        seed=meta["seed"],
        about=meta["about"],
    )


def _layer_of(trace: Trace, num_layers: int, repeat: bool) -> npt.NDArray[np.int64]:
    if num_layers > trace.num_layers and not repeat:
        raise MismatchError(
            f"the model has {num_layers} MoE layers, the trace {trace.num_layers}",
            f"cut the model to {trace.num_layers} MoE layers, or repeat the trace's layers",
        )
    return np.arange(num_layers) % trace.num_layers


def _check_ids(ids: npt.NDArray[np.integer]) -> None:
    if ids.min() < 0:
        raise InputError(
            "the trace has tokens that chose fewer experts than top-k",
            "an engine gives every token its top-k: use a trace that does",
        )
    if (np.diff(np.sort(ids, axis=2), axis=2) == 0).any():
        raise InputError(
            "the trace has tokens that chose one expert twice",
            "an engine's router never does: check the trace with moesim trace check",
        )


def _check_plan(plan: Plan, trace: Trace) -> None:
    placement = plan.placement
    if placement.num_experts != trace.num_experts:
        raise MismatchError(
            f"the plan places {placement.num_experts} experts, the trace has {trace.num_experts}",
            "plan with this trace, or one of the same model",
        )
    if tuple(plan.layer_ids) != tuple(trace.meta.layer_ids):
        raise MismatchError(
            "the plan's layers are not those of the trace", "plan with this trace, whole"
        )
    if placement.physical_to_logical.min() < 0:
        raise MismatchError(
            "the plan leaves slots empty; the engine fills all of them",
            "plan with as many slots on every GPU",
        )


def _phase(trace: Trace, phase: Literal["prefill", "decode"]) -> PhaseRows:
    from moesim.trace.batches import index_requests

    index, _ = index_requests(trace, phase)
    return PhaseRows(index.token_idx.astype(np.int32), index.indptr[:-1].astype(np.int32))
