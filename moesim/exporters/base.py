"""What every exporter is given and gives back, and the checks that they share.

An exporter is a module with `NAME`, `TITLE`, `SUFFIX`, `ACCEPTED_BY`, `encode`, `launch` and
`decode` (the `Exporter` protocol); `registry.py` lists them. What an engine cannot express is
refused with MismatchError that says why; nothing is rounded off in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, MismatchError, plain
from moesim.model.names import ModelSpec
from moesim.placement import EMPTY, Placement, Plan, doubled, in_order

Table = npt.NDArray[np.int64]


def _silent(_: str) -> None:
    """The default of `notify`."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the plan does not say.

    spec:              the model, if known; checks that the plan covers all its MoE layers.
    num_hidden_layers: all layers of the model, dense ones included.
    mtp_layers:        multi-token-prediction (MTP) layers with experts after them; None if unknown.
    mtp_rows:          the plan's own rows of such layers, by their number.
    fill_layers:       MoE layers that the plan lacks since no trace has them (they route by token
                       id): `fill_layers` places them in order.
    model_id:          what launch lines call the model, else the plan's name of it.
    notify:            called with one line for everything worth knowing.
    """

    spec: ModelSpec | None = None
    num_hidden_layers: int | None = None
    mtp_layers: int | None = None
    mtp_rows: Mapping[int, list[int]] = field(default_factory=dict)
    fill_layers: tuple[int, ...] = ()
    model_id: str = ""
    notify: Callable[[str], None] = _silent


NOTHING_KNOWN = ExportOptions()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the engine's file does not say, for reading it back.

    where:             the file's name, for errors.
    num_gpus:          GPUs that the slots are spread over, where the file has no ranks.
    num_nodes:         nodes that the GPUs are spread over.
    num_experts:       logical experts, where the file does not imply them.
    layer_ids:         absolute numbers of the MoE layers, where the file has none.
    num_hidden_layers: all layers of the model, dense ones included; later rows are of MTP layers.
    """

    where: str
    num_gpus: int | None = None
    num_nodes: int = 1
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    model: str = ""
    notify: Callable[[str], None] = _silent


class Exporter(Protocol):
    """One engine's file.

    `encode` gives the file's bytes and raises MismatchError for a plan that the engine cannot run;
    `launch` the lines that start the engine with the file at `path`; `decode` the plan that a file
    of the engine means. decode(encode(plan)) has the placement of `plan`; omni-infer's file has no
    order of slots within a GPU, and vLLM's only one of two.
    """

    NAME: str
    TITLE: str
    SUFFIX: str
    ACCEPTED_BY: str

    def encode(self, plan: Plan, options: ExportOptions) -> bytes: ...

    def launch(
        self, plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN
    ) -> list[str]: ...

    def decode(self, data: bytes, options: ReadOptions) -> Plan: ...


def require_full_slots(plan: Plan, engine: str) -> None:
    """Refuse a plan whose GPUs hold different numbers of experts."""
    table = plan.placement.physical_to_logical
    empty = int((table == EMPTY).sum())
    if empty:
        layer = int(np.nonzero((table == EMPTY).any(axis=1))[0][0])
        raise MismatchError(
            f"{engine} gives every GPU the same number of experts, but layer"
            f" {plan.layer_ids[layer]} of the plan has empty slots ({empty} in all)",
            "plan again with the same number of slots on every GPU, or export to omni-infer",
        )


def require_single_copies(plan: Plan, engine: str, remedy: str) -> None:
    """Refuse a plan with replicas."""
    count = plan.placement.replica_count
    if (count > 1).any():
        layer, expert = (int(x[0]) for x in np.nonzero(count > 1))
        raise MismatchError(
            f"{engine} holds every expert once, but layer {plan.layer_ids[layer]} of the plan has"
            f" {int(count[layer, expert])} copies of expert {expert}",
            remedy,
        )


def require_all_layers(plan: Plan, options: ExportOptions, engine: str) -> None:
    """Refuse a plan that leaves out MoE layers of the model, if the model is known."""
    spec = options.spec
    if spec is None:
        options.notify(
            "the plan's model is no known preset, so nothing checks that it covers all MoE layers;"
            " `model` names one"
        )
        return
    if plan.placement.num_experts != spec.num_experts:
        raise MismatchError(
            f"the plan has {plan.placement.num_experts} experts, {spec.name} {spec.num_experts}",
            "name the model that the plan was made for",
        )
    if plan.layer_ids != spec.moe_layer_ids:
        raise MismatchError(
            f"{engine} wants every MoE layer, but the plan has {len(plan.layer_ids)} layers and"
            f" {spec.name} {spec.num_moe_layers}",
            "plan with a trace of all MoE layers, name the model that the plan was made for, or"
            " place layers that route by token id in order: `fill_layers`",
        )


