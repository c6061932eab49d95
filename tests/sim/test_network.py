"""Flows in time: contention worked out by hand, bytes, order, links that fail."""

from __future__ import annotations

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.network import Flow, Network

B_PER_US = 100.0
"""Rate of every link in these tests."""


def flow(path: dict[int, float], *, latency: float = 0.0, alone: float | None = None) -> Flow:
    links = np.array(list(path), np.int64)
    sizes = np.array(list(path.values()), float)
    busy = sizes / B_PER_US
    return Flow("f", "other", links, sizes, busy, latency, busy.max() if alone is None else alone)


def run(flows: list[tuple[float, Flow]], num_links: int = 3) -> tuple[list[float], Network]:
    """Start each flow at its time; return when each ended."""
    env = simpy.Environment()
    network = Network(env, num_links)
    ended = [np.nan] * len(flows)

    def one(i: int, at: float, what: Flow):
        yield env.timeout(at)
        yield network.send(what)
        ended[i] = env.now

    for i, (at, what) in enumerate(flows):
        env.process(one(i, at, what))
    env.run()
    return ended, network


def test_alone() -> None:
    """5 us of latency, then 1,000 bytes at 100 a us."""
    assert run([(0, flow({0: 1000}, latency=5))])[0] == [15.0]


def test_two_share_a_link() -> None:
    """1,000 and 500 bytes at 50 a us each: the shorter ends at 10, when the longer has 500 left,
    which take 5 us at full rate."""
    assert run([(0, flow({0: 1000})), (0, flow({0: 500}))])[0] == [15.0, 10.0]


def test_a_later_flow_slows_the_first() -> None:
    """A is alone until 4 (400 of 1,000 sent). Then both at 50: B's 300 end at 10, A has 300 left
    and ends at 13."""
    assert run([(0, flow({0: 1000})), (4, flow({0: 300}))])[0] == [13.0, 10.0]


def test_only_shared_links_matter() -> None:
    assert run([(0, flow({0: 1000})), (0, flow({1: 500}))])[0] == [10.0, 5.0]


def test_a_collective_gives_way_where_it_must() -> None:
    """A collective with 1,000 bytes on link 0 and 200 on link 1, beside a transfer of 800 on link
    1. Equal rates x on the busiest links: link 1 carries 0.2 x + x <= 100, so x could be 83.3;
    link 0 then carries 83.3. The transfer ends at 800 / 83.3 = 9.6, the collective has 200 left
    and ends at 9.6 + 2 = 11.6."""
    ended, _ = run([(0, flow({0: 1000, 1: 200})), (0, flow({1: 800}))])
    assert ended == pytest.approx([11.6, 9.6])


def test_slower_than_its_links() -> None:
    """Protocols make a flow of 1,000 bytes take 40 us alone, a quarter of the link. Another flow
    of 1,500 bytes then has the other three quarters: 1,500 / 75 = 20 us."""
    ended, network = run([(0, flow({0: 1000}, alone=40)), (0, flow({0: 1500}))])
    assert ended == pytest.approx([40.0, 20.0])
    assert network.peak_used[0] == pytest.approx(1.0)


def test_a_degraded_link() -> None:
    """Half the rate from 4 us on: 400 bytes before, 600 at 50 a us after."""
    env = simpy.Environment()
    network = Network(env, 1)
    done = network.send(flow({0: 1000}))

    def fault():
        yield env.timeout(4)
        network.set_room([0], 0.5)

    env.process(fault())
    env.run(until=done)
    assert env.now == pytest.approx(16.0)


def test_a_dead_link_holds_its_flow_until_it_is_back() -> None:
    env = simpy.Environment()
    network = Network(env, 1)
    done = network.send(flow({0: 1000}))

    def fault():
        yield env.timeout(4)
        network.set_room([0], 0.0)
        yield env.timeout(10)
        assert network.stalled() == ["f"]
        network.set_room([0], 1.0)

    env.process(fault())
    env.run(until=done)
    assert env.now == pytest.approx(20.0)


def test_nothing_to_send_takes_the_latency_only() -> None:
    empty = Flow("e", "other", np.zeros(0, np.int64), np.zeros(0), np.zeros(0), 3.0, 0.0)
    assert run([(1, empty)])[0] == [4.0]


def test_cancelled_flows_count_what_they_carried() -> None:
    env = simpy.Environment()
    network = Network(env, 1)
    first = network.send(flow({0: 1000}))
    second = network.send(flow({0: 100}, latency=50))
    env.run(until=3)
    network.cancel([first, second])
    env.run(until=200)
    assert network.bytes[0] == pytest.approx(300)
    assert network.busy_us[0] == pytest.approx(3)
    assert network.num_active == 0


paths = st.dictionaries(st.integers(0, 2), st.floats(1, 1e4), min_size=1)
events = st.lists(st.tuples(st.floats(0, 100), paths, st.floats(0, 5)), min_size=1, max_size=8)


@given(events)
@settings(max_examples=60, deadline=None)
def test_bytes_and_capacity(case) -> None:
    """INV-3: what is sent arrives, link by link, and no link is ever above its rate. INV-4: every
    flow ends, after its start and its time alone."""
    flows = [(at, flow(path, latency=latency)) for at, path, latency in case]
    ended, network = run(flows)
    sent = np.zeros(3)
    for _, what in flows:
        sent[what.link_idx] += what.bytes
    np.testing.assert_allclose(network.bytes, sent, rtol=1e-9)
    assert network.peak_used.max() <= 1 + 1e-9
    for (at, what), end in zip(flows, ended, strict=True):
        assert end >= (at + what.latency_us + what.alone_us) * (1 - 1e-9)


@given(events, st.floats(1.0, 4.0))
@settings(max_examples=40, deadline=None)
def test_faster_links_end_sooner_when_all_scale(case, factor) -> None:
    """INV-9 for the network: all links f times as fast, and all starts scaled, end f times as
    soon."""
    slow = [(at, flow(path)) for at, path, _ in case]
    fast = [
        (
            at / factor,
            Flow("f", "o", w.link_idx, w.bytes, w.busy_us / factor, 0, w.alone_us / factor),
        )
        for at, w in slow
    ]
    np.testing.assert_allclose(np.array(run(fast)[0]) * factor, run(slow)[0], rtol=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
def test_processor_sharing_queue(deterministic: bool) -> None:
    """Poisson flows over one link are an M/G/1 queue with processor sharing, whose mean time in
    the system is s / (1 - rho) whatever the distribution of sizes (Kleinrock, Queueing Systems II,
    section 4.4), here with the mean and the load that were drawn: 10 us and 0.5 or so, so 20 us
    both for exponential and for fixed sizes."""
    rng = np.random.default_rng(5)
    count, service, rho = 12_000, 10.0, 0.5
    starts = np.cumsum(rng.exponential(service / rho, count))
    sizes = np.full(count, service) if deterministic else rng.exponential(service, count)
    flows = [
        (float(at), flow({0: float(size) * B_PER_US}))
        for at, size in zip(starts, sizes, strict=True)
    ]
    ended, _ = run(flows)
    expected = sizes.mean() / (1 - sizes.sum() / max(ended))
    assert np.mean(np.array(ended) - starts) == pytest.approx(expected, rel=0.06)
    assert expected == pytest.approx(20.0, rel=0.1)
