"""What broken captures leave behind, by hand, and that real routing has none of it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.trace.check import check_trace
from moesim.trace.format import LoadTrace, TraceMeta, load_trace
from moesim.trace.suspects import in_every_token, one_rank, suspects


def codes(trace: object) -> set[str]:
    return {code for code, _, _ in suspects(trace)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["debian-moe"])
def test_real_routing_has_none(name: str) -> None:
    assert codes(load_trace(f"sample:{name}")) == set()


def test_one_decode_routing_repeated(build: ModuleType) -> None:
    """40 decoded tokens with 2 routings: 38 repeats. With 20 or more different ones nothing is
    said, and prefill tokens do not count."""
    rng = np.random.default_rng(0)
    ids = np.array(build.random_trace(rng, 80, 4, 32, 4).expert_ids)
    phases = np.repeat([0, 1], 40)
    assert codes(build.make_trace(ids, 32, phases=phases)) == set()
    ids[40:60], ids[60:] = ids[40], ids[60]
    found = suspects(build.make_trace(ids, 32, phases=phases))
    assert [(code, count) for code, count, _ in found] == [("repeated-decode", 38)]
    assert codes(build.make_trace(ids, 32, phases=1 - phases)) == set()
    named = [f.code for f in check_trace(build.make_trace(ids, 32, phases=phases))]
    assert "repeated-decode" in named


def test_few_possible_routings_are_no_surprise(build: ModuleType) -> None:
    """One layer, 2 of 4 experts: 6 routings, so 40 equal ones are nothing to speak of."""
    ids = np.tile(np.array([[[0, 1]]]), (40, 1, 1))
    assert "repeated-decode" not in codes(build.make_trace(ids, 4, phases=np.ones(40)))


@pytest.mark.parametrize(
    ("used", "ranks"),
    [((0, 15), 16), ((240, 255), 16), ((0, 127), 2), ((64, 64), 256), ((120, 135), 0)],
)
def test_one_ranks_experts(used: tuple[int, int], ranks: int) -> None:
    """256 experts: 0 to 15 are those of one of 16 ranks; 120 to 135 are of two at any count."""
    load = np.zeros((2, 256), np.int64)
    load[:, used[0] : used[1] + 1] = 8
    load[:, used[0]] += 64
    found = one_rank(load)
    assert bool(found) == bool(ranks)
    if ranks:
        assert f"one of {ranks} ranks" in found[0][2]
    assert one_rank(np.where(load > 0, 1, 0)[:, :8]) == []


def test_an_expert_in_every_token() -> None:
    """64 tokens with 2 of 4 experts: expert 3 in all of them is a shared one. Both in all tokens is
    a constant layer, which has its own finding; below 64 tokens chance is possible."""
    tokens = np.array([64.0])
    found = in_every_token(np.array([[30, 30, 4, 64]]), tokens, 2, (7,))
    assert "in layers 7 (3)" in found[0][2]
    assert in_every_token(np.array([[0, 0, 64, 64]]), tokens, 2, (7,)) == []
    assert in_every_token(np.array([[30, 30, 3, 63]]), np.array([63.0]), 2, (7,)) == []


def test_counts_are_looked_at_too() -> None:
    load = np.zeros((3, 2, 64), np.int64)
    load[:, :, :8] = 40
    assert codes(LoadTrace(load, TraceMeta("m", 64, 4, (0, 1)))) == {"one-rank"}
