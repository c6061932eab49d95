"""Tuning data: drawn from the tuning requests alone, of the asked size, the same for a seed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.cost.routing import DEDUP_CODES, home_ranks
from moesim.cost.step import build_step_model
from moesim.planning.evaluate import draw_sample
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import batch_counts, tuning_counts
from moesim.trace.batches import RequestIndex, index_requests, split_requests
from moesim.trace.format import Trace

PHASES = ["prefill", "decode"]
EXPERTS = 8


def two_sided(build: ModuleType) -> tuple[Trace, RequestIndex, RequestIndex]:
    """Tuning requests choose experts 0 to 3, held-out ones 4 to 7; both phases in every request."""
    rng = np.random.default_rng(0)
    requests = np.arange(960) // 12
    plain = build.make_trace(np.zeros((960, 2, 2), int), EXPERTS, request_ids=requests)
    tune, held_out = split_requests(index_requests(plain)[0])
    base = np.where(np.isin(requests, held_out.ids), 4, 0)
    ids = np.argsort(rng.random((960, 2, 4)), axis=2)[:, :, :2] + base[:, None, None]
    phases = (np.arange(960) % 12 >= 6).astype(int)
    return (
        build.make_trace(ids, EXPERTS, request_ids=requests, phases=phases),
        tune,
        held_out,
    )


def sides(trace: Trace, phase: Any) -> tuple[RequestIndex, RequestIndex]:
    return split_requests(index_requests(trace, phase)[0])


@pytest.mark.parametrize("phase", PHASES)
def test_tuning_and_evaluation_share_no_request(build: ModuleType, phase: Any) -> None:
    """What solvers see comes from one side, what users see from the other."""
    trace, _, _ = two_sided(build)
    tune, held_out = sides(trace, phase)
    assert not set(tune.ids) & set(held_out.ids)
    assert len(tune.ids) + len(held_out.ids) == 80
    counts = tuning_counts(trace, tune, phase, 48, 0)
    assert counts[..., :4].sum() > 0
    assert counts[..., 4:].sum() == 0
    step = build_step_model(build.small_cluster(), build.toy_model(2, EXPERTS, 2))
    traffic = sample_traffic(trace, tune, phase, 48, step, 0)
    assert traffic.expert_ids.max() < 4
    sample = draw_sample(trace, held_out, phase, 48, 0)
    assert trace.expert_ids[sample.batches.token_idx].min() >= 4
    assert sample.num_requests == len(held_out.ids)


@pytest.mark.parametrize("phase", PHASES)
def test_phases_are_kept_apart(build: ModuleType, phase: Any) -> None:
    trace, _, _ = two_sided(build)
    wanted = int(phase == "decode")
    _, held_out = sides(trace, phase)
    sample = draw_sample(trace, held_out, phase, 48, 0)
    assert (trace.phases[sample.batches.token_idx] == wanted).all()


@pytest.mark.parametrize("phase", PHASES)
def test_counts_are_of_whole_batches(build: ModuleType, phase: Any) -> None:
    """[B, L, E] float32; a batch of 48 tokens with two choices each has 96 choices per layer."""
    trace, _, _ = two_sided(build)
    tune, _ = sides(trace, phase)
    counts = tuning_counts(trace, tune, phase, 48, 0)
    assert counts.dtype == np.float32
    assert counts.shape[1:] == (2, EXPERTS)
    assert len(counts) == 2400
    # Requests have 6 tokens of each phase, so that 8 of them fill a batch exactly.
    assert (counts.sum(axis=2) == 96).all()
    assert counts.max() <= 48
    # On average an expert of the side gets a quarter of the choices.
    assert counts[..., :4].mean() == pytest.approx(24, rel=0.05)


@pytest.mark.parametrize("phase", PHASES)
def test_long_requests_are_cut_to_the_batch(build: ModuleType, phase: Any) -> None:
    trace = build.random_trace(np.random.default_rng(1), 400, 1, EXPERTS, 2, request_tokens=100)
    tune, _ = split_requests(index_requests(trace)[0])
    counts = tuning_counts(trace, tune, phase, 30, 0)
    assert (counts.sum(axis=2) == 60).all()


@pytest.mark.parametrize("phase", PHASES)
def test_same_seed_same_counts(build: ModuleType, phase: Any) -> None:
    """INV-6."""
    trace, tune, _ = two_sided(build)
    first, again, other = (tuning_counts(trace, tune, phase, 48, seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_large_models_get_fewer_batches(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, tune, _ = two_sided(build)
    # 2 x 8 cells a batch: room for 1,600 cells is 100 batches, or 12 resamples of 8.
    monkeypatch.setattr("moesim.planning.tuning.MAX_COUNT_CELLS", 1600)
    assert len(tuning_counts(trace, tune, "prefill", 48, 0)) == 96
    monkeypatch.setattr("moesim.planning.tuning.MAX_COUNT_CELLS", 1)
    assert len(tuning_counts(trace, tune, "decode", 48, 0)) == 64


def test_batch_counts_by_hand(build: ModuleType) -> None:
    ids = [[[0, 1]], [[1, 2]], [[1, -1]]]
    counts = batch_counts(build.make_trace(ids, 3), build.cut(build.make_trace(ids, 3), 2, 1))
    assert counts.tolist() == [[[1, 2, 1]], [[0, 1, 0]]]


@pytest.mark.parametrize("phase", PHASES)
def test_sampled_traffic(build: ModuleType, phase: Any) -> None:
    """Whole batches of about 12,288 tokens in all, each with homes of its own."""
    trace, tune, _ = two_sided(build)
    step = build_step_model(build.small_cluster(), build.toy_model(2, EXPERTS, 2), dedup="node")
    traffic = sample_traffic(trace, tune, phase, 48, step, 0)
    assert traffic.num_batches == 12_288 // 48
    assert traffic.expert_ids.shape == (12_288, 2, 2)
    sizes = np.bincount(traffic.batch_idx)
    assert (sizes == 48).all()
    whole = build.make_trace(traffic.expert_ids, EXPERTS)
    assert np.array_equal(traffic.home, home_ranks(whole, build.cut(whole, *sizes.tolist()), 4))
    assert traffic.dedup == DEDUP_CODES["node"]
    # Times of up to as many messages as a link can carry, none for none.
    assert traffic.time_us.shape == (2, 3, 48 * 2 + 1)
    assert (traffic.time_us[:, :, 0] == 0).all()
    assert (np.diff(traffic.time_us, axis=2) >= 0).all()


def test_at_least_two_batches_of_messages(build: ModuleType) -> None:
    trace = build.random_trace(np.random.default_rng(1), 400, 2, EXPERTS, 2)
    step = build_step_model(build.small_cluster(), build.toy_model(2, EXPERTS, 2))
    tune, _ = split_requests(index_requests(trace)[0])
    assert sample_traffic(trace, tune, "decode", 20_000, step, 0).num_batches == 2