def filled(plan: Plan, options: ExportOptions) -> Plan:
    """The plan with `fill_layers`, and the layers that the model says route by token id, placed in
    order where it lacks them. Raises MismatchError for layers that are no MoE layers."""
    spec = options.spec
    known = getattr(spec, "hash_layer_ids", ()) if spec is not None else ()
    wrong = [x for x in options.fill_layers if spec is not None and x not in spec.moe_layer_ids]
    if wrong:
        raise MismatchError(
            f"layer {wrong[0]} is no MoE layer of {spec.name if spec else 'the model'}",
            "name MoE layers that the plan lacks",
        )
    missing = sorted({*options.fill_layers, *known} - set(plan.layer_ids))
    if not missing:
        return plan
    options.notify(
        f"layers {', '.join(map(str, missing[:6]))}{', ...' if len(missing) > 6 else ''} are not in"
        " the plan, since no trace has their routing: placed in order"
    )
    rows = dict(zip(plan.layer_ids, plan.placement.physical_to_logical, strict=True))
    rows |= dict.fromkeys(missing, in_order(plan.placement))
    layers = tuple(sorted(rows))
    table = np.stack([rows[layer] for layer in layers])
    return replace(
        plan, layer_ids=layers, placement=replace(plan.placement, physical_to_logical=table)
    )


def hidden_layers(plan: Plan, options: ExportOptions) -> int:
    """Number of all layers of the model. Raises InputError when it is not known."""
    total = options.num_hidden_layers
    if total is None and options.spec is not None:
        total = options.spec.num_hidden_layers
    if total is None:
        raise InputError(
            "the number of all layers, dense ones included, is not known",
            "give `model` with a preset or config.json, or `num_hidden_layers`",
        )
    if total <= max(plan.layer_ids):
        raise MismatchError(
            f"the plan has layer {max(plan.layer_ids)}, but the model only {total} layers",
            "name the model that the plan was made for",
        )
    return total


def num_redundant(plan: Plan) -> int:
    """Slots beyond one for each expert."""
    return plan.placement.num_slots - plan.placement.num_experts


def model_name(plan: Plan, options: ExportOptions) -> str:
    """What stands for the model in a command line: what the user or the trace called it."""
    return plain(options.model_id or plan.model, 400) or "MODEL"


def all_to_all(plan: Plan, options: ExportOptions) -> str | None:
    """The all-to-all that the plan was made for, or None with a notice."""
    asked = plan.provenance.get("options")
    found = plan.evaluation.get("all_to_all")
    if found is None and isinstance(asked, dict):
        found = asked.get("all_to_all")
    if not isinstance(found, str):
        options.notify(
            "the plan does not say which all-to-all it was made for: the launch line leaves the"
            " engine's default"
        )
        return None
    return found


def mtp_layer_ids(options: ExportOptions) -> tuple[int, ...] | None:
    """Absolute numbers of the model's MTP layers with experts; None where that is not known."""
    count, total = options.mtp_layers, options.num_hidden_layers
    if options.spec is not None:
        total = total or options.spec.num_hidden_layers
        count = getattr(options.spec, "mtp_moe_layers", None) if count is None else count
    if count is None or total is None:
        return None
    return tuple(range(total, total + count))


def make_plan(
    table: npt.NDArray[Any],
    options: ReadOptions,
    engine: str,
    layer_ids: tuple[int, ...] | None = None,
    num_gpus: int | None = None,
) -> Plan:
    """A plan from [L, P] expert ids in slots; `layer_ids` when the file gives them.

    Raises FormatError (names the file) when the table is no placement, InputError when the number
    of GPUs is not known.
    """
    gpus = num_gpus if num_gpus is not None else options.num_gpus
    if gpus is None:
        raise InputError(
            f"{options.where}: does not say how many GPUs its slots are for", "give `num_gpus`"
        )
    if num_gpus is not None and options.num_gpus not in (None, num_gpus):
        raise MismatchError(
            f"{options.where}: is for {num_gpus} GPUs, not {options.num_gpus}", "leave it out"
        )
    if layer_ids is None:
        layer_ids = options.layer_ids
        if layer_ids is not None and len(layer_ids) != len(table):
            raise MismatchError(
                f"{options.where}: has {len(table)} layers, but the model {len(layer_ids)} MoE"
                " layers",
                "name the model that the file is for",
            )
    if layer_ids is None:
        layer_ids = tuple(range(len(table)))
        options.notify("layers are numbered from 0; `model` gives their real numbers")
    table, layer_ids = _without_mtp(table, layer_ids, options)
    num_experts = options.num_experts or int(table.max(initial=0)) + 1
    table = _without_shared(table, gpus, num_experts, options)
    if table.shape[1] % gpus:
        raise MismatchError(
            f"{options.where}: {table.shape[1]} slots do not divide over {gpus} GPUs",
            "give the number of GPUs that the file was made for",
        )
    double = doubled(table, gpus)
    if len(double):
        layer, gpu, expert = (int(x) for x in double[0])
        options.notify(
            f"{len(double)} slots hold an expert that their GPU has already (first: layer"
            f" {layer_ids[layer]}, GPU {gpu}, expert {expert}): {engine} runs such maps, as EPLB"
            " makes them, but such a slot spreads no load; plans of moesim have none"
        )
    try:
        placement = Placement(
            table.astype(np.int32), gpus, options.num_nodes, num_experts, bool(len(double))
        )
        return Plan(
            model=options.model,
            layer_ids=layer_ids,
            placement=placement,
            solver=f"imported from {engine}",
            provenance={"source": {"engine": engine, "file": Path(options.where).name}},
        )
    except FormatError as error:
        raise FormatError(
            f"{options.where}: {error.cause}",
            f"check the numbers of GPUs, nodes and experts that were given; if they are right,"
            f" {engine} would not run with this file: ask whoever made it",
        ) from None


