"""Serving as people run it: redundant experts, overlap of two batches, pipeline stages, compressed
caches, predicted lengths."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.serving.batch import BatchShape
from moesim.serving.config import ServingConfig
from moesim.serving.deployment import deploy
from moesim.serving.memory import gpu_memory
from moesim.serving.overlap import SM_SHARE, overlapped_us, sm_share
from moesim.serving.requests import Requests
from moesim.serving.static import LoadTest, run_load_test
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_table import TERM_FIELDS


def ranks(count: int, each: float) -> np.ndarray:
    return np.full(count, each)


def test_redundant_experts_balance_the_layers() -> None:
    """DeepSeek-V3 over 32 GPUs has 8 experts on each; 32 redundant ones make 9 slots. Every expert
    has a slot in every layer, its slots' shares are 1 together, no rank is as busy as the busiest
    of experts in their order, and a slot of 58 layers is 2.6 GB of every GPU."""
    plain, more = (
        EngineStepCost(deploy("DeepSeek-V3", "h200-sxm-ib", dp=32, redundant_experts=r))
        for r in (None, 32)
    )
    gpu, expert, share = more._of_moe._slots
    assert np.bincount(gpu).tolist() == [9] * 32
    for row, parts in zip(expert, share, strict=True):
        assert np.bincount(row, parts, minlength=256) == pytest.approx(np.ones(256))
    prompts = BatchShape.of(prefill_tokens=ranks(32, 4096.0))
    assert float(more.breakdown(prompts)["experts"]) < 0.6 * float(
        plain.breakdown(prompts)["experts"]
    )
    less = gpu_memory(more.deployment).expert_weight_bytes
    less -= gpu_memory(plain.deployment).expert_weight_bytes
    assert less == pytest.approx(58 * plain.deployment.model.expert_bytes("fp8"))


@pytest.mark.parametrize("more", [-32, 1, 40])
def test_slots_are_equal(more: int) -> None:
    with pytest.raises(InputError, match="no equal number of slots on 32"):
        deploy("DeepSeek-V3", "h200-sxm-ib", dp=32, redundant_experts=more)
    with pytest.raises(InputError, match="slots on 1 expert-parallel ranks"):
        deploy("DeepSeek-V3", "h200-sxm-ib", tp=8, redundant_experts=8)


def test_overlap_by_hand() -> None:
    """60 us to compute beside 30 us to send in two layers. Sending with 20 of 132 SMs slows 30 us
    of computing by 20/132: 60 + 4.5; a quarter of the sending is not hidden: 72 us. With 30 us to
    compute and 60 to send the longer is 60, and 15 stay: 75. Kernels without SMs: 60 + 7.5."""
    share = np.array(SM_SHARE)
    assert overlapped_us(np.array(60.0), np.array(30.0), share, 2) == pytest.approx(
        72.045, abs=0.01
    )
    assert overlapped_us(np.array(30.0), np.array(60.0), share, 2) == pytest.approx(75.0)
    none = np.array(sm_share("deepep_ll"))
    assert overlapped_us(np.array(60.0), np.array(30.0), none, 2) == pytest.approx(67.5)


def test_two_batches_overlap_where_asked_and_worth_it() -> None:
    """Long prompts over four nodes hide most of their all-to-all; a rank with fewer tokens than the
    engines' thresholds, and the phase that was not asked for, are as without."""
    plain, prefill, both = (
        EngineStepCost(deploy("DeepSeek-V3", "h200-sxm-ib", dp=32, two_batch_overlap=o))
        for o in ("off", "prefill", "both")
    )
    prompts = BatchShape.of(prefill_tokens=ranks(32, 4096.0))
    decode = BatchShape.of(ranks(32, 128.0), ranks(32, 128 * 4000.0))
    few = BatchShape.of(ranks(32, 16.0), ranks(32, 16 * 4000.0))
    short = BatchShape.of(prefill_tokens=ranks(32, 256.0))
    before, after = float(plain.step_us(prompts)), float(prefill.step_us(prompts))
    sent = float(plain.breakdown(prompts)["communication"])
    assert before - sent < after < before - 0.4 * sent
    assert float(both.step_us(prompts)) == after
    assert float(prefill.step_us(decode)) == float(plain.step_us(decode))
    assert float(both.step_us(decode)) != float(plain.step_us(decode))
    for batch in (few, short):
        assert float(both.step_us(batch)) == float(plain.step_us(batch))
    parts = both.breakdown(prompts)
    assert float(sum(parts.values())) == pytest.approx(after)  # type: ignore[arg-type]
    one = both.one_us([128.0] * 32, [128 * 4000.0] * 32, [0.0] * 32, [0.0] * 32, [0.0] * 32)
    assert one == pytest.approx(float(both.step_us(decode)))
    with pytest.raises(InputError, match="no dispatch to hide"):
        deploy("DeepSeek-V3", "h200-sxm-ib", tp=8, two_batch_overlap="both")


