"""Held-out evaluation: figures by hand, chunks, intervals, paired differences."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.cost.routing import route
from moesim.cost.step import StepModel, build_step_model
from moesim.metrics import imbalance
from moesim.placement import Placement
from moesim.planning import evaluate
from moesim.planning.evaluate import (
    Sample,
    _between_nodes,
    difference,
    draw_sample,
    figures,
    measure,
)
from moesim.trace.batches import Batches, index_requests
from moesim.trace.format import Trace

PLACEMENT = Placement(np.array([[0, 5, 1, 2, 3, 4, 0, 5]], np.int32), 4, 2, 6)


def one_sample(batches: Batches, num_main: int, num_resamples: int) -> Sample:
    return Sample(batches, num_main, num_resamples, 1)


@pytest.fixture(scope="module")
def step(build: ModuleType) -> StepModel:
    model = build.toy_model(1, 6, 2)
    return build_step_model(
        build.small_cluster(), model, all_to_all="nccl", calibration=build.toy_calibration()
    )


@pytest.fixture(scope="module")
def drawn(build: ModuleType) -> tuple[Trace, Sample]:
    trace = build.random_trace(np.random.default_rng(3), 896, 2, 6, 2)
    return trace, draw_sample(trace, index_requests(trace)[0], "prefill", 40, 0)


def two_layers(order: list[int]) -> Placement:
    return Placement(np.array([order, order], np.int32), 3, 1, 6)


def test_measured_by_hand(build: ModuleType, step: StepModel) -> None:
    """The four tokens of tests/cost/test_routing.py, dedup per GPU, as one main batch of two."""
    trace = build.make_trace([[[1, 2]], [[3, 4]], [[4, 0]], [[0, 3]]] * 3, 6)
    sample = one_sample(build.cut(trace, 4, 4, 4), 1, 2)
    measured = measure(
        trace,
        sample,
        PLACEMENT,
        policy="split",
        dedup="gpu",
        step=step,
        homes=lambda some: np.resize([1, 1, 0, 0], len(some.token_idx)).astype(np.int32),
    )
    got = measured.values
    assert measured.layer_parts_us == pytest.approx(np.array([[32.0, 6.44, 32.0]]))
    # Choices of the GPUs: 1 2 4 1: mean 2, max 4.
    assert got["imbalance"].tolist() == [[2.0]] * 3
    assert got["balancedness"].tolist() == [[0.5]] * 3
    # Distinct GPUs 1 1 2 2, nodes 1 1 2 1, over four tokens and one layer.
    assert got["fan_out"].tolist() == [1.5] * 3
    assert got["node_fan_out"].tolist() == [1.25] * 3
    # Four messages cross nodes; 2,000 bytes out and 2,000 back, over four tokens.
    assert got["inter_node_bytes"].tolist() == [4000.0] * 3
    assert got["dispatch_us"] == pytest.approx(32.0)
    assert got["combine_us"] == pytest.approx(32.0)
    assert got["compute_us"] == pytest.approx(6.44)
    assert got["step_us"] == pytest.approx(70.44)


def test_gpu_load_is_of_the_main_batches(build: ModuleType) -> None:
    trace = build.make_trace([[[1, 2]], [[3, 4]], [[4, 0]], [[0, 3]]], 6)
    sample = one_sample(build.cut(trace, 1, 1, 1, 1), 2, 2)
    measured = measure(trace, sample, PLACEMENT, policy="split", dedup="gpu", step=None)
    # Batches {1, 2} on GPU 1 and {3, 4} on GPU 2: a choice a batch on average.
    assert measured.gpu_load.tolist() == [[0, 1, 1, 0]]
    assert "step_us" not in measured.values
    assert measured.layer_parts_us is None


def test_speeds_count_in_imbalance(drawn: tuple[Trace, Sample]) -> None:
    trace, sample = drawn
    speed = np.array([2.0, 1.0, 1.0])
    placement = two_layers([0, 1, 2, 3, 4, 5])
    measured = measure(
        trace, sample, placement, policy="split", dedup="gpu", step=None, speed=speed
    )
    tokens = route(trace, sample.batches, placement).gpu_tokens(3)
    assert measured.values["imbalance"] == pytest.approx(imbalance(tokens, speed))


def test_chunks_do_not_matter(drawn: tuple[Trace, Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    trace, sample = drawn
    placement = two_layers([0, 1, 2, 3, 4, 5])
    whole = measure(trace, sample, placement, policy="split", dedup="gpu", step=None)
    for cells in (1, 18 * 7):  # one and seven batches at a time, two layers of 3 x 3 cells each
        monkeypatch.setattr(evaluate, "CHUNK_CELLS", cells)
        parts = measure(trace, sample, placement, policy="split", dedup="gpu", step=None)
        for name, values in whole.values.items():
            assert np.array_equal(parts.values[name], values), name
        assert np.array_equal(parts.gpu_load, whole.gpu_load)


def test_sample(drawn: tuple[Trace, Sample], build: ModuleType) -> None:
    """48 main batches and 20 resamples of 12; the same for a seed."""
    trace, sample = drawn
    assert (sample.num_main, sample.num_resamples, len(sample.batches)) == (48, 20, 48 + 240)
    assert (np.diff(sample.batches.indptr) == 40).all()
    assert sample.num_requests == 112
    again = draw_sample(trace, index_requests(trace)[0], "prefill", 40, 0)
    assert np.array_equal(again.batches.token_idx, sample.batches.token_idx)
    other = draw_sample(trace, index_requests(trace)[0], "prefill", 40, 1)
    assert not np.array_equal(other.batches.token_idx, sample.batches.token_idx)
    main, groups = sample.groups(np.arange(288))
    assert main.tolist() == list(range(48))
    assert groups.shape == (20, 12)
    assert groups[1].tolist() == list(range(60, 72))


def test_expensive_samples_have_fewer_batches(
    drawn: tuple[Trace, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, _ = drawn
    # 40 tokens x 2 layers x 2 choices x 288 batches = 46,080 choices: half of them halves all.
    monkeypatch.setattr(evaluate, "MAX_CHOICES", 23_040)
    sample = draw_sample(trace, index_requests(trace)[0], "prefill", 40, 0)
    assert (sample.num_main, len(sample.batches)) == (24, 24 + 20 * 6)
    monkeypatch.setattr(evaluate, "MAX_CHOICES", 1)
    sample = draw_sample(trace, index_requests(trace)[0], "prefill", 40, 0)
    assert (sample.num_main, len(sample.batches)) == (16, 16 + 20 * 4)


def test_figures_by_hand(build: ModuleType) -> None:
    """Statistic of the main batches; 1.96 standard deviations of the resamples' statistics."""
    trace = build.make_trace(np.zeros((8, 1, 1), int), 1)
    sample = one_sample(build.cut(trace, *[1] * 8), 2, 3)
    # Main batches 1.0 and 3.0; resamples (2, 2), (1, 1), (4, 2): means 2, 1, 3, deviation 1.
    values = np.array([1.0, 3, 2, 2, 1, 1, 4, 2])[:, None]
    measured = evaluate.Measured({"imbalance": values}, np.zeros((1, 1)))
    got = figures(sample, measured)
    assert set(got) == {"imbalance", "imbalance_p99"}
    figure = got["imbalance"]
    assert figure.value == 2.0
    assert figure.low == pytest.approx(2 - 1.959964)
    assert figure.high == pytest.approx(2 + 1.959964)
    assert got["imbalance_p99"].value == pytest.approx(2.98)  # 1 + 0.99 x 2
    assert figure.to_json() == {"value": figure.value, "low": figure.low, "high": figure.high}


