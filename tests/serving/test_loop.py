"""Served requests by hand: times of steps, chunks, preemptions, transfers, levels, drafts."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest

from moesim.errors import InfeasibleError, InputError, MismatchError, UnknownNameError
from moesim.serving.config import Level, ServingConfig
from moesim.serving.requests import Requests
from moesim.serving.speculative import Speculation


def test_one_request(small: ModuleType) -> None:
    """Prompt of 100 in one step of 1 ms + 100 x 10 us = 2 ms, which gives the first token; four
    more tokens in steps of 1 ms + 10 us: 2 + 4 x 1.01 = 6.04 ms."""
    result = small.serve(small.at_once([100], [5]), small.tables(1000.0, row_us=10.0))
    assert result.first_token_s[0] == pytest.approx(2e-3)
    assert result.finish_s[0] == pytest.approx(6.04e-3)
    assert result.ttft_s[0] == pytest.approx(2e-3)
    assert result.tpot_s[0] == pytest.approx(1.01e-3)
    assert result.e2e_s[0] == pytest.approx(6.04e-3)
    assert result.metrics["steps"] == 5
    assert result.metrics["step_ms_mean"] == pytest.approx(6.04 / 5)
    assert result.metrics["gpu_utilisation"] == pytest.approx(1.0)


def test_host_path_and_steps_ahead(small: ModuleType) -> None:
    """Requests reach the scheduler 3 ms + 10 us a prompt token after they were sent, so that the
    second (sent 0.3 ms later, 50 instead of 100 tokens) is first: at 3.8 ms against 4.0. Its step
    takes 3.8 to 4.8. An engine that plans ahead had nothing else to decide on then: the other, at
    4.0, misses the step that was decided at 3.8 (4.8 to 5.8) and gets the next (5.8 to 6.8)."""
    requests = Requests.of([0.0, 0.3e-3], [100, 50], [1, 3])
    host = {"request_ms": 3.0, "prompt_token_us": 10.0}
    soon = small.serve(requests, small.tables(1000.0), deployment=small.small_deployment(host=host))
    np.testing.assert_allclose(soon.finish_s, [5.8e-3, 6.8e-3])
    ahead = small.small_deployment(host=host | {"steps_ahead": 1})
    late = small.serve(requests, small.tables(1000.0), deployment=ahead)
    np.testing.assert_allclose(late.finish_s, [6.8e-3, 6.8e-3])
    np.testing.assert_allclose(late.ttft_s, [6.8e-3, 4.5e-3])
    np.testing.assert_allclose(late.start_s, [5.8e-3, 3.8e-3])


def test_context_and_pairs(small: ModuleType) -> None:
    """100 us a cached token and 1 us a pair: the prompt of 4 has 4 x 5 / 2 = 10 pairs, decodes see
    4 and 5 cached tokens. 1000 + 10, then 1000 + 400, then 1000 + 500 us."""
    result = small.serve(
        small.at_once([4], [3]), small.tables(1000.0, context_us=100.0, pair_us=1.0)
    )
    assert result.first_token_s[0] == pytest.approx(1010e-6)
    assert result.finish_s[0] == pytest.approx((1010 + 1400 + 1500) * 1e-6)


def test_chunks_share_the_budget(small: ModuleType) -> None:
    """Budget 8, both at 0, steps of 1 ms. Step 1: 8 of the first prompt (10). Step 2: its last 2,
    and 6 of the second (9). Step 3: the first decodes (1), the second computes 3: first token.
    Step 4: the first ends (3 tokens: steps 2, 3, 4). The second ends in step 4 as well (2)."""
    result = small.serve(
        small.at_once([10, 9], [3, 2]),
        small.tables(1000.0),
        deployment=small.small_deployment(max_batch_tokens=8),
    )
    np.testing.assert_allclose(result.first_token_s, [2e-3, 3e-3])
    np.testing.assert_allclose(result.finish_s, [4e-3, 4e-3])
    assert result.metrics["steps"] == 4


def test_prefill_first_holds_decodes(small: ModuleType) -> None:
    """The second prompt arrives at 1.5 ms. Prefill first: step 3 is its alone, so the first request
    (tokens at 1, 2 ms, then 4 ms) waits. Mixed: both advance in step 3."""
    requests = Requests.of([0.0, 1.5e-3], [8, 8], [3, 1])
    first = small.serve(requests, small.tables(1000.0), prefill_first=True)
    mixed = small.serve(requests, small.tables(1000.0), prefill_first=False)
    np.testing.assert_allclose(first.finish_s, [4e-3, 3e-3])
    np.testing.assert_allclose(mixed.finish_s, [3e-3, 3e-3])


def test_slowest_rank_and_turns(small: ModuleType) -> None:
    """Two ranks step together: 10 us a row of the fuller rank, 1 us a row of both. Prompts of 100
    and 20 go to ranks 0 and 1 in turn: 1000 + 1000 + 120."""
    result = small.serve(
        small.at_once([100, 20], [1, 1]),
        small.tables(1000.0, row_us=10.0, moe_us=1.0),
        deployment=small.small_deployment(dp=2),
        router="round_robin",
    )
    np.testing.assert_allclose(result.finish_s, [2.12e-3, 2.12e-3])
    assert result.rank.tolist() == [0, 1]
    # On their own the ranks compute 1000 and 200 us.
    assert result.metrics["rank_balance"] == pytest.approx(600 / 1000)


def test_preempts_the_last_and_recomputes(small: ModuleType) -> None:
    """Four blocks of 4 tokens. Prompts of 4 take a block each, and one more each for tokens 5 to 8.
    Step 1: both prompts. Steps 2 to 5 reach 8 cached tokens. In step 6 the first needs a third
    block: the second (5 tokens made) is preempted. The first ends at step 8 (8 tokens). Step 9
    recomputes 4 + 5 tokens at once, which gives token 6; steps 10 and 11 give 7 and 8."""
    result = small.serve(
        small.at_once([4, 4], [8, 8]), small.tables(1000.0), capacity=16, block_size=4
    )
    assert result.preempted.tolist() == [0, 1]
    np.testing.assert_allclose(result.finish_s, [8e-3, 11e-3])
    assert result.generated_tokens.tolist() == [8, 8]


def test_reserving_answers_never_preempts(small: ModuleType) -> None:
    """The same two requests where prompt and answer are reserved: 12 tokens are three blocks of the
    four, so the second waits for the end of the first (step 8) and runs steps 9 to 16."""
    result = small.serve(
        small.at_once([4, 4], [8, 8]),
        small.tables(1000.0),
        capacity=16,
        block_size=4,
        deployment=small.small_deployment(host={"admission": "whole"}),
    )
    assert result.preempted.tolist() == [0, 0]
    np.testing.assert_allclose(result.finish_s, [8e-3, 16e-3])


def test_urgent_requests_go_first(small: ModuleType) -> None:
    """One sequence at a time; arrivals 0, 1 and 2 at 0 with priorities 5, 5 and 1. The urgent one
    runs first (2 steps each), then the others by arrival."""
    result = small.serve(
        small.at_once([4, 4, 4], [2, 2, 2], priority=[5, 5, 1]),
        small.tables(1000.0),
        deployment=small.small_deployment(max_sequences=1),
    )
    np.testing.assert_allclose(result.finish_s, [4e-3, 6e-3, 2e-3])


def test_prefix_is_computed_once(small: ModuleType) -> None:
    """10 us a row. The first prompt, 70 tokens in blocks of 32, takes 1000 + 700. The second has
    the same two blocks and 6 tokens of its own: 1000 + 60 for its first token. A prompt of exactly
    64 with both blocks cached computes the second block again: one token at least is needed."""
    requests = Requests.of(
        [0.0, 0.01, 0.02],
        [70, 70, 64],
        [1, 1, 1],
        blocks=[[1, 2], [1, 2], [1, 2]],
        block_tokens=32,
    )
    result = small.serve(requests, small.tables(1000.0, row_us=10.0))
    took = result.finish_s - requests.arrival_s
    np.testing.assert_allclose(took, [1.7e-3, 1.06e-3, 1.32e-3])
    assert result.cached_tokens.tolist() == [0, 64, 32]
    assert result.metrics["prefix_hit_share"] == pytest.approx(96 / 204)
    without = small.serve(requests, small.tables(1000.0, row_us=10.0), prefix_cache=False)
    np.testing.assert_allclose(without.finish_s - requests.arrival_s, [1.7e-3, 1.7e-3, 1.64e-3])


def test_prefix_evicts_what_was_unused_longest(small: ModuleType) -> None:
    """Room for two blocks of 32 and a bit: prompts A, B, C of one block each in turn, then B, A.
    C evicts A, so that B is found and A is not."""
    requests = Requests.of(
        np.arange(5) * 0.01, [33] * 5, [1] * 5, blocks=[[1], [2], [3], [2], [1]], block_tokens=32
    )
    result = small.serve(requests, small.tables(1000.0), capacity=96)
    assert result.cached_tokens.tolist() == [0, 0, 0, 32, 0]


def test_disaggregated(small: ModuleType) -> None:
    """Prompt step 1 ms. The cache of 100 tokens is sent in 50 us + 100 x 2 us = 250 us, and two
    decode steps of 1 ms follow: 1 + 0.25 + 2 ms. The second request's prompt ran in the same step;
    the sender's link is free at 1.25 ms: 1.5 ms, when the decoding engine is in its first step
    (1.25 to 2.25): decodes at 3.25 and 4.25 ms."""
    deployment = small.small_deployment()
    size = deployment.model.kv_bytes_per_token(deployment.kv_dtype)
    step = small.tables(1000.0)
    both = type(step)(*(np.concatenate([a, a]) for a in step))
    result = small.serve(
        small.at_once([100, 100], [3, 3]),
        both,
        deployment=deployment,
        decode=deployment,
        transfer_gb_per_s=size / 2e3,
        transfer_latency_us=50.0,
    )
    np.testing.assert_allclose(result.first_token_s, [1e-3, 1e-3])
    np.testing.assert_allclose(result.finish_s, [3.25e-3, 4.25e-3])
    assert result.num_gpus == 2


def test_levels_refuse_shorten_and_demote(small: ModuleType) -> None:
    """One sequence at a time, so one runs only after the first step; limits of one waiting."""
    deployment = small.small_deployment(max_sequences=1)

    def run(level: Level) -> object:
        return small.serve(
            small.at_once([4] * 4, [10] * 4),
            small.tables(1000.0),
            deployment=deployment,
            levels=(level, Level()),
        )

    refused = run(Level("refuse", 1))
    assert refused.counts() == {"unfinished": 0, "finished": 1, "rejected": 0, "refused": 3}
    short = run(Level("shorten", 2, 0.3))
    assert short.generated_tokens.tolist() == [10, 10, 3, 3]
    assert short.metrics["shortened"] == 2
    demoted = run(Level("demote", 1))
    assert demoted.level.tolist() == [0, 1, 1, 1]
    assert demoted.metrics["demoted"] == 3


def test_too_large_is_rejected_and_rest_served(small: ModuleType) -> None:
    result = small.serve(small.at_once([100, 4], [20, 4]), small.tables(), capacity=64)
    assert result.counts() == {"unfinished": 0, "finished": 1, "rejected": 1, "refused": 0}
    assert math.isnan(result.ttft_s[0])
    with pytest.raises(InfeasibleError, match="holds 64 tokens, the shortest request has 120"):
        small.serve(small.at_once([100], [20]), small.tables(), capacity=64)


def test_stops_at_a_time(small: ModuleType) -> None:
    """Steps of 1 ms until 3.5 ms: three tokens of five."""
    result = small.serve(small.at_once([4], [5]), small.tables(1000.0), until_s=3.5e-3)
    assert result.counts()["unfinished"] == 1
    assert result.generated_tokens.tolist() == [3]


@pytest.mark.parametrize("acceptance", [0.3, 0.8])
def test_fixed_drafts_give_the_expected_tokens(small: ModuleType, acceptance: float) -> None:
    """With k = 3: (1 - a^4) / (1 - a) tokens a step on average: 1.417 and 2.952."""
    expected = (1 - acceptance**4) / (1 - acceptance)
    assert expected == pytest.approx({0.3: 1.417, 0.8: 2.952}[acceptance])
    result = small.serve(
        small.at_once([1] * 200, [400] * 200),
        small.tables(1000.0),
        speculation=Speculation(acceptance, 3, 0.0, fixed=True),
    )
    # All steps take 1 ms; a sequence gets its last 399 tokens in 399 / expected steps.
    steps = result.tpot_s * 399 / 1e-3
    assert steps.mean() == pytest.approx(399 / expected, rel=0.01)
    assert (result.generated_tokens == 400).all()
    assert result.metrics["drafts_accepted_share"] == pytest.approx((expected - 1) / 3, rel=0.03)


def test_goodput_drafts_less_when_rows_cost_more(small: ModuleType) -> None:
    """One sequence, a = 0.7, drafting free. A step costs 1000 + 1 us a row: every draft pays.
    At 3000 us a row one draft gives 1.7 tokens in 7 ms, none gives 1 in 4 ms: none is made."""
    requests = small.at_once([1], [50])
    cheap = small.serve(
        requests, small.tables(1000.0, row_us=1.0), speculation=Speculation(0.7, 4, 0.0)
    )
    dear = small.serve(
        requests, small.tables(1000.0, row_us=3000.0), speculation=Speculation(0.7, 4, 0.0)
    )
    # The prompt's step drafts nothing.
    steps = cheap.metrics["steps"]
    assert cheap.metrics["drafts_mean"] == pytest.approx(4 * (steps - 1) / steps)
    assert dear.metrics["drafts_mean"] == 0


def test_same_seed_same_bytes(small: ModuleType) -> None:
    """INV-6."""
    requests = small.at_once([9] * 20, [30] * 20)

    def run(seed: int) -> bytes:
        result = small.serve(
            requests, small.tables(row_us=3.0), speculation=Speculation(0.6, 3), seed=seed
        )
        return result.finish_s.tobytes()

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("seed", range(5))
def test_every_request_is_finished_once_or_counted(small: ModuleType, seed: int) -> None:
    """INV-1 and INV-4: tokens made are tokens asked for, or the request is counted; times are in
    order."""
    rng = np.random.default_rng(seed)
    count = 300
    requests = Requests.of(
        np.cumsum(rng.exponential(0.0005, count)),
        rng.integers(1, 400, count),
        rng.integers(1, 60, count),
        priority=rng.integers(0, 3, count),
    )
    result = small.serve(
        requests,
        small.tables(row_us=5.0, context_us=0.1),
        capacity=384,
        deployment=small.small_deployment(dp=2, max_batch_tokens=64, max_sequences=8),
        levels=(Level(), Level("demote", 5), Level("refuse", 20)),
        router="length_aware",
        speculation=Speculation(0.5, 2) if seed % 2 else None,
    )
    counts = result.counts()
    assert sum(counts.values()) == count
    assert counts["unfinished"] == 0
    assert min(counts["finished"], counts["rejected"], counts["refused"]) > 0
    ended = result.status == 1
    assert (result.generated_tokens[ended] == requests.output_tokens[ended]).all()
    assert (result.generated_tokens[~ended] == 0).all()
    assert (result.arrival_s[ended] <= result.start_s[ended]).all()
    assert (result.start_s[ended] < result.first_token_s[ended]).all()
    assert (result.first_token_s[ended] <= result.finish_s[ended]).all()
    series = result.series["serving"]
    made = (series["output_tokens_per_s"] * result.bin_s).sum()
    assert made == pytest.approx(result.generated_tokens.sum())


def test_waiting_obeys_littles_law(small: ModuleType) -> None:
    """Requests waiting summed over time = waits summed over requests, exactly, over a whole run."""
    rng = np.random.default_rng(3)
    requests = Requests.of(np.cumsum(rng.exponential(0.0011, 2000)), [1] * 2000, [1] * 2000)
    result = small.serve(
        requests, small.tables(1000.0), deployment=small.small_deployment(max_sequences=1)
    )
    waits = result.start_s - result.arrival_s
    series = result.series["serving"]
    assert series["waiting"].sum() * result.bin_s == pytest.approx(waits.sum(), rel=1e-9)
    assert series["busy"].sum() * result.bin_s == pytest.approx(2000 * 1e-3)


def test_bad_settings(small: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="router"):
        ServingConfig(router="fastest")  # type: ignore[arg-type]
    for bad in ({"replicas": 0}, {"block_size": 0}, {"until_s": 0.0}, {"transfer_gb_per_s": -1.0}):
        with pytest.raises(InputError):
            ServingConfig(**bad)
    with pytest.raises(InputError, match="do not tell their content"):
        small.serve(small.at_once([4], [4]), small.tables(), prefix_cache=True)
    with pytest.raises(MismatchError, match="do not divide"):
        small.serve(
            small.at_once([64], [4], blocks=[[1]], block_tokens=50), small.tables(), block_size=16
        )
    for bad_spec in ((1.0, 4), (0.0, 4), (0.5, 0), (0.5, 99)):
        with pytest.raises(InputError):
            Speculation(*bad_spec)
