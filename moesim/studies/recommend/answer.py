"""One answer as plain data: the options, what binds, how firm it is, what was searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any

from moesim.cost.curves import weakest
from moesim.errors import InfeasibleError
from moesim.figures import LATENCIES, count
from moesim.studies.recommend.firm import firmness, one_fewer
from moesim.studies.recommend.layouts import Bench, Layout, Tried
from moesim.studies.recommend.others import Other, best_of
from moesim.studies.recommend.search import Searched, cheapest, fastest
from moesim.studies.recommend.shapes import Place, Shape
from moesim.types import Progress

SHOWN = tuple(f"{name}_{stat}" for name in LATENCIES for stat in ("p50", "p99"))
FIGURES = (*SHOWN, "kv_used_peak", "decode_kv_used_peak", "gpu_utilisation")
BOUND_BY = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "e2e": "end-to-end time",
}


def answer(
    bench: Bench,
    max_gpus: int,
    *,
    named: Mapping[str, str | None],
    maximize: bool,
    also: Sequence[Other] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The answer of one model on one type of GPU with one engine.

    named: how the question names model, engine and trace. also: what is searched beside it.

    Raises InfeasibleError where the model fits no engine of `max_gpus` GPUs at all.
    """
    searched = Searched()
    search = fastest if maximize else cheapest
    options = search(bench, max_gpus, searched, _part(progress, 0, 1 + len(also)))
    if not options:
        reasons = "; ".join(f"{cause} ({n})" for cause, n in searched.skipped.most_common(3))
        if searched.least_gpus is not None:
            reasons = f"closed forms need {searched.least_gpus:,} GPUs or more"
        raise InfeasibleError(
            f"{bench.place.model.name} on up to {count(max_gpus, 'GPU')} of {bench.place.cluster}:"
            f" no layout can serve this ({reasons})",
            "promise less, allow more GPUs, or name narrower `expert_dtype` or `kv_dtype`",
        )
    best = options[0]
    kept = best.kept
    firm = firmness(bench, best, max_gpus) if kept and not maximize else None
    fewer = one_fewer(bench, best, best.rate) if kept else None
    also_found = [
        _other(bench, one, best, max_gpus, maximize, _part(progress, i, 1 + len(also)))
        for i, one in enumerate(also, start=1)
    ]
    return {
        "model": bench.place.model.name,
        "cluster": bench.place.cluster,
        "decode_cluster": bench.place.decode_cluster,
        "gpu": _gpus(bench, best.layout),
        "engine": bench.place.engine,
        **named,
        "kept": kept,
        "options": [_option(bench, tried) for tried in options],
        "binds": _binds(best),
        "fewer": None if fewer is None else _option(bench, fewer),
        "firm": None if firm is None else firm.to_json(),
        "tried": [_point(tried) for tried in bench.tried],
        "searched": {
            "shapes": searched.shapes,
            "families": searched.families,
            "simulated": searched.simulated,
            "skipped": dict(searched.skipped.most_common()),
        },
        "also": also_found,
        "speculation": _drafts(bench.place),
        "prices": dict(bench.prices.used),
        "basis": weakest(*(tried.basis for tried in options)),
        "notes": list(best.notes),
    }


