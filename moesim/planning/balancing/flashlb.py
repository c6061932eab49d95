"""FlashLB, a policy of vllm-ascend: replicas and places by mean, spread and covariance of loads.

Theirs (github.com/vllm-project/vllm-ascend @182b75e, `eplb/core/policy/policy_flashlb.py`): a layer
is placed anew where its balancedness (mean over max) has fallen below 0.85, or 0.9 of what its
last plan promised (0.9 and 0.95 for fewer than 32 GPUs), and always the first time. Experts are
sorted by mean + z x deviation of their load in the window's samples (z 0.674, the 75th percentile)
and cut into DEPTH groups. Replicas are given group by group: as many to the group as min-max
replication of all that is left would give it, or up to WIDTH more or fewer, whichever number is
best when all is placed and the samples are gone through; inside a group by min-max replication.
Placing is greedy: by mean load per replica, to the GPU with least mean + z x deviation, covariances
counted. GPUs of the new placement are renamed so that most experts stay (assignment problem), and
layers change where balancedness rises.

Ours: the implementation; samples are the batches of the course's window (64 at most, as theirs).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moesim.kernels import kernel
from moesim.planning.balancing.bench import Bench, Outcome, Table
from moesim.planning.balancing.eplb import Rhythm, periodic
from moesim.planning.balancing.swift import keep_slots
from moesim.types import Array, FloatArray

Z = 0.6744897501960817
DEPTH, WIDTH = 4, 8
WIDE = 32


@dataclass(frozen=True, slots=True)
class FlashLb:
    """FlashLB with `redundant` slots."""

    name: str
    about: str
    rhythm: Rhythm
    redundant: int = 0
    enable: str = ""

    def run(self, bench: Bench) -> Outcome:
        promised = np.zeros(bench.course.trace.num_layers)
        share, least = (0.9, 0.85) if bench.num_gpus >= WIDE else (0.95, 0.9)

        def target(bench: Bench, seen: Array, held: Table, step: int) -> Table:
            samples = np.ascontiguousarray(seen.transpose(1, 0, 2), np.float64) + 1.0

            def one(layer: int) -> npt.NDArray[np.int32]:
                own, now = held[layer], _balancedness(samples[layer], held[layer])
                if promised[layer] and now >= max(promised[layer] * share, least):
                    return own
                new = place(samples[layer], *own.shape)
                then = _balancedness(samples[layer], new) if new.min() >= 0 else 0.0
                if then <= now:
                    return own
                promised[layer] = then
                return renamed(own, new)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return np.stack(list(pool.map(one, range(len(held)))))

        return periodic(bench, self.rhythm, self.redundant, target, self.enable)


def place(samples: FloatArray, num_gpus: int, num_slots: int) -> npt.NDArray[np.int32]:
    """Slots [G, S] for the loads [T, E] of one layer's samples; -1 in slots that stayed open."""
    mean, cov = samples.mean(axis=0), np.zeros((samples.shape[1],) * 2)
    if len(samples) > 1:
        cov = np.atleast_2d(np.cov(samples, rowvar=False))
    risk = mean + Z * np.sqrt(np.diag(cov))
    order = np.argsort(-risk, kind="stable")
    size = ceil(len(order) / DEPTH)
    left = num_gpus * num_slots - len(order)
    copies = np.ones(len(order), np.int64)
    for first in range(0, size * (DEPTH - 1), size):
        own, rest = order[first : first + size], order[first + size :]
        if not len(rest) or not left:
            break
        start = int(_replicas(risk[order[first:]], left)[: len(own)].sum()) - len(own)
        reach = min(max(start, left - start), WIDTH)
        nearest = sorted(range(start - reach, start + reach + 1), key=lambda n: (abs(n - start), n))
        best, best_score = start, np.inf
        for number in nearest:
            if not 0 <= number <= left:
                continue
            copies[own] = _replicas(risk[own], number)
            copies[rest] = _replicas(risk[rest], left - number)
            score = float(_score(samples, copies, _packed(mean, cov, copies, num_gpus, num_slots)))
            if score < best_score:
                best, best_score = number, score
        copies[own] = _replicas(risk[own], best)
        left -= best
        copies[rest] = _replicas(risk[rest], left)
    return np.asarray(_packed(mean, cov, copies, num_gpus, num_slots), np.int32)


def renamed(old: npt.NDArray[np.int32], new: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """`new` [G, S] with its GPUs in the order that keeps most of what `old` has where it is."""
    shape = (len(old), int(max(old.max(), new.max())) + 1)
    has = [np.zeros(shape, np.int64) for _ in range(2)]
    for counts, table in zip(has, (old, new), strict=True):
        np.add.at(counts, (np.repeat(np.arange(len(table)), table.shape[1]), table.ravel()), 1)
    match = np.minimum(has[0][:, None], has[1][None]).sum(axis=2)
    out = old.copy()
    keep_slots(out, np.ascontiguousarray(new[linear_sum_assignment(-match)[1]]))
    return out


def _balancedness(samples: FloatArray, table: npt.NDArray[np.int32]) -> float:
    copies = np.bincount(table.ravel(), minlength=samples.shape[1])
    return 1.0 / float(_score(samples, copies, table))


@kernel
def _replicas(risk: Array, number: int) -> Array:
    """One replica each and `number` more, one by one to the expert with most risk per replica."""
    copies = np.ones(len(risk), np.int64)
    for _ in range(number):
        copies[np.argmax(risk / copies)] += 1
    return copies


@kernel
def _packed(mean: Array, cov: Array, copies: Array, num_gpus: int, num_slots: int) -> Array:
    """Slots [G, S]; -1 where no GPU was left that lacked an expert."""
    table = np.full((num_gpus, num_slots), -1, np.int64)
    filled = np.zeros(num_gpus, np.int64)
    work, var = np.zeros(num_gpus), np.zeros(num_gpus)
    for e in np.argsort(-mean / copies, kind="mergesort"):
        own = mean[e] / copies[e]
        for _ in range(copies[e]):
            to, least, new_var = -1, 0.0, 0.0
            for g in range(num_gpus):
                if filled[g] >= num_slots:
                    continue
                spread, there = var[g] + cov[e, e] / copies[e] ** 2, False
                for s in range(filled[g]):
                    other = table[g, s]
                    if other == e:
                        there = True
                        break
                    spread += 2 * cov[e, other] / (copies[e] * copies[other])
                risk = work[g] + own + Z * np.sqrt(max(spread, 0.0))
                if not there and (to < 0 or risk < least):
                    to, least, new_var = g, risk, spread
            if to < 0:
                return table
            table[to, filled[to]] = e
            filled[to] += 1
            work[to] += own
            var[to] = new_var
    return table


@kernel
def _score(samples: Array, copies: Array, table: Array) -> float:
    """Largest over mean load of the GPUs, mean over samples [T, E]; open slots have no load."""
    total = 0.0
    for t in range(len(samples)):
        most, all_of = 0.0, 0.0
        for g in range(len(table)):
            own = 0.0
            for e in table[g]:
                if e >= 0:
                    own += samples[t, e] / copies[e]
            all_of += own
            most = max(most, own)
        total += (most * len(table) + 1e-2) / (all_of + 1e-2)
    return total / len(samples)
