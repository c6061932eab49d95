"""EPIC: GPUs of one host swap experts before they dispatch (SIGCOMM 2026, 10.1145/3789240.3829201).

Theirs, as AI-Infra-Team/awesome-papers issue 228 summarises it; the paper was not to be had: on top
of EPLB that looks at messages too. Right after gating, every layer sums the tokens per GPU (hidden
behind quantisation); the GPUs of each host are sorted by load and paired, heaviest with lightest
and so on inwards; each pair makes the one swap that lessens its larger load most, if what that
saves is at least what the swap takes; weights go over NVLink only, 92 us for 42 MB on H20s, 210 on
H800s, in a kernel fused with dispatch, and the new places stay.

Ours: EPLB by load from recorded loads without redundant experts, since what a swap of replicas does
is not said; time saved by the table of expert times, a pair's swap at the measured rate of the
cluster's links (145 us on H200s, 157 on H100s for theirs); and to bring the places up to where they
would be by the step at hand, WARM steps before it from the tuning requests. Its message-aware EPLB
and second stage (multicast, pipelined messages) are not modelled.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.kernels import kernel
from moesim.placement import Placement
from moesim.planning.balancing.bench import PARTS, Bench, Outcome, Priced
from moesim.sim.rebalance import slot_table
from moesim.types import Array, FloatArray, IntArray

WARM = 4


@dataclass(frozen=True, slots=True)
class Epic:
    """One swap a pair of GPUs, layer and batch, where it pays."""

    name: str = "epic"
    about: str = "EPLB from recorded loads; every batch, GPUs of a host swap where that pays"

    def run(self, bench: Bench) -> Outcome:
        course, base = bench.course, bench.placed("eplb", "balance", 0)
        table = slot_table(base).astype(np.int64)
        per_node = bench.num_gpus // bench.cluster.num_nodes
        pair = np.zeros((1, bench.num_gpus, bench.num_gpus), np.int32)
        if per_node > 1:
            pair[0, 0, 1] = pair[0, 1, 0] = 1
        swap_us = float(bench.transfer_us(pair)[0])
        assert bench.problem.expert_us is not None
        times = bench.problem.expert_us[0]

        def step(counts: IntArray) -> npt.NDArray[np.int32]:
            swapped = np.zeros((len(table), len(pair[0]), len(pair[0])), np.int32)
            for layer in range(len(table)):
                swap_pairs(counts[layer], table[layer], per_node, times, swap_us, swapped[layer])
            return swapped

        placements: list[Placement] = []
        sent = []
        for row, now in enumerate(course.step_of.tolist()):
            for before in course.seen(now, min(now, WARM)) if now else ():
                step(before.astype(np.int64))
            sent.append(step(course.counts[row].astype(np.int64)))
            placements.append(
                Placement(
                    table.reshape(len(table), -1).astype(np.int32),
                    base.num_gpus,
                    base.num_nodes,
                    base.num_experts,
                )
            )

        def some(row: int) -> tuple[FloatArray, float]:
            routed = bench.routed(placements[row], slice(row, row + 1))
            weights = float(bench.transfer_us(sent[row]).sum())
            return np.append(bench.parts(routed)[:, 0], weights), float(bench.imbalance(routed)[0])

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            found = list(workers.map(some, range(len(placements))))
        moved = float(np.mean([s.sum() for s in sent])) * course.num_steps
        return Outcome(
            Priced(
                dict(zip(PARTS, np.stack([p for p, _ in found], axis=1), strict=True)),
                np.array([i for _, i in found]),
            ),
            moved_experts=moved,
            moved_bytes=moved * bench.expert_bytes,
            pool=1.0,
            enable="Alibaba Cloud's own engine",
            note="no public code",
        )


@kernel
def swap_pairs(
    counts: Array, table: Array, per_node: int, times: Array, swap_us: float, sent: Array
) -> None:
    """Swap experts in `table` [G, S] of one layer, add what was sent to `sent` [G, G].

    counts: [E]; times: [N + 1] microseconds of an expert by tokens.
    """
    num_gpus, num_slots = table.shape
    last = len(times) - 1
    work = np.zeros(num_gpus)
    for g in range(num_gpus):
        for s in range(num_slots):
            if table[g, s] >= 0:
                work[g] += times[min(counts[table[g, s]], last)]
    for first in range(0, num_gpus, per_node):
        order = np.argsort(work[first : first + per_node]) + first
        for i in range(per_node // 2):
            light, heavy = order[i], order[per_node - 1 - i]
            best, at_light, at_heavy = swap_us, -1, -1
            for s in range(num_slots):
                for t in range(num_slots):
                    a, b = table[heavy, s], table[light, t]
                    if a < 0 or b < 0:
                        continue
                    shift = times[min(counts[a], last)] - times[min(counts[b], last)]
                    saved = work[heavy] - max(work[heavy] - shift, work[light] + shift)
                    if saved > best:
                        best, at_heavy, at_light = saved, s, t
            if at_heavy >= 0:
                a, b = table[heavy, at_heavy], table[light, at_light]
                table[heavy, at_heavy], table[light, at_light] = b, a
                sent[heavy, light] += 1
                sent[light, heavy] += 1