def test_two_stages_by_hand(small: ModuleType) -> None:
    """Steps of 2 ms in two stages of 1 ms; two requests of three tokens, each in a batch of its
    own. A is in the stages from 0 to 1 and 1 to 2 ms, B from 1 to 2 and 2 to 3; A again from 2 to
    4, and so on: tokens of A at 2, 4, 6 and of B at 3, 5, 7 ms. Both stages are busy from 1 to 6
    and one before and after: 12 of 14 ms."""
    two = small.small_deployment(pp=2)
    result = small.serve(small.at_once([1, 1], [3, 3]), small.tables(2000.0), deployment=two)
    assert result.first_token_s.tolist() == pytest.approx([2e-3, 3e-3])
    assert result.finish_s.tolist() == pytest.approx([6e-3, 7e-3])
    assert result.metrics["gpu_utilisation"] == pytest.approx(12 / 14)
    assert result.num_gpus == 2


def test_a_bubble_by_hand(small: ModuleType) -> None:
    """1 ms per row. A's prompt of 4 rows is 2 ms in each stage, until 4 ms; B's of 2 rows is 1 ms
    in each: the first is free at 2 ms, the second at 4 ms, so that it ends at 5 ms, not at 2."""
    two = small.small_deployment(pp=2)
    result = small.serve(
        small.at_once([4, 2], [1, 1]), small.tables(0.0, row_us=1000.0), deployment=two
    )
    assert result.finish_s.tolist() == pytest.approx([4e-3, 5e-3])


def test_stages_pass_rows_on_and_share_the_load(small: ModuleType) -> None:
    """DeepSeek-V3 with tp 8 in two stages on two nodes: 1,024 rows of 7,168 values, twice (hidden
    state and residual), in bf16 over 8 NICs are 3.67 MB each; at 85% of 50 GB/s that is 86 us and
    the latencies. A load test with twice the requests gives nearly twice the tokens/s."""
    one, two = (
        EngineStepCost(deploy("DeepSeek-V3", "h200-sxm-ib", tp=8, pp=pp, ep=8)) for pp in (1, 2)
    )
    batch = BatchShape.of(prefill_tokens=1024.0)
    hop = float(two.breakdown(batch)["pipeline"])
    assert pytest.approx(86.4, abs=0.1) == 1024 * 7168 * 2 * 2 / 8 / (0.85 * 50e3)
    assert 86 < hop < 130
    assert float(two.step_us(batch)) == pytest.approx(float(one.step_us(batch)) + hop)
    short, long = LoadTest(512, 16, 8, 16), LoadTest(512, 16, 16, 32)
    rate, twice = run_load_test(one, short), run_load_test(two, long)
    assert 1.9 < twice.output_tokens_per_s / rate.output_tokens_per_s <= 2.0
    assert 1.0 <= twice.mean_tpot_ms / rate.mean_tpot_ms < 1.05


def test_a_compressed_cache_holds_more_and_is_read_sooner() -> None:
    """A quarter of the bytes: four times the tokens; attention over a long context takes at least a
    quarter of the time."""
    full, quarter = (
        deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1, kv_scale=scale) for scale in (1.0, 0.25)
    )
    most = gpu_memory(full).kv_token_capacity
    assert gpu_memory(quarter).kv_token_capacity == pytest.approx(4 * most, abs=4)
    long = BatchShape.of(32.0, 32 * 32_000.0)
    times = [float(EngineStepCost(d).breakdown(long)["attention"]) for d in (full, quarter)]
    assert 0.25 <= times[1] / times[0] < 0.5
    with pytest.raises(InputError, match="`kv_scale` is 0"):
        deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1, kv_scale=0.0)


