"""Lower bounds on the messages of a layer, and on what they take, that hold for every placement.

Three arguments, of which the strongest counts. A *place* is a GPU, or a node.

Homes. A token's message to a place is saved only by experts that its own place holds. An expert is
held where most of the tokens that choose it are at home, at best, and in one more place for each
redundant slot: that limits how many choices are served at home (`home_choices`), and with 1/K of a
token for each of its K choices how many tokens need no message in a batch (`remote`).

Pairs. Choices of a token in one place are co-located pairs. A token with a choices at home and m
places besides has no fewer pairs than a at home and the others dealt evenly have. How many pairs
all tokens together can have is bounded by the best neighbours of every slot and, without
redundant slots, by eigenvalues: for any d that sums to zero, sum_i m_i lambda_i(W + diag(d)), with
place sizes m and W the counts of pairs and both in descending order, is at least the weight inside
the places (W. Donath, A. Hoffman, Lower Bounds for the Partitioning of Graphs, IBM J. Res. Dev. 17,
1973). A small linear program takes the least messages under both limits (`fewest_messages`).

Links. Each message takes a known share of the links that its kind can use, and the busiest link has
no less than the average one.
"""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.kernels import kernel
from moesim.solvers.base import Traffic
from moesim.solvers.objective import PlacementCost
from moesim.types import Array, FloatArray

PAIRS_AT_ONCE = 1 << 16
SHIFT_ROUNDS = 8
"""Steps towards the best diagonal shift; the bound holds after any number of them."""


def message_bound(objective: PlacementCost, layer: int) -> float:
    """Lower bound on the objective's message term of one layer, in microseconds."""
    traffic = objective.problem.traffic
    assert traffic is not None
    if objective.problem.num_gpus == 1:
        return 0.0
    found = _Messages(objective, traffic, layer)
    return found.link_us() if objective.problem.objective == "time" else found.total_us()


def fewest_on_busiest(objective: PlacementCost, layer: int) -> npt.NDArray[np.int64]:
    """[2, groups, batches]: messages, there and back, that the busiest link of every group carries
    in each sampled batch at least, scaled as `Traffic.time_us` is looked up."""
    problem, traffic = objective.problem, objective.problem.traffic
    assert traffic is not None
    groups = traffic.time_us.shape[1]
    if problem.num_gpus == 1:
        return np.zeros((2, groups, traffic.num_batches), np.int64)
    found = _Messages(objective, traffic, layer)
    shares = link_shares(objective.net, far=found.far)
    return np.floor(shares[:, :, None] * found.by_batch() + 1e-6).astype(np.int64)


