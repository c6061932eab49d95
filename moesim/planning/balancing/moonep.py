"""MoonEP: every rank computes the same number of choices, experts' weights come to it as needed.

Theirs (github.com/MoonshotAI/MoonEP, README; vllm pull request 52101, Megatron-LM 6274): planned on
the GPU for every call from the router's output; exactly s x K choices per rank (floor, and one more
for the first ranks where they do not divide); a rank gets experts of at most one other rank, in
E / R slots that all layers share; weights are fetched over NVLink before the experts compute. Needs
NVSwitch multicast. In vLLM each dispatch is padded to the largest batch, which cost more than half
of decode's throughput (4.0 against 9.8 requests/s, pull request 52101); steps here are not padded.

Ours: which experts go. Ranks below their share are filled one after the other from the rank that
has most above its own, its experts with most tokens first, the last one split (A. J. Walker's
alias method, Electronics Letters 10, 1974, has the same pairs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.planning.balancing.bench import Bench, Outcome
from moesim.planning.balancing.per_batch import serve_batches
from moesim.types import Array, IntArray


@dataclass(frozen=True, slots=True)
class MoonEp:
    """Exact balance of every batch."""

    name: str = "moonep"
    about: str = "every batch: equal choices per GPU, weights sent to them"

    def run(self, bench: Bench) -> Outcome:
        def shares(row: int, counts: IntArray, home: IntArray) -> IntArray:
            out = np.zeros((*counts.shape, bench.num_gpus), np.int64)
            for layer in range(len(counts)):
                equal_shares(counts[layer], home[layer], out[layer])
            return out

        return serve_batches(
            bench,
            shares,
            pool=float(bench.capacity.max()),
            enable="vLLM: --all2all-backend moonep",
            note="needs all GPUs on one NVSwitch" if bench.cluster.num_nodes > 1 else "",
        )


@kernel
def equal_shares(counts: Array, home: Array, share: Array) -> None:
    """Fill share [E, G] so that every GPU's sum is equal, the first ones' one more where counts [E]
    do not divide; home: [E] GPUs of the experts."""
    num_experts, num_gpus = share.shape
    load = np.zeros(num_gpus, np.int64)
    for e in range(num_experts):
        share[e, home[e]] = counts[e]
        load[home[e]] += counts[e]
    total = load.sum()
    excess = np.empty(num_gpus, np.int64)
    for g in range(num_gpus):
        excess[g] = load[g] - total // num_gpus - (g < total % num_gpus)
    for _ in range(num_gpus):
        needy, giver = np.argmin(excess), np.argmax(excess)
        if excess[needy] >= 0:
            return
        wanted = -excess[needy]
        excess[needy] = 0
        excess[giver] -= wanted
        while wanted > 0:
            best = -1
            for e in range(num_experts):
                if home[e] == giver and (best < 0 or share[e, giver] > share[best, giver]):
                    best = e
            taken = min(wanted, share[best, giver])
            share[best, giver] -= taken
            share[best, needy] += taken
            wanted -= taken
