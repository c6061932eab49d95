"""ECHO, elastic cloning for hot experts (NVIDIA/Megatron-LM pull request 2368, a prototype for
training; description and planner were read: `gen_intermediate`, `gen_assignment` with its default,
one_shot_greedy).

Theirs: planned on the GPU for every batch from all ranks' counts. A rank keeps the mean load
(rounded down), its experts with fewest tokens first, so that its hottest spill over. Spills by
size, laid end to end, fill the room of ranks below the mean by size; of what falls to a rank, its
spare slots take the largest pieces and the rest stays at home. Weights of cloned experts go from
their home to the spare slots by a dispatch of their own. As many spare slots as experts are their
default.

Ours: prices; spare slots that all layers share; ties, which go to the first. Left out: reclaiming
slots that save little (off by default there), and which tokens of an expert move.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.planning.balancing.bench import Bench, Outcome
from moesim.planning.balancing.per_batch import serve_batches
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Echo:
    """Clones of every batch."""

    name: str = "echo"
    about: str = "every batch: hot experts cloned to GPUs below the mean load"

    def run(self, bench: Bench) -> Outcome:
        spare = int(bench.capacity.max())

        def shares(row: int, counts: IntArray, home: IntArray) -> IntArray:
            out = np.zeros((*counts.shape, bench.num_gpus), np.int64)
            for layer in range(len(counts)):
                clone(counts[layer], home[layer], spare, out[layer])
            return out

        return serve_batches(
            bench,
            shares,
            pool=float(spare),
            enable="Megatron-LM pull request 2368 (training; a prototype)",
            note="no serving engine has it",
        )


@kernel
def clone(counts: Array, home: Array, spare: int, share: Array) -> None:
    """Fill share [E, G]; counts, home: [E]; spare: slots for clones on every GPU."""
    num_experts, num_gpus = share.shape
    mean = counts.sum() // num_gpus
    load = np.zeros(num_gpus, np.int64)
    spill = np.zeros(num_experts, np.int64)
    for e in np.argsort(counts, kind="mergesort"):
        share[e, home[e]] = counts[e]
        spill[e] = min(counts[e], max(0, load[home[e]] + counts[e] - mean))
        load[home[e]] += counts[e]
    givers = np.argsort(-spill, kind="mergesort")
    room = np.maximum(mean - load, 0)
    at = 0
    left = spill[givers[0]]
    for g in np.argsort(-room, kind="mergesort"):
        pieces = np.zeros(num_experts, np.int64)
        space = room[g]
        while space > 0 and at < num_experts:
            taken = min(space, left)
            pieces[givers[at]] += taken
            space -= taken
            left -= taken
            if left == 0:
                at += 1
                if at < num_experts:
                    left = spill[givers[at]]
        for e in np.argsort(-pieces, kind="mergesort")[:spare]:
            share[e, home[e]] -= pieces[e]
            share[e, g] += pieces[e]