def test_worst_layer(build: ModuleType) -> None:
    trace = build.make_trace(np.zeros((4, 1, 1), int), 1)
    sample = one_sample(build.cut(trace, 1, 1, 1, 1), 2, 2)
    values = np.array([[0.9, 0.5], [0.7, 0.7], [1, 1], [1, 1]])
    measured = evaluate.Measured({"balancedness": values}, np.zeros((2, 1)))
    # Layers average 0.8 and 0.6 over the two main batches.
    assert figures(sample, measured)["balancedness_worst_layer"].value == pytest.approx(0.6)
    assert figures(sample, measured)["balancedness"].value == pytest.approx(0.7)


def test_intervals_contain_the_point_and_shrink_when_paired(drawn: tuple[Trace, Sample]) -> None:
    trace, sample = drawn
    first, second = (
        measure(trace, sample, two_layers(order), policy="split", dedup="gpu", step=None)
        for order in ([0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4])
    )
    for figure in figures(sample, first).values():
        assert figure.low <= figure.value <= figure.high
        assert np.isfinite([figure.low, figure.high]).all()
    # The second swaps slots within GPUs: nothing differs, batch by batch, so neither can the mean.
    delta = difference(sample, first, second, "imbalance")
    assert delta is not None
    assert (delta.value, delta.low, delta.high) == (0, 0, 0)
    third = measure(
        trace, sample, two_layers([0, 3, 1, 4, 2, 5]), policy="split", dedup="gpu", step=None
    )
    delta = difference(sample, third, first, "imbalance")
    assert delta is not None
    point = [figures(sample, it)["imbalance"].value for it in (third, first)]
    assert delta.value == pytest.approx(point[0] - point[1])
    assert delta.low < delta.value < delta.high
    assert difference(sample, first, second, "step_us") is None


