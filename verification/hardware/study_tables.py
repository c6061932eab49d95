"""Tables of the study, between `<!-- begin NAME -->` and `<!-- end NAME -->` in its README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moesim.cost.calibration import Calibration

PLANS = {
    "eplb": "EPLB",
    "balanced": "balanced",
    "time": "time",
    "traffic": "traffic",
    "eplb_redundant": "EPLB, redundant",
    "balanced_redundant": "balanced, redundant",
}


def fill(path: Path, results: dict[str, Any], calibration: Calibration) -> None:
    """Replace the marked tables; a marker that no table is made for is left alone."""
    text = path.read_text(encoding="utf-8")
    for name, make in _TABLES.items():
        table = make(results, calibration)
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def verdict(results: dict[str, Any], _: Calibration) -> str:
    lines = ["| | layers | median error | 90th percentile | largest | bias | orders met |"]
    lines.append("|---|---|---|---|---|---|---|")
    for mode in ("graph", "eager"):
        o = results["overall"][mode]
        lines.append(
            f"| **{mode}, all** | {o['layers']} | {o['median']:.1%} | {o['p90']:.1%} |"
            f" {o['largest']:.0%} | {o['bias']:+.1%} | {o['orders_met']} of {o['orders']} |"
        )
        for tokens in (128, 1024, 8192):
            o = results["overall"][f"{mode} {tokens}"]
            lines.append(
                f"| {mode}, {tokens:,} tokens a rank | {o['layers']} | {o['median']:.1%} |"
                f" {o['p90']:.1%} | {o['largest']:.0%} | {o['bias']:+.1%} | |"
            )
    return "\n".join(lines) + "\n"


def pairs(results: dict[str, Any], _: Calibration) -> str:
    lines = ["| pairs of plans that differ by more than | graph | eager |", "|---|---|---|"]
    of = {(row["mode"], row["apart"]): row for row in results["pairs"]}
    for apart in sorted({row["apart"] for row in results["pairs"]}):
        cells = [
            f"{of[mode, apart]['wrong']} of {of[mode, apart]['pairs']} wrong"
            for mode in ("graph", "eager")
        ]
        name = f"the noise and {apart:.0%}" if apart else "the noise"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def groups(results: dict[str, Any], _: Calibration) -> str:
    lines = [
        "| model | tokens a rank | mode | median error | p90 | bias | noise | plans differ by |"
        " distinct | Spearman | marks, us a layer |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, entry in results["models"].items():
        for mode in ("graph", "eager"):
            for g in (g for g in entry["groups"] if g["mode"] == mode):
                rho = "" if g["spearman"] is None else f"{g['spearman']:.2f}"
                lines.append(
                    f"| {model} | {g['tokens_per_rank']:,} | {mode} | {g['median_error']:.1%} |"
                    f" {g['p90_error']:.1%} | {g['bias']:+.1%} | {g['noise']:.1%} |"
                    f" {g['spread']:.1%} | {g['num_distinct']} of {g['num_plans']} | {rho} |"
                    f" {g['mark_us']:.0f} |"
                )
    return "\n".join(lines) + "\n"


def phases(results: dict[str, Any], _: Calibration) -> str:
    names = ("permute", "dispatch", "compute", "combine", "unpermute")
    lines = [
        f"| model | tokens a rank | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for model, entry in results["models"].items():
        for g in (g for g in entry["groups"] if g["mode"] == "graph"):
            cells = []
            for name in names:
                p = g["phases"][name]
                cells.append(
                    f"{p['measured_us']:.0f} / {p['predicted_us']:.0f}"
                    f" ({p['median_of_layer']:.1%}, {p['p90_of_layer']:.1%})"
                )
            lines.append(f"| {model} | {g['tokens_per_rank']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speedups(results: dict[str, Any], _: Calibration) -> str:
    groups = [(m, g) for m, entry in results["models"].items() for g in entry["groups"]]
    plans = [p for p in PLANS if any(p in g["mean_us"] for _, g in groups)]
    versus = "eplb_redundant" if "eplb_redundant" in plans else "eplb"
    against = [("balanced_redundant", versus)]
    if "time" in plans:
        against += [("balanced", "eplb"), ("time", "eplb")]
    titles = [PLANS[p] for p in plans] + [f"{PLANS[a]} over {PLANS[b]}" for a, b in against]
    lines = [
        f"| model | tokens a rank | mode | {' | '.join(titles)} | noise |",
        "|---|---|---|" + "---|" * (len(titles) + 1),
    ]
    for mode in ("graph", "eager"):
        for model, g in ((m, g) for m, g in groups if g["mode"] == mode):
            cells = [_ratio(g, "linear", p) for p in plans]
            cells += [_ratio(g, b, a) for a, b in against]
            lines.append(
                f"| {model} | {g['tokens_per_rank']:,} | {mode} | {' | '.join(cells)} |"
                f" {g['noise']:.1%} |"
            )
    return "\n".join(lines) + "\n"


def growth(results: dict[str, Any], _: Calibration) -> str:
    lines = [
        "| model | tokens a rank | median error, fewer GPUs | here | p90, fewer | here |"
        " bias, fewer | here | Spearman, fewer | here |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results.get("fewer", []):
        cells = [
            f"{row[prefix + name]:{form}}"
            for name, form in (("median_error", ".1%"), ("p90_error", ".1%"), ("bias", "+.1%"))
            for prefix in ("fewer_", "")
        ]
        rhos = (row["fewer_spearman"], row["spearman"])
        cells += ["" if rho is None else f"{rho:.2f}" for rho in rhos]
        lines.append(f"| {row['model']} | {row['tokens_per_rank']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(group: dict[str, Any], base: str, plan: str) -> str:
    if plan not in group["mean_us"]:
        return ""
    (measured, predicted), (own, ours) = group["mean_us"][base], group["mean_us"][plan]
    return f"{measured / own:.3f} ({predicted / ours:.3f})"


def offload(results: dict[str, Any], _: Calibration) -> str:
    lines = [
        "| cache | copies a token | measured, us a token | predicted from the run's own copy and"
        " kernel times | predicted from the calibration |",
        "|---|---|---|---|---|",
    ]
    for row in results["offload"]:
        calibrated = row["calibrated_us"]
        cells = [_beside(row["own_us"], row["measured_us"])]
        cells.append("" if calibrated is None else _beside(calibrated, row["measured_us"]))
        lines.append(
            f"| {row['label']} | {row['copies_per_token']:.1f} |"
            f" {row['measured_us']:,.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _beside(predicted: float, measured: float) -> str:
    return f"{predicted:,.0f} ({predicted / measured - 1:+.1%})"


def disjoint(results: dict[str, Any], _: Calibration) -> str:
    d = results["disjoint"]
    return (
        f"Of {d['loads']:,} loads of a GPU in a layer that were validated,"
        f" {d['loads_in_both']} equal a calibrated one; of {d['messages']:,} exchanges,"
        f" {d['messages_in_both']} have a calibrated size.\n"
    )


def throttling(results: dict[str, Any], _: Calibration) -> str:
    rows = results["throttling"]
    if not rows:
        return "Not measured in this run.\n"
    lines = [
        "| shape | rows | bare kernel, us | in a layer's company, us | |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['shape']} | {r['rows']:,} | {r['alone_us']:,.1f} | {r['in_company_us']:,.1f} |"
        f" {r['alone_us'] / r['in_company_us'] - 1:+.1%} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def failures(results: dict[str, Any], _: Calibration) -> str:
    lines = [f"- {model}: {f}" for model, e in results["models"].items() for f in e["failures"]]
    return "\n".join(lines or ["- none"]) + "\n"


_TABLES = {
    "verdict": verdict,
    "pairs": pairs,
    "groups": groups,
    "phases": phases,
    "speedups": speedups,
    "growth": growth,
    "offload": offload,
    "disjoint": disjoint,
    "throttling": throttling,
    "failures": failures,
}
