"""Schemes that balance every batch: expert weights follow the tokens of the batch at hand.

A scheme gives, for one layer of one batch, how many tokens of each expert every GPU computes. Where
a GPU computes tokens of an expert that it does not hold, the expert's weights are sent to it first,
into slots that all layers share. Tokens are then routed with those shares, on their home GPU as far
as possible, and a layer is plan, dispatch, weights, compute, combine, one after the other: whether
copies hide behind dispatch, and how well, the sources do not say in figures. Ours: all prices.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import route
from moesim.placement import EMPTY, Placement
from moesim.planning.balancing.bench import PARTS, Bench, Outcome, Priced
from moesim.sim.rebalance import slot_table
from moesim.types import FloatArray, IntArray

Shares = Callable[[int, IntArray, IntArray], IntArray]
"""(judged step, counts [L, E], home GPU of every expert [L, E]) to shares [L, E, G]."""


def serve_batches(bench: Bench, shares: Shares, *, pool: float, enable: str, note: str) -> Outcome:
    """Every judged step with the shares that a scheme gives it, from linear placement.

    pool: slots for other GPUs' experts on every GPU.
    """
    base = bench.placed("linear", "balance", 0)
    home = homes_of(base)
    layers = bench.course.trace.num_layers
    counts = bench.course.counts.astype(np.int64)

    def some(row: int) -> tuple[FloatArray, float, int]:
        share = shares(row, counts[row], home)
        placement, quota, pairs = lent(base, home, share)
        rows = slice(row, row + 1)
        routed = route(
            bench.course.trace,
            bench.course.part(rows),
            placement,
            dedup=bench.step.dedup,
            home=bench.home(rows),
            quota=quota,
        )
        weights = float(bench.transfer_us(pairs).sum()) + layers * bench.costs.batch_us
        return (
            np.append(bench.parts(routed)[:, 0], weights),
            float(bench.imbalance(routed)[0]),
            int(pairs.sum()),
        )

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        found = list(workers.map(some, range(len(counts))))
    parts = np.stack([p for p, _, _ in found], axis=1)
    moved = float(np.mean([n for _, _, n in found])) * bench.course.num_steps
    return Outcome(
        Priced(dict(zip(PARTS, parts, strict=True)), np.array([i for _, i, _ in found])),
        moved_experts=moved,
        moved_bytes=moved * bench.expert_bytes,
        pool=pool,
        enable=enable,
        note=note,
    )


def homes_of(placement: Placement) -> IntArray:
    """[L, E] the GPU of every expert's first slot."""
    return placement.logical_to_physical()[:, :, 0].astype(np.int64) // placement.slots_per_gpu


def lent(
    base: Placement, home: IntArray, share: IntArray
) -> tuple[Placement, IntArray, npt.NDArray[np.int32]]:
    """`base` with further slots for the experts that `share` [L, E, G] lends to GPUs that do not
    hold them, the quota [L, E, R] of every replica, and experts sent between GPUs [L, G, G]."""
    layers, experts, gpus = share.shape
    table = slot_table(base)
    away = share > 0
    held_in, held_by, _ = np.nonzero(table >= 0)
    away[held_in, table[table >= 0], held_by] = False
    layer, expert, gpu = np.nonzero(away)
    pairs = np.zeros((layers, gpus, gpus), np.int32)
    np.add.at(pairs, (layer, home[layer, expert], gpu), 1)
    order = np.lexsort((expert, gpu, layer))
    layer, expert, gpu = layer[order], expert[order], gpu[order]
    cell = layer * gpus + gpu
    place = np.arange(len(cell)) - np.searchsorted(cell, cell)
    more = np.full((layers, gpus, int(place.max(initial=-1)) + 1), EMPTY, np.int32)
    more[layer, gpu, place] = expert
    wide = np.concatenate([table, more], axis=2)
    placement = Placement(wide.reshape(layers, -1), gpus, base.num_nodes, experts)
    slots = placement.logical_to_physical()
    where = np.maximum(slots, 0) // placement.slots_per_gpu
    quota = np.take_along_axis(share, where.astype(np.int64), axis=2)
    return placement, np.where(slots >= 0, quota, 0), pairs
