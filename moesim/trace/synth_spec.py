"""The specification of a synthetic trace, and its JSON form."""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError
from moesim.trace.format import MAX_EXPERTS, TraceMeta
from moesim.types import Array, FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]

FORMAT = "moesim-synth"
VERSION = 1
MAX_CELLS = 1 << 28
MAX_REQUEST_TOKENS = 1 << 22
_LOGIT_LIMIT = 200.0


@dataclass(frozen=True, slots=True, eq=False)
class SynthSpec:
    """What the generator draws from (see `synth_kernels.choose_experts` for the model).

    requests:          [N, 4] int64; domain, first position, prefill tokens, decode tokens of
                       requests to draw lengths and domains from.
    base:              [D, L, E] float32, score of an expert in a domain.
    type_logits:       [L, C, E] float32, score that the type of a token adds.
    type_share:        [D, C] float64, share of the types in a domain.
    type_concentration: how alike requests are in their mix of types (Dirichlet).
    type_persistence:  probability that a token has the type of the one before it.
    chain:             [L-1, E, E] float32, score that a chosen expert adds in the next layer.
    request_spread:    [L], standard deviation of a request's own score of an expert.
    noise_persistence: [L], probability that the noise of an expert stays from token to token.
    domains:           names; empty for a trace without domains (D is then 1).
    layers_per_pool:   so many adjacent layers choose from one set of experts.
    """

    model: str
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    requests: IntArray
    base: Float32Array
    type_logits: Float32Array
    type_share: FloatArray
    type_concentration: float
    type_persistence: float
    chain: Float32Array
    request_spread: FloatArray
    noise_persistence: FloatArray
    domains: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    layers_per_pool: int = 1

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    def to_json(self) -> str:
        """JSON text; arrays as zlib-compressed float16 or int64 in base64."""
        out: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            out[item.name] = _pack(value) if isinstance(value, np.ndarray) else value
        return json.dumps(out, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = "specification") -> SynthSpec:
        """Parse and check a specification; raises FormatError naming the field that is wrong."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError(f"{where}: not JSON", _REMEDY) from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise FormatError(f'{where}: does not say format "{FORMAT}"', _REMEDY)
        if raw.get("version") != VERSION:
            raise FormatError(f"{where}: version {raw.get('version')!r}, wanted {VERSION}", _REMEDY)
        values = {f.name: _field(raw, f.name, where) for f in fields(cls)}
        spec = cls(**values)
        _check(spec, where)
        return spec

    def meta(self) -> TraceMeta:
        """The meta of traces drawn from this specification."""
        return TraceMeta(
            model=self.model,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layer_ids=self.layer_ids,
            domains=self.domains,
            source={**self.source, "kind": "synthetic"},
            layers_per_pool=self.layers_per_pool,
        )


_REMEDY = "write it with moesim trace synth --save-spec"
_ARRAYS = {
    "requests": 2,
    "base": 3,
    "type_logits": 3,
    "type_share": 2,
    "chain": 3,
    "request_spread": 1,
    "noise_persistence": 1,
}
_TYPES = {"requests": np.int64, "base": np.float32, "type_logits": np.float32, "chain": np.float32}


def _pack(array: Array) -> dict[str, Any]:
    stored = array.astype("<i8" if array.dtype.kind == "i" else "<f2")
    data = zlib.compress(stored.tobytes(), 9)
    return {
        "shape": list(array.shape),
        "dtype": stored.dtype.str,
        "zlib": base64.b64encode(data).decode(),
    }


def _unpack(raw: Any, name: str, where: str) -> Array:
    bad = FormatError(f"{where}: {name} is not an array", _REMEDY)
    if not isinstance(raw, dict):
        raise bad
    shape, dtype, text = raw.get("shape"), raw.get("dtype"), raw.get("zlib")
    if (
        not isinstance(shape, list)
        or len(shape) != _ARRAYS[name]
        or any(type(n) is not int or not 0 <= n <= 1 << 24 for n in shape)
        or math.prod(shape) > MAX_CELLS
        or dtype != ("<i8" if name == "requests" else "<f2")
        or not isinstance(text, str)
    ):
        raise bad
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error):
        raise bad from None
    if len(data) != size:
        raise bad
    array = np.frombuffer(data, dtype).reshape(shape).astype(_TYPES.get(name, np.float64))
    if not np.isfinite(array).all() or (name != "requests" and np.abs(array).max(initial=0) > 1e4):
        raise FormatError(f"{where}: {name} has values out of range", _REMEDY)
    return array


def _field(raw: dict[str, Any], name: str, where: str) -> Any:
    value = raw.get(name, 1) if name == "layers_per_pool" else raw.get(name)
    if name in _ARRAYS:
        return _unpack(value, name, where)
    wanted: dict[str, bool] = {
        "model": isinstance(value, str),
        "num_experts": type(value) is int and 1 <= value <= MAX_EXPERTS,
        "top_k": type(value) is int and 1 <= value <= MAX_EXPERTS,
        "layer_ids": isinstance(value, list)
        and 0 < len(value) <= 4096
        and all(type(x) is int and 0 <= x < 1 << 20 for x in value)
        and len(set(value)) == len(value),
        "type_concentration": _in_range(value, 0, 1e12),
        "type_persistence": _in_range(value, 0, 1),
        "domains": isinstance(value, list)
        and len(value) < 1 << 15
        and all(isinstance(x, str) for x in value),
        "source": isinstance(value, dict),
        "layers_per_pool": type(value) is int and value >= 1,
    }
    if not wanted[name]:
        raise FormatError(f"{where}: {name} is missing or out of range", _REMEDY)
    return tuple(value) if isinstance(value, list) else value


def _in_range(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _check(spec: SynthSpec, where: str) -> None:
    layers, experts = spec.num_layers, spec.num_experts
    num_domains, num_types = max(1, len(spec.domains)), spec.type_share.shape[-1]
    shapes: dict[str, tuple[int, ...]] = {
        "requests": (len(spec.requests), 4),
        "base": (num_domains, layers, experts),
        "type_logits": (layers, num_types, experts),
        "type_share": (num_domains, num_types),
        "chain": (layers - 1, experts, experts),
        "request_spread": (layers,),
        "noise_persistence": (layers,),
    }
    for name, shape in shapes.items():
        if getattr(spec, name).shape != shape:
            raise FormatError(
                f"{where}: {name} has shape {getattr(spec, name).shape}, wanted {shape}", _REMEDY
            )
    requests = spec.requests
    if (
        spec.top_k > experts
        or layers % spec.layers_per_pool
        or num_types == 0
        or not len(requests)
        or requests.min() < 0
        or requests[:, 0].max() >= num_domains
        or requests[:, 1:].max() > MAX_REQUEST_TOKENS
        or (requests[:, 2] + requests[:, 3]).min() < 1
        or spec.type_share.min() < 0
        or (spec.type_share.sum(axis=1) <= 0).any()
        or not 0 <= spec.noise_persistence.min() <= spec.noise_persistence.max() <= 1
        or any(
            np.abs(getattr(spec, n)).max(initial=0) > _LOGIT_LIMIT
            for n in ("base", "type_logits", "chain", "request_spread")
        )
    ):
        raise FormatError(f"{where}: values that contradict each other", _REMEDY)
