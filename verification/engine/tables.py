"""Tables of reports/engine-vllm from its records: measured beside predicted.

    python verification/engine/tables.py reports/engine-vllm [--write]

Without --write the tables are printed; with it they replace what stands between the marks of the
same name in the report's README.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000
KINDS = ("experts", "attention", "other")


def load(report: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The step records, and the predictions by model; a record's `key` names its predictions."""
    records = []
    for path in sorted((report / "raw").glob("steps-*.json.gz")):
        record = json.loads(gzip.decompress(path.read_bytes()))
        record["name"] = path.name.removeprefix("steps-").removesuffix(".json.gz")
        record["key"] = "qwen3-30b" if record["model"].startswith("qwen3-30b") else record["model"]
        records.append(record)
    predicted = json.loads((report / "predictions.json").read_text())["models"]
    return records, predicted


def samples(record: dict[str, Any], case: str, routing: str, mode: str) -> np.ndarray:
    """Milliseconds of a step, one value a round."""
    rows = record["cases"][case]["rows"]
    if case.startswith("prefill"):
        return np.array([r[2] for r in rows if r[1] == routing])
    return np.array([np.median(r[3]) for r in rows if r[1] == routing and r[2] == mode])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95% interval by resampling rounds."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picked], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def host_bound(record: dict[str, Any], case: str) -> bool:
    """Whether a prefill step took as long as enqueueing it: the GPU waited for the host."""
    rows = record["cases"][case]["rows"]
    gpu = np.median([sum(p[0] for p in r[4]) for r in rows])
    host = np.median([sum(p[1] for p in r[4]) for r in rows])
    return bool(host > 0.97 * gpu)


def all_errors(
    records: list[dict[str, Any]], predicted: dict[str, Any]
) -> list[tuple[str, str, str, float, bool]]:
    """(record, case, routing, predicted / measured - 1, host-bound) of every step with graphs."""
    found = []
    for record in records:
        steps = predicted[record["key"]]["steps"]
        for case in record["cases"]:
            for routing in ("trace", "uniform", "same"):
                measured = float(np.median(samples(record, case, routing, "graph")))
                error = steps[case][routing]["ms"] / measured - 1
                bound = case.startswith("prefill") and host_bound(record, case)
                found.append((record["name"], case, routing, error, bound))
    return found


