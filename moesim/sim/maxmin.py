"""Max-min fair rates by progressive filling.

All rates rise together; where a link fills up or a flow meets its own limit, the flows concerned
stop and the others go on (Bertsekas and Gallager, Data Networks, 1992; the model of
SimGrid's `maxmin` solver, Casanova et al. 2014). `tests.reference.maxmin` holds the slow version.
"""

from __future__ import annotations

import numpy as np

from moesim.kernels import kernel
from moesim.types import Array, FloatArray

SLACK = 1e-12
"""Relative distance at which a link counts as full."""


@kernel
def max_min_rates(
    indptr: Array, link_idx: Array, load: Array, limit: Array, room: Array, used: Array
) -> FloatArray:
    """Rates [F] of F flows; `used` [links] receives what they take of each link.

    Flow f crosses links `link_idx[indptr[f]:indptr[f + 1]]` and takes `load` of each per unit of
    rate; its rate is at most `limit[f]`, which must be finite. Link l has `room[l]` to give. Every
    flow has the same weight: at the solution a flow is at its limit, or crosses a full link on
    which no other flow is faster.
    """
    num_flows = len(limit)
    rate = np.zeros(num_flows)
    rising = np.ones(num_flows, np.bool_)
    demand = np.zeros(len(room))
    crossing = np.zeros(len(room), np.int64)
    used[:] = 0.0
    for e in range(indptr[num_flows]):
        demand[link_idx[e]] += load[e]
        crossing[link_idx[e]] += 1
    num_rising = num_flows
    level = 0.0
    while num_rising > 0:
        lowest = np.inf
        for f in range(num_flows):
            if rising[f]:
                lowest = min(lowest, limit[f])
                for e in range(indptr[f], indptr[f + 1]):
                    link = link_idx[e]
                    if demand[link] > 0.0:
                        lowest = min(lowest, (room[link] - used[link]) / demand[link])
        level = max(level, lowest)
        for f in range(num_flows):
            if not rising[f]:
                continue
            full = limit[f] <= level * (1.0 + SLACK)
            for e in range(indptr[f], indptr[f + 1]):
                link = link_idx[e]
                if load[e] > 0.0 and used[link] + demand[link] * level >= room[link] * (
                    1.0 - SLACK
                ):
                    full = True
            if not full:
                continue
            rising[f] = False
            num_rising -= 1
            rate[f] = min(level, limit[f])
            for e in range(indptr[f], indptr[f + 1]):
                link = link_idx[e]
                used[link] += load[e] * rate[f]
                crossing[link] -= 1
                demand[link] = demand[link] - load[e] if crossing[link] > 0 else 0.0
    return rate