class _Messages:
    """The sampled tokens of one layer, and the bounds on their messages."""

    def __init__(self, objective: PlacementCost, traffic: Traffic, layer: int) -> None:
        problem = self.problem = objective.problem
        self.traffic, self.net = traffic, objective.net
        self.spare = problem.num_slots - problem.num_experts
        self.ids = traffic.expert_ids[:, layer].astype(np.int64)
        self.num_choices = (self.ids >= 0).sum(axis=1)
        together = objective.tokens(layer).together.astype(np.float64)
        self.together = together * (1 - np.eye(len(together)))
        self.gpus = np.arange(problem.num_gpus)
        self.nodes = self.gpus // (problem.num_gpus // problem.num_nodes)
        self.node_slots = np.bincount(self.nodes, problem.capacity).astype(np.int64)
        self.far = problem.num_nodes > 1

    def remote(self, place_of_home: Array, batch_idx: Array) -> FloatArray:
        """[batches]: messages that tokens must send out of their own place, by homes.

        place_of_home: [G] GPU or node of each home.
        """
        place = place_of_home[self.traffic.home]
        token, choice = np.nonzero(self.ids >= 0)
        expert = self.ids[token, choice]
        single = self.traffic.dedup == 0
        weight = np.ones(len(token)) if single else 1.0 / self.num_choices[token]
        shape = (int(batch_idx.max()) + 1, int(place_of_home.max()) + 1, self.problem.num_experts)
        hits = np.zeros(shape)
        np.add.at(hits, (batch_idx[token], place[token], expert), weight)
        hits *= self._held(place_of_home)[:, None]
        sent = np.bincount(
            batch_idx, self.num_choices if single else self.num_choices > 0, minlength=len(hits)
        )
        return np.maximum(sent - self._saved(hits), 0.0)

    def home_choices(self, place_of_home: Array) -> float:
        """How many choices can be served in the place of their token's home."""
        token, choice = np.nonzero(self.ids >= 0)
        hits = np.zeros((int(place_of_home.max()) + 1, self.problem.num_experts))
        np.add.at(hits, (place_of_home[self.traffic.home][token], self.ids[token, choice]), 1)
        hits *= self._held(place_of_home)[:, None]
        return float(self._saved(hits[None])[0])

    def _held(self, places: Array) -> Array:
        """[places]: whether a place has slots, so that a token may be served at home there."""
        return np.bincount(places, self.problem.capacity) > 0

    def _saved(self, hits: FloatArray) -> FloatArray:
        """[batches]: most of `hits` [batches, places, E] where each expert has one place, and the
        redundant slots one more each."""
        ordered = -np.sort(-hits, axis=1)
        further = -np.sort(-ordered[:, 1:].reshape(len(hits), -1), axis=1)
        return ordered[:, 0].sum(axis=1) + further[:, : self.spare].sum(axis=1)

    def most_pairs(self, sizes: Array) -> float:
        """Pairs of choices of one token that places of `sizes` slots can hold together."""
        ordered = -np.sort(-self.together, axis=1)
        upto = np.concatenate((np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)), axis=1)
        last = len(ordered) - 1
        steps = np.minimum(np.arange(self.spare + 2) * (int(sizes.max()) - 1), last)
        gains = np.diff(upto[:, steps], axis=1)
        pairs = gains[:, 0].sum()
        if self.spare:
            pairs += np.sort(gains[:, 1:], axis=None)[::-1][: self.spare].sum()
        else:
            pairs = min(pairs, most_inside(self.together, sizes))
        return float(pairs) / 2

    def outside(self, *, nodes: bool) -> float:
        """Messages out of GPUs (or nodes), over all sampled tokens."""
        places, sizes = (
            (self.nodes, self.node_slots) if nodes else (self.gpus, self.problem.capacity)
        )
        home = self.home_choices(places)
        if self.traffic.dedup == 0:
            return max(0.0, float(self.num_choices.sum()) - home)
        return fewest_messages(
            np.bincount(self.num_choices),
            len(sizes),
            int(sizes.max()),
            self.most_pairs(sizes),
            home,
        )

    def total_us(self) -> float:
        """Summed link time per batch."""
        pair_us = self.net.pair_us
        other = ~np.eye(self.problem.num_gpus, dtype=bool)
        far = other & (self.nodes[:, None] != self.nodes[None, :])
        least = pair_us[other].min()
        total = self.outside(nodes=False) * least
        if far.any():
            total += self.outside(nodes=True) * max(0.0, pair_us[far].min() - least)
        return float(total) / self.traffic.num_batches

    def by_batch(self) -> FloatArray:
        """[batches]: messages out of GPUs, or on several nodes out of nodes, by homes."""
        return self.remote(
            self.nodes if self.far else self.gpus, self.traffic.batch_idx.astype(np.int64)
        )

    def link_us(self) -> float:
        """Dispatch and combine time, mean over the sampled batches.

        On several nodes only messages between nodes are counted. A mean over batches is bounded
        from the messages of every batch, and from all batches' together through the convex hull of
        the time from the fewest messages of a batch on.
        """
        batches = self.by_batch()
        mean = max(self.outside(nodes=self.far) / len(batches), batches.mean())
        shares = link_shares(self.net, far=self.far)
        total = 0.0
        for way in range(2):
            best = 0.0
            for group in range(self.net.time_us.shape[1]):
                share = shares[way, group]
                if share == 0.0:
                    continue
                time = np.minimum.accumulate(self.net.time_us[way, group][::-1])[::-1]
                at = np.minimum(len(time) - 1, np.floor(batches * share + 1e-6).astype(np.int64))
                low = int(at.min())
                hull = hull_at(time[low:], max(0.0, mean * share - low))
                best = max(best, float(time[at].mean()), hull)
            total += best
        return total


