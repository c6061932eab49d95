"""All the paths of a leaf-spine network between two GPUs: one through each spine."""

from __future__ import annotations

import numpy as np

from moesim.cluster.core import Cluster
from moesim.cluster.routes import paths_between
from moesim.types import IntArray


def paths(cluster: Cluster, source: int, target: int) -> list[IntArray]:
    """Links of each path from GPU `source` to GPU `target`, the one that the cluster's hash takes
    first. Between two leaves there is a path for every spine; elsewhere one."""
    fabric = cluster.fabric
    own = paths_between(fabric, np.array([source]), np.array([target]))[0]
    own = own[own >= 0]
    up, down = (
        np.flatnonzero(np.isin(own, fabric.spine_up)),
        np.flatnonzero(np.isin(own, fabric.spine_down)),
    )
    if not len(up):
        return [own]
    leaf_a, first = (int(i[0]) for i in np.nonzero(fabric.spine_up == own[up[0]]))
    leaf_b = int(np.nonzero(fabric.spine_down == own[down[0]])[0][0])
    spines = fabric.spine_up.shape[1]
    out = []
    for spine in [first, *(s for s in range(spines) if s != first)]:
        path = own.copy()
        path[up[0]], path[down[0]] = (
            fabric.spine_up[leaf_a, spine],
            fabric.spine_down[leaf_b, spine],
        )
        out.append(path)
    return out
