"""A picture of a cluster's graph, laid out in tiers."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from moesim.cluster import LINK_CLASSES, Cluster
from moesim.errors import InputError
from moesim.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PLOT_GPUS = 576

_TIERS = {
    "spine": 6.0,
    "leaf": 4.6,
    "nic": 3.2,
    "host": 2.5,
    "pcie": 1.8,
    "gpu": 0.9,
    "nvswitch": 0.0,
}
_NAMES = {
    "spine": "spine switches",
    "leaf": "leaf switches",
    "nic": "NICs",
    "host": "hosts",
    "pcie": "PCIe",
    "gpu": "GPUs",
    "nvswitch": "NVSwitch",
}
_FILL = {
    "spine": "#d9d9d9",
    "leaf": "#d9d9d9",
    "nic": "#fdd9a8",
    "host": "#f2f2f2",
    "pcie": "#cfe3f3",
    "gpu": "#c7e6c3",
    "nvswitch": "#e2d5ee",
}
_COLOUR = {
    "nvlink": "#6a3d9a",
    "pcie": "#1f78b4",
    "nic": "#e07b00",
    "leaf_spine": "#444444",
    "host": "#999999",
    "nvme": "#999999",
}
_NODE_GAP = 1.0


def plot_topology(cluster: Cluster, path: str | PathLike[str]) -> None:
    """Draw `cluster` into `path` (the suffix gives the format: png, svg, pdf).

    Tiers from the top: spines, leaves, NICs, hosts, PCIe, GPUs, NVSwitches; the two directions of a
    link are one line, its width growing with the bandwidth. DRAM and NVMe are not drawn. Raises
    InputError for more than MAX_PLOT_GPUS GPUs or a path that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if cluster.num_gpus > MAX_PLOT_GPUS:
        raise InputError(
            f"a picture of {cluster.num_gpus} GPUs would be unreadable",
            f"plot a part of it: `gpus` {MAX_PLOT_GPUS} or fewer",
        )
    where = _positions(cluster)
    span = max(x for x, _ in where.values()) + 1
    inches = 0.42 if span <= 40 else 0.3
    width = float(np.clip(2.0 + inches * span, 8.0, 30.0))
    figure = Figure(figsize=(width, max(5.6, 0.28 * width)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    fabric = cluster.fabric
    lines: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {}
    widths: dict[str, list[float]] = {}
    rates: dict[str, set[float]] = {}
    for link, name in enumerate(fabric.link_name):
        source, _, target = name.partition("->")
        if source > target or source not in where or target not in where:
            continue
        kind = LINK_CLASSES[fabric.link_class[link]]
        rate = float(fabric.link_gb_per_s[link])
        ends = [where[source], where[target]]
        for i, end in enumerate((source, target)):
            if end.startswith("nvswitch:"):
                ends[i] = (ends[1 - i][0], ends[i][1])
        lines.setdefault(kind, []).append((ends[0], ends[1]))
        widths.setdefault(kind, []).append(0.35 * float(np.log2(1 + rate / 8)))
        rates.setdefault(kind, set()).add(rate)
    thin = 1.0 if span <= 40 else 0.6
    for kind, segments in lines.items():
        axes.add_collection(
            LineCollection(
                segments,
                colors=_COLOUR[kind],
                linewidths=[thin * w for w in widths[kind]],
                alpha=0.75,
                zorder=1,
            )
        )
    _draw_boxes(axes, where, span, width)
    _draw_switches(axes, cluster, where)
    tiers = [tier for tier in _TIERS if any(name.startswith(f"{tier}:") for name in where)]
    for tier in tiers:
        axes.text(
            -0.005,
            _TIERS[tier],
            _NAMES[tier],
            ha="right",
            va="center",
            fontsize=9,
            transform=axes.get_yaxis_transform(),
        )
    heights = [_TIERS[tier] for tier in tiers]
    axes.set_xlim(-0.8, span - 0.2)
    axes.set_ylim(min(heights) - 0.5, max(heights) + 0.5)
    axes.set_axis_off()
    axes.set_title(
        f"{cluster.name}: {cluster.num_gpus} GPUs in {cluster.num_nodes} "
        f"{'node' if cluster.num_nodes == 1 else 'nodes'}, figures {cluster.basis().kind}",
        fontsize=11,
    )
    handles = [
        Line2D([], [], color=_COLOUR[kind], label=f"{kind}: {_rates(rates[kind])} GB/s")
        for kind in LINK_CLASSES
        if kind in rates
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    with atomic_path(path) as temporary:
        try:
            figure.savefig(
                temporary, dpi=150, metadata={"Software": None} if _is_png(path) else None
            )
        except ValueError as error:
            raise InputError(
                f"cannot draw {path}: {error}", "name a file ending in .png, .svg or .pdf"
            ) from None


def _positions(cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Place of every drawn vertex. GPUs in order with a gap between nodes; the others above or
    below what they attach to."""
    fabric = cluster.fabric
    x_of: dict[int, float] = {}
    for gpu, vertex in enumerate(fabric.gpu_vertex.tolist()):
        x_of[vertex] = gpu + _NODE_GAP * float(cluster.node_of_gpu[gpu])
    kind = [name.partition(":")[0] for name in fabric.vertices]
    neighbours: dict[int, list[int]] = {}
    for a, b in zip(fabric.link_src.tolist(), fabric.link_dst.tolist(), strict=True):
        neighbours.setdefault(a, []).append(b)
    nic_x: dict[int, list[float]] = {}
    for gpu, nic in enumerate(fabric.nic_of_gpu.tolist()):
        nic_x.setdefault(nic, []).append(x_of[int(fabric.gpu_vertex[gpu])])
    nics = [v for v, name in enumerate(kind) if name == "nic"]
    for idx, vertex in enumerate(nics):
        x_of[vertex] = sum(nic_x[idx]) / len(nic_x[idx])
    for tier, below in (("nvswitch", "gpu"), ("pcie", "gpu"), ("host", "pcie")):
        for vertex, name in enumerate(kind):
            if name == tier:
                xs = [x_of[v] for v in neighbours.get(vertex, []) if kind[v] == below]
                x_of[vertex] = sum(xs) / len(xs)
    taken = [x_of[v] for v in nics]
    for vertex, name in enumerate(kind):
        if name == "host" and any(abs(x_of[vertex] - x) < 0.3 for x in taken):
            x_of[vertex] += 0.7
    right = max(x_of.values())
    for tier in ("leaf", "spine"):
        members = [v for v, name in enumerate(kind) if name == tier]
        for i, vertex in enumerate(members):
            x_of[vertex] = right * (i + 0.5) / len(members)
    return {
        fabric.vertices[vertex]: (x, _TIERS[kind[vertex]])
        for vertex, x in x_of.items()
        if kind[vertex] in _TIERS
    }


def _draw_boxes(
    axes: Axes, where: dict[str, tuple[float, float]], span: float, width: float
) -> None:
    """Vertices as labelled boxes, the label shrinking with the number of GPUs."""
    size = float(np.clip(72 * width / span / 3.2, 2.5, 8.0))
    for name, (x, y) in where.items():
        tier, _, label = name.partition(":")
        if tier == "nvswitch":
            continue
        if tier == "pcie":
            label = label.partition(":")[2]
        axes.text(
            x,
            y,
            label,
            ha="center",
            va="center",
            fontsize=8.0 if tier in ("leaf", "spine") else size,
            zorder=2,
            bbox={"boxstyle": "round,pad=0.25", "fc": _FILL[tier], "ec": "#555555", "lw": 0.5},
        )


def _draw_switches(axes: Axes, cluster: Cluster, where: dict[str, tuple[float, float]]) -> None:
    """NVSwitches as bars under all the GPUs that they join."""
    from matplotlib.patches import FancyBboxPatch

    reach: dict[str, list[float]] = {}
    for link in cluster.fabric.nv_up[cluster.fabric.nv_up >= 0].tolist():
        source, _, target = cluster.fabric.link_name[link].partition("->")
        reach.setdefault(target, []).append(where[source][0])
    for name, xs in reach.items():
        y = where[name][1]
        axes.add_patch(
            FancyBboxPatch(
                (min(xs) - 0.3, y - 0.14),
                max(xs) - min(xs) + 0.6,
                0.28,
                boxstyle="round,pad=0,rounding_size=0.1",
                fc=_FILL["nvswitch"],
                ec="#555555",
                lw=0.5,
                zorder=2,
            )
        )
        middle = (min(xs) + max(xs)) / 2
        axes.text(middle, y, name.partition(":")[2], ha="center", va="center", fontsize=8, zorder=3)


def _rates(values: Iterable[float]) -> str:
    return " or ".join(f"{value:.4g}" for value in sorted(values))


def _is_png(path: str | PathLike[str]) -> bool:
    return str(path).lower().endswith(".png")
