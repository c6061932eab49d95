"""Tables of reports/engine-vllm-x2 from its records: measured beside predicted.

    python verification/engine/two_tables.py reports/engine-vllm-x2 [--write]

Without --write the tables are printed; with it they replace what stands between the marks of the
same name in the report's README. `predictions.json` was written before the runs, `after.json` by
the same script after what they taught.
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tables import interval, put

HOST_SHARE = 0.9
KINDS = {
    "decode, 8 to 128 sequences": lambda c, h: c.startswith("decode") and c != "decode-512x512",
    "decode, 512 sequences": lambda c, h: c == "decode-512x512",
    "prefill, bound by the GPU": lambda c, h: c.startswith("prefill") and not h,
    "prefill, bound by the host": lambda c, h: c.startswith("prefill") and h,
}
PARTS = {
    "experts": (
        "fused_moe",
        "moe_align",
        "count_and_sort",
        "act_and_mul",
        "silu",
        "swiglu",
        "reduce_kernel",
        "moe_sum",
    ),
    "communication": ("nccl",),
    "attention": ("flash",),
    "products": ("nvjet", "gemm", "cublas"),
}
MODELLED = {
    "experts": ("experts",),
    "communication": ("communication",),
    "attention": ("attention", "projections"),
    "products": ("shared_experts", "dense_ffn", "router", "head"),
}
"""Latent attention is predicted as a module, its products among `projections`."""
Key = tuple[str, str, str, str]


def records(report: Path) -> list[dict[str, Any]]:
    """Rank 0's record of every run of steps; both ranks saw the same walls."""
    return [
        json.loads(gzip.decompress(path.read_bytes()))
        for path in sorted((report / "raw").glob("*.0.json.gz"))
        if not path.name.startswith(("kernels", "dsv2-lite-balancer"))
    ]


def host_bound(rows: list[Any], case: str) -> bool:
    """Whether enqueueing a prefill step took as long as the step on some rank."""
    if not case.startswith("prefill"):
        return False
    times = np.array([[np.sum(worker, axis=0) for worker in row[3]] for row in rows])
    gpu, host = np.median(times, axis=0).T
    return bool((host > HOST_SHARE * gpu).any())


def measured(report: Path) -> dict[Key, tuple[np.ndarray, bool]]:
    """{(model, mode, placement, case): (milliseconds, one value a round; bound by the host)}."""
    found = {}
    for record in records(report):
        for case, rows in record["cases"].items():
            host = host_bound(rows, case)
            for name in dict.fromkeys(row[1] for row in rows):
                values = np.array([np.median(row[2]) for row in rows if row[1] == name])
                found[record["model"], record["mode"], name, case] = (values, host)
    return found


def predicted(report: Path, name: str, value: str = "ms") -> dict[Key, float]:
    """Milliseconds by the same keys; value "host_ms": with the host named."""
    models = json.loads((report / name).read_text())["models"]
    return {
        (model, mode, plan, case): row[value]
        for model, given in models.items()
        for mode, plans in given["modes"].items()
        for plan, cases in plans.items()
        for case, row in cases.items()
    }


