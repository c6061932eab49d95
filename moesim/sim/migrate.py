"""Moving expert weights between GPUs, and loading them from host memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.cost.step import calibration_of_gpu
from moesim.placement import EMPTY
from moesim.sim.links import LinkTable, asymptotic_gb_per_s, transfer_flow
from moesim.sim.network import Flow
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster

Table = npt.NDArray[np.int32]
HOST = -1
"""Source of weights that come from host memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Experts of one layer that one GPU gets from another, or from its HOST."""

    layer: int
    source: int
    target: int
    num_experts: int


@dataclass(frozen=True, slots=True, eq=False)
class Mover:
    """Times of weight transfers on one cluster.

    us_per_byte: [links] at point-to-point rates between GPUs and pinned-copy rates to the host.
    Ignored: copying into place on the target (done from a second buffer), reading from disk.
    """

    cluster: Cluster
    expert_bytes: float
    us_per_byte: FloatArray

    def flows(self, moves: list[Move]) -> list[Flow]:
        """One transfer a move."""
        routes, hosts = self.cluster.routes(), self.cluster.host_routes().dram_to_gpu
        out = []
        for move in moves:
            size = move.num_experts * self.expert_bytes
            if move.source == HOST:
                path = hosts.links(move.target)
                latency = float(hosts.latency_us[move.target])
                origin = "host"
            else:
                path = routes.links(move.source, move.target)
                latency = float(routes.latency_us[move.source, move.target])
                origin = f"GPU {move.source}"
            name = f"layer {move.layer} weights {origin} to GPU {move.target}"
            out.append(transfer_flow(name, "other", size, path, latency, self.us_per_byte))
        return out

    def bytes(self, moves: list[Move]) -> tuple[float, float]:
        """(bytes from other GPUs, bytes from hosts)."""
        count = [0, 0]
        for move in moves:
            count[move.source == HOST] += move.num_experts
        return count[0] * self.expert_bytes, count[1] * self.expert_bytes


def build_mover(cluster: Cluster, links: LinkTable, expert_bytes: float) -> Mover:
    """Rates from the calibration of the slowest GPU type: point-to-point (all-to-all where that was
    not measured) over NVLink and NICs, host-to-device copies over PCIe, 85 % of other links."""
    slowest = min(cluster.gpus, key=lambda gpu: gpu.nvlink_gb_per_s)
    same = len({gpu.name for gpu in cluster.gpus}) == 1
    calibration = calibration_of_gpu(slowest, cluster.calibration, same)
    nics = links.line_gb_per_s[[c == "nic" for c in links.classes]]
    curve = calibration.collective(
        "p2p",
        min(2, cluster.num_gpus),
        1 if cluster.num_nodes == 1 else 2,
        nic_gb_per_s=float(nics.min()) if len(nics) else None,
    )
    us = links.us_per_byte(curve)
    at_once = cluster.num_gpus // cluster.num_nodes
    copy = asymptotic_gb_per_s(calibration.host_copy("h2d", at_once).curve) / slowest.pcie_gb_per_s
    host_only = np.array([c == "pcie" for c in links.classes]) & (links.group < 0)
    us[host_only] = 1.0 / (links.line_gb_per_s[host_only] * copy * 1e3)
    return Mover(cluster, expert_bytes, us)


def plan_moves(
    held: list[list[set[int]]], wanted: Table, node_of_gpu: npt.NDArray[np.int64]
) -> list[Move]:
    """What each GPU must fetch so that its slots hold `wanted`.

    held: [L][G] experts that each GPU has now (empty for a GPU that is down). wanted: [L, G, S].
    A source is the holder of the same node that has given least so far, else any holder that has
    given least, else the target's host.
    """
    moves: dict[tuple[int, int, int], int] = defaultdict(int)
    given: dict[int, int] = defaultdict(int)
    for layer in range(wanted.shape[0]):
        holders: dict[int, list[int]] = defaultdict(list)
        for gpu, experts in enumerate(held[layer]):
            for expert in sorted(experts):
                holders[expert].append(gpu)
        for target in range(wanted.shape[1]):
            for expert in wanted[layer, target].tolist():
                if expert == EMPTY or expert in held[layer][target]:
                    continue
                near = [g for g in holders[expert] if node_of_gpu[g] == node_of_gpu[target]]
                options = near or holders[expert]
                source = min(options, key=lambda g: (given[g], g)) if options else HOST
                given[source] += 1
                moves[layer, source, target] += 1
    return [Move(layer, s, t, n) for (layer, s, t), n in moves.items()]


def holdings(table: Table) -> list[list[set[int]]]:
    """[L][G] experts held, from slots [L, G, S]."""
    return [[set(row[row != EMPTY].tolist()) for row in layer] for layer in table]
