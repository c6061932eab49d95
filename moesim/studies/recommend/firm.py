"""How firm an answer is: the search again where every step takes as much longer, or less, as
predictions were off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moesim.errors import MoesimError
from moesim.studies.recommend.layouts import Bench, Layout, Tried
from moesim.studies.recommend.search import GROWTH, larger

HELD_OUT_TPOT: Mapping[str, tuple[float, float]] = {
    "vllm": (0.049, 0.18),
    "sglang": (0.096, 0.27),
    "trtllm": (0.142, 0.33),
}
"""Error of TPOT by engine, median and 90th percentile, on measured H100 and H200 rows of models
that no constant was fitted to (reports/serving-accuracy)."""
MEASURED_ON = ("h100-sxm", "h200-sxm")


@dataclass(frozen=True, slots=True)
class Firmness:
    """errors: (median, 90th percentile) of the held-out error, None where nothing like it was
    measured, and `unlike` says what no measured service has. slower, faster: by error, the layout
    that is enough if steps take so much longer, or are so much quicker; None where none of the
    family is."""

    errors: tuple[float, float] | None
    slower: tuple[Layout | None, ...] = ()
    faster: tuple[Layout | None, ...] = ()
    unlike: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.errors is None:
            return {"held_out_tpot_error": None, "unlike": self.unlike}
        rows = zip(("median", "p90"), self.errors, self.slower, self.faster, strict=True)
        return {
            "held_out_tpot_error": {"median": self.errors[0], "p90": self.errors[1]},
            "if_steps_differ_by": {
                name: {
                    "error": error,
                    "slower_gpus": None if slow is None else slow.num_gpus,
                    "faster_gpus": None if fast is None else fast.num_gpus,
                }
                for name, error, slow, fast in rows
            },
        }


def firmness(bench: Bench, answer: Tried, max_gpus: int) -> Firmness:
    """Of an answer to the question for fewest GPUs, within its family of layouts."""
    parts = [part for part in (answer.layout.front, answer.layout.back) if part is not None]
    gpus = dict.fromkeys(bench.engine(part)[0].gpu.name for part in parts)
    unlike = [gpu for gpu in gpus if gpu not in MEASURED_ON]
    if unlike:
        return Firmness(None, unlike=f"on {' or '.join(unlike)}")
    if any(part.pp > 1 for part in parts):
        return Firmness(None, unlike="with pipeline stages")
    errors = HELD_OUT_TPOT[bench.place.engine]
    slower = tuple(_enough(bench, answer.layout, 1 + e, max_gpus) for e in errors)
    faster = tuple(_fewer(bench, answer.layout, 1 / (1 + e)) for e in errors)
    return Firmness(errors, slower, faster)


def _enough(bench: Bench, layout: Layout, factor: float, max_gpus: int) -> Layout | None:
    for _ in range(GROWTH):
        if layout.num_gpus > max_gpus:
            return None
        tried = _tried(bench, layout, factor)
        if tried is None or tried.kept:
            return layout if tried is not None else None
        layout = larger(layout, tried)
    return None


def _fewer(bench: Bench, layout: Layout, factor: float) -> Layout:
    """The smallest layout that is enough, engines taken off one by one."""
    while True:
        less = [
            (found.worst, smaller)
            for smaller in smaller_layouts(layout)
            if (found := _tried(bench, smaller, factor)) is not None and found.kept
        ]
        if not less:
            return layout
        layout = min(less, key=lambda pair: (pair[1].num_gpus, pair[0]))[1]


def smaller_layouts(layout: Layout) -> list[Layout]:
    """The layouts with one engine fewer."""
    out = []
    if layout.replicas > 1:
        out.append(replace(layout, replicas=layout.replicas - 1))
    if layout.back_replicas > 1:
        out.append(replace(layout, back_replicas=layout.back_replicas - 1))
    return out


def one_fewer(bench: Bench, answer: Tried, rate: float) -> Tried | None:
    """The layout with one engine fewer that comes nearest to keeping the promises; None where there
    is none to take away."""
    found = [t for s in smaller_layouts(answer.layout) if (t := _tried(bench, s, 1.0, rate))]
    return min(found, key=lambda tried: tried.worst, default=None)


def _tried(bench: Bench, layout: Layout, factor: float, rate: float | None = None) -> Tried | None:
    try:
        return bench.run(layout, bench.need.rate if rate is None else rate, factor)
    except MoesimError:
        return None
