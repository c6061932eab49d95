"""A picture of a cluster's graph, laid out in tiers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moesim.cluster import LINK_CLASSES, Cluster
from moesim.draw.charts import layer, own_look
from moesim.draw.colours import SOFT, TEXT
from moesim.draw.picture import Picture, Spec
from moesim.errors import InputError

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


def topology(cluster: Cluster) -> Picture:
    """The graph of `cluster` in tiers from the top: spines, leaves, NICs, hosts, PCIe, GPUs,
    NVSwitches.

    The two directions of a link are one line, its width growing with the bandwidth. DRAM and NVMe
    are not drawn. Raises InputError for more than MAX_PLOT_GPUS GPUs.
    """
    if cluster.num_gpus > MAX_PLOT_GPUS:
        raise InputError(
            f"a picture of {cluster.num_gpus} GPUs would be unreadable",
            f"plot a part of it: `gpus` {MAX_PLOT_GPUS} or fewer",
        )
    where = _positions(cluster)
    span = max(x for x, _ in where.values()) + 1
    width = int(np.clip(span * (30 if span <= 40 else 21), 520, 2200))
    links, rates = _links(cluster, where, 1.0 if span <= 40 else 0.6)
    tiers = [tier for tier in _TIERS if any(name.startswith(f"{tier}:") for name in where)]
    heights = [_TIERS[tier] for tier in tiers]
    x: Spec = {"type": "quantitative", "axis": None, "scale": {"domain": [-0.8, span - 0.2]}}
    y: Spec = {"type": "quantitative"}
    y["scale"] = {"domain": [min(heights) - 0.5, max(heights) + 0.5], "nice": False}
    names = "{" + ", ".join(f"'{_TIERS[t]:g}': '{_NAMES[t]}'" for t in tiers) + "}"
    y["axis"] = {"values": heights, "labelExpr": f"{names}[format(datum.value, '~g')]"}
    y["axis"] |= {"grid": False, "title": None, "labelColor": TEXT}
    kinds = {kind: f"{kind}: {_rates(rates[kind])} GB/s" for kind in LINK_CLASSES if kind in rates}
    legend = {"orient": "bottom", "symbolType": "stroke", "symbolStrokeWidth": 2}
    legend["columns"] = len(kinds) if width > 170 * len(kinds) else 2
    colour: Spec = {"field": "kind", "type": "nominal", "legend": legend}
    colour["scale"] = {"domain": list(kinds.values()), "range": [_COLOUR[kind] for kind in kinds]}
    size = float(np.clip(width / span / 2.6, 3.5, 11.0))
    links = [link | {"kind": kinds[link["kind"]]} for link in links]
    height = int(np.clip(0.3 * width, 330, 620))
    high = (11 if size >= 6 else 7) * (max(heights) - min(heights) + 1) / height
    boxes = [*_boxes(where, size, width / (span + 0.6), high), *_switches(cluster, where, high)]
    box: Spec = {"x": {**x, "field": "x"}, "y": {**y, "field": "y"}}
    corners: Spec = {"x": {**x, "field": "left"}, "x2": {"field": "right"}}
    corners |= {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    ends = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}
    rect = {"type": "rect", "stroke": SOFT, "strokeWidth": 0.5, "cornerRadius": 3}
    text = {"type": "text", "baseline": "middle"}
    wide, points = ({"field": f, "type": "quantitative", "scale": None} for f in ("wide", "size"))
    name, label = {"field": "name"}, {"field": "label"}
    layers = [
        layer(
            links, {"type": "rule", "opacity": 0.75}, **box, **ends, color=colour, strokeWidth=wide
        ),
        layer(boxes, rect, **corners, color=own_look("fill"), description=name),
        layer(boxes, text, **box, text=label, size=points),
    ]
    nodes = "node" if cluster.num_nodes == 1 else "nodes"
    title = f"{cluster.name}: {cluster.num_gpus} GPUs in {cluster.num_nodes} {nodes}"
    about = f"figures {cluster.basis().kind}"
    view: Spec = {"title": {"text": title, "subtitle": about}}
    view |= {"width": width, "height": height, "layer": layers}
    view["resolve"] = {"scale": {"color": "independent"}}
    return Picture(title, view, f"{len(boxes)} parts and {len(links)} links, {about}")


def _links(
    cluster: Cluster, where: dict[str, tuple[float, float]], thin: float
) -> tuple[list[Spec], dict[str, set[float]]]:
    """Drawn links with ends and width, and the rates of each kind, GB/s."""
    fabric = cluster.fabric
    links: list[Spec] = []
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
        rates.setdefault(kind, set()).add(rate)
        (x, y), (x2, y2) = ends
        wide = thin * 0.45 * float(np.log2(1 + rate / 8))
        links.append({"x": x, "y": y, "x2": x2, "y2": y2, "kind": kind, "wide": wide})
    return links, rates


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


def _boxes(
    where: dict[str, tuple[float, float]], size: float, unit: float, high: float
) -> list[Spec]:
    """Vertices as labelled boxes; `unit`: pixels from one GPU to the next; `high`: half a box."""
    out: list[Spec] = []
    for name, (x, y) in where.items():
        tier, _, label = name.partition(":")
        if tier == "nvswitch":
            continue
        if tier == "pcie":
            label = label.partition(":")[2]
        own = 11.0 if tier in ("leaf", "spine") else size
        half = (len(label) * own * 0.29 + 4) / unit
        out.append(_box(name, label, x, y, half, high, _FILL[tier], own))
    return out


def _switches(cluster: Cluster, where: dict[str, tuple[float, float]], high: float) -> list[Spec]:
    """NVSwitches as bars under all the GPUs that they join."""
    reach: dict[str, list[float]] = {}
    for link in cluster.fabric.nv_up[cluster.fabric.nv_up >= 0].tolist():
        source, _, target = cluster.fabric.link_name[link].partition("->")
        reach.setdefault(target, []).append(where[source][0])
    return [
        _box(
            name,
            name.partition(":")[2],
            (min(xs) + max(xs)) / 2,
            where[name][1],
            (max(xs) - min(xs)) / 2 + 0.3,
            high,
            _FILL["nvswitch"],
            11.0,
        )
        for name, xs in reach.items()
    ]


def _box(
    name: str, label: str, x: float, y: float, half: float, high: float, fill: str, size: float
) -> Spec:
    ends = {"left": x - half, "right": x + half, "low": y - high, "high": y + high}
    return {"name": name, "label": label, "x": x, "y": y, "fill": fill, "size": size, **ends}


def _rates(values: Iterable[float]) -> str:
    return " or ".join(f"{value:.4g}" for value in sorted(values))