def test_interval_covers_new_requests(build: ModuleType) -> None:
    """Intervals are as wide as the figure varies over independent requests, or wider.

    Wider because a resample has 12 batches where the point has 48: here, with four requests a
    batch, almost twice as wide.
    """
    points, halves = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # Requests favour an expert of their own: requests, not tokens, are what varies.
        favourite = np.repeat(rng.integers(0, 6, (40, 2)), 8, axis=0)
        other = (favourite + rng.integers(1, 6, favourite.shape)) % 6
        ids = np.stack((favourite, other), axis=2)
        trace = build.make_trace(ids, 6, request_ids=np.arange(320) // 8)
        sample = draw_sample(trace, index_requests(trace)[0], "prefill", 32, seed)
        placement = two_layers([0, 1, 2, 3, 4, 5])
        measured = measure(trace, sample, placement, policy="split", dedup="gpu", step=None)
        figure = figures(sample, measured)["balancedness"]
        points.append(figure.value)
        halves.append((figure.high - figure.low) / 2)
    ratio = np.mean(halves) / (1.959964 * np.std(points, ddof=1))
    assert 1.0 < ratio < 2.5


def test_messages_between_nodes_and_on_links(step: StepModel) -> None:
    """Against sums over pairs, of two batches and layers on 4 GPUs in 2 nodes of 2: the other way,
    links carry what the transposed messages put on them."""
    rng = np.random.default_rng(0)
    messages = rng.integers(0, 9, (2, 2, 4, 4)).astype(np.int32)
    node = np.array([0, 0, 1, 1])
    across = messages[:, :, node[:, None] != node[None, :]].sum(axis=(1, 2))
    np.testing.assert_array_equal(_between_nodes(messages, node), across)
    out, back = step.both_ways(messages)
    np.testing.assert_array_equal(back, step.link_messages(np.swapaxes(messages, -1, -2)))
    by_pair = np.zeros(out.shape)
    for s in range(4):
        for d in range(4):
            pair = s * 4 + d
            route = step.route_links[step.route_indptr[pair] : step.route_indptr[pair + 1]]
            by_pair[..., route] += messages[:, :, s, d, None]
    np.testing.assert_array_equal(out, by_pair)


def test_many_gpus_are_judged_by_fewer_batches(drawn: tuple[Trace, Sample]) -> None:
    """2 layers and 6,000 GPUs: 7.2e7 pairs a batch, so the least number of batches."""
    trace, sample = drawn
    many = draw_sample(trace, index_requests(trace)[0], "prefill", 40, 0, 6000)
    assert (sample.num_main, many.num_main) == (48, 16)
    assert len(many.batches) == 16 + 20 * 4
