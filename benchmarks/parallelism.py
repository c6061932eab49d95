"""EP against TP against DP of one MoE layer, by tokens of each GPU: times, crossovers, layers.

python benchmarks/parallelism.py --out reports/parallelism

writes results.json, times.png, layers.png and tables.md there. Per-layer figures come from routing
traces: those of ../shared/data where that folder is, else the bundled one alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from parallelism_times import WAYS, LayerTimes, best_way, crossovers, layer_times

from moesim.cluster import load_cluster
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.serving.moe_load import MoeLoad, assumed_load, load_of_trace
from moesim.trace.format import load_token_trace

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3")
CLUSTERS = (("h100-sxm-ib", 8), ("h100-sxm-ib", 16), ("h100-sxm-ib", 32), ("l40s-pcie", 8))
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
SPREADS = (0.0, 1.0, 2.0)
COLOURS = {
    "ep": "#1f6fb4", "ep_gather": "#7fb3d9", "tp": "#d9741a", "dp": "#3a8f3a", "dp_gather": "0.55",
}  # fmt: skip
TRACES = (
    ("gpt-oss-20b.npz", "gpt-oss-20b"),
    ("deepseek-v2-lite.npz", "deepseek-v2-lite"),
)


def all_ways(model: Any, cluster: Any, load: MoeLoad) -> list[LayerTimes]:
    """The times of every way that is possible."""
    out = []
    for way in WAYS:
        try:
            out.append(layer_times(way, model, cluster, load, TOKENS))
        except InputError:
            continue
    return out


def regret(times: list[LayerTimes]) -> dict[str, dict[str, float]]:
    """By way: its time over the best way's, mean and most over the loads."""
    fitting = [t for t in times if t.fits]
    best = np.stack([t.total_us for t in fitting]).min(axis=0)
    ratios = {t.way: t.total_us / best for t in fitting}
    return {w: {"mean": float(r.mean()), "max": float(r.max())} for w, r in ratios.items()}


def study() -> list[dict[str, Any]]:
    """A row for every model, cluster and spread of the popularity."""
    rows = []
    for name in MODELS:
        model = load_model(name)
        for cluster_name, gpus in CLUSTERS:
            cluster = load_cluster(cluster_name, gpus)
            for spread in SPREADS:
                load = assumed_load(model.num_experts, model.top_k).spread(spread)
                times = all_ways(model, cluster, load)
                row: dict[str, Any] = {
                    "model": model.name,
                    "cluster": cluster_name,
                    "gpus": gpus,
                    "spread": spread,
                    "ways": {
                        t.way: {
                            "total_us": np.round(t.total_us, 2).tolist(),
                            "communication_us": np.round(t.communication_us, 2).tolist(),
                            "library": list(t.library) if any(t.library) else None,
                            "weight_gb": round(t.weight_bytes / 1e9, 2),
                            "fits": t.fits,
                            "basis": t.basis,
                            "notes": list(t.notes),
                        }
                        for t in times
                    },
                }
                if any(t.fits for t in times):
                    row["best"] = best_way(times)
                    row["crossovers"] = [
                        {"tokens_per_gpu": round(at, 1), "from": a, "to": b}
                        for at, a, b in crossovers(TOKENS, times)
                    ]
                    row["regret"] = regret(times)
                rows.append(row)
    return rows


def by_layer(folder: Path) -> list[dict[str, Any]]:
    """The quickest of ep and tp for every layer of real traces, on 8 GPUs of the first cluster."""
    found = [(folder / file, model) for file, model in TRACES if (folder / file).exists()]
    rows = []
    for path, name in [*found, (Path("sample:debian-moe"), "debian-moe")]:
        model, trace = load_model(name), load_token_trace(str(path), "this study")
        load = load_of_trace(trace)
        cluster = load_cluster(*CLUSTERS[0])
        layers = []
        for layer in range(trace.num_layers):
            one = MoeLoad(load.inclusion[layer : layer + 1], load.source)
            pair = [layer_times(way, model, cluster, one, TOKENS) for way in ("ep", "tp")]
            layers.append(np.stack([t.total_us for t in pair]))
        stacked = np.stack(layers)  # [layers, 2, loads]
        fixed = stacked.sum(axis=0)
        rows.append(
            {
                "trace": path.name,
                "model": model.name,
                "num_layers": trace.num_layers,
                "ep_is_quicker": (stacked[:, 0] < stacked[:, 1]).sum(axis=0).tolist(),
                "ep_us": np.round(fixed[0], 1).tolist(),
                "tp_us": np.round(fixed[1], 1).tolist(),
                "by_load_us": np.round(fixed.min(axis=0), 1).tolist(),
                "by_load_and_layer_us": np.round(stacked.min(axis=1).sum(axis=0), 1).tolist(),
                "ratio": np.round(stacked[:, 0] / stacked[:, 1], 4).tolist(),
            }
        )
    return rows


