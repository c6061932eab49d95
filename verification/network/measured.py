"""The event simulation against measured collectives:
`python verification/network/measured.py --data ../shared/data/measured`.

Every measured row is simulated alone on its cluster, from messages between GPUs over links and
routes to the time at which the last byte has arrived, and compared with the measured time. Token
exchanges (DeepEP, TensorRT-LLM) are routed token by token: 512 random tokens a rank, distinct
experts, across nodes limited to min(nodes, 4) of them, scaled to the row's number of tokens.
Errors are |simulated / measured - 1| over the rows that the calibration was not fitted to (every
other size), after the spikes that the fits drop as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))
from routing_bytes import BF16_ROW, FP8_ROW, LL_HEADER
from tables import alternate, drop_spikes_by_shape, nccl_points, trtllm_points

from moesim.cluster import Cluster, load_cluster
from moesim.cost.calibration import Calibration, load_calibration
from moesim.cost.collective import CollectiveCurve
from moesim.cost.routing import Dedup, route
from moesim.cost.step import StepModel, build_step_model
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.sim.collectives.base import make_stage
from moesim.sim.engine import Engine, Program
from moesim.sim.links import LinkTable, collective_flow, link_table
from moesim.trace.batches import Batches
from moesim.trace.format import Trace, TraceMeta

TOKENS_PER_RANK = 512
Row = tuple[float, float]
"""Simulated and measured microseconds."""


@dataclass(frozen=True)
class Bench:
    """A cluster whose collectives can be run one by one."""

    cluster: Cluster
    calibration: Calibration
    step: StepModel
    links: LinkTable

    def us(self, curve: CollectiveCurve, messages: np.ndarray, size: float) -> float:
        """Event time of one collective that moves `messages` [G, G] of `size` bytes each."""
        stage = make_stage(self.step, self.links, curve, messages[None, None], size)
        return self._run(stage.flow(0, 0, "dispatch"))

    def ring_us(self, curve: CollectiveCurve, size: float, sent: float) -> float:
        """Event time of a collective timed by `size`, whose ranks each send `sent` bytes on."""
        gpus = self.cluster.num_gpus
        ring = np.roll(np.eye(gpus), 1, axis=1)[None, None]
        carried = self.step.link_messages(ring)[0, 0] * sent
        us = float(curve.time_us(size))
        us_per_byte = self.links.us_per_byte(curve)
        return self._run(
            collective_flow("ring", "other", us, curve.latency_us, carried, us_per_byte)
        )

    def _run(self, flow: object) -> float:
        program = Program(self.cluster.num_gpus)
        program.collective(flow)  # type: ignore[arg-type]
        engine = Engine(self.links.num_links)
        us = engine.run(program).us
        if engine.network.peak_used.max() > 1 + 1e-9:
            raise RuntimeError("a link carried more than it can")
        return us


@cache
def bench(gpu: str, num_gpus: int) -> Bench:
    cluster = load_cluster(
        {"h100": "h100-sxm-ib", "h200": "h200-sxm-ib", "gb200": "gb200-nvl72"}[gpu], num_gpus
    )
    step = build_step_model(cluster, load_model("DeepSeek-V3"), all_to_all="nccl")
    return Bench(cluster, load_calibration(gpu), step, link_table(cluster, step))


@cache
def token_messages(num_gpus: int, num_nodes: int, experts: int, top_k: int, dedup: Dedup):
    """[G, G] messages of one random token on every rank, averaged over TOKENS_PER_RANK."""
    rng = np.random.default_rng(0)
    count = TOKENS_PER_RANK * num_gpus
    scores = np.abs(rng.standard_normal((count, experts)))
    if num_nodes > 1:
        best = scores.reshape(count, num_nodes, -1).max(axis=2)
        allowed = np.argsort(-best, axis=1)[:, : min(num_nodes, 4)]
        mask = np.zeros((count, num_nodes), bool)
        np.put_along_axis(mask, allowed, True, axis=1)
        scores[~np.repeat(mask, experts // num_nodes, axis=1)] = -1.0
    ids = np.argpartition(-scores, top_k, axis=1)[:, :top_k].astype(np.uint16)
    order = np.arange(count, dtype=np.int32)
    trace = Trace(
        ids[:, None],
        order,
        order * 0,
        np.ones(count, np.uint8),
        TraceMeta("", experts, top_k, (0,)),
    )
    whole = Batches(np.arange(count), np.array([0, count]), "decode", count)
    width = -(-experts // num_gpus)
    slots = np.full((num_gpus, width), -1, np.int32)
    gpu = np.arange(experts) * num_gpus // experts
    slots[gpu, np.arange(experts) - np.searchsorted(gpu, gpu)] = np.arange(experts)
    placement = Placement(slots.reshape(1, -1), num_gpus, num_nodes, experts)
    home = (order // TOKENS_PER_RANK).astype(np.int32)
    routed = route(trace, whole, placement, dedup=dedup, home=home)
    return routed.messages[0, 0] / TOKENS_PER_RANK


def nccl(data: Path, gpu: str) -> Iterator[tuple[str, Row]]:
    for (kind, ranks), points in sorted(nccl_points(data, gpu).items()):
        machine = bench(gpu, ranks)
        curve = machine.calibration.collective(kind, ranks)
        test = ~points.train
        for size, us in zip(points.num_bytes[test], points.times_us[test], strict=True):
            if kind == "all_to_all":
                everyone = 1.0 - np.eye(ranks)
                predicted = machine.us(curve, everyone, size / (ranks - 1))
            else:
                sent = 2 * size * (ranks - 1) / ranks if kind == "all_reduce" else size
                predicted = machine.ring_us(curve, size, sent)
            yield f"NCCL {kind}, {gpu}", (predicted, float(us))


def deepep(data: Path, mode: str, phase: str) -> Iterator[tuple[str, Row]]:
    name = "low_latency" if mode == "ll" else "normal"
    single = pd.read_parquet(data / f"h100_deepep_{name}_1node.parquet")
    multi = pd.read_parquet(data / f"h100_deepep_{name}_multinode.parquet")
    table = pd.concat([single, multi[multi["node_num"] > 1]], ignore_index=True)
    table = table[table["num_experts"] >= 128]
    if mode == "ll":
        table = table.dropna(subset=[f"{phase}_avg_t_us"])
        table = table.assign(us=table[f"{phase}_avg_t_us"], sms=0)
    else:
        table = table.dropna(subset=[f"{phase}_transmit_us"])
        notify = table[f"{phase}_notify_us"].fillna(0)
        table = table.assign(us=table[f"{phase}_transmit_us"] + notify, sms=table[f"{phase}_sms"])
    dedup: Dedup = "none" if mode == "ll" else "node"
    for (nodes, sms), rows in table.groupby(["node_num", "sms"]):
        machine = bench("h100", 8 * int(nodes))
        curve = machine.calibration.collective(
            f"deepep_{mode}_{phase}", 8 * int(nodes), int(nodes), num_sms=int(sms) or None
        )
        weight = (rows["num_token"] * rows["hidden_size"]).to_numpy(np.float64)
        keep = drop_spikes_by_shape(rows, weight, rows["us"].to_numpy())
        held_out = ~alternate(rows["num_token"].to_numpy()) & keep
        for row in rows[held_out].itertuples():
            element = FP8_ROW if phase == "dispatch" else BF16_ROW
            size = row.hidden_size * element + (LL_HEADER if mode == "ll" else 0) * (
                phase == "dispatch"
            )
            messages = token_messages(
                8 * int(nodes), int(nodes), int(row.num_experts), int(row.num_topk), dedup
            )
            if phase == "combine":
                messages = messages.T
            predicted = machine.us(curve, messages, size * row.num_token)
            yield f"DeepEP {name} {phase}, {nodes} node(s)", (predicted, float(row.us))


def trtllm(data: Path, phase: str) -> Iterator[tuple[str, Row]]:
    for ranks, points in sorted(trtllm_points(data, phase).items()):
        machine = bench("gb200", ranks)
        curve = machine.calibration.collective(f"nvlink_{phase}", ranks)
        test = ~points.train
        for size, us in zip(points.num_bytes[test], points.times_us[test], strict=True):
            predicted = machine.us(curve, 1.0 - np.eye(ranks), size / (ranks - 1))
            yield f"TensorRT-LLM {phase}, gb200", (predicted, float(us))


def own(data: Path) -> Iterator[tuple[str, Row]]:
    rows = json.loads((data / "h100x2_own.json").read_text())["data"]["a2a_even_us"]
    machine = bench("h100", 2)
    curve = machine.calibration.collective("all_to_all", 2, eager=True)
    for total, us in rows:
        yield (
            "own all-to-all, eager, 2 GPUs",
            (
                machine.us(curve, 1.0 - np.eye(2), total / 2),
                float(us),
            ),
        )


def sources(data: Path) -> list[tuple[str, Callable[[], Iterator[tuple[str, Row]]]]]:
    """The tables that exist, with what reads them."""
    found: list[tuple[str, Callable[[], Iterator[tuple[str, Row]]]]] = [
        ("h100_nccl.parquet", lambda: nccl(data, "h100")),
        ("h200_nccl.parquet", lambda: nccl(data, "h200")),
        ("gb200_trtllm_alltoall.parquet", lambda: trtllm(data, "dispatch")),
        ("gb200_trtllm_alltoall.parquet", lambda: trtllm(data, "combine")),
        ("h100x2_own.json", lambda: own(data)),
    ]
    for mode in ("normal", "ll"):
        for phase in ("dispatch", "combine"):
            name = "low_latency" if mode == "ll" else "normal"
            found.append(
                (
                    f"h100_deepep_{name}_multinode.parquet",
                    lambda mode=mode, phase=phase: deepep(data, mode, phase),
                )
            )
    return [(name, reader) for name, reader in found if (data / name).exists()]


def errors(data: Path) -> dict[str, np.ndarray]:
    """Signed relative errors of the held-out rows of every table."""
    found: dict[str, list[float]] = {}
    for _, reader in sources(data):
        for name, (predicted, measured) in reader():
            found.setdefault(name, []).append(predicted / measured - 1.0)
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured tables")
    args = parser.parse_args()
    if not args.data.is_dir():
        sys.exit(f"no folder {args.data}: the measured tables are not there")
    print("| collective | held-out rows | median error | 90th percentile | median bias |")
    print("|---|---|---|---|---|")
    for name, values in errors(args.data).items():
        size = np.abs(values)
        print(
            f"| {name} | {len(values)} | {np.median(size):.1%} | {np.quantile(size, 0.9):.1%} |"
            f" {np.median(values):+.1%} |"
        )


if __name__ == "__main__":
    main()
