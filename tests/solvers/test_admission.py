"""Flow admission over several paths, by hand and against enumeration (INV-7, INV-3)."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.cluster.multipath import paths
from moesim.errors import FormatError, InputError
from moesim.jobs.admit import admit
from moesim.solvers.admission import Flows, exact, first_path, genetic


def flows(rates: list[float], worth: list[float], ways: list[list[list[int]]]) -> Flows:
    made = [[np.array(path) for path in one] for one in ways]
    return Flows(np.array(rates), np.array(worth), made, np.full(4, 10.0))


def test_a_second_path_admits_what_the_first_cannot() -> None:
    """Links of 10. Flows of 6, 6 and 5, all first over link 0, the last two also over link 1. One
    path each: the worthiest (3) alone. Two paths: 6 on link 0; 6 or 5 on link 1, the worthier."""
    made = flows([6, 6, 5], [3, 1, 2], [[[0]], [[0], [1]], [[0], [1]]])
    assert first_path(made).worth == 3
    best = exact(made)
    assert (best.worth, best.proven, best.chosen.tolist()) == (5, True, [0, -1, 1])
    assert genetic(made).worth == 5


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ways = [[rng.choice(4, 2, replace=False).tolist() for _ in range(2)] for _ in range(6)]
    made = flows(rng.integers(2, 9, 6).tolist(), rng.integers(1, 5, 6).tolist(), ways)
    best = 0.0
    for choice in product((-1, 0, 1), repeat=6):
        chosen = np.array(choice)
        if (made.load(chosen) <= made.capacity_gb_per_s + 1e-9).all():
            best = max(best, float(made.worth[chosen >= 0].sum()))
    found = exact(made)
    assert found.worth == best
    for one in (found, genetic(made, seed=seed), first_path(made)):
        assert one.worth <= best
        assert (made.load(one.chosen) <= made.capacity_gb_per_s * (1 + 1e-6)).all()
    again = genetic(made, seed=seed)
    assert again.chosen.tolist() == genetic(made, seed=seed).chosen.tolist()


def test_a_path_for_every_spine_between_leaves_and_one_elsewhere() -> None:
    """Four nodes, two on a leaf: GPU 0 to 1 within a node, to 8 over the leaf, to 16 over any of
    four spines, the first as the cluster's own routes have it."""
    cluster = load_cluster("h100-sxm-roce-leafspine")
    assert [len(paths(cluster, 0, to)) for to in (1, 8, 16)] == [1, 1, 4]
    found = paths(cluster, 0, 16)
    assert sorted(found[0].tolist()) == sorted(cluster.routes().links(0, 16).tolist())
    assert len({tuple(p.tolist()) for p in found}) == 4
    assert len({len(p) for p in found}) == 1


def test_flows_of_a_file(tmp_path: Path) -> None:
    """Two flows of 30 GB/s from one GPU: its NIC of 50 takes one, the worthier."""
    file = tmp_path / "flows.csv"
    file.write_text("source,target,gb_per_s,priority\n0,16,30,1\n0,17,30,4\n")
    result = admit(file)
    assert {one.worth for one in result.found.values()} == {4.0}
    assert "2 flows of flows.csv on 32 GPUs" in result.summary()
    assert result.to_frame().loc["exact", "admitted"] == 1
    file.write_text("source,target,gb_per_s,priority\n0,99,30,1\n")
    with pytest.raises(FormatError, match="line 2"):
        admit(file)
    for text in ("random:count=0", "random:rate=3", "nowhere.csv"):
        with pytest.raises(InputError):
            admit(text)