def errors_table(records: list[dict[str, Any]], predicted: dict[str, Any]) -> str:
    """Errors by kind of step."""
    errors = all_errors(records, predicted)
    kinds = {
        "decode, trace and uniform": lambda c, r, b: c.startswith("decode") and r != "same",
        "decode, the same experts for all": lambda c, r, b: c.startswith("decode") and r == "same",
        "prefill, bound by the GPU": lambda c, r, b: c.startswith("prefill") and not b,
        "prefill, bound by the host": lambda c, r, b: c.startswith("prefill") and b,
        "all": lambda c, r, b: True,
    }
    lines = ["| steps | cases | median error | 90th percentile | largest | bias |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, keep in kinds.items():
        e = np.array([x[3] for x in errors if keep(x[1], x[2], x[4])])
        size = np.abs(e)
        lines.append(
            f"| {name} | {len(e)} | {np.median(size):.1%} | {np.percentile(size, 90):.1%} |"
            f" {size.max():.0%} | {np.median(e):+.1%} |"
        )
    return "\n".join(lines)


def steps_table(records: list[dict[str, Any]], predicted: dict[str, Any]) -> str:
    """Every case with the trace's routing, and the ratio of the other routings to it."""
    lines = [
        "| run | step | measured, ms (95%) | predicted | uniform / trace, measured | predicted"
    ]
    lines[0] += " | same / trace, measured | predicted | without graphs |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for record in records:
        for case in record["cases"]:
            mid, low, high = interval(samples(record, case, "trace", "graph"))
            step = predicted[record["key"]]["steps"][case]
            ratios = []
            for routing in ("uniform", "same"):
                got = np.median(samples(record, case, routing, "graph")) / mid
                ratios += [f"{got:.2f}", f"{step[routing]['ms'] / step['trace']['ms']:.2f}"]
            eager = ""
            if case.startswith("decode"):
                eager = f"{np.median(samples(record, case, 'trace', 'eager')):.1f}"
            mark = ", host" if case.startswith("prefill") and host_bound(record, case) else ""
            ms = step["trace"]["ms"]
            lines.append(
                f"| {record['name']} | {case}{mark} | {mid:.2f} ({low:.2f} to {high:.2f}) |"
                f" {ms:.2f} ({ms / mid - 1:+.0%}) | {' | '.join(ratios)} | {eager} |"
            )
    return "\n".join(lines)


def memory_table(records: list[dict[str, Any]], predicted: dict[str, Any]) -> str:
    """What the engine took and left, beside the prediction, GB."""
    lines = ["| run | | weights | activations | beside torch | engine's share | KV cache |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for record in records:
        m, p = record["memory"], predicted[record["key"]]["memory"]
        weights = p["expert_weight_bytes"] + p["other_weight_bytes"]
        rows = {
            "engine": (m["weights"], m["peak_activation"], m["non_torch"], m["requested"]),
            "predicted": (weights, p["activation_bytes"], p["runtime_bytes"], p["usable_bytes"]),
        }
        kv = {
            "engine": f"{m['kv_cache'] / 1e9:.2f}",
            "predicted": f"{p['kv_cache_bytes'] / 1e9:.2f}"
            f" ({p['kv_cache_bytes'] / m['kv_cache'] - 1:+.1%})",
        }
        for who, values in rows.items():
            cells = " | ".join(f"{v / 1e9:.2f}" for v in values)
            lines.append(f"| {record['name']} | {who} | {cells} | {kv[who]} |")
    return "\n".join(lines)


def kind_of(kernel: str) -> str:
    """Part of the model that a kernel belongs to."""
    expert = ("fused_moe", "moe_align", "moe_sum", "count_and_sort", "reduce_kernel<128, 4")
    if any(word in kernel for word in (*expert, "act_and_mul", "swigluoai")):
        return "experts"
    return "attention" if "flash::" in kernel else "other"


def kernels_table(records: list[dict[str, Any]], predicted: dict[str, Any]) -> str:
    """Kernel times of one step from a profile, beside the predicted parts."""
    lines = ["| run | step | experts, ms | predicted | attention | predicted | rest | predicted |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for record in records:
        for case, kernels in record.get("profile", {}).items():
            steps = 1 if case.startswith("prefill") else 3
            got = dict.fromkeys(KINDS, 0.0)
            for name, us, _ in kernels:
                if not name.startswith("Memcpy"):
                    got[kind_of(name)] += us / steps / 1e3
            parts = predicted[record["key"]]["steps"][case]["trace"]["parts_ms"]
            want = {"experts": parts["experts"], "attention": parts["attention"]}
            want["other"] = sum(parts.values()) - parts["host"] - sum(want.values())
            cells = " | ".join(f"{got[k]:.2f} | {want[k]:.2f}" for k in KINDS)
            lines.append(f"| {record['name']} | {case} | {cells} |")
    return "\n".join(lines)


def put(report: Path, tables: dict[str, str], *, write: bool) -> None:
    """Print tables, or set each between the marks of its name in the report's README."""
    if not write:
        print("\n\n".join(f"-- {name}\n{text}" for name, text in tables.items()))
        return
    page = report / "README.md"
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
        text, count = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)
        if count != 1:
            raise SystemExit(f"no marks for {name}")
    page.write_text(text)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    records, predicted = load(args.report)
    tables = {
        "errors": errors_table(records, predicted),
        "steps": steps_table(records, predicted),
        "kernels": kernels_table(records, predicted),
        "memory": memory_table(records, predicted),
    }
    put(args.report, tables, write=args.write)


if __name__ == "__main__":
    main()
