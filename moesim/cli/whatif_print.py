"""Tables of `moesim whatif`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MAX_COLUMNS = 7
COST = "cost_usd_per_hour"


def print_results(data: dict[str, Any], rows: int) -> None:
    """The answer, the table of points, the sensitivity, and what it rests on."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    points = data["points"]
    counts = {s: sum(p["status"] == s for p in points) for s in ("ok", "infeasible", "refused")}
    skipped = len(points) - sum(counts.values())
    parts = [f"{counts['ok']} evaluated"]
    parts += [f"{counts['infeasible']} infeasible"] if counts["infeasible"] else []
    parts += [f"{counts['refused']} refused"] if counts["refused"] else []
    parts += [f"{skipped} not evaluated"] if skipped else []
    name = f"{_plain(data['name'])}: " if data["name"] else ""
    console.print(f"{name}{data['about']}; {len(points)} points: {', '.join(parts)}")
    columns = _columns(data)
    _print_table(console, data, columns, rows)
    _print_refused(console, points)
    _print_answer(console, data)
    _print_sensitivity(console, data)
    _print_basis(console, data)


def _columns(data: dict[str, Any]) -> list[str]:
    """Figures to show: the goal, those with a promise, the front's axes, then others."""
    asked = [data["question"]["goal"], *(b["figure"] for b in data["question"]["slo"])]
    front = [axis["figure"] for axis in data["pareto"]["axes"]]
    out = list(dict.fromkeys([*asked, *front]))
    known = [n for n in data["figures"] if n not in ("gpus", COST, "cost_usd_per_million_tokens")]
    out += [name for name in known if name not in out][: max(0, 5 - len(out))]
    varied = data["varied"]
    return [name for name in out if name not in varied][:MAX_COLUMNS]


def _print_table(console: Console, data: dict[str, Any], columns: list[str], limit: int) -> None:
    from rich.table import Table
    from rich.text import Text

    points = [p for p in data["points"] if p["status"] == "ok"]
    if not points:
        return
    goal, low = data["question"]["goal"], data["question"]["better"] == "low"

    def rank(point: dict[str, Any]) -> tuple[bool, float]:
        value = point["figures"].get(goal)
        if value is None:
            return not point["keeps"], float("inf")
        return not point["keeps"], value if low else -value

    ranked = sorted(points, key=rank)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in data["varied"]:
        table.add_column(_plain(name), no_wrap=True)
    for name in columns:
        table.add_column(heading(name, data["figures"]), justify="right")
    best = data["answer"]["point"] if data["answer"] else None
    for point in ranked[:limit]:
        mark = "*" if point["key"] == best else "+" if point["pareto"] else ""
        mark = mark if point["keeps"] else "x"
        cells = [Text(_plain(_short(point["params"][name]))) for name in data["varied"]]
        unit = {name: data["figures"].get(name, {}).get("unit", "") for name in columns}
        shown = [number(point["figures"].get(name), unit[name]) for name in columns]
        table.add_row(mark, *cells, *shown)
    console.print(table)
    legend = ["* the answer", "+ on the Pareto front"]
    if any(not p["keeps"] for p in points):
        legend.append("x misses a promise")
    more = f"; {len(ranked) - limit} more points in the file" if len(ranked) > limit else ""
    console.print("; ".join(legend) + more)


def heading(name: str, figures: dict[str, Any]) -> str:
    """A figure's label with the unit that `number` shows it in."""
    figure = figures.get(name, {"label": name, "unit": ""})
    shown = {"us": "ms", "s": "ms", "bytes": "KB"}.get(figure["unit"], "")
    return figure["label"] + (f", {shown}" if shown else "")


def number(value: float | None, unit: str) -> str:
    """A figure for a table: times in ms, bytes in KB, at most four digits."""
    if value is None:
        return "-"
    value *= {"us": 1e-3, "s": 1e3, "bytes": 1e-3}.get(unit, 1.0)
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or (abs(value) >= 100 and float(value).is_integer()):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _print_refused(console: Console, points: list[dict[str, Any]]) -> None:
    for status, label in (("infeasible", "infeasible"), ("refused", "refused")):
        causes: dict[str, list[str]] = {}
        for point in points:
            if point["status"] == status:
                causes.setdefault(point["cause"], []).append(point["remedy"])
        for cause, remedies in list(causes.items())[:3]:
            console.print(f"{label} ({len(remedies)}): {_plain(cause, 300)}")
        if len(causes) > 3:
            console.print(f"{label}: {len(causes) - 3} more causes in the file")


def _print_answer(console: Console, data: dict[str, Any]) -> None:
    question = data["question"]
    answer = data["answer"]
    if answer is None:
        near = data["nearest"]
        bounds = _bounds(question)
        none = f"keeps the promises ({bounds})" if bounds else "can be run"
        console.print(f"no point {none}")
        if near is not None:
            point = next(p for p in data["points"] if p["key"] == near["point"])
            console.print(
                f"nearest: {_settings(data, point['params'])} misses {', '.join(near['missed'])}"
                f" by {100 * near['violation']:.0f}%"
            )
        return
    point = next(p for p in data["points"] if p["key"] == answer["point"])
    unit = data["figures"].get(question["goal"], {}).get("unit", "")
    console.print(
        f"answer: {_settings(data, point['params'])}: {heading(question['goal'], data['figures'])}"
        f" {number(answer['value'], unit)}"
        + (f", keeping {_bounds(question)}" if question["slo"] else "")
    )
    per_token = answer["figures"].get("cost_usd_per_million_tokens")
    if per_token is not None:
        console.print(
            f"${answer['figures'][COST]:,.2f} an hour, ${per_token:,.3f} a million tokens"
        )


def _bounds(question: dict[str, Any]) -> str:
    return ", ".join(b["text"] for b in question["slo"])


def _settings(data: dict[str, Any], params: dict[str, Any]) -> str:
    varied = data["varied"]
    if not varied:
        return "the one point"
    return ", ".join(f"{name} {_plain(_short(params[name]))}" for name in varied)


def _print_sensitivity(console: Console, data: dict[str, Any]) -> None:
    rows = data["sensitivity"]["rows"]
    if not rows:
        return
    goal = data["question"]["goal"]
    unit = data["figures"].get(goal, {}).get("unit", "")
    by_key = {p["key"]: p for p in data["points"]}
    console.print(f"asked again over {data['sensitivity']['over']}:")
    for row in rows:
        change = f"{100 * (row['factor'] - 1):+.0f}%"
        if row["answer"] is None:
            text = "no point keeps the promises any more"
        elif row["changed"]:
            other = by_key[row["answer"]]
            text = f"another answer: {_settings(data, other['params'])}"
        else:
            text = "the same answer"
        value = "" if row["answer"] is None else f" ({number(row['value'], unit)})"
        broken = "" if row["kept"] or row["answer"] is None else "; the first misses a promise"
        console.print(f"  {row['input']} {change}: {text}{value}{broken}")


def _print_basis(console: Console, data: dict[str, Any]) -> None:
    if data["basis"]:
        console.print(f"figures rest on {data['basis']} inputs")
    for gpu, used in data["prices"].items():
        if used["usd_per_gpu_hour"] is not None:
            console.print(
                f"price of {gpu}: ${used['usd_per_gpu_hour']:g} a GPU-hour, {used['kind']}"
                f" ({used['source']})"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else f"...{text[-29:]}"


def _plain(text: str, length: int = 80) -> str:
    """Text out of a file, on one line and without control characters."""
    return "".join(ch for ch in " ".join(str(text).split()) if ch.isprintable())[:length]
