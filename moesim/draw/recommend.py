"""A recommendation: what was tried, GPUs against latency, and how much of each promise is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.draw.axes import Axes
from moesim.draw.charts import Bar, Points, bars, points
from moesim.draw.picture import Picture, poster
from moesim.figures import figure

MAX_BARS = 5
KINDS = (("misses a promise", 7, False), ("keeps the promises", 0, False), ("the answer", 1, True))
"""Kind of point, series, whether it is a ring."""


def tried(asked: Mapping[str, Any], answer: Mapping[str, Any]) -> Picture:
    """All layouts that were simulated: GPUs (or requests/s, where those were maximised) against the
    latency whose promise binds, with the promise as a line."""
    latency = answer["binds"]["promise"].partition("_")[0]
    name = f"{latency}_p99" if latency in ("ttft", "tpot") else "tpot_p99"
    shown = figure(name)
    x = "requests_per_s" if asked["maximize"] else "num_gpus"
    rows = [p for p in answer["tried"] if p[name] is not None]
    best = answer["options"][0]
    groups = []
    for kind, series, ring in KINDS:
        own = [p for p in rows if p["kept"] == (series == 0)]
        if ring:
            own = [p for p in rows if (p["layout"], p[x]) == (best["layout"], best[x])]
        if own:
            ys = [p[name] * shown.factor for p in own]
            hints = [p["layout"] for p in own]
            groups.append(Points(kind, [float(p[x]) for p in own], ys, series, hints, ring))
    limits = [
        (bound["limit_s"] * shown.factor, bound["text"])
        for bound in asked["promises"]
        if bound["figure"] == name
    ]
    axes = Axes("requests/s" if asked["maximize"] else "GPUs", shown.heading, marks_y=limits)
    return points("Layouts tried", groups, axes)


def promises(answer: Mapping[str, Any]) -> Picture:
    """How much of the tightest promise each option uses, and which that is."""
    rows = []
    for option in answer["options"][:MAX_BARS]:
        name = f"{option['num_gpus']} GPUs: {_short(option)}"
        known = {key: ratio for key, ratio in option["promises"].items() if ratio is not None}
        if len(known) < len(option["promises"]):
            rows.append(Bar(name, (("", 7, 0.0),), "never served"))
            continue
        worst = max(known, key=lambda key: known[key])
        series = 0 if option["kept"] else 7
        said = f"{known[worst]:.0%} {worst.partition('_')[0].upper()}"
        rows.append(Bar(name, (("", series, known[worst] * 100),), said))
    return bars("The tightest promise", rows, "share of the limit (%)", mark=(100.0, "limit"))


def _short(option: Mapping[str, Any]) -> str:
    """ "2 x 8 prefill, 1 x 16 decode", "7 x 8 tp8"."""
    parts = []
    for name, role in option["roles"].items():
        said = f"tp{role['tp']}" if name == "serving" else name
        parts.append(f"{role['engines']} x {role['gpus']} {said}")
    return ", ".join(parts)


def recommend_poster(record: Mapping[str, Any]) -> Picture:
    """Each answer of a recommendation (`moesim.studies.recommend`): what was tried, and options."""
    rows = [[tried(record["asked"], one), promises(one)] for one in record["answers"]]
    names = ", ".join(f"{one['model']} on {one['gpu']}" for one in record["answers"])
    return poster(names, rows, record["asked"]["text"])