def _other(
    bench: Bench,
    other: Other,
    best: Tried,
    max_gpus: int,
    maximize: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """What is said of another: its best layout where that is better than the answer."""
    own = Bench(other.place, bench.need, bench.prices)
    found = best_of(own, bench, best, max_gpus, maximize, progress)
    return {
        "name": other.name,
        "ask": other.ask,
        "rests_on": other.rests_on,
        "option": None if found is None else _option(own, found),
    }


def _gpus(bench: Bench, layout: Layout) -> str:
    """Type of GPU, or the two with a slash: "h200-sxm/h100-sxm"."""
    parts = [layout.front] if layout.back is None else [layout.front, layout.back]
    return "/".join(dict.fromkeys(bench.engine(part)[0].gpu.name for part in parts))


def _drafts(place: Place) -> dict[str, Any] | None:
    spec = place.speculation
    return None if spec is None else {"acceptance": spec.acceptance, "drafts": spec.max_drafts}


def _part(progress: Progress | None, i: int, parts: int) -> Progress | None:
    """Progress over all parts of what one counts, each taken as long."""
    if progress is None:
        return None
    return lambda done, total: progress(i * max(total, 1) + done, parts * max(total, 1))


def _option(bench: Bench, tried: Tried) -> dict[str, Any]:
    layout, need = tried.layout, bench.need
    back = layout.back
    roles = {"serving" if back is None else "prefill": (layout.front, layout.replicas)}
    if back is not None:
        roles["decode"] = (back, layout.back_replicas)
    dollars = {}
    for name, (shape, engines) in roles.items():
        one = bench.per_hour(shape)
        dollars[name] = None if one is None else one * engines
    total = None if None in dollars.values() else sum(d for d in dollars.values() if d)
    tokens = tried.rate * need.output * 3600 / 1e6
    return {
        "layout": layout.name,
        "num_gpus": layout.num_gpus,
        "requests_per_s": tried.rate,
        "output_tokens_per_s_per_gpu": tried.rate * need.output / layout.num_gpus,
        "roles": {
            name: {"engines": engines, **_shape(bench, shape)}
            for name, (shape, engines) in roles.items()
        },
        "usd_per_hour": total,
        "usd_per_million_output_tokens": None if total is None else total / tokens,
        "split_usd": _split_usd(dollars, tried, bench) if back is not None else None,
        "promises": {name: _finite(ratio) for name, ratio in tried.ratios.items()},
        "kept": tried.kept,
        "overloaded": tried.overloaded,
        "figures": {name: tried.figures[name] for name in FIGURES if name in tried.figures},
    }


def _split_usd(
    dollars: Mapping[str, float | None], tried: Tried, bench: Bench
) -> dict[str, float] | None:
    """Dollars per million input tokens of the engines for prompts, and per million output tokens of
    those that decode."""
    prefill, decode = dollars["prefill"], dollars["decode"]
    if prefill is None or decode is None:
        return None
    million = tried.rate * 3600 / 1e6
    return {
        "usd_per_million_input_tokens": prefill / (million * bench.need.prompt),
        "usd_per_million_output_tokens": decode / (million * bench.need.output),
    }


def _shape(bench: Bench, shape: Shape) -> dict[str, Any]:
    made = bench.engine(shape)[0]
    names = ("tp", "dp", "pp", "ep", "moe_tp", "moe_comm", "expert_dtype", "kv_dtype")
    more = ("max_batch_tokens", "max_sequences", "memory_fraction", "two_batch_overlap")
    own = {
        "gpus": shape.num_gpus,
        "gpu": made.gpu_names,
        "expert_gpus": shape.expert_gpus,
        "redundant_experts": shape.redundant,
    }
    return own | {name: getattr(made, name) for name in (*names, *more)}


def _binds(tried: Tried) -> dict[str, Any]:
    """The promise with least room, by name and share of its limit in use."""
    name = max(tried.ratios, key=lambda promise: tried.ratios[promise])
    return {
        "promise": name,
        "what": BOUND_BY[name.partition("_")[0].partition("<")[0]],
        "used": _finite(tried.ratios[name]),
    }


def _point(tried: Tried) -> dict[str, Any]:
    return {
        "layout": tried.layout.name,
        "num_gpus": tried.layout.num_gpus,
        "requests_per_s": tried.rate,
        "kept": tried.kept,
        "worst": _finite(tried.worst),
    } | {name: tried.figures.get(name) for name in ("ttft_p99", "tpot_p99")}


def _finite(ratio: float) -> float | None:
    """None where requests are never served."""
    return None if isinf(ratio) else ratio