def test_a_window_keeps_the_last_tokens(small: ModuleType) -> None:
    """64 tokens of cache. 100 + 10 tokens do not fit; the last 48 of them do, in three blocks, and
    attention does not see more."""
    requests = small.at_once([100, 4], [2, 2])
    whole = small.serve(requests, small.tables(), capacity=64)
    assert whole.counts() == {"unfinished": 0, "finished": 1, "rejected": 1, "refused": 0}
    kept = small.small_deployment(kv_window=48)
    requests = small.at_once([100], [2])
    found = small.serve(requests, small.tables(0.0, row_us=1.0), capacity=64, deployment=kept)
    assert found.counts()["finished"] == 1
    assert found.metrics["kv_used_peak"] == pytest.approx(3 / 4)
    terms = EngineStepCost(kept).attention[0]
    seen = [float(terms.decode_us(np.array(1.0), np.array(n))) for n in (48.0, 100.0)]
    assert seen[0] == seen[1]


def test_a_router_that_predicts_lengths(small: ModuleType) -> None:
    """Two engines, equal prompts, outputs of 1,000, 1 and 1. Taken as equal, the third goes to the
    first engine again; known, to the second, where 2 tokens are outstanding and not 1,001."""

    def ranks_of(error: float | None) -> list[int]:
        requests = small.at_once([1, 1, 1], [1000, 1, 1])
        result = small.serve(
            requests, small.tables(), replicas=2, router="length_aware", length_error=error
        )
        return result.rank.tolist()

    assert ranks_of(None) == [0, 1, 0]
    assert ranks_of(0.0) == [0, 1, 1]
    assert sorted(set(ranks_of(5.0))) == [0, 1]
    with pytest.raises(InputError, match="does not look at lengths"):
        ServingConfig(length_error=0.5)
    with pytest.raises(InputError, match="`length_error` is -1"):
        ServingConfig(length_error=-1.0, router="length_aware")


def test_a_shared_beginning_is_read_once(small: ModuleType) -> None:
    """Two sequences share two blocks of 32 tokens; 1 us per cached token. While both decode, 64
    tokens are not read twice: 64 us less in each of the 19 steps after the second one's first
    token. With 0.25 us of arithmetic per repeated token it is 48 us."""
    requests = Requests.of(
        [0.0, 0.002], [64, 64], [100, 20], blocks=[[0, 1], [0, 1]], block_tokens=32
    )

    def decoding_us(repeat_us: float, **more: bool) -> float:
        step = small.tables(100.0, context_us=1.0)
        step.terms[0, 0, TERM_FIELDS.index("us_per_repeat")] = repeat_us
        found = small.serve(requests, step, **more)
        return float(found.finish_s[1] - found.first_token_s[1]) * 1e6

    plain = decoding_us(0.0)
    assert plain - decoding_us(0.0, shared_reads=True) == pytest.approx(19 * 64)
    assert plain - decoding_us(0.25, shared_reads=True) == pytest.approx(19 * 48)
    with pytest.raises(InputError, match="prefix cache that is off"):
        small.serve(small.at_once([4], [4]), small.tables(), shared_reads=True)


def test_repeated_tokens_cost_arithmetic_alone() -> None:
    """128 heads attend to one latent of DeepSeek-V3: arithmetic is most of it, and little is saved;
    grouped attention mostly reads."""
    latent = EngineStepCost(deploy("DeepSeek-V3", "h200-sxm-ib", dp=8)).attention[0]
    grouped = EngineStepCost(deploy("Qwen3-30B-A3B", "h200-sxm-ib", tp=1)).attention[0]
    assert grouped.us_per_repeat / grouped.us_per_seen < 0.5
    assert latent.us_per_repeat / latent.us_per_seen > grouped.us_per_repeat / grouped.us_per_seen
