"""Local search on load: costs by hand, incremental state against scratch, INV-7 on tiny cases."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.metrics import imbalance
from moesim.placement import EMPTY
from moesim.solvers.base import Problem
from moesim.solvers.kernels.load import search_layer, swap_pass
from moesim.solvers.kernels.pairs import best_swap, make_peaks, make_scratch, rank_peaks
from moesim.solvers.kernels.placed import (
    Costs,
    fill_row,
    make_placed,
    make_scan,
    make_work,
    mean_max,
)
from moesim.solvers.kernels.replace import make_rows, replace_pass
from moesim.solvers.methods.local_search import LocalSearch

Array = npt.NDArray[Any]
GRAINS = 2.0**18
"""Grains a token in these cases."""


class Case:
    """A random layer: counts, uneven capacities, kinds of GPU, and a valid start with replicas."""

    def __init__(self, seed: int, *, by_time: bool, batches: int = 40) -> None:
        rng = np.random.default_rng(seed)
        gpus, self.experts = int(rng.integers(2, 6)), int(rng.integers(2, 13))
        self.counts = rng.poisson(rng.gamma(1, 20, (self.experts, 1)), (self.experts, batches))
        self.counts = self.counts.astype(np.float32)
        self.capacity = rng.integers(0, self.experts + 1, gpus)
        if self.capacity.sum() < self.experts:
            self.capacity[:] = -(-self.experts // gpus)
        self.unit = rng.integers(0, 2, gpus)
        self.scale = np.array([1.0, 2.5]) * GRAINS
        steps = rng.random((2, 30)) if by_time else np.zeros((2, 0))
        self.table = np.concatenate((np.zeros((2, 1)), np.cumsum(steps, axis=1)), axis=1)
        width = int(self.capacity.max())
        self.slots = np.full((gpus, width), self.experts)
        order = itertools.cycle(rng.permutation(self.experts).tolist())
        spare = rng.random() < 0.3  # leave some slots empty, as a search may
        for gpu, size in enumerate(self.capacity):
            for slot in range(size):
                full = {*self.slots.ravel().tolist()} >= set(range(self.experts))
                if full and spare and rng.random() < 0.5:
                    continue
                held = self.slots[gpu].tolist()
                self.slots[gpu, slot] = next(e for e in order if e not in held)

    @property
    def costs(self) -> Costs:
        return Costs(self.counts, self.scale, self.table)

    def placed(self, slots: Array) -> Any:
        """State of `slots` from the compiled cost."""
        return make_placed(make_work(self.costs, slots), slots, self.capacity, self.unit)

    def value(self, slots: Array) -> float:
        """The objective from scratch, in float64, without any of the compiled code."""
        replicas = np.bincount(slots.ravel(), minlength=self.experts + 1)
        load = np.zeros((len(slots), self.counts.shape[1]))
        last = self.table.shape[1] - 1
        for gpu, row in enumerate(slots):
            kind = self.unit[gpu]
            for expert in row[row < self.experts]:
                tokens = self.counts[expert].astype(float) / replicas[expert]
                cost = tokens
                if last:
                    cost = np.interp(tokens, np.arange(last + 1), self.table[kind])
                    slope = self.table[kind, last] - self.table[kind, last - 1]
                    cost = cost + slope * np.maximum(tokens - last, 0)
                load[gpu] += cost * self.scale[kind] / GRAINS
        return float(load.max(axis=0).mean())

    def search(self, kicks: int, seed: int = 0) -> tuple[float, Array]:
        slots = self.slots.copy()
        value = search_layer(self.placed(slots), self.costs, kicks, seed)
        return float(value) / GRAINS, slots

    def check(self, slots: Array) -> None:
        """INV-2 for one layer."""
        for gpu, row in enumerate(slots):
            held = row[row < self.experts]
            assert len(held) == len(set(held.tolist())) <= self.capacity[gpu]
            assert (row[self.capacity[gpu] :] == self.experts).all()
        assert set(slots.ravel().tolist()) >= set(range(self.experts))


def test_cost_rows_by_hand() -> None:
    """Two kinds of GPU, 2 and 4 grains a token; 0, 1, 3 and 8 tokens of an expert with two
    replicas: 0, 0.5, 1.5, 4 each."""
    counts = np.array([[0, 1, 3, 8]], np.float32)
    scale = np.array([2.0, 4.0])
    out = np.zeros((2, 4), np.int32)
    fill_row(Costs(counts, scale, np.zeros((2, 1))), 0, 2, out)
    assert out.tolist() == [[0, 1, 3, 8], [0, 2, 6, 16]]
    # Costs of 0, 1, 2 tokens: 0 10 12. Half a token 5; 1.5 tokens 11; 4 go on in line: 12 + 2 x 2.
    fill_row(Costs(counts, scale, np.array([[0.0, 10, 12], [0, 1, 2]])), 0, 2, out)
    assert out.tolist() == [[0, 10, 22, 32], [0, 2, 6, 16]]


def test_mean_of_the_largest() -> None:
    # Batches: max(1, 4) = 4, max(3, 2) = 3.
    assert mean_max(np.array([[1, 3], [4, 2]], np.int32)) == 3.5


@given(seed=st.integers(0, 2**32), by_time=st.booleans(), kicks=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_search_returns_what_its_slots_cost(seed: int, by_time: bool, kicks: int) -> None:
    """The sums of grains end within 1e-4 of float64 from scratch; never worse than before."""
    case = Case(seed, by_time=by_time)
    value, slots = case.search(kicks)
    case.check(slots)
    assert value == pytest.approx(case.value(slots), rel=1e-4)
    assert case.value(slots) <= case.value(case.slots) * (1 + 1e-5)


def check_peaks(peaks: Any, load: Array) -> None:
    """The three largest loads of every batch, each at one of the GPUs that have it."""
    gpus, batches = load.shape
    ordered = -np.sort(-load, axis=0)[:3]
    for k in range(min(3, gpus)):
        assert np.array_equal(peaks.value[k], ordered[k])
        assert np.array_equal(load[peaks.gpu[k], np.arange(batches)], ordered[k])
    assert (peaks.gpu[gpus:] == -1).all()
    for gpu in range(gpus):
        mine = peaks.order[peaks.start[gpu] : peaks.start[gpu + 1]]
        assert set(mine.tolist()) == set(np.flatnonzero(peaks.gpu[0] == gpu).tolist())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_peaks_follow_the_loads(seed: int) -> None:
    """After some GPUs change, peaks are those of the loads; the sum of the largest is returned."""
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(1, 8))
    load = rng.integers(0, 20, (gpus, 50)).astype(np.int32)
    peaks = make_peaks(gpus, 50)
    assert rank_peaks(load, peaks, np.arange(gpus)) == load.max(axis=0).sum()
    check_peaks(peaks, load)
    for _ in range(3):
        moved = np.flatnonzero(rng.random(gpus) < 0.4)
        load[moved] = rng.integers(0, 20, (len(moved), 50))
        assert rank_peaks(load, peaks, moved) == load.max(axis=0).sum()
        check_peaks(peaks, load)


@given(seed=st.integers(0, 2**32), by_time=st.booleans())
@settings(max_examples=60, deadline=None)
def test_best_swap_of_a_pair_is_that_of_trying_all(seed: int, by_time: bool) -> None:
    """Ruling swaps out by a few batches loses none: the change found is the least over all valid
    swaps, each evaluated on all batches from scratch."""
    case = Case(seed, by_time=by_time, batches=300)
    slots, gpus = case.slots, len(case.capacity)
    placed = case.placed(slots)
    peaks, scratch = make_peaks(gpus, 300), make_scratch(slots.shape[1], 300)
    rank_peaks(placed.load, peaks, np.arange(gpus))
    now = case.value(slots) * 300
    least = int(1e-4 * now * GRAINS)
    for g1, g2 in itertools.combinations(range(gpus), 2):
        found, s1, s2 = best_swap(placed, peaks, scratch, g1, g2, least)
        changes = [-least / GRAINS]
        for i, j in np.ndindex(int(case.capacity[g1]), int(case.capacity[g2])):
            e1, e2 = slots[g1, i], slots[g2, j]
            taken = (e1 in slots[g2] and e1 < case.experts) or (
                e2 in slots[g1] and e2 < case.experts
            )
            if e1 == e2 or taken:
                continue
            other = slots.copy()
            other[g1, i], other[g2, j] = e2, e1
            changes.append(case.value(other) * 300 - now)
            if (i, j) == (s1, s2):
                assert changes[-1] == pytest.approx(found / GRAINS, abs=1e-4 * now)
        assert found / GRAINS == pytest.approx(min(changes), abs=1e-4 * now)


@given(seed=st.integers(0, 2**32), by_time=st.booleans())
@settings(max_examples=40, deadline=None)
def test_passes_keep_their_state(seed: int, by_time: bool) -> None:
    """After swaps and replica moves, loads, holders and replica counts are those of the slots."""
    case = Case(seed, by_time=by_time)
    slots, gpus = case.slots.copy(), len(case.capacity)
    placed = case.placed(slots)
    load = placed.load
    assert mean_max(load) / GRAINS == pytest.approx(case.value(slots), rel=1e-4)
    peaks, scan = make_peaks(gpus, load.shape[1]), make_scan(gpus)
    rank_peaks(load, peaks, np.arange(gpus))
    scratch, rows = make_scratch(slots.shape[1], load.shape[1]), make_rows(placed)
    before = mean_max(load)
    for _ in range(2):
        swap_pass(placed, peaks, scratch, scan)
        replace_pass(placed, case.costs, peaks, scan, rows)
        check_peaks(peaks, load)
        case.check(slots)
        again = case.placed(slots)
        assert np.array_equal(load, again.load)
        count = np.bincount(slots.ravel(), minlength=case.experts + 1)[: case.experts]
        assert placed.replicas.tolist() == count.tolist()
        for gpu, row in enumerate(slots):
            held = set(np.flatnonzero(placed.holds[gpu, : case.experts]))
            assert held == set(row) - {case.experts}
        assert mean_max(again.load) <= before * (1 + 1e-5)


def test_converged_search_has_no_better_swap() -> None:
    """A local optimum: no valid swap of two slots improves by more than the margin."""
    case = Case(7, by_time=False)
    value, slots = case.search(0)
    for (g1, s1), (g2, s2) in itertools.combinations(
        [(g, s) for g, size in enumerate(case.capacity) for s in range(size)], 2
    ):
        e1, e2 = slots[g1, s1], slots[g2, s2]
        if g1 == g2 or e1 in slots[g2] or e2 in slots[g1]:
            continue
        slots[g1, s1], slots[g2, s2] = e2, e1
        assert case.value(slots) >= value * (1 - 1e-4)
        slots[g1, s1], slots[g2, s2] = e1, e2


def fractional_imbalance(problem: Problem, table: list[set[int]]) -> float:
    """Mean imbalance of one layer when every expert's tokens are shared equally."""
    counts = problem.counts[:, 0].astype(float)
    replicas = [sum(e in held for held in table) for e in range(problem.num_experts)]
    load = np.zeros((len(counts), len(table)))
    for gpu, held in enumerate(table):
        for expert in held:
            load[:, gpu] += counts[:, expert] / replicas[expert]
    return float(imbalance(load, problem.speed).mean())


