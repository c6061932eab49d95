"""The replay of one worker, on the CPU: what routers answer, padding, counts (INV-1), swaps."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moesim.errors import MismatchError

torch = pytest.importorskip("torch", reason="the plug-in needs torch")

from moesim.engine.content import Content, build_content  # noqa: E402
from moesim.engine.state import Replay  # noqa: E402
from moesim.placement import Placement, Plan  # noqa: E402

IDS = np.array([[[0, 1], [2, 3]], [[2, 0], [1, 3]], [[3, 2], [0, 1]]])


def replay_of(content: Content) -> Replay:
    made = Replay(content, torch.device("cpu"), 16, 0)
    made.counting = True
    return made


def step(replay: Replay, tokens: int, padded: int) -> list[list[list[int]]]:
    """One prefill of `tokens` in a pass of `padded` rows; ids by layer."""
    n = np.array([tokens])
    replay.prepare(["r"], n, np.array([0]), n)
    found = []
    for layer in range(2):
        weights, ids = replay.route(layer, padded, torch.int32)
        assert weights.tolist() == [[0.5, 0.5]] * padded
        replay.count(layer, ids)
        found.append(ids.tolist())
    return found


def test_routers_answer_with_the_trace(build: ModuleType) -> None:
    """One request of 3 rows: a prompt of 3 takes rows 0, 1, 2 in both layers."""
    replay = replay_of(build_content(build.make_trace(IDS, 4), (0, 1)))
    assert step(replay, 3, 3) == IDS.transpose(1, 0, 2).tolist()


def test_padding_repeats_the_last_real_row_and_is_not_counted(build: ModuleType) -> None:
    """2 tokens in a pass of 4: rows 0, 1, 1, 1; counted are 2 tokens x 2 layers x 2 choices."""
    replay = replay_of(build_content(build.make_trace(IDS, 4), (0, 1)))
    assert step(replay, 2, 4)[0] == [[0, 1], [2, 0], [2, 0], [2, 0]]
    check = replay.check()
    assert (check["counted"], check["choices"], check["wrong_layers"]) == (8, 8, [])


def test_an_idle_pass_counts_nothing(build: ModuleType) -> None:
    replay = replay_of(build_content(build.make_trace(IDS, 4), (0, 1)))
    replay.idle()
    weights, ids = replay.route(0, 5, torch.int64)
    assert (ids.shape, ids.dtype, weights.dtype) == ((5, 2), torch.int64, torch.float32)
    replay.count(0, ids)
    assert replay.check()["counted"] == 0


def test_a_lost_token_is_seen(build: ModuleType) -> None:
    """Layer 1 counts only its first token: the check names layer 7."""
    replay = replay_of(build_content(build.make_trace(IDS, 4), (3, 7)))
    n = np.array([3])
    replay.prepare(["r"], n, np.array([0]), n)
    replay.count(0, replay.route(0, 3, torch.int32)[1])
    replay.count(1, replay.route(1, 3, torch.int32)[1][:1])
    assert replay.check()["wrong_layers"] == [7]


def test_replicas_are_counted_together(build: ModuleType) -> None:
    """Expert 0 in slots 0 and 4: tokens of it in either are its tokens."""
    table = np.array([[0, 1, 2, 3, 0, 1]] * 2, np.int32)
    plan = Plan("toy", (0, 1), Placement(table, 2, 1, 4))
    replay = replay_of(build_content(build.make_trace(IDS, 4), (0, 1), plan=plan))
    n = np.array([3])
    replay.prepare(["r"], n, np.array([0]), n)
    for layer in range(2):
        slots = replay.route(layer, 3, torch.int32)[1].clone()
        slots[0][slots[0] == 0] = 4
        replay.count(layer, slots)
    assert replay.check()["wrong_layers"] == []


def test_a_swap_replays_another_routing_of_the_same_shapes(build: ModuleType) -> None:
    trace = build.make_trace(IDS, 4)
    replay = replay_of(build_content(trace, (0, 1)))
    replay.swap(build_content(build.make_trace(IDS[::-1].copy(), 4), (0, 1)))
    assert step(replay, 3, 3)[0] == IDS[::-1, 0].tolist()
    with pytest.raises(MismatchError, match="shape"):
        replay.swap(build_content(build.make_trace(IDS[:2], 4), (0, 1)))
    with pytest.raises(MismatchError, match="moe_layer_ids"):
        replay.swap(build_content(trace, (0, 2)))


def test_a_pass_larger_than_prepared_for_is_refused(build: ModuleType) -> None:
    replay = replay_of(build_content(build.make_trace(IDS, 4), (0, 1)))
    with pytest.raises(MismatchError, match="17 tokens"):
        replay.route(0, 17, torch.int32)
