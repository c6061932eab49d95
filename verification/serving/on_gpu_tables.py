"""Tables of reports/recommend-on-gpu, put between the marks of its README.

    python verification/serving/on_gpu_tables.py reports/recommend-on-gpu TRACE [--write]

TRACE: the routing that the recommendation rests on, which is not kept (the report says how to make
it).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from predict import deployment, routed

from moesim.serving.batch import BatchShape
from moesim.serving.step_cost import EngineStepCost
from moesim.studies.recommend.measured import MeasuredResult, compare_measured
from moesim.trace.format import load_token_trace

RATES = ("4", "10", "20")
FITTED = "10"
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")


def answer_of(report: Path, trace: Path, folder: Path) -> Path:
    """The recommendation, of a model folder and a trace that are here."""
    text = json.loads((report / "scripts" / "recommendation.json").read_text())
    one = text["answers"][0]
    one["model_source"], one["trace_source"] = "Qwen3-30B-A3B", str(trace)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recommendation.json").write_text(json.dumps(text))
    return folder


def cell(value: float, measured: float) -> str:
    return f"{value * 1e3:.1f} ({value / measured - 1:+.0%})"


def served(report: Path, answer: Path) -> str:
    """Latencies by rate: measured, as written down, and with constants of another rate's run."""
    written = json.loads((report / "predictions.json").read_text())["qwen3"]
    runs = {rate: compare_measured(answer, report / f"raw/qwen3-{rate}.json") for rate in RATES}
    file = answer / "mine.yaml"
    runs[FITTED].save(file)
    lines = ["| requests/s | | measured, ms | profile of vLLM | host named | refitted at 10/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for rate in RATES:
        path = report / f"raw/qwen3-{rate}.json"
        mine: MeasuredResult = compare_measured(answer, path, engine=str(file))
        for name in FIGURES:
            real = runs[rate].measured.figures[name]
            before = [written[rate][key][name] for key in ("vllm", "host")]
            cells = " | ".join(cell(v, real) for v in (*before, mine.predicted[name] or 0.0))
            label = name.replace("_", " ").upper().replace("P50", "p50").replace("P99", "p99")
            lines.append(f"| {rate} | {label} | {real * 1e3:.1f} | {cells} |")
    return "\n".join(lines)


def padded(report: Path, trace: Path) -> str:
    """Decode batches between two sizes of graphs, the model's own router."""
    raw: dict[str, Any] = json.loads(gzip.decompress((report / "raw/padding.json.gz").read_bytes()))
    uniform = routed(load_token_trace(str(trace), "this report"), "uniform")
    cost = EngineStepCost(deployment("qwen3-30b", uniform))
    limit = cost.graph_limit
    lines = ["| sequences | graph | measured, ms | one token in all added rows | before | now |"]
    lines += ["|---|---|---|---|---|---|"]
    errors: list[tuple[float, float]] = []
    for key, rows in raw["decode"].items():
        count = int(key)
        times = {f: median(median(r[2]) for r in rows if r[0] == f) for f in {r[0] for r in rows}}
        batch = BatchShape.of(decode_tokens=count, decode_context_tokens=count * 540)
        both = []
        for cost.graph_limit in (0.0, limit):
            both.append(float(cost.step_us(batch)) / 1e3)
        real = times["stale"]
        errors.append((both[0] / real - 1, both[1] / real - 1))
        cells = " | ".join(f"{v:.2f} ({v / real - 1:+.1%})" for v in both)
        one = f"{times['one token']:.2f}" if "one token" in times else ""
        graph = next(s for s in (8, 16, 24, 32, 40, 64, 128, 256, 512) if s >= count)
        lines.append(f"| {count} | {graph} | {real:.2f} | {one} | {cells} |")
    sizes = np.abs(np.array(errors))
    said = [f"{np.median(e):.1%}, {np.percentile(e, 90):.1%}" for e in sizes.T]
    lines.append(f"| median, 90th percentile of errors | | | | {said[0]} | {said[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    answer = answer_of(args.report, args.trace, Path("out/recommend-on-gpu"))
    tables = {"served": served(args.report, answer), "padded": padded(args.report, args.trace)}
    page = args.report / "README.md"
    text = page.read_text() if args.write else ""
    for name, table in tables.items():
        print(table)
        mark = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(mark, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    if args.write:
        page.write_text(text)


if __name__ == "__main__":
    main()
