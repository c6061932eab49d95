"""Fit DeepEP dispatch and combine (H100, B200, B300) and TensorRT-LLM's NVLink all-to-all (GB200):
`python verification/calibration/fit_deepep.py --data ../shared/data/measured
--out topologies/calibration/h100.yaml`.

Every other token count is fitted, those between are held out. On one node the NVLink bytes explain
the time, on several the NIC bytes; a several-node entry keeps the one-node NVLink curve as its
other bound, and its errors are of the larger of the two. With `--gpu h200` the H100's fits are
taken over as assumed, with `--gpu gb300` the GB200's: the same NVLink and NIC generation.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import AICONFIGURATOR, HEADERS, arguments, report, update
from tables import DeepEpPoints, SizePoints, deepep_ll_points, deepep_normal_points, trtllm_points

from moesim.cost.curves import AffineMin
from moesim.cost.fitting import fit_affine_min

GPUS_PER_NODE = 8
PHASES = ("dispatch", "combine")
ELDERS = {"h200": ("h100", "deepep_h100"), "gb300": ("gb200", "trtllm_gb200")}
NVLINK_KINDS = {"NVLinkTwoSided": "nvlink", "NVLinkOneSided": "nvlink_one_sided"}
EIGHT_NODES = (
    "17 GB/s a NIC, where the same table's low-latency rows reach 48 at 8 nodes and DeepEP's own "
    "report 51 for 64 ranks (own node included): this run's fabric was probably congested"
)
SOURCES = {
    "deepep_h100": f"{AICONFIGURATOR}, h100 DeepEP tables (SGLang 0.5.12 on one node, 0.5.0 on "
    "several, 8 GPUs a node): kernel time, normal mode transmit + notify",
    **{
        f"deepep_{gpu}": f"{AICONFIGURATOR}, {gpu} DeepEP tables (SGLang 0.5.12 on one node of 8 "
        "GPUs): kernel time, normal mode transmit + notify"
        for gpu in ("b200", "b300")
    },
    "trtllm_gb200": f"{AICONFIGURATOR}, gb200 TensorRT-LLM 1.2.0rc6 NVLink all-to-all, CUDA "
    "graph, two-sided dispatch with its prepare kernel",
}


def curve_of(points: SizePoints, num_bytes: np.ndarray) -> AffineMin:
    return fit_affine_min(num_bytes[points.train], points.times_us[points.train])[0]


def deepep_entry(
    kind: str, nodes: int, data: DeepEpPoints, nvlink: AffineMin, source: str, **extra: Any
) -> dict[str, Any]:
    """One entry; `nvlink` is the fit itself on one node, the one-node bound on several."""
    points = data.points
    entry: dict[str, Any] = {
        "kind": kind,
        "group_size": GPUS_PER_NODE * nodes,
        "num_nodes": nodes,
        **extra,
        "basis": "measured",
        "source": source,
        "nvlink": [list(pair) for pair in nvlink.segments],
        "bytes_range": [float(points.num_bytes.min()), float(points.num_bytes.max())],
    }
    if nodes == 8 and "normal" in kind:
        entry["note"] = EIGHT_NODES
    predicted = nvlink.time_us(points.num_bytes)
    if nodes > 1:
        nic = curve_of(points, data.nic_bytes)
        entry["nic"] = [list(pair) for pair in nic.segments]
        entry["nic_bytes_range"] = [float(data.nic_bytes.min()), float(data.nic_bytes.max())]
        predicted = np.maximum(predicted, nic.time_us(data.nic_bytes))
    test = ~points.train
    entry["fit"] = [
        report(
            predicted[test],
            points.times_us[test],
            dropped=points.dropped,
            held_out="every other token count",
        )
    ]
    return entry


def fit_deepep(data: Path, gpu: str) -> list[dict[str, Any]]:
    entries, source = [], f"deepep_{gpu}"
    for phase in PHASES:
        normal = deepep_normal_points(data, phase, gpu)
        bounds = {
            sms: curve_of(x.points, x.points.num_bytes)
            for (nodes, sms), x in normal.items()
            if nodes == 1
        }
        for (nodes, sms), x in sorted(normal.items()):
            kind = f"deepep_normal_{phase}"
            entries.append(deepep_entry(kind, nodes, x, bounds[sms], source, num_sms=sms))
        low_latency = deepep_ll_points(data, phase, gpu)
        bound = curve_of(low_latency[1].points, low_latency[1].points.num_bytes)
        for nodes, x in sorted(low_latency.items()):
            entries.append(deepep_entry(f"deepep_ll_{phase}", nodes, x, bound, source))
    return entries


def fit_gb200(data: Path) -> list[dict[str, Any]]:
    entries = []
    for (kernel, kind), phase in product(NVLINK_KINDS.items(), PHASES):
        for ranks, points in sorted(trtllm_points(data, phase, kernel).items()):
            curve = curve_of(points, points.num_bytes)
            test = ~points.train
            entries.append(
                {
                    "kind": f"{kind}_{phase}",
                    "group_size": ranks,
                    "basis": "measured",
                    "source": "trtllm_gb200",
                    "nvlink": [list(pair) for pair in curve.segments],
                    "bytes_range": [float(points.num_bytes.min()), float(points.num_bytes.max())],
                    "fit": [
                        report(
                            curve.time_us(points.num_bytes[test]),
                            points.times_us[test],
                            dropped=points.dropped,
                            held_out="every other token count",
                        )
                    ],
                }
            )
    return entries


def from_elder(gpu: str, folder: Path) -> list[dict[str, Any]]:
    elder, source = ELDERS[gpu]
    entries = yaml.safe_load((folder / f"{elder}.yaml").read_text())["collectives"]
    note = f"taken over from the {elder.upper()}: same NVLink and NIC generation"
    if gpu == "gb300":
        note = "taken over from the GB200: same NVLink generation"
    return [
        {**{k: v for k, v in e.items() if k != "fit"}, "basis": "assumed", "note": note}
        for e in entries
        if e["source"] == source
    ]


def main() -> None:
    args = arguments(__doc__ or "")
    if args.gpu in ELDERS:
        entries = from_elder(args.gpu, args.out.parent)
    else:
        entries = fit_gb200(args.data) if args.gpu == "gb200" else fit_deepep(args.data, args.gpu)
    for e in entries:
        where = f"{e['kind']} x{e['group_size']} sms={e.get('num_sms')}"
        print(where, e["nvlink"], e.get("nic"), e.get("fit"))
    used = {e["source"] for e in entries}
    update(
        args.out,
        HEADERS[args.gpu],
        "collectives",
        entries,
        {k: v for k, v in SOURCES.items() if k in used},
        lambda e: e["source"] in used,
    )


if __name__ == "__main__":
    main()
