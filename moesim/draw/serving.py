"""Served requests: load and queues over time, and latencies as distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesim import figures
from moesim.draw.axes import Axes
from moesim.draw.charts import Line, lines
from moesim.draw.figures import significant
from moesim.draw.picture import Picture, poster

LATENCIES = tuple(
    (name, label[0].upper() + label[1:], series)
    for series, (name, label) in enumerate(figures.LATENCIES.items())
)
"""Name, name for readers, series."""
WIDE = 30.0
"""Largest over smallest drawn value from which a latency axis is logarithmic."""
OVER_TIME: tuple[tuple[str, tuple[tuple[str, str, int, float], ...], str], ...] = (
    (
        "Tokens per second",
        (
            ("output_tokens_per_s", "output tokens", 0, 1.0),
            ("prompt_tokens_per_s", "prompt tokens", 1, 1.0),
        ),
        "tokens per second",
    ),
    (
        "Requests running and waiting",
        (("running", "running", 0, 1.0), ("waiting", "waiting", 1, 1.0)),
        "requests",
    ),
    (
        "GPUs and KV cache in use",
        (("busy", "GPU time in steps", 0, 100.0), ("kv_used", "KV cache", 2, 100.0)),
        "share (%)",
    ),
)
"""Title, (column, name, series, factor) of each line, and the axis."""


def latency_unit(quantiles_s: Sequence[float]) -> tuple[float, str]:
    """Factor from seconds and the unit that suits quantiles in ascending order."""
    return (1e3, "ms") if quantiles_s[-1] < 1 else (1.0, "s")


def is_wide(quantiles_s: Sequence[float]) -> bool:
    """Whether the axis of these quantiles is logarithmic."""
    low = quantiles_s[max(1, len(quantiles_s) // 100)]
    return low > 0 and quantiles_s[-1] / low > WIDE


def distribution(
    name: str, quantiles_s: Sequence[float], limits_s: Sequence[tuple[float, str]]
) -> Picture:
    """Cumulative distribution of latency `name` of LATENCIES: quantiles at even shares, seconds,
    ascending; p50 and p99 are marked, and the promises (limit, name)."""
    title, series = next((t, s) for n, t, s in LATENCIES if n == name)
    factor, unit = latency_unit(quantiles_s)
    last = len(quantiles_s) - 1
    shares = [100 * i / last for i in range(last + 1)]
    drawn = Line(title, [v * factor for v in quantiles_s], shares, series)
    notable = [
        (float(p), f"p{p} {significant(quantiles_s[round(p / 100 * last)] * factor, 3)} {unit}")
        for p in (50, 99)
    ]
    axes = Axes(
        f"{title.lower()} ({unit})",
        "requests up to it (%)",
        log_x=is_wide(quantiles_s),
        y_range=(0.0, 100.0),
        marks_x=[(limit * factor, said) for limit, said in limits_s],
        marks_y=notable,
    )
    return lines(title, [drawn], axes)


def time_unit(series: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[float, str]:
    """Factor from seconds and the unit that suits the longest of the series."""
    last = max((c["time_s"][-1] for c in series.values() if len(c["time_s"])), default=0.0)
    return (1 / 60, "min") if last > 600 else (1.0, "s")


def over_time(
    series: Mapping[str, Mapping[str, Sequence[float]]],
) -> list[tuple[Picture, list[Line]]]:
    """What happens over time, with the lines drawn: `series` {role: {column: [bins]}} with time_s
    and the columns of OVER_TIME, of the same length."""
    factor, unit = time_unit(series)
    out = []
    for title, columns, axis in OVER_TIME:
        drawn = [
            Line(
                name + figures.ROLES.get(role, f", {role}"),
                [t * factor for t in own["time_s"]],
                [v * scale for v in own[column]],
                (number + 3 * k) % 8,
            )
            for k, (role, own) in enumerate(series.items())
            for column, name, number, scale in columns
            if len(own["time_s"]) > 1
        ]
        if drawn:
            top = max(max(line.y) for line in drawn) * 1.05 or 1.0
            axes = Axes(f"time ({unit})", axis, y_range=(0.0, top))
            out.append((lines(title, drawn, axes), drawn))
    return out


def promises(record: Mapping[str, Any], name: str) -> list[tuple[float, str]]:
    """The limits of latency `name` that a run was asked to keep: (seconds, name for readers)."""
    asked = (record.get("slo") or {}).get("promises") or []
    return [
        (float(b["limit_s"]), " ".join(filter(None, ("promise", b.get("stat")))))
        for b in asked
        if b["latency"] == name
    ]


def serving_poster(record: Mapping[str, Any]) -> Picture:
    """A run as `moesim.serving.record.run_record` gives it: latencies above, time below."""
    asked = record["requests"]
    top = [
        distribution(name, record["cdf"][name], promises(record, name))
        for name, *_ in LATENCIES
        if len(record["cdf"][name]) > 1
    ]
    return poster(
        f"{asked['num_requests']:,} requests of {asked['source']} on {record['num_gpus']} GPUs",
        [row for row in (top, [p for p, _ in over_time(record["series"])]) if row],
        f"{record['name']}; predicted, figures {record['basis']}",
    )
