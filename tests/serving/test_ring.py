"""One long prompt over many GPUs: rounds by hand, and what must hold of every schedule."""

from __future__ import annotations

import pytest

from moesim.errors import InfeasibleError, InputError
from moesim.jobs.prefill import prefill
from moesim.serving.deployment import deploy
from moesim.serving.ring import block_bytes, rounds_us


def test_rounds_by_hand() -> None:
    """4 GPUs, blocks that compute 10 us: sending takes 7 and hides; 12, and three rounds wait 2
    each; the last partial output comes back in 5."""
    assert rounds_us(4, 10.0, 7.0) == 0.0
    assert rounds_us(4, 10.0, 12.0) == 6.0
    assert rounds_us(4, 10.0, 12.0, 5.0) == 11.0


def test_bytes_of_a_block_by_hand() -> None:
    """Qwen3-30B-A3B: 4 KV heads and 32 query heads of 128, bf16. A token's keys and values are
    2 x 4 x 128 x 2 = 2,048 bytes, its query 8,192, its output 8,192 and 32 sums of 4 bytes."""
    one = deploy("Qwen3-30B-A3B", "h100-sxm-ib", tp=1, dp=8)
    assert block_bytes(one, 1.0) == (2048.0, 8192.0, 8320.0)


def test_a_ring_is_faster_than_one_rank_and_work_is_the_same() -> None:
    """With grouped queries a block of keys is the smallest thing to send, so that the ring never
    waits longer than token-ring; longer prompts hide more; the basis is said."""
    result = prefill("Qwen3-30B-A3B", tokens=131_072, gpus=8)
    times = result.times
    assert times["ring"].total_us < times["one rank"].total_us / 4
    assert times["ring"].exposed_us <= times["token-ring"].exposed_us
    assert times["ring"].other_us == times["all-gather"].other_us
    assert times["ring"].exposed_us <= times["all-gather"].exposed_us
    short = prefill("Qwen3-30B-A3B", tokens=4096, gpus=8).times["ring"]
    assert short.exposed_us / short.total_us >= times["ring"].exposed_us / times["ring"].total_us
    assert "basis: " in result.summary()
    assert result.best in times


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="over 8 GPUs"):
        prefill("Qwen3-30B-A3B", tokens=4, gpus=8)
    with pytest.raises(InfeasibleError, match="do not fit"):
        prefill("Mixtral-8x7B", tokens=60_000_000, gpus=8)
