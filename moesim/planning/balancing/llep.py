"""LLEP, least-loaded expert parallelism (X.-P. Nguyen and others, arXiv 2601.17111, ICML 2026).

Theirs (the paper, and github.com/SalesforceAIResearch/LeastLoadedEP, `compute_llep_lpt_plan`): if a
GPU has `ratio` times the mean load or more, experts are taken by tokens, most first; each stays at
home up to `factor` times the mean load per GPU, counting experts at home that are yet to come; the
rest spills to the least loaded GPU with room, in chunks of at least `least` tokens unless it is all
that remains, and where no GPU has room for that, to the least loaded. Weights go along, point to
point. Defaults are those of the repository's example run.

Ours: the implementation. Ignored: grouping of the sends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.planning.balancing.bench import Bench, Outcome
from moesim.planning.balancing.per_batch import serve_batches
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class Llep:
    """Spilling of every batch. ratio: imbalance from which it does; factor: of the mean load that a
    GPU takes; least: tokens worth a GEMM of their own."""

    name: str = "llep"
    about: str = "every batch: what is beyond the mean load spills to the least loaded GPU"
    ratio: float = 1.3
    factor: float = 1.0
    least: int = 1024

    def run(self, bench: Bench) -> Outcome:
        def shares(row: int, counts: IntArray, home: IntArray) -> IntArray:
            out = np.zeros((*counts.shape, bench.num_gpus), np.int64)
            for layer in range(len(counts)):
                spill(counts[layer], home[layer], self.ratio, self.factor, self.least, out[layer])
            return out

        return serve_batches(
            bench,
            shares,
            pool=1.0,
            enable="the authors' code, for GPT-OSS: SalesforceAIResearch/LeastLoadedEP",
            note="no serving engine has it",
        )


@kernel
def spill(
    counts: Array, home: Array, ratio: float, factor: float, least: int, share: Array
) -> None:
    """Fill share [E, G]; counts, home: [E]."""
    num_experts, num_gpus = share.shape
    pending = np.zeros(num_gpus, np.int64)
    for e in range(num_experts):
        pending[home[e]] += counts[e]
    total = pending.sum()
    if pending.max() * num_gpus < ratio * total:
        for e in range(num_experts):
            share[e, home[e]] = counts[e]
        return
    room = max(1, int(factor * (total // num_gpus)))
    load = np.zeros(num_gpus, np.int64)
    for e in np.argsort(-counts, kind="mergesort"):
        own = home[e]
        pending[own] -= counts[e]
        left = counts[e]
        kept = min(left, max(0, room - load[own] - pending[own]))
        share[e, own] = kept
        load[own] += kept
        left -= kept
        while left > 0:
            best, idlest = -1, -1
            for g in range(num_gpus):
                if g == own:
                    continue
                now = load[g] + pending[g]
                if idlest < 0 or now < load[idlest] + pending[idlest]:
                    idlest = g
                chunk = min(left, room - now)
                if chunk <= 0 or (chunk < least and left > chunk):
                    continue
                if best < 0 or now < load[best] + pending[best]:
                    best = g
            if idlest < 0:
                idlest, best = own, -1
            chosen = best if best >= 0 else idlest
            taken = left if best < 0 else min(left, room - load[best] - pending[best])
            share[e, chosen] += taken
            load[chosen] += taken
            left -= taken
