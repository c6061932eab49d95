"""What `moesim whatif` says of its result, as text."""

from __future__ import annotations

from typing import Any

from moesim.errors import plain
from moesim.figures import short_heading, text_table

MAX_COLUMNS = 7
UNSTEADY = "no steady state"
COST = "cost_usd_per_hour"
MONEY = {
    COST: "per hour",
    "cost_usd_per_million_output_tokens": "per million output tokens",
    "cost_usd_per_million_input_tokens": "per million input tokens",
    "cost_usd_per_million_tokens": "per million tokens",
}


def summary(data: dict[str, Any], rows: int) -> str:
    """The table of points, at most `rows` of them, the answer, the sensitivity, the basis."""
    points = data["points"]
    counts = {s: sum(p["status"] == s for p in points) for s in ("ok", "infeasible", "refused")}
    skipped = len(points) - sum(counts.values())
    parts = [f"{counts['ok']} evaluated"]
    parts += [f"{counts['infeasible']} infeasible"] if counts["infeasible"] else []
    parts += [f"{counts['refused']} refused"] if counts["refused"] else []
    parts += [f"{skipped} not evaluated"] if skipped else []
    name = f"{plain(data['name'])}: " if data["name"] else ""
    lines = [f"{name}{data['about']}; {len(points)} points: {', '.join(parts)}"]
    taken = ", ".join(f"{plain(key)} {plain(str(v))}" for key, v in data["defaults"].items())
    lines += [f"defaults taken: {taken}"] if taken else []
    lines += _table(data, _columns(data), rows)
    lines += [
        *_remarks(data),
        *_refused(points),
        *_answer(data),
        *_sensitivity(data),
        *_basis(data),
    ]
    return "\n".join(lines)


def _columns(data: dict[str, Any]) -> list[str]:
    """Figures to show: the goal, those with a promise, tokens/s per GPU and dollars per hour of a
    service, the front's axes, then others."""
    asked = [data["question"]["goal"], *(b["figure"] for b in data["question"]["slo"])]
    front = [axis["figure"] for axis in data["pareto"]["axes"]]
    worth = ["output_tokens_per_s", "output_tokens_per_s_per_gpu", COST]
    worth = worth if worth[0] in data["figures"] else []
    out = list(dict.fromkeys([*asked, *worth, *front]))
    known = [n for n in data["figures"] if n != "gpus" and n not in MONEY]
    out += [name for name in known if name not in out][: max(0, 5 - len(out))]
    varied = data["varied"]
    return [name for name in out if name not in varied][:MAX_COLUMNS]


def _table(data: dict[str, Any], columns: list[str], limit: int) -> list[str]:
    points = [p for p in data["points"] if p["status"] == "ok"]
    if not points:
        return []
    goal, low = data["question"]["goal"], data["question"]["better"] == "low"

    def rank(point: dict[str, Any]) -> tuple[bool, float]:
        value = point["figures"].get(goal)
        if value is None:
            return not point["keeps"], float("inf")
        return not point["keeps"], value if low else -value

    ranked = sorted(points, key=rank)
    varied = list(data["varied"])
    engines = any(p.get("engines") for p in points)
    head = ["", *(plain(name) for name in varied), *(["engines"] if engines else [])]
    head += [short_heading(name) or heading(name, data["figures"]) for name in columns]
    table = []
    best = {a["answer"]["point"] for a in _asked(data) if a["answer"]}
    for point in ranked[:limit]:
        mark = "*" if point["key"] in best else "+" if point["pareto"] else ""
        mark = mark if point["keeps"] else "x"
        cells = [plain(_short(point["params"][name])) for name in varied]
        cells += [point.get("engines", "")] if engines else []
        unit = {name: data["figures"].get(name, {}).get("unit", "") for name in columns}
        shown = [number(point["figures"].get(name), unit[name]) for name in columns]
        table.append([mark, *cells, *shown])
    legend = ["* the answer", "+ on the Pareto front"]
    if any(not p["keeps"] for p in points):
        legend.append("x misses a promise")
    more = f"; {len(ranked) - limit} more points in the file" if len(ranked) > limit else ""
    return [text_table(head, table, left=1 + len(varied) + engines), "; ".join(legend) + more]


def heading(name: str, figures: dict[str, Any]) -> str:
    """A figure's label with the unit that `number` shows it in."""
    figure = figures.get(name, {"label": name, "unit": ""})
    shown = {"us": "ms", "s": "ms", "bytes": "KB", "share": ""}
    shown = shown.get(figure["unit"], figure["unit"])
    return figure["label"] + (f", {shown}" if shown else "")


