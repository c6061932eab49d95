"""Placements of engines on one machine, out of a cache plan, as the files that start them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesim.caching.plan import CachePlan, is_cache_plan, load_cache_plan
from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError, plain
from moesim.exporters.registry import exporter
from moesim.files import atomic_write
from moesim.offloading.engines import ENGINES, engine_name
from moesim.offloading.ktransformers import COUNTS_FILE
from moesim.offloading.torch_counts import torch_counts
from moesim.types import IntArray

SUFFIX = {name: ".json" if name == "accelerate" else ".sh" for name in ENGINES}
TITLE = {name: f"{name} on one's own machine, from moesim cache --out" for name in ENGINES}
_REMEDY = "make it again with moesim cache"


def suffix_of(file: str | Path, to: str) -> str:
    """How the name of the file for an engine ends: of a placement where `file` is a cache plan,
    else of an exporter's. Raises UnknownNameError."""
    if is_cache_plan(file):
        return SUFFIX[engine_name(to)]
    try:
        return exporter(to).SUFFIX
    except UnknownNameError:
        if to.casefold() not in {name.casefold() for name in ENGINES}:
            raise
    load_cache_plan(file)
    raise MismatchError(
        f"{file} is a plan, not the file of moesim cache that {to} is placed by",
        "make one with moesim cache --machine GPU+HOST --model MODEL --out cache.json",
    )


def write_placement(
    file: str | Path, to: str, out: Path, model: str | None, notify: Callable[[str], None]
) -> tuple[str, int, tuple[str, ...]]:
    """Write the engine's file; (engine, bytes, launch lines).

    A shell script of the launch lines, beside it the counts that KTransformers' frequency strategy
    reads, or accelerate's device_map. model: what the lines call it, MODEL where nothing says it.
    Raises InputError, FormatError, and MismatchError where the plan has no placement for the
    engine.
    """
    engine = engine_name(to)
    if out.suffix != SUFFIX[engine]:
        raise InputError(
            f"{engine} wants a file that ends in {SUFFIX[engine]}",
            f"name it {out.stem}{SUFFIX[engine]}",
        )
    plan = load_cache_plan(file)
    placement = _placement(plan, engine, str(file))
    lines = tuple(_named(line, model) for line in placement["launch"])
    if model is None and any("MODEL" in line for line in lines):
        notify("nothing says where the model is: put its file or folder in place of MODEL")
    counts = placement["files"].get(COUNTS_FILE)
    if counts is not None:
        beside = out.with_suffix(".pt")
        atomic_write(beside, torch_counts(_counts(counts, str(file))))
        notify(f"wrote {beside}: counts of every expert, which {out.name} hands to the engine")
        here = f'"$(dirname "$0")"/{shlex.quote(beside.name)}'
        lines = tuple(line.replace("STATISTICS.pt", here) for line in lines)
    if engine == "accelerate":
        text = placement["files"]["device_map.json"]
    else:
        speed = placement["decode_tokens_per_s"]
        head = (
            "#!/bin/sh",
            f"# {plain(plan.model)} on {plain(str(plan.provenance.get('machine', '')))}: predicted"
            f" {speed:.1f} tokens/s",
        )
        text = "\n".join([*head, *lines]) + "\n"
    atomic_write(out, text)
    return engine, len(text.encode()), lines


def _placement(plan: CachePlan, engine: str, where: str) -> dict[str, Any]:
    found = plan.engines.get(engine)
    if found is None:
        known = ", ".join(name for name in plan.engines if name in ENGINES) or "none"
        raise MismatchError(
            f"{where} has no placement for {engine}, it has {plain(known)}",
            f"make it with moesim cache, for one request and with engine {engine}",
        )
    if isinstance(found, dict) and found.get("problem"):
        raise MismatchError(
            f"{engine} does not run it: {plain(str(found['problem']), 400)}", "take another engine"
        )
    good = (
        isinstance(found, dict)
        and isinstance(found.get("launch"), list)
        and all(isinstance(line, str) and line.isprintable() for line in found["launch"])
        and isinstance(found.get("decode_tokens_per_s"), float)
        and isinstance(found.get("files"), dict)
        and (engine != "accelerate" or isinstance(found["files"].get("device_map.json"), str))
    )
    if not good:
        raise FormatError(f"{where}: the placement for {engine} is damaged", _REMEDY)
    return found


def _counts(text: Any, where: str) -> IntArray:
    """[layers, experts] as written into the plan; FormatError for anything else."""
    try:
        counts = np.array(json.loads(text), np.float64)
    except (TypeError, ValueError, RecursionError):
        counts = np.zeros(0)
    if counts.ndim != 2 or not ((counts >= 0) & (counts <= 1e6) & (counts % 1 == 0)).all():
        raise FormatError(f"{where}: the counts of experts are damaged", _REMEDY)
    return counts.astype(np.int64)


def _named(line: str, model: str | None) -> str:
    return line if model is None else line.replace("MODEL", shlex.quote(model))
