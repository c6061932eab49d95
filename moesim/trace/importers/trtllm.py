"""TensorRT-LLM's `expert_statistic` folders.

With `EXPERT_STATISTIC_ITER_RANGE=A-B` every rank writes `rankN.safetensors` with one tensor
`ITERATION_LAYER` [experts] of token counts for each iteration and absolute layer; rank 0 adds
`meta_info.json` with `num_experts` and `num_experts_per_token`. Counts are of logical experts and
are summed over ranks: a load trace with one step an iteration. Where `rankN_raw.safetensors` are
there too, their tensors `ITERATION_LAYER` [tokens, K] hold each token's experts, and the result is
a token trace instead. Those files do not say which tokens form a request: the tokens of one
iteration on one rank are taken as one request, so decode batches drawn from it mean little.

Source: NVIDIA/TensorRT-LLM@0fccc5b (tensorrt_llm/_torch/expert_statistic.py) and @7ce477f
(examples/wide_ep/ep_load_balancer/utils.py). Ignored: `rankN_numtokens.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError
from moesim.safetensors_file import SafetensorsFile, open_safetensors
from moesim.trace.format import MAX_EXPERTS, LoadTrace, Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field, unknown_phases
from moesim.trace.importers.build import Segment, assemble, assemble_load
from moesim.trace.importers.layers import file_layers
from moesim.trace.importers.ranks import Copies, without_ranks
from moesim.trace.importers.records import parse_json

NAME = "tensorrt-llm"
TITLE = "TensorRT-LLM expert_statistic folders (rank*.safetensors with meta_info.json)"
_RANK = re.compile(r"rank(\d{1,6})(_raw)?\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,6})")

Counts = dict[tuple[int, int], npt.NDArray[np.int64]]


def detect(path: Path) -> bool:
    """A folder with `meta_info.json` and rank files."""
    return (
        path.is_dir()
        and (path / "meta_info.json").is_file()
        and any(path.glob("rank*.safetensors"))
    )


def read(paths: Sequence[Path], options: ImportOptions) -> Trace | LoadTrace:
    """One folder after another."""
    source: dict[str, Any] = {"format": NAME, "files": [p.name for p in paths]}
    metas = [_meta(path) for path in paths]
    for path in paths:
        _note_missing_ranks(path, options)
    if len(set(metas)) > 1:
        raise FormatError(
            f"{paths[1]}: meta_info.json differs from that of {paths[0]}",
            "import runs of different models apart",
        )
    num_experts, top_k = metas[0]
    if options.num_experts not in (None, num_experts):
        raise FormatError(
            f"{paths[0]}: meta_info.json: num_experts is {num_experts}, the model has"
            f" {options.num_experts}",
            "name the model that was recorded",
        )
    raw = [_rank_files(path, raw=True) for path in paths]
    if all(raw):
        segments: list[Segment] = []
        for path, files in zip(paths, raw, strict=True):
            segments += _tokens(path, files, top_k, len(segments), options)
        layers = _layers(paths[0], raw[0][0][1])
        file_layers(layers, options, str(paths[0]))
        options.notify(
            "expert_statistic does not name requests: each iteration of a rank is one request"
        )
        return assemble(segments, _with_layers(options, layers, num_experts), source)
    layers = ()
    parts = []
    for path in paths:
        counts = _counts(path, num_experts)
        iterations = sorted({key[0] for key in counts})
        found = tuple(sorted({key[1] for key in counts}))
        layers = layers or found
        if found != layers:
            raise FormatError(
                f"{path}: has layers {_short(found)}, {paths[0]} {_short(layers)}", DAMAGED
            )
        parts.append(_stack(path, counts, iterations, layers, num_experts))
    return assemble_load(
        np.concatenate(parts), options, source, str(paths[0]), layer_ids=layers, top_k=top_k
    )


def _meta(path: Path) -> tuple[int, int]:
    file = path / "meta_info.json"
    try:
        meta = parse_json(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise FormatError(f"{file}: not UTF-8 text", DAMAGED) from None
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}",
            "name the folder that EXPERT_STATISTIC_PATH named",
        ) from None
    out = []
    for name in ("num_experts", "num_experts_per_token"):
        value = meta.get(name) if isinstance(meta, dict) else None
        if type(value) is not int or not 1 <= value <= MAX_EXPERTS:
            raise bad_field(str(file), name, f"a whole number from 1 to {MAX_EXPERTS}")
        out.append(value)
    if out[1] > out[0]:
        raise bad_field(str(file), "num_experts_per_token", f"at most num_experts ({out[0]})")
    return out[0], out[1]


def _rank_files(path: Path, raw: bool) -> list[tuple[int, SafetensorsFile]]:
    """(rank, file) in order of rank."""
    found = []
    for file in path.glob("rank*.safetensors"):
        match = _RANK.fullmatch(file.name)
        if match and bool(match[2]) == raw:
            found.append((int(match[1]), file))
    return [(rank, open_safetensors(file)) for rank, file in sorted(found)]


def _note_missing_ranks(path: Path, options: ImportOptions) -> None:
    """Ranks count their own tokens, so a load without one of them is not that of the group."""
    found = {int(m[1]) for file in path.iterdir() if (m := _RANK.fullmatch(file.name))}
    missing = [rank for rank in range(max(found, default=0)) if rank not in found]
    if missing:
        shown = ", ".join(map(str, missing[:8]))
        options.notify(f"{path}: has no file of rank {shown}: their tokens are not counted")


def _keys(file: SafetensorsFile) -> list[tuple[int, int, str]]:
    """(iteration, layer, name) of each tensor."""
    out = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match:
            raise FormatError(
                f"{file.path}: tensor {name:.80}: is not named ITERATION_LAYER", DAMAGED
            )
        out.append((int(match[1]), int(match[2]), name))
    return sorted(out)


def _counts(path: Path, num_experts: int) -> Counts:
    """Counts [E] by (iteration, layer), summed over ranks."""
    counts: Counts = {}
    files = _rank_files(path, raw=False)
    if not files:
        raise FormatError(f"{path}: has no rank*.safetensors", "name the folder with rank files")
    for _, file in files:
        for iteration, layer, name in _keys(file):
            data = file.integers(name)
            if data.shape != (num_experts,):
                raise FormatError(
                    f"{file.path}: tensor {name}: has shape {data.shape}, wanted ({num_experts},)",
                    DAMAGED,
                )
            if data.min() < 0:
                expert = int(np.argmax(data < 0))
                raise FormatError(
                    f"{file.path}: tensor {name}: expert {expert}: negative count", DAMAGED
                )
            key = (iteration, layer)
            counts[key] = counts[key] + data if key in counts else data
    return counts


def _stack(
    path: Path, counts: Counts, iterations: list[int], layers: tuple[int, ...], num_experts: int
) -> npt.NDArray[np.int64]:
    out = np.zeros((len(iterations), len(layers), num_experts), np.int64)
    for i, iteration in enumerate(iterations):
        for j, layer in enumerate(layers):
            if (iteration, layer) not in counts:
                raise FormatError(
                    f"{path}: iteration {iteration} has no layer {layer} on any rank", DAMAGED
                )
            out[i, j] = counts[iteration, layer]
    return out


def _layers(path: Path, file: SafetensorsFile) -> tuple[int, ...]:
    layers = tuple(sorted({layer for _, layer, _ in _keys(file)}))
    if not layers:
        raise FormatError(f"{file.path}: has no tensors", DAMAGED)
    return layers


def _tokens(
    path: Path,
    files: list[tuple[int, SafetensorsFile]],
    top_k: int,
    num_before: int,
    options: ImportOptions,
) -> list[Segment]:
    layers = _layers(path, files[0][1])
    segments: list[Segment] = []
    copies = Copies()
    for rank, file in files:
        by_iteration: dict[int, dict[int, npt.NDArray[np.int64]]] = {}
        for iteration, layer, name in _keys(file):
            data = file.integers(name)
            if data.ndim != 2 or data.shape[1] != top_k:
                raise FormatError(
                    f"{file.path}: tensor {name}: has shape {data.shape}, wanted [tokens, {top_k}]",
                    DAMAGED,
                )
            by_iteration.setdefault(iteration, {})[layer] = data
        for iteration, tables in sorted(by_iteration.items()):
            if tuple(sorted(tables)) != layers or len({t.shape for t in tables.values()}) > 1:
                raise FormatError(
                    f"{file.path}: iteration {iteration}: not every layer has the same tokens",
                    DAMAGED,
                )
            ids = np.stack([tables[layer] for layer in layers], axis=1)
            count = len(ids)
            if count and copies.is_copy(iteration, rank, ids):
                continue
            segments.append(
                Segment(
                    ids,
                    f"{file.path}: iteration {iteration}",
                    num_before + len(segments),
                    np.arange(count),
                    unknown_phases(count, options),
                    step_ids=np.full(count, iteration),
                    rank_ids=np.full(count, rank),
                )
            )
    copies.report(options)
    return without_ranks(segments) if copies.count else segments


def _with_layers(
    options: ImportOptions, layers: tuple[int, ...], num_experts: int
) -> ImportOptions:
    return replace(options, layer_ids=layers, num_experts=num_experts)


def _short(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}..{layers[-1]} ({len(layers)})" if layers else "none"