def errors_table(report: Path) -> str:
    """Errors by kind of step and mode, before and after."""
    found = measured(report)
    every = [predicted(report, n) for n in ("predictions.json", "after.json")]
    every.append(predicted(report, "after.json", "host_ms"))
    lines = ["| steps | mode | cases | median, 90th percentile | bias | with the changes | bias |"]
    lines[0] += " and the host named | bias |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for kind, keep in KINDS.items():
        for mode in ("dp", "tp"):
            keys = [k for k, (_, host) in found.items() if k[1] == mode and keep(k[3], host)]
            cells = []
            for given in every:
                e = np.array([given[k] / np.median(found[k][0]) - 1 for k in keys])
                size = np.abs(e)
                cells += [f"{np.median(size):.1%}, {np.percentile(size, 90):.1%}"]
                cells += [f"{np.median(e):+.1%}"]
            lines.append(f"| {kind} | {mode.upper()}2 + EP2 | {len(keys)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(report: Path) -> str:
    """Linear in milliseconds; the other placements against it, measured (predicted)."""
    found, before = measured(report), predicted(report, "predictions.json")
    lines = ["| model | mode | step | linear, ms (95%) | predicted | eplb | time | balance | bad |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for key in (k for k in found if k[2].startswith("linear")):
        model, mode, name, case = key
        extra = name.removeprefix("linear")
        values, host = found[key]
        mid, low, high = interval(values)
        cells = []
        for other in ("eplb", "time", "balance", "bad"):
            there = (model, mode, other + extra, case)
            got = np.median(found[there][0]) / mid - 1
            cells.append(f"{got:+.1%} ({before[there] / before[key] - 1:+.1%})")
        mark = ", host" if host else ""
        ms = before[key]
        lines.append(
            f"| {model}{', redundant' * bool(extra)} | {mode} | {case}{mark} | {mid:.2f}"
            f" ({low:.2f} to {high:.2f}) | {ms:.2f} ({ms / mid - 1:+.0%}) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def orders_table(report: Path) -> str:
    """Pairs of placements of one start that differ by more than noise: how many in order."""
    found = measured(report)
    given = predicted(report, "predictions.json"), predicted(report, "after.json")
    lines = [
        "| steps | pairs | differ by more than noise | in order | with the changes | without bad |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for kind, keep in KINDS.items():
        apart, right, count, plain = 0, [0, 0], 0, [0, 0]
        for a, b in combinations(found, 2):
            same = (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and a[2][-1:] != "+" != b[2][-1:]
            same |= (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and a[2][-1:] == b[2][-1:] == "+"
            if not same or not keep(a[3], found[a][1]):
                continue
            count += 1
            x, y = interval(found[a][0]), interval(found[b][0])
            if not (x[1] > y[2] or x[2] < y[1]):
                continue
            apart += 1
            good = [(x[0] > y[0]) == (p[a] > p[b]) for p in given]
            right = [r + g for r, g in zip(right, good, strict=True)]
            if "bad" not in a[2] + b[2]:
                plain = [plain[0] + good[0], plain[1] + 1]
        lines.append(
            f"| {kind} | {count} | {apart} | {right[0]} | {right[1]} | {plain[0]} of {plain[1]} |"
        )
    return "\n".join(lines)


def memory_table(report: Path) -> str:
    """The engine's memory of a GPU, GB, beside what the model says."""
    models = json.loads((report / "after.json").read_text())["models"]
    lines = ["| model | mode | weights | predicted | activations | beside torch | KV cache"]
    lines[0] += " | predicted |"
    lines += ["|---|---|---|---|---|---|---|---|"]
    for record in records(report):
        name = "linear" + "+" * record["redundant"]
        wanted = models[record["model"]]["memory"][record["mode"]][name]
        found = record["memory"][0]
        kv = found["available_kv_cache_memory_bytes"]
        run = f"{record['model']}{', redundant' * record['redundant']} | {record['mode']}"
        lines.append(
            f"| {run} | {found['weights'] / 1e9:.2f} | {wanted['weights'] / 1e9:.2f} |"
            f" {found['peak_activation_memory'] / 1e9:.2f} | {found['non_torch_memory'] / 1e9:.2f}"
            f" | {kv / 1e9:.2f} | {wanted['kv_cache'] / 1e9:.2f}"
            f" ({wanted['kv_cache'] / kv - 1:+.1%}) |"
        )
    return "\n".join(lines)


def part_of(kernel: str) -> str:
    """Part of a step that a kernel belongs to."""
    for part, words in PARTS.items():
        if any(word in kernel.lower() for word in words):
            return part
    return "rest"


def other_rank(report: Path, record: dict[str, Any], key: str) -> list[Any]:
    """The same profile of the other data-parallel rank."""
    if record["mode"] != "dp":
        return []
    name = f"{record['model']}-dp{'-redundant' * record['redundant']}.1.json.gz"
    raw = gzip.decompress((report / "raw" / name).read_bytes())
    return list(json.loads(raw)["profile"][key])


def kernels_table(report: Path) -> str:
    """Kernels of a prefill step of 16 x 1,024 tokens under linear, busier rank, milliseconds."""
    before = json.loads((report / "predictions.json").read_text())["models"]
    lines = [
        "| model | mode | experts | predicted | communication | predicted | attention and products"
    ]
    lines[0] += " | predicted | rest | predicted | all | step |"
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for record in records(report):
        key = next((k for k in record.get("profile", {}) if "prefill" in k and "linear" in k), None)
        if key is None:
            continue
        name, case = key.split()
        wanted = before[record["model"]]["modes"][record["mode"]][name][case]
        best: dict[str, float] = {}
        for worker in record["profile"][key] + other_rank(report, record, key):
            times: dict[str, float] = dict.fromkeys((*PARTS, "rest"), 0.0)
            for kernel, us, _ in worker:
                times[part_of(kernel)] += us / 1e3
            if times["experts"] > best.get("experts", 0.0):
                best = times
        model = {p: sum(wanted["parts_ms"].get(n, 0.0) for n in ns) for p, ns in MODELLED.items()}
        other = wanted["ms"] - sum(model.values())
        both = [
            (best["experts"], model["experts"]),
            (best["communication"], model["communication"]),
            (best["attention"] + best["products"], model["attention"] + model["products"]),
            (best["rest"], other),
        ]
        cells = " | ".join(f"{a:.1f} | {b:.1f}" for a, b in both)
        step = np.median([r[2] for r in record["cases"][case] if r[1] == name])
        run = f"{record['model']}{', redundant' * record['redundant']} | {record['mode']}"
        lines.append(f"| {run} | {cells} | {sum(best.values()):.1f} | {step:.1f} |")
    return "\n".join(lines)


def moved(before: np.ndarray, after: np.ndarray, ranks: int = 2) -> tuple[int, int]:
    """(experts that a rank gets from another, slots filled from the rank's own memory), the larger
    rank's; vLLM receives an expert once for a rank, and copies it on."""
    most, copied = 0, 0
    for rank in range(ranks):
        width = before.shape[1] // ranks
        part = slice(rank * width, (rank + 1) * width)
        far = near = 0
        for old, new in zip(before[:, part], after[:, part], strict=True):
            changed = new[old != new]
            here = np.isin(changed, old)
            far += len(np.unique(changed[~here]))
            near += int(here.sum())
        most, copied = max(most, far), max(copied, near)
    return most, copied


def cycles_of(report: Path) -> dict[str, list[tuple[float, float, dict[str, Any]]]]:
    """{way: (GB that the busier rank receives, seconds, the record) of every rearrangement}, those
    of the first start first; without the one that opens NCCL's connections."""
    raw = report / "raw"
    read = [json.loads(gzip.decompress(p.read_bytes())) for p in sorted(raw.glob("*.0.json.gz"))]
    found: dict[str, list[tuple[float, float, dict[str, Any]]]] = {}
    for record in reversed(read):
        given = record.get("balancer", {})
        for way in ("sync", "async", "sync-nccl"):
            for cycle in given.get(way, {}).get("cycles", ())[way == "sync-nccl" :]:
                far, _ = moved(np.array(cycle["before"]), np.array(cycle["after"]))
                log = [row for worker in cycle["log"] for row in worker]
                (start,) = [row for row in log if row[0] == "rearrange"]
                last = [row for row in log if row[0] == "layer"][-1:] or [start]
                gb = far * given["about"][0]["bytes_per_expert"] / 1e9
                found.setdefault(way, []).append((gb, last[0][2] - start[1], cycle))
    return found


def rearrangements_table(report: Path) -> str:
    """What a rearrangement of 26 layers took, by the way that the weights go."""
    lines = ["| weights go | rearrangements | GB received | took, s (range) | GB/s"]
    lines[0] += " | step before, ms | longest step | step meanwhile | step after |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    names = {
        "sync": "in the step, gloo",
        "sync-nccl": "in the step, NCCL",
        "async": "beside the steps, gloo",
    }
    for way, cycles in cycles_of(report).items():
        rows = []
        for gb, took, cycle in cycles:
            first, during, last = (np.diff(m) * 1e3 for m in cycle["marks"])
            steps = (np.median(first), during.max(), np.median(during), np.median(last))
            rows.append([gb, took, *steps])
        gb, took, first, longest, during, last = np.median(rows, axis=0)
        times = np.array(rows)[:, 1]
        span = f"{took:.3g} ({times.min():.3g} to {times.max():.3g}) | {gb / took:.3g}"
        steps = f"{first:.2f} | {longest:,.0f} | {during:.2f} | {last:.2f}"
        lines.append(f"| {names[way]} | {len(rows)} | {gb:.2f} | {span} | {steps} |")
    return "\n".join(lines)


TABLES = {
    "errors": errors_table,
    "orders": orders_table,
    "rearrangements": rearrangements_table,
    "kernels": kernels_table,
    "memory": memory_table,
    "steps": steps_table,
}


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tables = {name: make(args.report) for name, make in TABLES.items()}
    put(args.report, tables, write=args.write)


if __name__ == "__main__":
    main()