def plot_times(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for every model and cluster at the assumed popularity."""
    figure = Figure(figsize=(3.3 * len(CLUSTERS), 2.7 * len(MODELS)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MODELS), len(CLUSTERS), sharex=True, squeeze=False)
    shown = [row for row in rows if row["spread"] == 1.0]
    for ax, row in zip(axes.ravel(), shown, strict=True):
        for way, times in row["ways"].items():
            style = "-" if times["fits"] else ":"
            label = way if times["fits"] else f"{way} (does not fit)"
            ax.plot(TOKENS, times["total_us"], style, color=COLOURS[way], label=label)
        for cross in row.get("crossovers", []):
            ax.axvline(cross["tokens_per_gpu"], color="0.75", linewidth=0.8, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(f"{row['model']}, {row['gpus']} GPUs, {row['cluster']}", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.2, linewidth=0.5)
        ax.legend(fontsize=6)
    for ax in axes[-1]:
        ax.set_xlabel("tokens of each GPU", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("us a layer", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_layers(rows: list[dict[str, Any]], path: Path) -> None:
    """Time under ep over time under tp: layers down, loads across."""
    figure = Figure(figsize=(4.2 * len(rows), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for ax, row in zip(axes, rows, strict=True):
        image = ax.imshow(
            np.log2(np.array(row["ratio"])), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1
        )
        ax.set_xticks(range(0, len(TOKENS), 2), [str(t) for t in TOKENS[::2]], fontsize=7)
        ax.set_xlabel("tokens of each GPU", fontsize=8)
        ax.set_ylabel("MoE layer", fontsize=8)
        ax.set_title(f"{row['model']}, 8 GPUs, {CLUSTERS[0][0]}", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels(["ep half", "0.7", "equal", "1.4", "tp half"], fontsize=7)
    figure.savefig(path, dpi=110)


def tables(rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> str:
    """Markdown of the crossovers, the cost of never switching, and the layers."""
    out = [
        "| model | cluster | quickest way by tokens of each GPU | rests on |",
        "|---|---|---|---|",
    ]
    for row in (r for r in rows if r["spread"] == 1.0):
        where = f"{row['gpus']} x {row['cluster']}"
        if "best" not in row:
            out.append(f"| {row['model']} | {where} | nothing fits | |")
            continue
        parts = [row["best"][0]]
        parts += [f"-- {c['tokens_per_gpu']:.0f} --> {c['to']}" for c in row["crossovers"]]
        basis = {row["ways"][way]["basis"] for way in row["best"]}
        out.append(f"| {row['model']} | {where} | {' '.join(parts)} | {', '.join(sorted(basis))} |")
    out += ["", "| model | cluster | " + " | ".join(WAYS) + " |", "|---|---|" + "---|" * len(WAYS)]
    for row in (r for r in rows if r["spread"] == 1.0 and "regret" in r):
        cells = []
        for way in WAYS:
            found = row["regret"].get(way)
            cells.append(f"{found['mean']:.2f} ({found['max']:.1f})" if found else "-")
        out.append(f"| {row['model']} | {row['gpus']} x {row['cluster']} | {' | '.join(cells)} |")
    out += [
        "",
        "| model | cluster | balanced | assumed | twice as skewed |",
        "|---|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str, int], dict[float, str]] = {}
    for row in (r for r in rows if "best" in r):
        text = row["best"][0] + "".join(
            f" {c['tokens_per_gpu']:.0f} {c['to']}" for c in row["crossovers"]
        )
        grouped.setdefault((row["model"], row["cluster"], row["gpus"]), {})[row["spread"]] = text
    for (model, cluster, gpus), texts in grouped.items():
        cells = " | ".join(texts[s] for s in SPREADS)
        out.append(f"| {model} | {gpus} x {cluster} | {cells} |")
    at = [TOKENS.index(t) for t in (1, 4, 16, 64, 256, 1024, 4096)]
    heads = " | ".join(str(TOKENS[i]) for i in at)
    out += ["", f"| model, layers where ep is quicker, at tokens of each GPU | {heads} |"]
    out += ["|---|" + "---|" * len(at)]
    for row in layers:
        cells = " | ".join(f"{row['ep_is_quicker'][i]}" for i in at)
        out.append(f"| {row['model']}, of {row['num_layers']} | {cells} |")
        gain = [1 - row["by_load_and_layer_us"][i] / row["by_load_us"][i] for i in at]
        cells = " | ".join(f"{100 * g:.1f}%" for g in gain)
        out.append(f"| time saved by choosing layer by layer | {cells} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/parallelism"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, layers = study(), by_layer(args.data)
    data = {"tokens_per_gpu": TOKENS, "rows": rows, "layers": layers}
    (args.out / "results.json").write_text(json.dumps(data, indent=0) + "\n")
    plot_times(rows, args.out / "times.png")
    plot_layers(layers, args.out / "layers.png")
    text = tables(rows, layers)
    (args.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
