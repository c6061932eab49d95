"""The caching plan: what each layer keeps in fast memory and how; JSON in and out."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moesim.caching.policies import get_policy
from moesim.caching.timeline import CpuMode
from moesim.errors import FormatError, InputError
from moesim.files import atomic_write

FORMAT = "moesim-cache-plan"
VERSION = 1
MAX_BYTES = 1 << 28
MAX_LAYERS = 4096
Prefetcher = Literal[
    "popularity", "previous-layer", "token-id", "history", "learned", "neural", "oracle"
]


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Predict `depth` layers ahead; of the experts that score at least `min_score` and are not in
    HBM, send for the `width` likeliest."""

    predictor: str
    depth: int
    width: int
    min_score: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """What one GPU keeps where.

    layer_ids: [L] absolute numbers of the MoE layers. slots: [L] slots that `policy` manages.
    pinned: [L] expert ids that are always in HBM, in slots of their own. cpu: `auto` lets the CPU
    compute what it finishes before the link; cpu_layers: absolute layers always on the CPU.
    prefetch: None for none. bits: [L][E] bits of each expert, None where all have the model's
    type. nvme: [L] expert ids that live on NVMe; all others that are not pinned live in DRAM.
    memory, predicted, provenance: plain JSON data; `predicted` holds held-out figures. engines:
    placements of engines on the same machine, by name, as `cache` found them.
    """

    model: str
    gpu: str
    num_experts: int
    layer_ids: tuple[int, ...]
    slots: tuple[int, ...]
    pinned: tuple[tuple[int, ...], ...]
    policy: str = "lru"
    cpu: CpuMode = "none"
    cpu_layers: tuple[int, ...] = ()
    prefetch: Prefetch | None = None
    bits: tuple[tuple[int, ...], ...] | None = None
    nvme: tuple[tuple[int, ...], ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises FormatError for slots, experts or layers that are not the model's."""
        num = len(self.layer_ids)
        if len(self.slots) != num or len(self.pinned) != num:
            raise FormatError(
                f"{len(self.slots)} slots and {len(self.pinned)} pinned rows for {num} layers",
                _REMEDY,
            )
        if self.nvme and len(self.nvme) != num:
            raise FormatError(f"{len(self.nvme)} nvme rows for {num} layers", _REMEDY)
        for layer in range(num):
            for name, row in (("pinned", self.pinned[layer]), *self._nvme_row(layer)):
                if len(set(row)) != len(row) or any(not 0 <= e < self.num_experts for e in row):
                    raise FormatError(
                        f"{name}[{layer}] must hold distinct experts below {self.num_experts}",
                        _REMEDY,
                    )
            if not 0 <= self.slots[layer] + len(self.pinned[layer]) <= self.num_experts:
                raise FormatError(
                    f"layer {layer} has {self.slots[layer]} slots and {len(self.pinned[layer])}"
                    f" pinned experts, the model {self.num_experts} experts",
                    _REMEDY,
                )
        if not set(self.cpu_layers) <= set(self.layer_ids):
            raise FormatError("cpu_layers must be MoE layers of the model", _REMEDY)
        get_policy(self.policy)

    def _nvme_row(self, layer: int) -> list[tuple[str, tuple[int, ...]]]:
        return [("nvme", self.nvme[layer])] if self.nvme else []

    @property
    def num_slots(self) -> int:
        """Slots in all, pinned ones included."""
        return sum(self.slots) + sum(map(len, self.pinned))

    def pinned_mask(self) -> npt.NDArray[np.bool_]:
        """[L, E]: whether an expert is pinned."""
        return self._mask(self.pinned)

    def nvme_mask(self) -> npt.NDArray[np.bool_]:
        """[L, E]: whether an expert lives on NVMe."""
        return self._mask(self.nvme or ((),) * len(self.layer_ids))

    def _mask(self, rows: tuple[tuple[int, ...], ...]) -> npt.NDArray[np.bool_]:
        mask = np.zeros((len(self.layer_ids), self.num_experts), bool)
        for layer, row in enumerate(rows):
            mask[layer, list(row)] = True
        return mask

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as `Plan.cache` and cache plan files hold it."""
        prefetch = self.prefetch
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "gpu": self.gpu,
            "num_experts": self.num_experts,
            "layer_ids": list(self.layer_ids),
            "policy": self.policy,
            "slots": list(self.slots),
            "pinned": [list(row) for row in self.pinned],
            "cpu": self.cpu,
            "cpu_layers": list(self.cpu_layers),
            "prefetch": None
            if prefetch is None
            else {
                "predictor": prefetch.predictor,
                "depth": prefetch.depth,
                "width": prefetch.width,
                "min_score": prefetch.min_score,
            },
            "bits": None if self.bits is None else [list(row) for row in self.bits],
            "nvme": [list(row) for row in self.nvme],
            "memory": self.memory,
            "predicted": self.predicted,
            "provenance": self.provenance,
            **({"engines": self.engines} if self.engines else {}),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a cache plan file, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        rows = re.sub(r"\[\s+(-?\d[-\d,\s]*?)\s+\]", lambda m: _one_line(m[1]), text)
        atomic_write(path, rows + "\n")


def load_cache_plan(path: str | os.PathLike[str]) -> CachePlan:
    """Read a cache plan file, or the `cache` of a plan file. Raises InputError or FormatError."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise FormatError(f"{file}: larger than {MAX_BYTES} bytes", _REMEDY)
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read cache plan {file}: {error.strerror}", "give the file of moesim cache"
        ) from None
    except (ValueError, RecursionError):
        raise FormatError(f"{file}: not JSON", _REMEDY) from None
    if isinstance(raw, dict) and raw.get("format") == "moesim-plan":
        raw = raw.get("cache")
        if raw is None:
            raise FormatError(
                f"{file}: this plan has no cache", "make it with moesim cache or plan --offload"
            )
    try:
        return parse_cache_plan(raw)
    except FormatError as error:
        raise FormatError(f"{file}: {error.cause}", error.remedy) from None


