"""ECHO, elastic cloning for hot experts (NVIDIA/Megatron-LM pull request 2368, a prototype, of
which the description was read, not the code).

Theirs: for every batch, experts with much traffic are cloned to ranks that get fewer tokens than
the mean, and the tokens beyond it go there; spare slots on every rank hold the clones.

Ours: the order, which the description leaves open. The rank with most tokens gives those beyond the
mean of its expert that has most, to the rank with fewest that has a spare slot, up to that rank's
mean; until no rank above the mean can give, or no rank below it has a slot. `spare` is assumed.
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
    """Clones of every batch, at most `spare` on a GPU."""

    name: str = "echo"
    about: str = "every batch: hot experts cloned to GPUs below the mean load"
    spare: int = 1

    def run(self, bench: Bench) -> Outcome:
        def shares(row: int, counts: IntArray, home: IntArray) -> IntArray:
            out = np.zeros((*counts.shape, bench.num_gpus), np.int64)
            for layer in range(len(counts)):
                clone(counts[layer], home[layer], self.spare, out[layer])
            return out

        return serve_batches(
            bench,
            shares,
            pool=float(self.spare),
            enable="Megatron-LM pull request 2368 (training; a prototype)",
            note="no serving engine has it",
        )


@kernel
def clone(counts: Array, home: Array, spare: int, share: Array) -> None:
    """Fill share [E, G]; counts, home: [E]."""
    num_experts, num_gpus = share.shape
    load = np.zeros(num_gpus, np.int64)
    for e in range(num_experts):
        share[e, home[e]] = counts[e]
        load[home[e]] += counts[e]
    mean = -(-load.sum() // num_gpus)
    room = np.full(num_gpus, spare, np.int64)
    for _ in range(num_gpus * spare):
        hot = np.argmax(load)
        cold = -1
        for g in range(num_gpus):
            if room[g] > 0 and load[g] < mean and (cold < 0 or load[g] < load[cold]):
                cold = g
        best = -1
        for e in range(num_experts):
            if home[e] == hot and (best < 0 or share[e, hot] > share[best, hot]):
                best = e
        if cold < 0 or best < 0:
            return
        taken = min(load[hot] - mean, mean - load[cold], share[best, hot])
        if taken <= 0:
            return
        share[best, hot] -= taken
        share[best, cold] += taken
        load[hot] -= taken
        load[cold] += taken
        room[cold] -= 1
