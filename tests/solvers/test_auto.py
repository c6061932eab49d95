"""What `auto` takes, and that it is that solver's answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.solvers.base import Problem
from moesim.solvers.methods.auto import Auto, choose
from moesim.solvers.registry import find_solver


def problem(
    layers: int = 2, experts: int = 16, gpus: int = 4, spare: int = 0, limit: float = 60.0
) -> Problem:
    counts = np.random.default_rng(0).poisson(20, (12, layers, experts)).astype(np.float32)
    capacity = np.full(gpus, (experts + spare) // gpus)
    return Problem(counts, capacity, 1, time_limit_s=limit)


@pytest.mark.parametrize(
    ("sizes", "solver", "reason"),
    [
        ({"gpus": 1}, "linear", "same"),
        ({"limit": 60.0}, "lns", "60 s are enough for 2 layers"),
        # 40 layers on load alone: 10 s of local search, 35 s with the neighbourhoods.
        ({"layers": 40, "limit": 35.0}, "lns", "about 35 s"),
        ({"layers": 40, "limit": 34.0}, "local_search", "34 s are too few for lns"),
        ({"layers": 40, "limit": 9.0}, "eplb", "about 10 s, the limit is 9"),
        # 8 experts on 4 GPUs are 32 cells: provable, at 5 s a layer and without replicas only.
        ({"experts": 8, "limit": 10.0}, "ilp", "few enough to prove"),
        ({"experts": 8, "limit": 9.0}, "lns", "enough"),
        ({"experts": 8, "spare": 4}, "lns", "enough"),
        ({"experts": 12}, "lns", "enough"),
    ],
)
def test_choice(sizes: dict[str, float], solver: str, reason: str) -> None:
    found = choose(problem(**sizes))  # type: ignore[arg-type]
    assert found.solver == solver
    assert reason in found.reason


def test_unequal_gpus_are_not_given_to_eplb() -> None:
    """EPLB refuses them."""
    uneven = replace(problem(layers=100, limit=1.0), capacity=np.array([5, 4, 4, 3]))
    assert choose(uneven).solver == "greedy"


def test_messages_have_a_time_of_their_own() -> None:
    """60 layers at 0.2 s: 12 s for the local search, 42 s for the neighbourhoods."""
    seen = problem(layers=60)
    object.__setattr__(seen, "objective", "time")
    assert choose(seen).solver == "lns"
    object.__setattr__(seen, "time_limit_s", 41.0)
    assert choose(seen).solver == "local_search"
    object.__setattr__(seen, "time_limit_s", 11.0)
    assert choose(seen).solver == "eplb"


def test_it_is_the_chosen_solvers_answer_and_says_so() -> None:
    given = problem()
    found, want = Auto().solve(given), find_solver("lns").solve(given)
    assert np.array_equal(found.placement.physical_to_logical, want.placement.physical_to_logical)
    assert found.status == want.status
    assert found.notes[0].startswith("took lns: ")
    assert found.notes[1:] == want.notes
