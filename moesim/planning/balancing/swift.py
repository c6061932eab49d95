"""SwiftBalance, vllm-ascend's default policy: few experts moved, at most one between two GPUs.

Theirs (github.com/vllm-project/vllm-ascend @182b75e, `eplb/core/policy/policy_swift_balancer.py`,
without its redundancy per node, which the worker does not ask for): a layer below 1.01 max over
mean is left alone. Slots whose expert stands in an earlier slot (slot index first, then GPU) are
free to be given anew: to the expert with most tokens per replica, which counts (r + 1) / (r + 2) of
itself for its r-th further replica, on the GPU with least load that lacks it and gets nothing else
from the expert's first holder; what is left open then goes to the heaviest expert that the GPU
lacks. Up to 100 times the GPU with most load swaps one expert with another GPU, least loaded
first, if the larger of the two loads falls by 1% of the first layer's mean load; a pair of GPUs
swaps once, and an expert that has just come stays. A layer changes only where its largest load
falls.

Ours: the implementation. Order among experts of equal load is by index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.planning.balancing.bench import Bench, Outcome, Table
from moesim.planning.balancing.eplb import Rhythm, periodic
from moesim.types import Array

LEAST_IMBALANCE = 1.01
LEAST_GAIN = 0.01
MAX_SWAPS = 100


@dataclass(frozen=True, slots=True)
class Swift:
    """SwiftBalance with `redundant` slots."""

    name: str
    about: str
    rhythm: Rhythm
    redundant: int = 0
    enable: str = ""

    def run(self, bench: Bench) -> Outcome:
        return periodic(bench, self.rhythm, self.redundant, self._target, self.enable)

    def _target(self, bench: Bench, seen: Array, held: Table, step: int) -> Table:
        load = seen.mean(axis=0, dtype=np.float64)
        out = held.copy()
        least = LEAST_GAIN * float(load[0].sum()) / held.shape[1]
        for layer in range(len(held)):
            rebalance(load[layer], least, out[layer])
        return out


@kernel
def rebalance(load: Array, least: float, table: Array) -> None:
    """Change `table` [G, S] of one layer, if its largest load falls; load: [E] tokens."""
    num_gpus, num_slots = table.shape
    num_experts = len(load)
    copies = np.zeros(num_experts, np.int64)
    for g in range(num_gpus):
        for s in range(num_slots):
            copies[table[g, s]] += 1
    before = _most(load, copies, table)
    mean = load.sum() / num_gpus
    if mean <= 0 or before < LEAST_IMBALANCE * mean:
        return
    new = table.copy()
    sent = np.zeros((num_gpus, num_gpus), np.int64)
    came = np.zeros((num_gpus, num_experts), np.bool_)
    weight = _spread_copies(load, new, sent, came)
    if _swap(weight, least, new, sent, came) < before:
        keep_slots(table, new)


@kernel
def _most(load: Array, copies: Array, table: Array) -> float:
    """Largest load of a GPU, replicas sharing equally."""
    most = 0.0
    for g in range(len(table)):
        own = 0.0
        for e in table[g]:
            own += load[e] / copies[e]
        most = max(most, own)
    return most


@kernel
def _spread_copies(load: Array, new: Array, sent: Array, came: Array) -> Array:
    """Give the slots of further replicas in `new` anew; returns tokens per replica [E]."""
    num_gpus, num_slots = new.shape
    num_experts = len(load)
    first = np.full(num_experts, -1, np.int64)
    free = 0
    for s in range(num_slots):
        for g in range(num_gpus):
            if first[new[g, s]] < 0:
                first[new[g, s]] = g
            else:
                new[g, s] = -1
                free += 1
    extra = np.zeros(num_experts, np.int64)
    weight = load.copy()
    for _ in range(free):
        best = -1
        for e in range(num_experts):
            if extra[e] + 1 < num_gpus and (best < 0 or weight[e] >= weight[best]):
                best = e
        if best < 0:
            break
        extra[best] += 1
        weight[best] *= (extra[best] + 1) / (extra[best] + 2)
    work = np.zeros(num_gpus)
    for g in range(num_gpus):
        for e in new[g]:
            if e >= 0:
                work[g] += weight[e]
    for e in np.argsort(-weight, kind="mergesort"):
        for _ in range(extra[e]):
            to = -1
            for g in range(num_gpus):
                if (
                    (new[g] == -1).any()
                    and not (new[g] == e).any()
                    and sent[first[e], g] < 1
                    and (to < 0 or work[g] < work[to])
                ):
                    to = g
            if to >= 0:
                _put(new[to], e)
                work[to] += weight[e]
                sent[first[e], to] += 1
                came[to, e] = True
    _fill(load, first, weight, new, sent, came)
    return weight


@kernel
def _put(row: Array, expert: int) -> None:
    for s in range(len(row)):
        if row[s] == -1:
            row[s] = expert
            return


@kernel
def _fill(load: Array, first: Array, weight: Array, new: Array, sent: Array, came: Array) -> None:
    """Fill slots that are still open with the heaviest experts that their GPUs lack; where there
    are any, `weight` becomes the load of each replica."""
    if not (new == -1).any():
        return
    copies = np.zeros(len(load), np.int64)
    for g in range(len(new)):
        for e in new[g]:
            if e >= 0:
                copies[e] += 1
    weight[:] = load / copies
    for g in range(len(new)):
        for _ in range((new[g] == -1).sum()):
            best = -1
            for e in range(len(load)):
                if not (new[g] == e).any() and (best < 0 or weight[e] >= weight[best]):
                    best = e
            _put(new[g], best)
            sent[first[best], g] += 1
            came[g, best] = True
            weight[best] *= copies[best] / (copies[best] + 1)
            copies[best] += 1


@kernel
def _swap(weight: Array, least: float, new: Array, sent: Array, came: Array) -> float:
    """Swaps with the GPU that has most load; returns that load in the end."""
    num_gpus, num_slots = new.shape
    work = np.zeros(num_gpus)
    for g in range(num_gpus):
        for e in new[g]:
            work[g] += weight[e]
    for _ in range(MAX_SWAPS):
        order = np.argsort(work, kind="mergesort")
        hot = order[num_gpus - 1]
        changed = False
        for cold in order[: num_gpus - 1]:
            if sent[hot, cold] >= 1 or sent[cold, hot] >= 1:
                continue
            best, at_hot, at_cold = work[hot], -1, -1
            for s in range(num_slots):
                a = new[hot, s]
                if came[hot, a] or (new[cold] == a).any():
                    continue
                for t in range(num_slots):
                    b = new[cold, t]
                    if came[cold, b] or (new[hot] == b).any():
                        continue
                    shift = weight[a] - weight[b]
                    after = max(work[hot] - shift, work[cold] + shift)
                    if after < best:
                        best, at_hot, at_cold = after, s, t
            if at_hot < 0 or work[hot] - best < least:
                continue
            a, b = new[hot, at_hot], new[cold, at_cold]
            new[hot, at_hot], new[cold, at_cold] = b, a
            work[hot] += weight[b] - weight[a]
            work[cold] += weight[a] - weight[b]
            came[hot, b] = came[cold, a] = True
            sent[hot, cold] += 1
            sent[cold, hot] += 1
            changed = True
            break
        if not changed:
            break
    return work.max()


@kernel
def keep_slots(table: Array, new: Array) -> None:
    """Write `new` into `table`; experts that stay on a GPU stay in their slot."""
    for g in range(len(table)):
        stays = np.zeros(table.shape[1], np.bool_)
        taken = np.zeros(table.shape[1], np.bool_)
        for s in range(table.shape[1]):
            for t in range(table.shape[1]):
                if new[g, t] == table[g, s] and not taken[t]:
                    stays[s] = taken[t] = True
                    break
        t = 0
        for s in range(table.shape[1]):
            if not stays[s]:
                while taken[t]:
                    t += 1
                table[g, s] = new[g, t]
                taken[t] = True