def is_cache_plan(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a cache plan by itself; False as well for what cannot be read."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            return False
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def parse_cache_plan(raw: Any) -> CachePlan:
    """Build a CachePlan from parsed JSON; FormatError names the field that is wrong."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f'not a cache plan: format is not "{FORMAT}"', _REMEDY)
    if raw.get("version") != VERSION:
        raise FormatError(
            f"cache plan version {raw.get('version')!r}, this moesim reads {VERSION}", _REMEDY
        )
    layer_ids = _ints(raw.get("layer_ids"), "layer_ids")
    num_experts = raw.get("num_experts")
    if type(num_experts) is not int or not 1 <= num_experts < 1 << 15:
        raise FormatError("num_experts must be a whole number of at least 1", _REMEDY)
    if raw.get("cpu") not in get_args(CpuMode):
        raise FormatError(f"cpu must be one of {', '.join(get_args(CpuMode))}", _REMEDY)
    if not isinstance(raw.get("policy"), str):
        raise FormatError("policy must be a name", _REMEDY)
    bits = raw.get("bits")
    for name in ("memory", "predicted", "provenance", "engines"):
        if not isinstance(raw.get(name) or {}, dict):
            raise FormatError(f"{name} must be an object", _REMEDY)
    return CachePlan(
        model=str(raw.get("model", "")),
        gpu=str(raw.get("gpu", "")),
        num_experts=num_experts,
        layer_ids=layer_ids,
        slots=_ints(raw.get("slots"), "slots"),
        pinned=_rows(raw.get("pinned"), "pinned"),
        policy=raw["policy"],
        cpu=raw["cpu"],
        cpu_layers=_ints(raw.get("cpu_layers", []), "cpu_layers"),
        prefetch=_prefetch(raw.get("prefetch")),
        bits=None if bits is None else _rows(bits, "bits"),
        nvme=_rows(raw.get("nvme", []), "nvme"),
        memory=raw.get("memory") or {},
        predicted=raw.get("predicted") or {},
        provenance=raw.get("provenance") or {},
        engines=raw.get("engines") or {},
    )


def _one_line(numbers: str) -> str:
    return "[" + ", ".join(x.strip() for x in numbers.split(",")) + "]"


_REMEDY = "make it again with moesim cache; docs/offloading.md describes the format"


def _prefetch(raw: Any) -> Prefetch | None:
    if raw is None:
        return None
    if (
        not isinstance(raw, dict)
        or raw.get("predictor") not in get_args(Prefetcher)
        or any(type(raw.get(n)) is not int or not 1 <= raw[n] < 1 << 15 for n in ("depth", "width"))
    ):
        raise FormatError(
            "prefetch must be null or name a predictor, a depth and a width of at least 1", _REMEDY
        )
    least = raw.get("min_score", 0.0)
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < 1e6:
        raise FormatError("prefetch.min_score must be a number of at least 0", _REMEDY)
    return Prefetch(raw["predictor"], raw["depth"], raw["width"], float(least))


def _ints(raw: Any, name: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or any(type(x) is not int or not 0 <= x < 1 << 20 for x in raw):
        raise FormatError(f"{name} must be a list of whole numbers", _REMEDY)
    return tuple(raw)


def _rows(raw: Any, name: str) -> tuple[tuple[int, ...], ...]:
    if not isinstance(raw, list) or len(raw) > MAX_LAYERS:
        raise FormatError(f"{name} must be a list with a row for each layer", _REMEDY)
    return tuple(_ints(row, f"{name}[{i}]") for i, row in enumerate(raw))