def link_shares(net: Any, *, far: bool) -> FloatArray:
    """[2, groups]: what one message between GPUs (or between nodes, `far`), there or back, adds at
    least to the average link of a group: its scaled load over the number of links that such
    messages can use."""
    num_gpus, num_links, groups = len(net.node_of), len(net.group), net.time_us.shape[1]
    src, dst = np.divmod(np.arange(num_gpus**2), num_gpus)
    counted = src != dst
    if far:
        counted &= net.node_of[src] != net.node_of[dst]
        if net.dedup == 2:
            counted &= net.relay[src, net.node_of[dst]] == dst
    else:
        counted &= net.node_of[src] == net.node_of[dst]
    load = np.zeros((2, groups, num_gpus**2))
    used = np.zeros((2, groups, num_links), bool)
    for first in range(0, num_gpus**2, PAIRS_AT_ONCE):
        last = min(first + PAIRS_AT_ONCE, num_gpus**2)
        pair = np.repeat(np.arange(first, last), np.diff(net.indptr[first : last + 1]))
        way, link = np.divmod(net.link[net.indptr[first] : net.indptr[last]], num_links)
        here = counted[pair]
        pair, way, link = pair[here], way[here], link[here]
        place = (way.astype(np.int64) * groups + net.group[link]) * (last - first) + pair - first
        sums = np.bincount(place, net.scale[link], 2 * groups * (last - first))
        load[:, :, first:last] = sums.reshape(2, groups, -1)
        used[way, net.group[link], link] = True
    out = np.zeros((2, groups))
    for w, g in np.ndindex(out.shape):
        if used[w, g].any():
            out[w, g] = load[w, g][counted].min() / used[w, g].sum()
    return out


def even_pairs(num_choices: int, num_places: int) -> int:
    """Co-located pairs of choices dealt evenly: the fewest that so many places can have."""
    if num_places == 0:
        return 0
    each, more = divmod(num_choices, num_places)
    return more * (each + 1) * each // 2 + (num_places - more) * each * (each - 1) // 2


def fewest_messages(
    tokens_by_choices: npt.NDArray[np.integer[Any]],
    num_places: int,
    most_slots: int,
    pairs: float,
    home_choices: float,
) -> float:
    """Least sum over tokens of the places besides home that serve them.

    tokens_by_choices: [K + 1], how many tokens have so many choices; no place holds more than
    `most_slots` of a token's. Over all tokens at most `pairs` of choices are co-located and
    `home_choices` served at home. Tokens may be split between ways to be served (a relaxation).
    """
    from scipy.optimize import linprog

    ways = [
        (k, places, home, comb(home, 2) + even_pairs(k - home, places))
        for k in np.flatnonzero(tokens_by_choices).tolist()
        for home in range(min(k, most_slots) + 1)
        for places in range(-(-(k - home) // most_slots), min(k - home, num_places - 1) + 1)
        if (places == 0) == (home == k)
    ]
    if not ways:
        return 0.0
    choices, places, home, together = np.array(ways).T
    kinds = np.unique(choices)
    found = linprog(
        places,
        A_ub=np.stack([together, home]),
        b_ub=[max(pairs, 0.0), home_choices],
        A_eq=(choices == kinds[:, None]).astype(float),
        b_eq=tokens_by_choices[kinds],
    )
    return float(found.fun) if found.status == 0 and found.fun is not None else 0.0


def most_inside(weights: FloatArray, sizes: Array) -> float:
    """Upper bound on the sum of `weights` [E, E] (symmetric, zero diagonal) over pairs in one
    place, each counted twice, when all E experts are dealt to places of `sizes`."""
    from scipy.linalg import eigh

    size = -np.sort(-np.asarray(sizes, np.float64))
    experts = len(weights)
    count = min(len(size), experts)
    if size.sum() != experts:
        return float(weights.sum())
    shift = weights.sum(axis=1).mean() - weights.sum(axis=1)
    best = float(weights.sum())
    for attempt in range(SHIFT_ROUNDS):
        values, vectors = eigh(
            weights + np.diag(shift), subset_by_index=[experts - count, experts - 1]
        )
        value = float(size[:count] @ values[::-1])
        slope = (vectors[:, ::-1] ** 2) @ size[:count] - 1.0
        best = min(best, value)
        steep = float(slope @ slope)
        if steep < 1e-12:
            break
        shift = shift - slope * (0.05 * abs(value) / (1 + attempt)) / steep
        shift -= shift.mean()
    return best


@kernel
def hull_at(values: Array, x: float) -> float:
    """The largest convex function below `values` at 0, 1, 2, ..., at x; the last value beyond."""
    corners = np.empty(len(values), np.int64)
    count = 0
    for i in range(len(values)):
        while count > 1:
            a, b = corners[count - 2], corners[count - 1]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            count -= 1
        corners[count] = i
        count += 1
    for c in range(count - 1):
        a, b = corners[c], corners[c + 1]
        if x <= b:
            return float(values[a] + (values[b] - values[a]) * (x - a) / (b - a))
    return float(values[corners[count - 1]])
