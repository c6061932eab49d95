"""The plan: which logical expert lives in which slot of which GPU. The only hand-over file.

Only numpy is imported, so that the replay can read plans inside a serving engine's container.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moesim.choices import ReplicaPolicy as ReplicaPolicy
from moesim.errors import FormatError, InputError, plain
from moesim.files import atomic_write

FORMAT = "moesim-plan"
VERSION = 1
EMPTY = -1
MAX_PLAN_BYTES = 1 << 30

Status = Literal["optimal", "feasible", "time_limit", "infeasible"]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """`physical_to_logical` [L, P] int32: the logical expert in each slot, -1 for an empty slot.

    Slot p sits on GPU p // (P // G), GPU g on node g // (G // N). GPUs that hold fewer experts
    than the largest have empty slots at their end. Every expert has at least one slot in every
    layer, and no GPU holds an expert twice (INV-2); the constructor checks both and raises
    FormatError. double_replicas: a GPU may hold an expert twice, as in files of engines that do so;
    no solver makes such a placement.
    """

    physical_to_logical: IntArray
    num_gpus: int
    num_nodes: int
    num_experts: int
    double_replicas: bool = False

    def __repr__(self) -> str:
        return (
            f"<Placement: {self.num_layers} MoE layers, {self.num_experts} experts in"
            f" {self.num_slots} slots on {self.num_gpus} GPUs>"
        )

    def __post_init__(self) -> None:
        table = self.physical_to_logical
        if table.ndim != 2 or min(table.shape) < 1:
            raise FormatError(
                f"physical_to_logical has shape {table.shape}, wanted [layers, slots]", _REMEDY
            )
        if self.num_gpus < 1 or self.num_slots % self.num_gpus:
            raise FormatError(
                f"{self.num_slots} slots do not divide over {self.num_gpus} GPUs",
                "choose a number of slots that is a multiple of the number of GPUs",
            )
        if self.num_nodes < 1 or self.num_gpus % self.num_nodes:
            raise FormatError(
                f"{self.num_gpus} GPUs do not divide over {self.num_nodes} nodes",
                "every node holds the same number of GPUs",
            )
        if not 1 <= self.num_experts <= self.num_slots:
            raise FormatError(
                f"{self.num_experts} experts do not fit {self.num_slots} slots", _REMEDY
            )
        if table.min() < EMPTY or table.max() >= self.num_experts:
            raise FormatError(
                f"physical_to_logical holds expert ids from {table.min()} to {table.max()},"
                f" outside 0..{self.num_experts - 1}",
                _REMEDY,
            )
        if (self.replica_count == 0).any():
            layer, expert = (int(x[0]) for x in np.nonzero(self.replica_count == 0))
            raise FormatError(f"layer {layer}: expert {expert} has no slot", _REMEDY)
        double = doubled(table, self.num_gpus)
        if len(double) and not self.double_replicas:
            layer, gpu, expert = double[0]
            raise FormatError(f"layer {layer}: GPU {gpu} holds expert {expert} twice", _REMEDY)

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.num_gpus

    @property
    def gpu_of_slot(self) -> npt.NDArray[np.int64]:
        """[P]: the GPU of each slot."""
        return np.arange(self.num_slots) // self.slots_per_gpu

    @property
    def node_of_gpu(self) -> npt.NDArray[np.int64]:
        """[G]: the node of each GPU."""
        return np.arange(self.num_gpus) // (self.num_gpus // self.num_nodes)

    @property
    def replica_count(self) -> npt.NDArray[np.int64]:
        """[L, E]: slots that hold each expert."""
        count = np.zeros((self.num_layers, self.num_experts), np.int64)
        layer, slot = np.nonzero(self.physical_to_logical != EMPTY)
        np.add.at(count, (layer, self.physical_to_logical[layer, slot]), 1)
        return count

    def behind(self, attention_gpus: int, num_nodes: int) -> Placement:
        """The same slots on the last GPUs of a group whose first `attention_gpus` hold none."""
        if not attention_gpus:
            return self
        none = np.full((self.num_layers, attention_gpus * self.slots_per_gpu), EMPTY, np.int32)
        table = np.concatenate([none, self.physical_to_logical], axis=1)
        gpus = attention_gpus + self.num_gpus
        return Placement(table, gpus, num_nodes, self.num_experts, self.double_replicas)

    def logical_to_physical(self) -> IntArray:
        """[L, E, R] int32: slots of each expert in ascending order, -1 beyond its replicas;
        R is the largest replica count."""
        most = int(self.replica_count.max())
        table = np.full((self.num_layers, self.num_experts, most), -1, np.int32)
        for layer in range(self.num_layers):
            row = self.physical_to_logical[layer]
            slots = np.flatnonzero(row != EMPTY)
            order = slots[np.argsort(row[slots], kind="stable")]
            experts = row[order]
            rank = np.arange(len(order)) - np.searchsorted(experts, experts)
            table[layer, experts, rank] = order
        return table


def doubled(physical_to_logical: npt.NDArray[Any], num_gpus: int) -> npt.NDArray[np.int64]:
    """[n, 3]: layer, GPU and expert of every further slot of an expert on a GPU that has it."""
    ordered = np.sort(physical_to_logical.reshape(len(physical_to_logical), num_gpus, -1), axis=2)
    twice = (np.diff(ordered, axis=2) == 0) & (ordered[:, :, 1:] != EMPTY)
    layer, gpu, slot = np.nonzero(twice)
    return np.stack([layer, gpu, ordered[layer, gpu, slot]], axis=1).astype(np.int64)


def in_order(placement: Placement) -> IntArray:
    """[P]: experts 0, 1, ... in the slots that the first layer of `placement` uses, each once, then
    from 0 again; no GPU gets one twice."""
    used = placement.physical_to_logical[0] != EMPTY
    row = np.full(placement.num_slots, EMPTY, np.int32)
    sizes = used.reshape(placement.num_gpus, -1).sum(axis=1)
    experts = placement.num_experts
    first = 0
    for gpu, size in enumerate(sizes):
        start = gpu * placement.slots_per_gpu
        row[start : start + size] = (first + np.arange(size)) % experts
        first += int(size)
    return row


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A placement with what it was made for, how good it is, and where it came from.

    `evaluation` holds held-out metrics of this plan and its baselines; `provenance` hashes, seed,
    versions and command line; `provenance["run"]` alone may differ between equal runs.
    `cache` is the caching plan for models that do not fit, as plain JSON data. `attention_gpus`:
    with attention and experts apart, the GPUs before the placement's that compute attention; 0
    where the placement's own do.
    """

    model: str
    layer_ids: tuple[int, ...]
    placement: Placement
    replica_policy: ReplicaPolicy = "split"
    objective: str = ""
    solver: str = ""
    status: Status = "feasible"
    objective_value: float | None = None
    bound: float | None = None
    gap: float | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    attention_gpus: int = 0

    def __repr__(self) -> str:
        name = plain(self.model) or "unnamed model"
        return f"<Plan: {name} by {plain(self.solver)}, {self.placement!r}>"

    def __post_init__(self) -> None:
        if len(self.layer_ids) != self.placement.num_layers:
            raise FormatError(
                f"{len(self.layer_ids)} layer_ids for {self.placement.num_layers} layers", _REMEDY
            )

    def together(self) -> Plan:
        """The plan, for those that know attention and experts on the same GPUs alone; InputError
        for another."""
        if not self.attention_gpus:
            return self
        raise InputError(
            f"the plan has experts on {self.placement.num_gpus} GPUs of their own, behind"
            f" {self.attention_gpus} of attention, which this command does not know",
            "use simulate, serve or export, or make a plan without `expert_gpus`",
        )

    def mtp_apart(self) -> tuple[Plan, dict[int, list[int]]]:
        """The plan of the model's own layers, and the rows of layers for multi-token prediction
        (`provenance["mtp_layers"]`) by their number."""
        named = self.provenance.get("mtp_layers")
        behind = set(named) if isinstance(named, list) else set()
        keep = [i for i, layer in enumerate(self.layer_ids) if layer not in behind]
        if len(keep) in (0, len(self.layer_ids)):
            return self, {}
        table = self.placement.physical_to_logical
        rows = {x: table[i].tolist() for i, x in enumerate(self.layer_ids) if x in behind}
        own = replace(self.placement, physical_to_logical=table[keep])
        layer_ids = tuple(self.layer_ids[i] for i in keep)
        return replace(self, layer_ids=layer_ids, placement=own), rows

    def to_json(self) -> str:
        """Version 1 of the plan format; the same plan always gives the same text."""
        placement = self.placement
        head: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "num_gpus": placement.num_gpus,
            "num_nodes": placement.num_nodes,
            "num_slots": placement.num_slots,
            "num_experts": placement.num_experts,
            "layer_ids": list(self.layer_ids),
            "replica_policy": self.replica_policy,
            "objective": self.objective,
            "solver": self.solver,
            "status": self.status,
            "objective_value": self.objective_value,
            "bound": self.bound,
            "gap": self.gap,
            "evaluation": self.evaluation,
            "provenance": self.provenance,
        }
        if placement.double_replicas:
            head["double_replicas"] = True
        if self.attention_gpus:
            head["attention_gpus"] = self.attention_gpus
        if self.cache is not None:
            head["cache"] = self.cache
        text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
        rows = ",\n   ".join(
            json.dumps(row, separators=(",", ":")) for row in placement.physical_to_logical.tolist()
        )
        table = f',\n "placement": {{\n  "physical_to_logical": [\n   {rows}\n  ]\n }}\n}}\n'
        whole = text.removesuffix("\n}") + table
        # A lone surrogate has no UTF-8; backslashreplace writes it as JSON does.
        return whole.encode("utf-8", "backslashreplace").decode("utf-8")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan file, whole or not at all."""
        atomic_write(path, self.to_json())


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file. Raises InputError (no such file) or FormatError (names the field)."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_PLAN_BYTES:
            raise FormatError(f"{file}: larger than {MAX_PLAN_BYTES} bytes", _REMEDY)
        raw = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite
        )
    except OSError as error:
        raise InputError(
            f"cannot read plan {file}: {error.strerror}", "give the file that moesim plan wrote"
        ) from None
    except (ValueError, RecursionError):
        raise FormatError(f"{file}: not JSON of finite numbers", _REMEDY) from None
    try:
        return parse_plan(raw)
    except FormatError as error:
        raise FormatError(f"{file}: {error.cause}", error.remedy) from None


def parse_plan(raw: Any) -> Plan:
    """Build a Plan from parsed JSON, checking every field that moesim relies on."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f'not a plan: format is not "{FORMAT}"', _REMEDY)
    if raw.get("version") != VERSION:
        raise FormatError(
            f"plan version {raw.get('version')!r}, this moesim reads {VERSION}",
            "make the plan again with this version",
        )
    sizes = {n: _count(raw, n) for n in ("num_gpus", "num_nodes", "num_slots")}
    body = raw.get("placement")
    if not isinstance(body, dict):
        raise FormatError("placement must be an object", _REMEDY)
    table = _table(body.get("physical_to_logical"), sizes["num_slots"])
    num_experts = _count(raw, "num_experts") if "num_experts" in raw else int(table.max()) + 1
    layers = raw.get("layer_ids")
    if (
        not isinstance(layers, list)
        or any(type(x) is not int or x < 0 for x in layers)
        or len(set(layers)) != len(layers)
    ):
        raise FormatError("layer_ids must be a list of distinct layer numbers", _REMEDY)
    for name, allowed in (("replica_policy", ReplicaPolicy), ("status", Status)):
        if name in raw and raw[name] not in get_args(allowed):
            raise FormatError(f"{name} must be one of {', '.join(get_args(allowed))}", _REMEDY)
    numbers = {n: raw.get(n) for n in ("objective_value", "bound", "gap")}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FormatError(f"{name} must be a number or null", _REMEDY)
    for name in ("evaluation", "provenance", "cache"):
        if raw.get(name) is not None and not isinstance(raw[name], dict):
            raise FormatError(f"{name} must be an object", _REMEDY)
    return Plan(
        model=str(raw.get("model", "")),
        layer_ids=tuple(layers),
        placement=Placement(
            table,
            sizes["num_gpus"],
            sizes["num_nodes"],
            num_experts,
            double_replicas=raw.get("double_replicas") is True,
        ),
        replica_policy=raw.get("replica_policy", "split"),
        objective=str(raw.get("objective", "")),
        solver=str(raw.get("solver", "")),
        status=raw.get("status", "feasible"),
        evaluation=raw.get("evaluation") or {},
        provenance=raw.get("provenance") or {},
        cache=raw.get("cache"),
        attention_gpus=_count(raw, "attention_gpus") if raw.get("attention_gpus") else 0,
        **numbers,
    )


_REMEDY = "make the plan again with moesim plan, or see docs/plan-format.md"


def _finite(text: str) -> float:
    """A number of the file; ValueError for NaN, Infinity and what overflows to it, which JSON does
    not have and `to_json` would refuse to write."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _count(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise FormatError(f"{name} must be a whole number of at least 1", _REMEDY)
    return value


def _table(rows: Any, num_slots: int) -> IntArray:
    if not isinstance(rows, list) or not rows:
        raise FormatError("placement.physical_to_logical must be a list of layers", _REMEDY)
    for layer, row in enumerate(rows):
        if (
            not isinstance(row, list)
            or len(row) != num_slots
            or any(type(x) is not int or not EMPTY <= x < 1 << 15 for x in row)
        ):
            raise FormatError(
                f"placement.physical_to_logical[{layer}] must hold {num_slots} expert ids", _REMEDY
            )
    return np.array(rows, np.int32)