def _without_mtp(
    table: Table, layer_ids: tuple[int, ...], options: ReadOptions
) -> tuple[Table, tuple[int, ...]]:
    """Without the rows of MTP layers, which come after the model's own and are in no trace."""
    total = options.num_hidden_layers
    extra = [layer for layer in layer_ids if total is not None and layer >= total]
    if not extra or len(extra) == len(layer_ids):
        return table, layer_ids
    options.notify(
        f"left out layers {', '.join(map(str, extra[:4]))}: after the model's {total} layers come"
        " those of multi-token prediction (MTP), which no trace has"
    )
    keep = [i for i, layer in enumerate(layer_ids) if layer not in extra]
    return table[keep], tuple(layer_ids[i] for i in keep)


def _without_shared(table: Table, gpus: int, num_experts: int, options: ReadOptions) -> Table:
    """Without the slots of shared experts: ids beyond the routed ones that every GPU has once.

    Raises InputError where the highest expert looks like one and nothing says how many routed
    experts there are.
    """
    if gpus < 2 or table.shape[1] % gpus:
        return table
    by_gpu = table.reshape(len(table), gpus, -1)
    if options.num_experts is None:
        highest = int(table.max())
        everywhere = ((by_gpu == highest).sum(axis=2) == 1).all()
        if everywhere and by_gpu.shape[2] > 1 and not _everywhere(by_gpu, highest - 1):
            raise InputError(
                f"{options.where}: expert {highest} has a slot on each of the {gpus} GPUs in every"
                " layer, as a shared expert does",
                f"say how many routed experts there are: `num_experts` {highest} if it is shared,"
                f" {highest + 1} if it is routed, or name the model",
            )
        return table
    extra = [e for e in np.unique(table).tolist() if e >= num_experts]
    shared = [e for e in extra if _everywhere(by_gpu, e)]
    if not extra or extra != shared:
        return table
    options.notify(
        f"left out the slots of shared experts ({', '.join(map(str, shared[:4]))}), which every"
        " GPU has beside the routed ones"
    )
    return by_gpu[by_gpu < num_experts].reshape(len(table), -1)


def _everywhere(by_gpu: Table, expert: int) -> bool:
    """Whether every GPU has one slot of the expert in every layer; by_gpu: [L, G, S]."""
    return bool(((by_gpu == expert).sum(axis=2) == 1).all())


def id_table(rows: Any, where: str, field: str) -> npt.NDArray[np.int64]:
    """[L, P] from a list of lists of expert ids; FormatError names the row that is wrong."""
    if not isinstance(rows, list) or not rows:
        raise FormatError(f"{where}: {field} must be a list of layers", DAMAGED)
    for index, row in enumerate(rows):
        check_row(row, where, f"{field}[{index}]")
        if len(row) != len(rows[0]):
            raise FormatError(
                f"{where}: {field}[{index}] has {len(row)} slots, {field}[0] {len(rows[0])}",
                DAMAGED,
            )
    return np.array(rows, np.int64)


def check_row(row: Any, where: str, field: str) -> list[int]:
    """`row` if it is a non-empty list of expert ids; FormatError otherwise."""
    if not isinstance(row, list) or not row or any(type(x) is not int for x in row):
        raise FormatError(f"{where}: {field} must be a list of expert ids", DAMAGED)
    if min(row) < 0 or max(row) >= 1 << 15:
        raise FormatError(f"{where}: {field} has expert ids out of range", DAMAGED)
    return row


def parse_json(data: bytes, where: str) -> Any:
    """JSON from bytes, with the library's errors."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: not JSON", DAMAGED) from None


def rows_to_json(rows: Sequence[Sequence[int]], indent: str) -> str:
    """Lists of numbers as JSON, one list a line."""
    return ",\n".join(indent + json.dumps(row, separators=(",", ":")) for row in rows)


DAMAGED = "check that the file is whole and of the engine that --from names"
