"""Expert groups by spectral co-clustering of tokens and experts.

I. S. Dhillon, Co-clustering documents and words using bipartite spectral graph partitioning, KDD
2001: with A the tokens x experts matrix and D1, D2 its row and column sums, the left and right
singular vectors of D1^-1/2 A D2^-1/2 after the first, scaled back by D1^-1/2 and D2^-1/2, place
tokens and experts in one space where k-means finds clusters of both. Speculative MoE (arXiv
2503.04398) groups experts and tokens by co-clustering for the same purpose: tokens whose experts
sit together send fewer messages.

Here the tokens' side is not needed, so that the right singular vectors come from the experts x
experts matrix, and clusters have exactly as many experts as a GPU has slots.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import numpy.typing as npt

from moesim.placement import EMPTY
from moesim.solvers.base import Problem, Solution, empty_slots, pack_table
from moesim.solvers.methods.greedy import replica_counts
from moesim.solvers.repair import moved_note, separate_replicas
from moesim.types import Array, FloatArray, Progress, stream

ROUNDS = 12
PRICE_STEP = 0.5
STARTS = 3


class Coclustering:
    """Groups experts that the same tokens (or batches) choose; balance comes second.

    Per layer: experts are embedded, clustered into nodes and each node's experts into GPUs, both
    by k-means with clusters of given sizes (an assignment problem in every round), in which loaded
    clusters get dearer for loaded experts. Of all rounds the one with the most experts together is
    kept among those whose most loaded cluster is no fuller than linear placement's. Redundant slots
    go to the experts with the most load a replica, whose replicas are embedded alike and then kept
    apart. Uses sampled tokens where the problem has them (objectives traffic and time), else its
    batches. Ignores home ranks, speeds of GPUs and batch-to-batch variation of load.
    """

    name = "coclustering"

    def solve(self, problem: Problem, *, progress: Progress | None = None) -> Solution:
        started = time.monotonic()
        table = empty_slots(problem)
        load = problem.mean_load
        late = 0
        for layer in range(problem.num_layers):
            if problem.stop() or time.monotonic() - started > problem.time_limit_s:
                late += 1
            _place_layer(problem, layer, load[layer], table[layer], quick=late > 0)
            if progress is not None:
                progress(layer + 1, problem.num_layers)
        moved = separate_replicas(table, load)
        notes = [moved_note(moved)] if moved else []
        if late:
            notes.append(f"{late} of {problem.num_layers} layers were clustered in one round only")
        return Solution(
            pack_table(problem, table),
            "time_limit" if late else "feasible",
            seconds=time.monotonic() - started,
            notes=tuple(notes),
        )


def _place_layer(
    problem: Problem, layer: int, load: FloatArray, out: Array, *, quick: bool
) -> None:
    count = replica_counts(load, problem.num_slots, problem.num_gpus)
    items = np.repeat(np.arange(problem.num_experts), count)
    share = (load / count)[items]
    capacity = np.asarray(problem.capacity, np.int64)
    per_node = problem.num_gpus // problem.num_nodes
    rounds = 1 if quick else ROUNDS
    together = co_activation(problem, layer)
    seed = problem.seed * 7919 + layer
    place = embed(together, problem.num_gpus)[items]
    node = np.zeros(len(items), np.int64)
    if problem.num_nodes > 1:
        room = capacity.reshape(problem.num_nodes, per_node).sum(axis=1)
        node = balanced_clusters(place, room, share, seed, rounds)
    for n in range(problem.num_nodes):
        mine = np.flatnonzero(node == n)
        room = capacity[n * per_node : (n + 1) * per_node]
        gpu = n * per_node + balanced_clusters(place[mine], room, share[mine], seed, rounds)
        for g in range(n * per_node, (n + 1) * per_node):
            held = items[mine[gpu == g]]
            out[g, : len(held)] = held
            out[g, len(held) :] = EMPTY


def co_activation(problem: Problem, layer: int) -> FloatArray:
    """[E, E]: D2^-1/2 A^T D1^-1 A D2^-1/2 of tokens x experts, or of batches x experts.

    Experts that are never chosen have zero rows.
    """
    if problem.traffic is not None:
        ids = problem.traffic.expert_ids[:, layer].astype(np.int64)
        hit = np.zeros((len(ids), problem.num_experts))
        token, choice = np.nonzero(ids >= 0)
        hit[token, ids[token, choice]] = 1.0
    else:
        hit = problem.counts[:, layer].astype(np.float64)
    rows, columns = hit.sum(axis=1), hit.sum(axis=0)
    scaled = hit / np.sqrt(np.maximum(rows, 1e-12))[:, None]
    root = np.where(columns > 0, 1.0 / np.sqrt(np.maximum(columns, 1e-12)), 0.0)
    gram: FloatArray = (scaled.T @ scaled) * root[:, None] * root[None, :]
    return gram


def embed(together: FloatArray, num_clusters: int) -> FloatArray:
    """[E, d] place of each expert: its entries in the leading singular vectors after the first,
    with rows of unit length (the direction tells the cluster). d is one less than the clusters:
    with q clusters apart from each other there are q leading vectors, the first of them trivial.
    """
    from scipy.linalg import eigh

    size = len(together)
    dimensions = int(np.clip(num_clusters - 1, 1, max(1, size - 1)))
    first = max(0, size - 1 - dimensions)
    _, vectors = eigh(together, subset_by_index=(first, size - 1))
    place = vectors[:, ::-1][:, 1:] if size > 1 else vectors
    length = np.linalg.norm(place, axis=1, keepdims=True)
    return np.where(length > 1e-12, place / np.maximum(length, 1e-12), 0.0)


def balanced_clusters(
    place: FloatArray, room: Array, load: FloatArray, seed: int, rounds: int = ROUNDS
) -> npt.NDArray[np.int64]:
    """[n] cluster of each item: `room` [clusters] items each, near in `place` [n, d], and no
    cluster with more of `load` [n] than linear placement's fullest, if that can be had.

    k-means from a few starts, whose assignment step is exact for given centres, sizes and prices of
    load.
    """
    num, clusters = len(place), len(room)
    if clusters == 1 or num == 0:
        return np.zeros(num, np.int64)
    best = None
    best_key = (np.inf, np.inf)
    starts = STARTS if rounds > 1 else 1
    for start in range(starts):
        rng = stream(seed, start)
        key, found = _cluster_from(_spread_centres(place, room, rng), place, room, load, rounds)
        if best is None or key < best_key:
            best, best_key = found, key
    assert best is not None
    return best


def _spread_centres(place: FloatArray, room: Array, rng: np.random.Generator) -> FloatArray:
    """[clusters, d]: k-means++ (D. Arthur, S. Vassilvitskii, SODA 2007) and Lloyd's k-means, larger
    clusters given to larger rooms."""
    from scipy.cluster.vq import kmeans2

    num, clusters = len(place), len(room)
    picked = [int(rng.integers(num))]
    for _ in range(1, clusters):
        far = ((place[:, None] - place[picked][None]) ** 2).sum(axis=2).min(axis=1)
        weight = far / far.sum() if far.sum() > 0 else np.full(num, 1.0 / num)
        picked.append(int(rng.choice(num, p=weight)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        centres, label = kmeans2(place, place[picked], minit="matrix", missing="warn")
    size = np.bincount(label, minlength=clusters)
    out = np.empty_like(centres)
    out[np.argsort(-room, kind="stable")] = centres[np.argsort(-size, kind="stable")]
    return out


def _cluster_from(
    centres: FloatArray, place: FloatArray, room: Array, load: FloatArray, rounds: int
) -> tuple[tuple[float, float], npt.NDArray[np.int64]]:
    """((load above the ceiling, sum of squared distances), clusters) of the best of `rounds`."""
    from scipy.optimize import linear_sum_assignment

    num, clusters = len(place), len(room)
    seats = np.repeat(np.arange(clusters), room)
    mean = max(float(load.mean()), 1e-12)
    even = load.sum() * room / max(int(room.sum()), 1)
    ceiling = np.bincount(seats[:num], weights=load, minlength=clusters).max()
    price = np.zeros(clusters)
    best = np.zeros(num, np.int64)
    best_key = (np.inf, np.inf)
    for _ in range(rounds):
        far = ((place[:, None] - centres[None]) ** 2).sum(axis=2)
        cost = far + price[None, :] * (load / mean)[:, None]
        row, column = linear_sum_assignment(cost[:, seats])
        found = np.empty(num, np.int64)
        found[row] = seats[column]
        total = np.bincount(found, weights=load, minlength=clusters)
        for c in range(clusters):
            members = place[found == c]
            if len(members):
                centres[c] = members.mean(axis=0)
        spread = float(((place - centres[found]) ** 2).sum())
        key = (max(0.0, float(total.max() - ceiling * (1 + 1e-9))), spread)
        if key < best_key:
            best, best_key = found, key
        price = price + PRICE_STEP * (total / np.maximum(even, 1e-12) - 1)
    return best_key, best
