"""The trace format, version 1: types, validation, reading and writing.

A trace is an `.npz` file or, when larger than memory, a directory of the same arrays as `.npy`
files (memory-mapped) with `meta.json`. Only numpy is imported, so that the replay can read traces
inside a serving engine's container. No pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, MismatchError, plain
from moesim.files import atomic_directory, atomic_path, atomic_write
from moesim.trace import candidates, checks
from moesim.trace.checks import DECODE as DECODE
from moesim.trace.checks import PREFILL as PREFILL
from moesim.trace.checks import TOKEN_DTYPES as TOKEN_DTYPES
from moesim.trace.npyio import REMEDY as _REMEDY
from moesim.trace.npyio import drop_pages as drop_pages
from moesim.trace.npyio import iter_chunks as iter_chunks
from moesim.trace.npyio import map_npy, read_archive
from moesim.trace.npyio import read_npy as read_npy
from moesim.types import Array as Array

FORMAT = "moesim-trace"
OTHER_TEXT = (".csv", ".tsv", ".json", ".jsonl")
VERSION = 1
MAX_EXPERTS = 32_767


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """What a trace says of itself.

    `layer_ids` are absolute layer numbers of the MoE layers, in the order of axis L; `domains`
    names the values of `domain_ids`; `source` is free-form provenance. layers_per_pool: so many
    adjacent layers choose from one set of experts (`trace.pools`).
    """

    model: str
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    domains: tuple[str, ...] = ()
    license: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    layers_per_pool: int = 1

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    def to_json(self) -> str:
        pools = {"layers_per_pool": self.layers_per_pool} if self.layers_per_pool > 1 else {}
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": self.model,
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "layer_ids": list(self.layer_ids),
                "domains": list(self.domains),
                "license": self.license,
                "source": self.source,
                **pools,
            },
            ensure_ascii=False,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A token-level routing trace.

    expert_ids:   [T, L, K] uint8, uint16 or int16; logical ids, -1 where a token chose fewer.
    request_ids, positions: [T] int32; position of the token within its request.
    phases:       [T] uint8; 0 prefill, 1 decode.
    gate_weights: [T, L, K] float16 or float32, optional.
    candidate_ids, candidate_scores: [T, L, M], as in `trace.candidates`, optional.
    token_ids, domain_ids, step_ids, rank_ids: [T], optional.
    """

    expert_ids: Array
    request_ids: Array
    positions: Array
    phases: Array
    meta: TraceMeta
    gate_weights: Array | None = None
    candidate_ids: Array | None = None
    candidate_scores: Array | None = None
    token_ids: Array | None = None
    domain_ids: Array | None = None
    step_ids: Array | None = None
    rank_ids: Array | None = None
    path: str = ""

    def __repr__(self) -> str:
        meta = self.meta
        return (
            f"<Trace: {plain(meta.model) or 'unnamed model'}, {self.num_tokens:,} tokens,"
            f" {meta.num_layers} MoE layers, top-{meta.top_k} of {meta.num_experts} experts>"
        )

    @property
    def num_tokens(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def num_experts(self) -> int:
        return self.meta.num_experts

    @property
    def num_candidates(self) -> int:
        """M, or 0 without candidates."""
        return 0 if self.candidate_ids is None else int(self.candidate_ids.shape[2])

    def arrays(self) -> dict[str, Array]:
        """The arrays that are present, by name, in file order."""
        names = (*candidates.LAYER_ARRAYS, *TOKEN_DTYPES)
        return {n: a for n in names if (a := getattr(self, n)) is not None}

    def take(self, token_idx: npt.NDArray[np.int64] | slice) -> Trace:
        """The trace restricted to the given tokens, in the given order."""
        picked = {n: np.asarray(a[token_idx]) for n, a in self.arrays().items()}
        return Trace(meta=self.meta, path=self.path, **picked)

    def content_hash(self) -> str:
        """sha256 over meta and arrays, chunk by chunk; the same for npz and directory."""
        return _content_hash(self.meta, self.arrays())


@dataclass(frozen=True, slots=True, eq=False)
class LoadTrace:
    """Expert counts only: `expert_load` [S, L, E] int64, S steps or workloads."""

    expert_load: Array
    meta: TraceMeta
    path: str = ""

    def __repr__(self) -> str:
        steps, layers, experts = self.expert_load.shape
        name = plain(self.meta.model) or "unnamed model"
        return f"<LoadTrace: {name}, {steps:,} steps, {layers} MoE layers, {experts} experts>"

    def content_hash(self) -> str:
        """sha256 over meta and counts."""
        return _content_hash(self.meta, {"expert_load": self.expert_load})


def _content_hash(meta: TraceMeta, arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256(meta.to_json().encode(errors="surrogatepass"))
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        for chunk in _chunks(array):
            digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


def load_trace(source: str | os.PathLike[str], *, validate: bool = True) -> Trace | LoadTrace:
    """Read a trace file, trace directory, or bundled sample (`sample:NAME`).

    Raises InputError when there is no such trace, FormatError when its content is not version 1
    of the format. `validate=False` skips the pass over the expert ids (shapes and types are
    always checked).
    """
    path = _resolve(source)
    if path.suffix.lower() in OTHER_TEXT:
        raise InputError(
            f"{path}: a routing trace is a .npz file or a folder, not {path.suffix}",
            "a request log goes to moesim serve --requests; a dump of routing through moesim trace"
            " import first",
        )
    if path.is_dir():
        raw = _read_directory(path)
    else:
        raw = _read_npz(path)
    meta = parse_meta(raw.pop("meta"), str(path))
    if "expert_load" in raw:
        return _build_load_trace(raw, meta, str(path))
    trace = _build_trace(raw, meta, str(path))
    if validate:
        checks.check_values(trace.arrays(), meta.num_experts, len(meta.domains), str(path))
    return trace


def require_tokens(trace: Trace | LoadTrace, needed_by: str) -> Trace:
    """Return `trace` if it is token-level; otherwise raise MismatchError naming what needs it."""
    if isinstance(trace, LoadTrace):
        raise MismatchError(
            f"{needed_by} needs token-level routing, but {trace.path or 'this trace'} is a load"
            " trace (expert counts only)",
            "give a trace with expert_ids, or use a command that works on counts",
        )
    return trace


def load_token_trace(source: str | os.PathLike[str], needed_by: str) -> Trace:
    """`load_trace` followed by `require_tokens`; an empty trace is refused as well."""
    trace = require_tokens(load_trace(source), needed_by)
    if trace.num_tokens == 0:
        raise FormatError(f"{trace.path}: the trace has no tokens", "capture or import some")
    return trace


def save_trace(trace: Trace | LoadTrace, path: str | os.PathLike[str]) -> None:
    """Write `trace` as compressed `.npz`, or as a directory when `path` has no `.npz` suffix.

    Files appear complete or not at all; an existing directory is refused.
    """
    target = Path(path)
    arrays = trace.arrays() if isinstance(trace, Trace) else {"expert_load": trace.expert_load}
    if target.suffix == ".npz":
        with atomic_path(target) as temporary, temporary.open("wb") as out:
            np.savez_compressed(
                out, allow_pickle=False, meta=np.array(trace.meta.to_json()), **arrays
            )
        return
    with atomic_directory(target) as temporary_dir:
        for name, array in arrays.items():
            np.save(temporary_dir / f"{name}.npy", array, allow_pickle=False)
        atomic_write(temporary_dir / "meta.json", trace.meta.to_json())


def sample_names() -> list[str]:
    """Names of the bundled traces, as accepted after `sample:`."""
    from importlib.resources import files

    return sorted(
        entry.name[: -len(".npz")]
        for entry in files("moesim.traces").iterdir()
        if entry.name.endswith(".npz")
    )


def parse_meta(text: str, where: str) -> TraceMeta:
    """Parse and check the JSON text of `meta`; FormatError names the field that is wrong."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: meta is not JSON", _REMEDY) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f'{where}: meta does not say format "{FORMAT}"', _REMEDY)
    if raw.get("version") != VERSION:
        raise FormatError(
            f"{where}: trace version {raw.get('version')!r}, this moesim reads {VERSION}",
            "write the trace again with this version",
        )

    def bad(name: str, want: str) -> FormatError:
        return FormatError(f"{where}: meta.{name} must be {want}", _REMEDY)

    counts = {}
    for name in ("num_experts", "top_k"):
        value = raw.get(name)
        if type(value) is not int or not 1 <= value <= MAX_EXPERTS:
            raise bad(name, f"a whole number from 1 to {MAX_EXPERTS}")
        counts[name] = value
    if counts["top_k"] > counts["num_experts"]:
        raise bad("top_k", f"at most num_experts ({counts['num_experts']})")
    layers = raw.get("layer_ids")
    if (
        not isinstance(layers, list)
        or not layers
        or any(type(x) is not int or not 0 <= x < 1 << 20 for x in layers)
        or len(set(layers)) != len(layers)
    ):
        raise bad("layer_ids", "a list of distinct layer numbers")
    domains = raw.get("domains") or []
    if not isinstance(domains, list) or any(type(x) is not str for x in domains):
        raise bad("domains", "a list of names")
    source = raw.get("source") or {}
    if not isinstance(raw.get("model", ""), str) or not isinstance(raw.get("license", ""), str):
        raise bad("model and meta.license", "text")
    pool = raw.get("layers_per_pool", 1)
    if type(pool) is not int or pool < 1 or len(layers) % pool:
        raise bad("layers_per_pool", f"a whole number that divides the {len(layers)} layers")
    return TraceMeta(
        model=raw.get("model", ""),
        num_experts=counts["num_experts"],
        top_k=counts["top_k"],
        layer_ids=tuple(layers),
        domains=tuple(domains),
        license=raw.get("license", ""),
        source=source if isinstance(source, dict) else {"note": str(source)},
        layers_per_pool=pool,
    )


def _chunks(array: Array) -> Iterator[Array]:
    for part in iter_chunks(array.shape[0]):
        yield array[part]
        drop_pages(array)


def _resolve(source: str | os.PathLike[str]) -> Path:
    text = os.fspath(source)
    if text.startswith("sample:"):
        from importlib.resources import files

        from moesim.errors import UnknownNameError

        name = text[len("sample:") :]
        if name not in sample_names():
            raise UnknownNameError("sample trace", name, sample_names())
        return Path(str(files("moesim.traces").joinpath(f"{name}.npz")))
    path = Path(text)
    try:
        found = path.exists()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise InputError(
            f"no trace at {text:.300}", "give an .npz file, a trace directory, or sample:NAME"
        )
    return path


def _read_npz(path: Path) -> dict[str, Any]:
    known = {*candidates.LAYER_ARRAYS, "expert_load", "meta", *TOKEN_DTYPES}

    def check(announced: dict[str, Array]) -> None:
        if "meta" not in announced:
            raise FormatError(f"{path}: there is no array called meta", _REMEDY)
        meta = parse_meta(str(announced["meta"]), str(path))
        shapes = {name: array for name, array in announced.items() if name != "meta"}
        if "expert_load" in shapes:
            checks.check_load(shapes, (meta.num_layers, meta.num_experts), str(path))
        else:
            _build_trace(shapes, meta, str(path))

    raw: dict[str, Any] = read_archive(path, known, check)
    raw["meta"] = str(raw["meta"])
    return raw


def _read_directory(path: Path) -> dict[str, Any]:
    meta = path / "meta.json"
    if not meta.is_file():
        raise FormatError(f"{path}: there is no meta.json in this directory", _REMEDY)
    try:
        raw: dict[str, Any] = {"meta": meta.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{meta}: not readable text ({error})", _REMEDY) from None
    for name in (*candidates.LAYER_ARRAYS, "expert_load", *TOKEN_DTYPES):
        file = path / f"{name}.npy"
        if file.exists():
            raw[name] = map_npy(file)
    return raw


def _build_load_trace(raw: dict[str, Any], meta: TraceMeta, where: str) -> LoadTrace:
    checks.check_load(raw, (meta.num_layers, meta.num_experts), where)
    if raw["expert_load"].min() < 0:
        raise FormatError(f"{where}: expert_load has negative counts", _REMEDY)
    return LoadTrace(raw["expert_load"], meta, where)


def _build_trace(raw: dict[str, Any], meta: TraceMeta, where: str) -> Trace:
    arrays = checks.check_arrays(raw, (meta.num_layers, meta.top_k, meta.num_experts), where)
    return Trace(meta=meta, path=where, **arrays)
