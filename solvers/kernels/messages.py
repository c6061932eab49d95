"""Compiled local search on load and messages together: one layer.

Candidates of a pair of GPUs are screened by their load (see `pairs`) and by what they save in
messages by themselves (see `gains`); the few best are tried exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.kernels.gains import (
    Messages,
    make_messages,
    move_rows,
    move_us,
    replica_row,
    replicas,
    try_swap,
)
from moesim.solvers.kernels.pairs import (
    Peaks,
    Scratch,
    gather_pair,
    hot_delta,
    make_peaks,
    make_scratch,
    mark_rest,
    rank_peaks,
    rest_delta,
)
from moesim.solvers.kernels.placed import (
    MARGIN,
    Goal,
    Placed,
    Scan,
    apply_swap,
    begin_pair,
    kick,
    make_scan,
    mean_max,
    note_swap,
    objective,
    rebuild,
)
from moesim.solvers.kernels.traffic import Flow, Net, Tokens, message_us
from moesim.types import Array

TRIES_PER_PAIR = 2
KICK_SWAPS = 4
MAX_PASSES = 30
STEP = 1e-5
"""Least relative gain of a swap that is made; smaller ones take long to add up to anything."""


class Tries(NamedTuple):
    """Work space of a pair of GPUs. score, value [N], pick [N, 2]: the best candidates' estimated
    objective, mean largest load and slots, -1 for none. For every slot of the second GPU [S]: row2,
    moved2, shared2, count2 as `replica_row`, `move_us` and `replicas` say; row1 of the first."""

    score: Array
    value: Array
    pick: Array
    row1: Array
    row2: Array
    moved2: Array
    shared2: Array
    count2: Array


@kernel
def make_tries(num_slots: int) -> Tries:
    """Tries for GPUs of up to `num_slots` slots."""
    return Tries(
        np.empty(TRIES_PER_PAIR),
        np.empty(TRIES_PER_PAIR),
        np.empty((TRIES_PER_PAIR, 2), np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots),
        np.empty(num_slots),
        np.empty(num_slots),
    )


@kernel
def value_of(placed: Placed, goal: Goal, load_sum: float, messages_us: float) -> float:
    """The objective, from the sum over batches of the largest load in grains."""
    load = load_sum / (goal.grains * placed.load.shape[1])
    return float(objective(load, messages_us, goal.ceiling, goal.weight))


@kernel
def pair_pass(
    placed: Placed,
    peaks: Peaks,
    messages: Messages,
    goal: Goal,
    scan: Scan,
    scratch: Scratch,
    tries: Tries,
) -> None:
    """One round over all pairs of GPUs of which one changed since the pair was last looked at."""
    num_gpus = len(placed.capacity)
    pair = np.empty(2, np.int64)
    load_sum = peaks.value[0].sum()
    messages_now = message_us(messages.net, messages.flow)
    for g1 in range(num_gpus):
        for g2 in range(g1 + 1, num_gpus):
            if not begin_pair(scan, g1, g2):
                continue
            enough = value_of(placed, goal, load_sum, messages_now) * (1 - STEP)
            tries.score[:] = enough
            tries.pick[:] = -1
            read_pair(placed, messages, tries, g1, g2)
            hot = gather_pair(placed, peaks, scratch, g1, g2)
            mark_rest(peaks, g1, g2, scratch.rest)
            now = (load_sum, messages_now)
            screen(placed, messages, goal, scratch, tries, hot, (g1, g2), now)
            best = best_try(messages, goal, tries, g1, g2, enough)
            if best >= 0:
                s1, s2 = tries.pick[best]
                row1, row2 = tries.row1[s1], tries.row2[s2]
                try_swap(messages, row1, g1, row2, g2)
                move_rows(messages, row1, g1, row2, g2)
                apply_swap(placed, g1, s1, g2, s2)
                pair[0], pair[1] = g1, g2
                load_sum = rank_peaks(placed.load, peaks, pair)
                messages_now = message_us(messages.net, messages.flow)
                note_swap(scan, g1, g2)


@kernel
def read_pair(placed: Placed, messages: Messages, tries: Tries, g1: int, g2: int) -> None:
    """Fill what `tries` has by slot."""
    serving = messages.serving
    for s in range(placed.capacity[g1]):
        tries.row1[s] = replica_row(serving, placed.slots[g1, s], g1)
    for s in range(placed.capacity[g2]):
        row = replica_row(serving, placed.slots[g2, s], g2)
        tries.row2[s] = row
        tries.moved2[s], tries.shared2[s], tries.count2[s] = 0.0, 0.0, 1.0
        if row >= 0:
            tries.moved2[s], tries.shared2[s] = move_us(messages, row, g1)
            tries.count2[s] = replicas(serving, placed.slots[g2, s])


@kernel
def screen(
    placed: Placed,
    messages: Messages,
    goal: Goal,
    scratch: Scratch,
    tries: Tries,
    hot: int,
    pair: tuple[int, int],
    now: tuple[int, float],
) -> None:
    """Find the swaps of a pair of GPUs that are best by estimate. now: the sum over batches of the
    largest load, and the messages, both before the swap; hot: see `gather_pair`."""
    (g1, g2), (load_sum, messages_now) = pair, now
    tokens, net = messages.tokens, messages.net
    slots, holds, empty = placed.slots, placed.holds, len(placed.replicas)
    unit_grains = goal.grains * placed.load.shape[1]
    per_us = messages_now / max(messages.flow.total[0], 1e-12)
    least = (scratch.hot_others[:hot] - scratch.hot_most[:hot]).sum()
    score = tries.score
    for s1 in range(placed.capacity[g1]):
        e1 = slots[g1, s1]
        if e1 != empty and holds[g2, e1]:
            continue
        us1, shared1, count1 = 0.0, 0.0, 1.0
        if e1 < empty:
            us1, shared1 = move_us(messages, tries.row1[s1], g2)
            count1 = replicas(messages.serving, e1)
        for s2 in range(placed.capacity[g2]):
            e2 = slots[g2, s2]
            if e1 == e2 or (e2 != empty and holds[g1, e2]):
                continue
            us = us1 + tries.moved2[s2]
            if e1 < empty and e2 < empty and net.dedup > 0:
                both = tokens.together[e1, e2] / (count1 * tries.count2[s2])
                us += both * (shared1 + tries.shared2[s2])
            after_us = messages_now + per_us * us
            worst = np.argmax(score)
            if value_of(placed, goal, load_sum + least, after_us) >= score[worst]:
                continue
            delta = hot_delta(scratch, hot, s1, s2)
            if value_of(placed, goal, load_sum + delta, after_us) >= score[worst]:
                continue
            limit = np.inf
            if goal.ceiling == 0.0:
                limit = (score[worst] - after_us) * unit_grains - load_sum
            delta = rest_delta(placed, scratch.rest, g1, e1, g2, e2, delta, limit)
            estimate = value_of(placed, goal, load_sum + delta, after_us)
            if estimate < score[worst]:
                score[worst] = estimate
                tries.pick[worst, 0], tries.pick[worst, 1] = s1, s2
                tries.value[worst] = (load_sum + delta) / unit_grains


@kernel
def best_try(messages: Messages, goal: Goal, tries: Tries, g1: int, g2: int, enough: float) -> int:
    """Which candidate is best, its messages counted exactly; -1 if none is below `enough`."""
    best, best_i = enough, -1
    for i in range(TRIES_PER_PAIR):
        if tries.pick[i, 0] < 0:
            continue
        try_swap(messages, tries.row1[tries.pick[i, 0]], g1, tries.row2[tries.pick[i, 1]], g2)
        us = message_us(messages.net, messages.trial)
        exact = objective(tries.value[i], us, goal.ceiling, goal.weight)
        if exact < best:
            best, best_i = exact, i
    return best_i


@kernel
def search_messages(
    placed: Placed, tokens: Tokens, net: Net, flow: Flow, goal: Goal, num_kicks: int, seed: int
) -> float:
    """Iterated local search over swaps; improves the slots in place, returns the objective. The
    numbers of replicas do not change.

    A kick is `KICK_SWAPS` random swaps, kept with what was descended to from there if that is
    better; only pairs with a GPU that it changed are looked at. flow: work space.
    """
    np.random.seed(seed)
    slots, load = placed.slots, placed.load
    num_gpus, num_batches = load.shape
    every = np.arange(num_gpus)
    peaks = make_peaks(num_gpus, num_batches)
    scratch, tries = make_scratch(slots.shape[1], num_batches), make_tries(slots.shape[1])
    scan = make_scan(num_gpus)
    best_value, best_slots = np.inf, slots.copy()
    for attempt in range(num_kicks + 1):
        rebuild(placed)
        scan.changed[:] = 0
        scan.clock[0] = 1
        if attempt > 0:
            scan.changed[kick(placed, KICK_SWAPS)] = 1
        rank_peaks(load, peaks, every)
        messages = make_messages(tokens, net, flow, slots, placed.capacity)
        for _ in range(MAX_PASSES):
            before = scan.clock[0]
            pair_pass(placed, peaks, messages, goal, scan, scratch, tries)
            if scan.changed.max() <= before:
                break
        rebuild(placed)
        load_value = mean_max(load) / goal.grains
        value = objective(load_value, message_us(net, flow), goal.ceiling, goal.weight)
        if value < best_value * (1 - MARGIN):
            best_value = value
            best_slots[:] = slots
        else:
            slots[:] = best_slots
        scan.scanned[:] = 1
    slots[:] = best_slots
    return float(best_value)
