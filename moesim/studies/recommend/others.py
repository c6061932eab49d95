"""What else would serve it: the same question with another precision, speculation, redundant
experts, or experts on GPUs of their own. None is chosen unasked, since each changes what the model
computes, or rests on an assumption that the user can check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from moesim.errors import InputError
from moesim.model.checkpoints import published
from moesim.model.dtypes import WEIGHT_BYTES
from moesim.model.names import load_model
from moesim.serving.moe_load import ASSUMED_SKEW
from moesim.serving.speculative import Speculation
from moesim.studies.recommend.layouts import Bench, Tried
from moesim.studies.recommend.search import Searched, cheapest, fastest
from moesim.studies.recommend.shapes import Place, sized
from moesim.types import Progress

RESOLUTION = 0.01
"""Shares of a rate that the search tells apart."""
ACCEPTANCE = 0.85
ACCEPTED = (
    "acceptance 0.85 is assumed, the low end of what DeepSeek-V3's report gives for its second"
    " token (arXiv:2412.19437, section 5.4.3)"
)
"""Cited from others who quote that section; the report itself was not at hand."""


@dataclass(frozen=True, slots=True)
class Other:
    """name: what differs. ask: the options that make it the question itself, "" where there are
    none. rests_on: what a user should know before choosing it."""

    name: str
    ask: str
    rests_on: str
    place: Place


def mtp(place: Place, acceptance: float, drafts: int) -> Speculation:
    """Speculation by the model's own layers for further tokens, always `drafts`. Raises InputError
    where it has none."""
    if not place.model.mtp_layers:
        raise InputError(
            f"`speculate`: {place.model.name} has no layers that predict further tokens",
            "leave it out; `moesim serve --speculate` simulates a draft model",
        )
    return Speculation(acceptance, drafts, draft_share=0.0, fixed=True)


def others(place: Place, experts_apart: bool) -> Iterator[Other]:
    """All that differ from `place` in one thing, or in what one checkpoint holds."""
    gpus = [sized(name, 1).gpus[0] for name in place.clusters]
    formats = {name for name in ("fp8", "fp4") if all(name in gpu.tflops for gpu in gpus)}
    kept = place.options["kv_dtype"]
    if kept == "bf16" and "fp8" in formats:
        yield Other(
            "KV cache in fp8",
            "--kv-dtype fp8",
            "it changes what the model computes: test its answers",
            _with(place, kv_dtype="fp8"),
        )
    own = WEIGHT_BYTES[place.model.expert_dtype]
    for one in published(place.model.name) if place.options["expert_dtype"] is None else ():
        narrow = "fp8" if one.expert_dtype == "fp8" else "fp4"
        if narrow not in formats or WEIGHT_BYTES[one.expert_dtype] >= own:
            continue
        kv = one.kv_dtype or kept
        yield Other(
            f"checkpoint {one.name}, experts {one.expert_dtype}, KV {kv}",
            f"--model {one.name}" + (f" --kv-dtype {kv}" if kv != kept else ""),
            f"published by {one.publisher}: test its answers",
            replace(_with(place, kv_dtype=kv), model=load_model(one.name)),
        )
    if place.model.mtp_layers and place.speculation is None:
        drafted = mtp(place, ACCEPTANCE, 1)
        yield Other(
            "speculation with the model's MTP layer",
            f"--speculate {ACCEPTANCE}",
            ACCEPTED,
            replace(place, speculation=drafted),
        )
    if not place.redundancy:
        yield Other(
            "a redundant expert per GPU, placed by EPLB",
            "--redundant-experts",
            f"popularity of experts is assumed, rank r in proportion to r**-{ASSUMED_SKEW:g};"
            " --trace says how uneven they are",
            replace(place, redundancy=True),
        )
    if experts_apart:
        yield Other(
            "decoding with experts on GPUs of their own",
            "",
            f"no release of {place.engine} runs it; prompts are computed in engines of their own",
            replace(place, apart=True),
        )


def _with(place: Place, **options: Any) -> Place:
    return replace(place, options={**place.options, **options})


def best_of(
    own: Bench,
    base: Bench,
    best: Tried,
    max_gpus: int,
    maximize: bool,
    progress: Progress | None = None,
) -> Tried | None:
    """The best layout of another, `own`, where it is of fewer GPUs (or dollars an hour, of two
    types), or serves more requests/s, than `best`, the answer of `base`; None where none is."""
    if maximize:
        floor = best.rate * (1 + RESOLUTION)
        found = fastest(own, max_gpus, Searched(), progress, keep=1, above=floor)
    else:
        limit = own.size(best.layout) if best.kept else inf
        found = cheapest(own, max_gpus, Searched(), progress, keep=1, below=limit)
    if not found or not found[0].kept:
        return None
    layout = found[0].layout
    parts = [layout.front] if layout.back is None else [layout.front, layout.back]
    asked_anyway = base.place.redundancy or not own.place.redundancy
    return found[0] if asked_anyway or any(part.redundant for part in parts) else None