def number(value: float | None, unit: str) -> str:
    """A figure for a table: times in ms, bytes in KB, shares in %, at most four digits."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.1%}"
    value *= {"us": 1e-3, "s": 1e3, "bytes": 1e-3}.get(unit, 1.0)
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or (abs(value) >= 100 and float(value).is_integer()):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _remarks(data: dict[str, Any]) -> list[str]:
    """What is no steady state, by its kind: which points, and the first one's words."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for point in data["points"]:
        for note in point.get("notes", ()):
            if note.startswith(UNSTEADY):
                kind = note[: len(UNSTEADY) + 10]
                kinds.setdefault(kind, []).append((_settings(data, point), note))
    return [
        f"{'; '.join(where for where, _ in found[:4])}{', ...' if len(found) > 4 else ''}: {note}"
        for found in kinds.values()
        for note in [found[0][1]]
    ]


def _refused(points: list[dict[str, Any]]) -> list[str]:
    lines = []
    for status, label in (("infeasible", "infeasible"), ("refused", "refused")):
        causes: dict[str, list[str]] = {}
        for point in points:
            if point["status"] == status:
                causes.setdefault(point["cause"], []).append(point["remedy"])
        for cause, remedies in list(causes.items())[:3]:
            lines.append(f"{label} ({len(remedies)}): {plain(cause, 300)}")
        if len(causes) > 3:
            lines.append(f"{label}: {len(causes) - 3} more causes in the file")
    return lines


def _asked(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked per value, or the one question."""
    one = {"value": None, "answer": data["answer"], "nearest": data["nearest"]}
    return data["answers"] if data["per"] else [one]  # type: ignore[no-any-return]


def _answer(data: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for asked in _asked(data):
        own = _one_answer(data, asked["answer"], asked["nearest"])
        if data["per"]:
            own[0] = f"{plain(data['per'])} {plain(_short(asked['value']))}: {own[0]}"
        lines += own
    return lines


def _one_answer(
    data: dict[str, Any], answer: dict[str, Any] | None, near: dict[str, Any] | None
) -> list[str]:
    question = data["question"]
    by_key = {p["key"]: p for p in data["points"]}
    if answer is None:
        bounds = _bounds(question)
        lines = [f"no point {f'keeps the promises ({bounds})' if bounds else 'can be run'}"]
        if near is not None:
            lines.append(
                f"nearest: {_settings(data, by_key[near['point']])} misses"
                f" {', '.join(near['missed'])} by {100 * near['violation']:.0f}%"
            )
        return lines
    unit = data["figures"].get(question["goal"], {}).get("unit", "")
    lines = [
        f"answer: {_settings(data, by_key[answer['point']])}:"
        f" {heading(question['goal'], data['figures'])} {number(answer['value'], unit)}"
        + (f", keeping {_bounds(question)}" if question["slo"] else "")
    ]
    figures = answer["figures"]
    money = [
        f"${figures[name]:,.{2 if name == COST else 3}f} {said}"
        for name, said in MONEY.items()
        if figures.get(name) is not None
    ]
    lines += [", ".join(money)] if len(money) > 1 else []
    if any(note.startswith(UNSTEADY) for note in by_key[answer["point"]].get("notes", ())):
        lines.append("the answer's run has no steady state: longer ones may keep less")
    return lines


def _bounds(question: dict[str, Any]) -> str:
    return ", ".join(b["text"] for b in question["slo"])


def _settings(data: dict[str, Any], point: dict[str, Any]) -> str:
    """What is different about a point, and its engines."""
    params, engines = point["params"], point.get("engines", "")
    said = ", ".join(f"{name} {plain(_short(params[name]))}" for name in data["varied"])
    said = said or "the one point"
    return f"{said} ({engines})" if engines else said


def _sensitivity(data: dict[str, Any]) -> list[str]:
    rows = data["sensitivity"]["rows"]
    if not rows:
        return []
    goal = data["question"]["goal"]
    unit = data["figures"].get(goal, {}).get("unit", "")
    by_key = {p["key"]: p for p in data["points"]}
    lines = [f"asked again over {data['sensitivity']['over']}:"]
    for row in rows:
        change = f"{100 * (row['factor'] - 1):+.0f}%"
        if row["answer"] is None:
            text = "no point keeps the promises any more"
        elif row["changed"]:
            other = by_key[row["answer"]]
            text = f"another answer: {_settings(data, other)}"
        else:
            text = "the same answer"
        value = "" if row["answer"] is None else f" ({number(row['value'], unit)})"
        broken = "" if row["kept"] or row["answer"] is None else "; the first misses a promise"
        own = f"{plain(row['per'])}, " if "per" in row else ""
        lines.append(f"  {own}{row['input']} {change}: {text}{value}{broken}")
    return lines


def _basis(data: dict[str, Any]) -> list[str]:
    lines = []
    if data["basis"]:
        lines.append(f"figures rest on {data['basis']} inputs")
    for gpu, used in data["prices"].items():
        if used["usd_per_gpu_hour"] is not None:
            lines.append(
                f"price of {gpu}: ${used['usd_per_gpu_hour']:g} per GPU-hour, {used['kind']}"
                f" ({used['source']})"
            )
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else f"...{text[-29:]}"
