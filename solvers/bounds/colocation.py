"""A bound from one placement having to serve all batches: the co-location relaxation.

Without redundancy let y[e, f] say whether experts e and f share a GPU. Whatever the placement, the
GPU that holds e costs w[e, b] + sum over f of y[e, f] w[f, b] in batch b, so

    minimise  mean over b of z[b]
    subject to  z[b] >= w[e, b] + sum_f y[e, f] w[f, b]   for every e and b
                sum_f y[e, f] = S - 1,  y symmetric, between 0 and 1

bounds the objective from below. It knows nothing of GPUs, so that their symmetry, which makes the
usual relaxation useless (every expert spread evenly over all GPUs), is not there. The program has
E^2 / 2 variables and E B dense rows; it is solved approximately by smoothing the maximum, and the
bound is then proven by its dual: for any weights omega[e, b] >= 0 that sum to 1 in every batch,
the least of sum omega * (right-hand sides) over y, a linear program in y alone (HiGHS).
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.solvers.base import Problem
from moesim.types import Array, FloatArray

SHARPNESS = ((30.0, 1e-4, 60), (80.0, 3e-5, 100), (240.0, 3e-6, 200))
"""Stages: sharpness of the smoothed maximum (of work in units of the mean bound), weight of the
entropy that keeps y inside its box, most iterations."""
PENALTY = 30.0
WORTHWHILE = 1.05
MAX_EXPERTS = 128
CELLS = 2.5e6


def applies(problem: Problem) -> bool:
    """Whether every GPU holds the same number of slots and there is none to spare."""
    return (
        problem.num_slots == problem.num_experts
        and len(np.unique(problem.capacity)) == 1
        and 1 < problem.num_gpus < problem.num_experts <= MAX_EXPERTS
    )


def colocation_bound(work: FloatArray, num_gpus: int, floor: FloatArray) -> float:
    """Lower bound on the mean over batches of the costliest GPU; `floor`'s mean if no better.

    work: [E, B] cost of each expert; floor: [B] known lower bounds of each batch. Stops early
    where the relaxation itself is within 5% of the floor.
    """
    unit = float(floor.mean())
    if unit <= 0:
        return unit
    relaxation = _Relaxation(work / unit, floor / unit, len(work) // num_gpus)
    best = 1.0
    for sharpness, entropy, iterations in SHARPNESS:
        relaxation.minimise(sharpness, entropy, iterations)
        value, weights = relaxation.weights(sharpness)
        if value < WORTHWHILE:
            break
        best = max(best, relaxation.proven(weights))
    return best * unit


@kernel
def smooth_max(full: Array, work: Array, floor: Array, sharpness: float, slope: Array) -> float:
    """Mean over batches of the smoothed largest of `full` @ `work` [E, B] and `floor` [B]; adds
    its derivative by `full` [E, E] to `slope`. Terms below exp(-20) are left out."""
    num, num_batches = work.shape
    columns = np.ascontiguousarray(work.T)
    load = np.empty(num)
    total_value = 0.0
    for b in range(num_batches):
        column = columns[b]
        top = floor[b]
        for e in range(num):
            total = 0.0
            for f in range(num):
                total += full[e, f] * column[f]
            load[e] = total
            top = max(top, total)
        norm = np.exp(sharpness * (floor[b] - top))
        for e in range(num):
            below = sharpness * (load[e] - top)
            load[e] = np.exp(below) if below > -20 else 0.0
            norm += load[e]
        total_value += top + np.log(norm) / sharpness
        for e in range(num):
            if load[e] > 0:
                share = load[e] / (norm * num_batches)
                for f in range(num):
                    slope[e, f] += share * column[f]
    return total_value / num_batches


class _Relaxation:
    """State of the smoothed problem. work: [E, B], floor: [B], in units of the mean floor."""

    def __init__(self, work: FloatArray, floor: FloatArray, slots: int) -> None:
        self.work, self.floor, self.slots = work, floor, slots
        num = len(work)
        self.pairs = np.triu_indices(num, 1)
        step = max(1, round(work.shape[1] / max(200.0, CELLS / num**2)))
        self.some = np.ascontiguousarray(work[:, ::step])
        self.some_floor = floor[::step]
        start = (slots - 1) / (num - 1)
        self.x = np.full(len(self.pairs[0]), np.log(max(start, 1e-6) / max(1 - start, 1e-6)))

    def matrix(self, values: FloatArray) -> FloatArray:
        out = np.eye(len(self.work))
        out[self.pairs] = values
        out.T[self.pairs] = values
        return out

    def minimise(self, sharpness: float, entropy: float, iterations: int) -> None:
        """Improve `x`, the logits of y, by L-BFGS."""
        from scipy.optimize import minimize
        from scipy.special import expit

        def cost(x: FloatArray) -> tuple[float, FloatArray]:
            y = expit(x)
            full = self.matrix(y)
            off = full.sum(axis=1) - self.slots
            near = np.clip(y, 1e-12, 1 - 1e-12)
            slope = np.zeros_like(full)
            value = smooth_max(full, self.some, self.some_floor, sharpness, slope)
            value += PENALTY * float((off**2).mean())
            value += entropy * float((near * np.log(near) + (1 - near) * np.log1p(-near)).sum())
            slope += (2 * PENALTY / len(off)) * off[:, None]
            at = (slope + slope.T)[self.pairs] + entropy * np.log(near / (1 - near))
            return value, at * y * (1 - y)

        found = minimize(
            cost,
            self.x,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-7},
        )
        self.x = found.x

    def weights(self, sharpness: float) -> tuple[float, FloatArray]:
        """(value of the relaxation at y, omega [E, B] on all batches; what is missing to 1 in a
        batch is on the floor)."""
        from scipy.special import expit

        load = self.matrix(expit(self.x)) @ self.work
        top = np.maximum(load.max(axis=0), self.floor)
        share = np.exp(sharpness * (load - top))
        rest = np.exp(sharpness * (self.floor - top))
        return float(top.mean()), share / (share.sum(axis=0) + rest)

    def proven(self, omega: FloatArray) -> float:
        """The dual value of `omega`: a lower bound whatever omega is."""
        num_batches = self.work.shape[1]
        cost = omega @ self.work.T / num_batches
        rest = 1 - omega.sum(axis=0)
        fixed = float(np.trace(cost)) + float((rest * self.floor).mean())
        return fixed + least_neighbours((cost + cost.T)[self.pairs], len(self.work), self.slots - 1)


def least_neighbours(cost: FloatArray, num: int, degree: int) -> float:
    """A lower bound, up to rounding the least, on sum cost * y over symmetric y in [0, 1] in which
    every one of `num` rows sums to `degree`. cost: [num (num - 1) / 2], upper triangle by rows.

    Whatever multipliers HiGHS returns, the value is recomputed from them.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    rows, cols = np.triu_indices(num, 1)
    column = np.arange(len(rows))
    incidence = csr_matrix(
        (np.ones(2 * len(rows)), (np.concatenate((rows, cols)), np.concatenate((column, column))))
    )
    found = linprog(  # type: ignore[call-overload]
        cost, A_eq=incidence, b_eq=np.full(num, float(degree)), bounds=(0.0, 1.0), method="highs"
    )
    price = np.asarray(found.eqlin.marginals) if found.success else np.zeros(num)
    reduced = cost - price[rows] - price[cols]
    return float(degree * price.sum() + np.minimum(reduced, 0.0).sum())
