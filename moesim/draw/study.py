"""The picture of a study: its points with the Pareto front, and how the answer takes changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = {"us": (1e-3, "ms"), "s": (1e3, "ms"), "bytes": (1e-3, "KB")}
GREY, BLUE, ORANGE, RED = "0.65", "#1f6fb4", "#d9741a", "#b02a2a"
MAX_LABELS = 14
MARKERS = "osD^vP*Xhp"


def plot_study(data: dict[str, Any], path: Path) -> None:
    """Draw the result `data` of a study (see `moesim.studies.result`) to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in data["sensitivity"]["rows"] if _value_of(data, r) is not None]
    wide = 2 if rows else 1
    figure = Figure(figsize=(6.2 * wide, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, wide, squeeze=False)[0]
    _front(axes[0], data)
    if rows:
        _sensitivity(axes[1], data, rows)
    title = data["name"] or data["question"]["text"]
    figure.suptitle(_plain(title), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _front(ax: Axes, data: dict[str, Any]) -> None:
    """Points by the two figures of the front; markers by the first varied parameter."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    x, y = (axis["figure"] for axis in data["pareto"]["axes"])
    drawn = [
        p
        for p in data["points"]
        if p["status"] == "ok" and None not in (p["figures"].get(x), p["figures"].get(y))
    ]
    fx, fy = (FACTORS.get(_unit(data, name), (1.0, ""))[0] for name in (x, y))
    answer = data["answer"]["point"] if data["answer"] else None
    by = data["varied"][0] if data["varied"] else None
    groups: dict[Any, list[dict[str, Any]]] = {}
    for point in drawn:
        groups.setdefault(point["params"].get(by) if by else None, []).append(point)
    for i, (value, members) in enumerate(groups.items()):
        for keeps in (True, False):
            some = [p for p in members if p["keeps"] is keeps]
            if not some:
                continue
            label = f"{by} {_plain(str(value), 24)}" if by and keeps else None
            ax.scatter(
                [p["figures"][x] * fx for p in some],
                [p["figures"][y] * fy for p in some],
                marker=MARKERS[i % len(MARKERS)],
                s=30,
                color=f"C{i % 10}" if keeps else "none",
                edgecolors=f"C{i % 10}" if keeps else GREY,
                linewidths=0.8,
                label=label if len(groups) <= MAX_LABELS else None,
                zorder=2,
            )
    front = [p for key in data["pareto"]["points"] for p in drawn if p["key"] == key]
    front.sort(key=lambda p: p["figures"][x])
    if len(front) > 1:
        ax.plot(
            [p["figures"][x] * fx for p in front],
            [p["figures"][y] * fy for p in front],
            color="0.3",
            linewidth=1,
            zorder=1,
            label="Pareto front",
        )
    for point in drawn:
        if point["key"] == answer:
            ax.scatter(
                [point["figures"][x] * fx],
                [point["figures"][y] * fy],
                s=170,
                facecolors="none",
                edgecolors=RED,
                linewidths=1.6,
                zorder=3,
                label="the answer",
            )
    if any(not p["keeps"] for p in drawn):
        ax.scatter([], [], s=30, facecolors="none", edgecolors=GREY, label="misses a promise")
    for bound in data["question"]["slo"]:
        for name, factor, line in ((x, fx, ax.axvline), (y, fy, ax.axhline)):
            if bound["figure"] == name:
                line(bound["limit"] * factor, color=RED, linewidth=0.8, linestyle="--")
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        values = [p["figures"][name] for p in drawn if p["figures"][name] > 0]
        if len(values) == len(drawn) and drawn and max(values) > 20 * min(values):
            (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}"))
            axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(_label(data, x))
    ax.set_ylabel(_label(data, y))
    ax.grid(alpha=0.25, linewidth=0.5)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


def _value_of(data: dict[str, Any], row: dict[str, Any]) -> float | None:
    """The figure that a bar of the sensitivity shows: the tightest promise's, else the goal's, of
    the answer's own point under the changed input."""
    value = row["figures"].get(_shown(data))
    return None if value is None else float(value)


def _shown(data: dict[str, Any]) -> str:
    question = data["question"]
    if data["answer"] is None or not question["slo"]:
        return str(question["goal"])
    figures = data["answer"]["figures"]

    def slack(bound: dict[str, Any]) -> float:
        value = figures.get(bound["figure"])
        if value is None:
            return float("inf")
        return float(abs(bound["limit"] - value) / abs(bound["limit"]))

    return str(min(question["slo"], key=slack)["figure"])


def _sensitivity(ax: Axes, data: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A bar an input, from its lower to its higher value; what changes the answer is marked."""
    name = _shown(data)
    factor = FACTORS.get(_unit(data, name), (1.0, ""))[0]
    base = data["answer"]["figures"][name] * factor
    inputs = list(dict.fromkeys(r["input"] for r in rows))
    for i, label in enumerate(reversed(inputs)):
        own = [r for r in rows if r["input"] == label]
        if all(abs((_value_of(data, r) or 0.0) * factor - base) < 1e-3 * abs(base) for r in own):
            same = not any(r["changed"] for r in own)
            text = "no effect" if same else "no effect here; another answer"
            ax.annotate(text, (base, i), xytext=(3, 0), textcoords="offset points", fontsize=7)
            continue
        for row in own:
            value = (_value_of(data, row) or 0.0) * factor
            colour = ORANGE if row["changed"] else BLUE
            ax.barh(i, value - base, left=base, height=0.6, color=colour, alpha=0.75)
            change = f"{100 * (row['factor'] - 1):+.0f}%"
            right = value >= base
            ax.annotate(
                change, (value, i), xytext=(3 if right else -3, 0), textcoords="offset points",
                fontsize=7, va="center", ha="left" if right else "right",
            )  # fmt: skip
    ax.set_yticks(range(len(inputs)), list(reversed(inputs)))
    ax.axvline(base, color="0.3", linewidth=1)
    for bound in data["question"]["slo"]:
        if bound["figure"] == name:
            ax.axvline(bound["limit"] * factor, color=RED, linewidth=0.8, linestyle="--")
    ax.margins(x=0.15)
    ax.set_xlabel(f"{_label(data, name)}, of the answer")
    ax.set_title("orange: another point becomes the answer", fontsize=8)
    ax.grid(axis="x", alpha=0.25, linewidth=0.5)


def _unit(data: dict[str, Any], name: str) -> str:
    return str(data["figures"].get(name, {}).get("unit", ""))


def _label(data: dict[str, Any], name: str) -> str:
    figure = data["figures"].get(name, {"label": name, "unit": ""})
    unit = FACTORS.get(figure["unit"], (1.0, ""))[1]
    return _plain(figure["label"] + (f", {unit}" if unit else ""))


def _plain(text: str, length: int = 90) -> str:
    """Text for a picture: one line, nothing that matplotlib reads as mathematics."""
    clean = "".join(ch for ch in " ".join(text.split()) if ch.isprintable())[:length]
    return clean.replace("$", r"\$")
