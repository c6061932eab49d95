"""The compiled part of `timeline.run_timeline`: its docstring says what happens when."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.caching.state import ABSENT, Asked, CacheState, Rule, lookup, update
from moesim.kernels import kernel
from moesim.types import FloatArray, IntArray

TIE_S = 1e-9
"""Times closer than this are one instant, so that rounding decides nothing: a prefetch that could
begin at a gate has not begun, and the CPU takes a miss only if that ends the layer sooner."""


class StepTimes(NamedTuple):
    """Times in seconds that a timeline runs on.

    gate_s: [L, M + 1] from the start of a layer to its gate, by tokens in the step; M is the
    largest step. gpu_s, cpu_s: [M + 1] one expert on GPU or CPU by its tokens. load_s: [L, E] one
    transfer of each expert into HBM from where it lives. tail_s: [M + 1] after the last layer.
    host_s: [L, E] before the CPU can begin with an expert: reading it from NVMe, 0 in DRAM.
    cpu_start_s: once a layer that uses the CPU, for moving hidden states there and back.
    """

    gate_s: FloatArray
    gpu_s: FloatArray
    cpu_s: FloatArray
    load_s: FloatArray
    host_s: FloatArray
    tail_s: FloatArray
    cpu_start_s: float = 0.0


class Memory(NamedTuple):
    """One GPU's expert memory: its slots, what they are asked for, and what serves misses.

    cpu_layers [L], cpu_auto, depth, width: see `timeline.Setup`. predicted: [S, L, C] experts to
    send for, best first, -1 for none.
    """

    rule: Rule
    asked: Asked
    state: CacheState
    cpu_layers: npt.NDArray[np.bool_]
    cpu_auto: bool
    depth: int
    width: int
    predicted: npt.NDArray[np.int16]


class LinkState(NamedTuple):
    """The copies of prefetches and fetches, one after another.

    free_s, busy_s [1]: when the link is free, and for how long it was not. layer, expert, issued_s
    [room]: prefetches that wait, the first `waiting` [1] of them. queued [L, E]: whether one waits;
    arrival_s [L, E] of those that have started, inf for the rest.
    """

    free_s: FloatArray
    busy_s: FloatArray
    layer: IntArray
    expert: IntArray
    issued_s: FloatArray
    waiting: IntArray
    queued: npt.NDArray[np.bool_]
    arrival_s: FloatArray


class LayerEvent(NamedTuple):
    """One layer of one step: the experts that were prefetched, that are missing, and that will have
    come to HBM by its end, in order [E each]; tokens [E] of those asked for."""

    early: IntArray
    miss: IntArray
    arrived: IntArray
    tokens: IntArray


class Ran(NamedTuple):
    """What happened, see `timeline.Timeline`."""

    hits: IntArray
    staged: IntArray
    fetched: IntArray
    on_cpu: IntArray
    wasted: IntArray
    wait_s: FloatArray
    step_s: FloatArray


@kernel
def run_kernel(memory, times):  # type: ignore[no-untyped-def]
    """Every step of `memory.asked`; (Ran, seconds that the link was busy)."""
    asked, state = memory.asked, memory.state
    num_steps = len(asked.tokens)
    num_layers, num_experts = state.place.shape
    ran = _nothing_yet(num_steps, num_layers)
    link = _idle_link(num_layers, num_experts, max(1, memory.width * (memory.depth + 1)))
    event = LayerEvent(
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
    )
    now = 0.0
    for s in range(num_steps):
        begin = now
        for layer in range(num_layers):
            gate = now + times.gate_s[layer, asked.tokens[s]]
            _start_prefetches(link, times.load_s, gate)
            _drop_waiting(link, layer)
            now, num_arrived = _run_experts(memory, times, link, event, ran, s, layer, gate)
            _issue_prefetches(memory, link, s, layer, gate)
            update(memory.rule, asked, state, layer, s, event.arrived[:num_arrived])
            ran.wasted[s, layer] = _empty_staging(memory, link, s, layer)
        now += times.tail_s[asked.tokens[s]]
        ran.step_s[s] = now - begin
    return ran, link.busy_s[0]


@kernel(allocates=False)
def split_misses(times, layer, gate, link, busy, miss, count):  # type: ignore[no-untyped-def]
    """How many of the misses, fewest tokens first, the CPU should take so that the layer ends
    soonest. `link`, `busy`: when the link is free and when the GPU is done with what it has;
    miss: experts by their tokens `count` [E]."""
    gpu_s, cpu_s = times.gpu_s, times.cpu_s
    host, load = times.host_s[layer], times.load_s[layer]
    best, best_end = 0, np.inf
    for j in range(len(miss) + 1):
        cpu = gate + times.cpu_start_s if j > 0 else gate
        for i in range(j):
            cpu += host[miss[i]] + cpu_s[count[miss[i]]]
        arrive, gpu = max(link, gate), busy
        for i in range(len(miss) - 1, j - 1, -1):
            arrive += load[miss[i]]
            gpu = max(gpu, arrive) + gpu_s[count[miss[i]]]
        end = max(cpu, gpu)
        if end < best_end - TIE_S:
            best, best_end = j, end
    return best


@kernel
def _nothing_yet(num_steps, num_layers):  # type: ignore[no-untyped-def]
    shape = (num_steps, num_layers)
    return Ran(
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape),
        np.zeros(num_steps),
    )


@kernel
def _idle_link(num_layers, num_experts, room):  # type: ignore[no-untyped-def]
    return LinkState(
        np.zeros(1),
        np.zeros(1),
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.empty(room),
        np.zeros(1, np.int64),
        np.zeros((num_layers, num_experts), np.bool_),
        np.full((num_layers, num_experts), np.inf),
    )


@kernel(allocates=False)
def _start_prefetches(link, load_s, gate):  # type: ignore[no-untyped-def]
    """Start the prefetches that the link gets to before the gate."""
    free, waiting, head = link.free_s[0], link.waiting[0], 0
    while head < waiting and max(free, link.issued_s[head]) < gate - TIE_S:
        layer, e = link.layer[head], link.expert[head]
        free = max(free, link.issued_s[head]) + load_s[layer, e]
        link.busy_s[0] += load_s[layer, e]
        link.arrival_s[layer, e] = free
        link.queued[layer, e] = False
        head += 1
    link.free_s[0] = free
    for q in range(head, waiting):
        _move(link, q, q - head)
    link.waiting[0] = waiting - head


@kernel(allocates=False)
def _drop_waiting(link, layer):  # type: ignore[no-untyped-def]
    """Drop the prefetches for `layer` that have not started."""
    kept = 0
    for q in range(link.waiting[0]):
        if link.layer[q] == layer:
            link.queued[layer, link.expert[q]] = False
        else:
            _move(link, q, kept)
            kept += 1
    link.waiting[0] = kept


@kernel(inline="always")
def _move(link, q, to):  # type: ignore[no-untyped-def]
    link.layer[to], link.expert[to] = link.layer[q], link.expert[q]
    link.issued_s[to] = link.issued_s[q]


@kernel(allocates=False)
def _run_experts(memory, times, link, event, ran, s, layer, gate):  # type: ignore[no-untyped-def]
    """From the gate to the end of the layer's last expert: when that is, and how many experts have
    come to HBM for it (event.arrived)."""
    gpu_s, load_s, tokens = times.gpu_s, times.load_s, event.tokens
    busy, num_early, num_miss = _classify(memory, gpu_s, link, event, ran, s, layer, gate)
    working = busy - gate
    for a in range(num_early):
        e = event.early[a]
        busy = max(busy, link.arrival_s[layer, e]) + gpu_s[tokens[e]]
        working += gpu_s[tokens[e]]
        event.arrived[a] = e
    cpu_share = 0
    if memory.cpu_layers[layer]:
        cpu_share = num_miss
    elif memory.cpu_auto and num_miss > 0:
        miss = event.miss[:num_miss]
        cpu_share = split_misses(times, layer, gate, link.free_s[0], busy, miss, tokens)
    cpu_end = gate + times.cpu_start_s if cpu_share > 0 else gate
    for a in range(cpu_share):
        cpu_end += times.host_s[layer, event.miss[a]] + times.cpu_s[tokens[event.miss[a]]]
    num_arrived = num_early
    for a in range(num_miss - 1, cpu_share - 1, -1):
        e = event.miss[a]
        link.free_s[0] = max(link.free_s[0], gate) + load_s[layer, e]
        link.busy_s[0] += load_s[layer, e]
        busy = max(busy, link.free_s[0]) + gpu_s[tokens[e]]
        working += gpu_s[tokens[e]]
        event.arrived[num_arrived] = e
        num_arrived += 1
    ran.staged[s, layer], ran.on_cpu[s, layer] = num_early, cpu_share
    ran.fetched[s, layer] = num_miss - cpu_share
    end = max(busy, cpu_end)
    ran.wait_s[s, layer] = end - gate - working
    return end, num_arrived


@kernel(allocates=False)
def _classify(memory, gpu_s, link, event, ran, s, layer, gate):  # type: ignore[no-untyped-def]
    """Sort what the layer asks for into hits, experts on their way (in order of arrival) and
    missing ones (fewest tokens first): when the GPU is done with the hits, and the numbers of the
    others."""
    asked, state = memory.asked, memory.state
    arrival_s = link.arrival_s[layer]
    on_cpu = memory.cpu_layers[layer]
    n = s * len(state.slots) + layer
    busy, num_miss, num_early = gate, 0, 0
    for i in range(asked.indptr[n], asked.indptr[n + 1]):
        e = asked.item[i]
        event.tokens[e] = asked.chosen_by[i]
        if not on_cpu and lookup(state, layer, e) != ABSENT:
            ran.hits[s, layer] += 1
            busy += gpu_s[asked.chosen_by[i]]
        elif not on_cpu and arrival_s[e] < np.inf:
            _insert(event.early, num_early, e, arrival_s)
            num_early += 1
        else:
            _insert(event.miss, num_miss, e, event.tokens)
            num_miss += 1
    return busy, num_early, num_miss


@kernel(inline="always")
def _insert(experts, size, e, key):  # type: ignore[no-untyped-def]
    """Insert e into experts[:size], sorted by key [E], behind its equals."""
    b = size
    while b > 0 and key[e] < key[experts[b - 1]]:
        experts[b] = experts[b - 1]
        b -= 1
    experts[b] = e


@kernel(allocates=False)
def _issue_prefetches(memory, link, s, layer, gate):  # type: ignore[no-untyped-def]
    """Send for what is predicted of the layer `depth` ahead, behind the fetches; at the first layer
    of a step, of those before it too."""
    last = layer + memory.depth
    for target in range(layer, last + 1):
        if target >= len(memory.state.slots) or memory.cpu_layers[target]:
            continue
        if target != last and (layer > 0 or target == 0):
            continue
        sent = 0
        for w in range(memory.predicted.shape[2]):
            e = memory.predicted[s, target, w]
            if sent == memory.width or link.waiting[0] == len(link.layer):
                break
            if e < 0 or link.queued[target, e] or link.arrival_s[target, e] < np.inf:
                continue
            if lookup(memory.state, target, e) != ABSENT:
                continue
            q = link.waiting[0]
            link.layer[q], link.expert[q], link.issued_s[q] = target, e, gate
            link.queued[target, e] = True
            link.waiting[0] += 1
            sent += 1


@kernel(allocates=False)
def _empty_staging(memory, link, s, layer):  # type: ignore[no-untyped-def]
    """Forget what was sent for; the number that the layer did not ask for."""
    wasted = 0
    for w in range(memory.predicted.shape[2]):
        e = memory.predicted[s, layer, w]
        if e >= 0 and link.arrival_s[layer, e] < np.inf:
            wasted += memory.state.mark[layer, e] != s
            link.arrival_s[layer, e] = np.inf
    return wasted