def all_tables(problem: Problem) -> list[list[set[int]]]:
    """Every way to fill all slots without doubles and with every expert somewhere."""
    choices = [
        [set(held) for held in itertools.combinations(range(problem.num_experts), size)]
        for size in problem.capacity
    ]
    every = set(range(problem.num_experts))
    return [list(table) for table in itertools.product(*choices) if set().union(*table) == every]


@pytest.mark.parametrize(
    ("capacity", "experts", "within"),
    [
        ([3, 3], 6, 0.0),
        ([4, 2], 6, 0.0),
        ([2, 2, 2], 6, 0.0),
        ([1, 2, 3], 6, 0.0),
        # With replicas a move may need a swap to pay off. On 659 random instances of up to 6
        # experts on 2 or 3 GPUs, 96 % were at the optimum, the mean 0.2 % off, the worst 28 %.
        ([3, 3], 4, 0.1),
        ([3, 2, 2], 5, 0.1),
        ([2, 2, 4], 6, 0.1),
    ],
)
def test_tiny_instances_against_enumeration(
    capacity: list[int], experts: int, within: float
) -> None:
    """INV-7: never better than the enumerated optimum, and at it where experts have one slot."""
    rng = np.random.default_rng(experts)
    for trial in range(6):
        counts = rng.poisson(rng.gamma(1, 20, experts), (12, 1, experts)).astype(np.float32) + 1
        speed = np.ones(len(capacity)) if trial % 2 else rng.choice([0.5, 1, 2], len(capacity))
        problem = Problem(counts, np.array(capacity), 1, speed=speed, seed=trial)
        solution = LocalSearch().solve(problem)
        slots = solution.placement.physical_to_logical.reshape(len(capacity), -1)
        own = fractional_imbalance(problem, [set(row) - {EMPTY} for row in slots.tolist()])
        assert solution.objective_value == pytest.approx(own, rel=1e-4)
        best = min(fractional_imbalance(problem, table) for table in all_tables(problem))
        assert own >= best * (1 - 1e-9)
        assert own <= best * (1 + within) + 1e-9
