"""Progressive filling against hand-worked cases and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.maxmin import max_min_rates
from tests.reference.maxmin import max_min_reference

FREE = 1e9


def solve(flows, room, limits=None):
    """Rates and use of links for flows given as {link: load}."""
    indptr = np.cumsum([0, *(len(f) for f in flows)])
    links = np.array([link for f in flows for link in f], np.int64)
    load = np.array([w for f in flows for w in f.values()], float)
    used = np.zeros(len(room))
    limit = np.full(len(flows), FREE) if limits is None else np.array(limits, float)
    rates = max_min_rates(indptr, links, load, limit, np.array(room, float), used)
    return rates, used


def test_one_link_is_shared_equally() -> None:
    rates, used = solve([{0: 1}, {0: 1}, {0: 1}, {0: 1}], [100])
    np.testing.assert_allclose(rates, [25, 25, 25, 25])
    assert used[0] == pytest.approx(100)


def test_chain_of_three_links() -> None:
    """SimGrid, teshsuite lmm_usage, test 1 (a = 1, b = 10): a flow over three links of 1, 10 and 1,
    and one flow on each. The outer links give each of their two flows 1/2; the middle one has
    10 - 1/2 = 9.5 left for its own."""
    flows = [{0: 1, 1: 1, 2: 1}, {0: 1}, {1: 1}, {2: 1}]
    rates, _ = solve(flows, [1, 10, 1])
    np.testing.assert_allclose(rates, [0.5, 0.5, 9.5, 0.5])


def test_two_separate_links() -> None:
    """SimGrid, lmm_usage, test 2: one flow on each of two links of 200 and 100."""
    rates, _ = solve([{0: 1}, {1: 1}], [200, 100])
    np.testing.assert_allclose(rates, [200, 100])


def test_eleven_flows_on_ten_links() -> None:
    """SimGrid, lmm_usage, test 3: eleven flows over ten links of 10.

    Link 7 carries flows 2, 4, 6, 9, 10: 10 / 5 = 2 each, the lowest share of all. Link 5 then has
    10 - 2 - 2 = 6 for flows 0 and 3: 3 each. Link 1 gives 10 / 3 to flows 1, 7 and 8. Link 9 has
    10 - 2 - 2 = 6 for flow 5.
    """
    links = [
        (1, 7), (1, 7, 8), (1, 8), (8,), (0, 3, 9), (0, 3, 4, 9), (0, 4, 9, 10),
        (2, 4, 6, 9, 10), (2, 10), (5, 6, 9),
    ]  # fmt: skip
    flows = [{i: 1 for i, members in enumerate(links) if f in members} for f in range(11)]
    rates, _ = solve(flows, [10] * 10)
    third = 10 / 3
    np.testing.assert_allclose(rates, [3, third, 2, 3, 2, 6, 2, third, third, 2, 2])


SOLVED = [
    # (weight of each flow, {constraint: consumption} of each flow, rooms, published values)
    pytest.param(
        [1, 2, 3], [{0: 1}, {0: 1}, {0: 1}], [10], [5.45455, 2.72727, 1.81818], id="weights"
    ),
    pytest.param(
        [1, 1, 1], [{0: 1}, {0: 2}, {0: 3}], [10], [1.666667] * 3, id="consumption"
    ),
    pytest.param(
        [56, 21, 3], [{0: 74}, {0: 6}, {0: 2}], [123], [0.9659686, 2.575916, 18.03141], id="both"
    ),
    pytest.param(
        [5.1, 7, 8.5, 6.2, 1],
        [{0: 4}, {0: 2.6, 1: 2}, {0: 1.2, 1: 4.1}, {1: 5}, {2: 6}],
        [14.6, 10.7, 7],
        [2.779119, 0.9708181, 0.7994973, 1.096085, 1.166667],
        id="three constraints",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "flows", "room", "published"), SOLVED)
def test_systems_that_simgrid_solves(weight, flows, room, published) -> None:
    """SimGrid, teshsuite/surf/lmm_usage/lmm_solve.cpp, its shared systems: a flow of weight w gets
    1/w of what others get. All flows here have the same weight, so that its rate and its load count
    in units of 1/w: the rate found, over w, is the published value. By hand for `weights`: the
    level is 10 / (1 + 1/2 + 1/3) = 5.4545, and the flows have it, half of it and a third."""
    scaled = [
        {link: load / w for link, load in flow.items()}
        for flow, w in zip(flows, weight, strict=True)
    ]
    rates, used = solve(scaled, room)
    np.testing.assert_allclose(rates / np.array(weight), published, rtol=1e-5)
    assert (used <= np.array(room) * (1 + 1e-9)).all()


def test_a_limit_leaves_room_for_others() -> None:
    """A flow held at 10 leaves 90 of 100 to the other."""
    rates, _ = solve([{0: 1}, {0: 1}], [100], [10, FREE])
    np.testing.assert_allclose(rates, [10, 90])


def test_load_counts_against_the_link() -> None:
    """A flow that takes 3 of the link per unit of rate, beside one that takes 1: equal rates of
    100 / 4 = 25, which occupy 75 and 25 of it."""
    rates, used = solve([{0: 3}, {0: 1}], [100])
    np.testing.assert_allclose(rates, [25, 25])
    assert used[0] == pytest.approx(100)


def test_a_dead_link_stops_its_flows_only() -> None:
    rates, _ = solve([{0: 1}, {1: 1}], [0, 50])
    np.testing.assert_allclose(rates, [0, 50])


small = st.fractions(min_value=Fraction(1, 4), max_value=8, max_denominator=4)


@st.composite
def systems(draw):
    num_links = draw(st.integers(1, 5))
    room = draw(st.lists(small, min_size=num_links, max_size=num_links))
    one = st.dictionaries(st.integers(0, num_links - 1), small, min_size=1)
    flows = draw(st.lists(one, min_size=1, max_size=6))
    limits = draw(st.lists(small, min_size=len(flows), max_size=len(flows)))
    return flows, limits, room


@given(systems())
@settings(max_examples=150, deadline=None)
def test_equals_exact_filling(case) -> None:
    """The compiled kernel against the reference in fractions; no link above its room (INV-3)."""
    flows, limits, room = case
    exact = max_min_reference(flows, limits, room)
    rates, used = solve(flows, room, limits)
    np.testing.assert_allclose(rates, [float(r) for r in exact], rtol=1e-9)
    assert (used <= np.array(room, float) * (1 + 1e-9)).all()


@given(systems())
@settings(max_examples=100, deadline=None)
def test_every_flow_is_held_by_something(case) -> None:
    """Max-min: a flow is at its limit, or crosses a full link where no flow is faster."""
    flows, limits, room = case
    rates, used = solve(flows, room, limits)
    for f, flow in enumerate(flows):
        at_limit = rates[f] >= float(limits[f]) * (1 - 1e-9)
        held = any(
            used[link] >= float(room[link]) * (1 - 1e-9)
            and all(rates[g] <= rates[f] * (1 + 1e-9) for g, o in enumerate(flows) if link in o)
            for link in flow
        )
        assert at_limit or held
