"""docs/cost-model.md: its worked examples, recomputed by hand and by the library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.cost.calibration import load_calibration
from moesim.cost.library import DEDUP_OF, KINDS_OF
from moesim.cost.routing import route
from moesim.metrics import imbalance
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.trace.batches import Batches
from moesim.trace.format import Trace, TraceMeta

TEXT = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return TEXT.split(f"## {name}.", 1)[1].split("\n## ", 1)[0]


def one_token_trace(choices: list[int], num_tokens: int = 1) -> Trace:
    zeros = np.zeros(num_tokens, np.int32)
    return Trace(
        np.tile(np.array(choices, np.uint8), (num_tokens, 1, 1)),
        zeros,
        zeros,
        zeros.astype(np.uint8),
        TraceMeta("example", 8, len(choices), (0,)),
    )


def batch_of(num_tokens: int) -> Batches:
    return Batches(np.arange(num_tokens), np.array([0, num_tokens]), "prefill", num_tokens)


@pytest.mark.parametrize(
    ("dedup", "sent", "crossing", "total"),
    [
        ("none", {(0, 2): 2, (0, 3): 1}, 3, "86,016"),
        ("gpu", {(0, 2): 1, (0, 3): 1}, 2, "57,344"),
        ("node", {(0, 2): 1, (2, 3): 1}, 1, "28,672"),
    ],
)
def test_messages_of_one_token(
    dedup: str, sent: dict[tuple[int, int], int], crossing: int, total: str
) -> None:
    """C2: experts 1, 4, 5, 6 on GPUs 0, 2, 2, 3; home GPU 0; nodes {0, 1} and {2, 3}."""
    placement = Placement(np.arange(8, dtype=np.int32)[None], 4, 2, 8)
    routed = route(
        one_token_trace([1, 4, 5, 6]),
        batch_of(1),
        placement,
        dedup=dedup,  # type: ignore[arg-type]
        home=np.zeros(1, np.int32),
    )
    messages = routed.messages[0, 0]
    assert {(int(s), int(d)): int(messages[s, d]) for s, d in np.argwhere(messages)} == sent
    assert routed.gpu_fan_out[0, 0] == 3
    assert routed.node_fan_out[0, 0] == 2
    assert int(messages[:2, 2:].sum()) == crossing
    size = crossing * 7168 * 2 * 2
    assert f"{size:,}" == total
    row = next(line for line in section("C2").splitlines() if line.startswith(f"| `{dedup}` |"))
    assert f"| {crossing} | {crossing} x 14,336 x 2 = {total} bytes |" in row


def test_the_libraries_and_their_dedup() -> None:
    rows = [line for line in section("C2").splitlines() if line.startswith("| `")]
    listed = {r.split("`")[1]: r.split("`")[3] for r in rows if r.split("`")[1] in KINDS_OF}
    assert listed == DEDUP_OF


def test_a_layer_of_qwen3() -> None:
    """C3 to C5: dispatch 59.58, compute 104.65, combine 56.45, together 220.68 us."""
    model = load_model("Qwen3-30B-A3B")
    hidden, width = model.hidden_size, model.moe_intermediate_size
    assert (hidden, width, model.num_experts // 8, model.expert_dtype) == (2048, 768, 16, "bf16")
    h100 = load_calibration("h100")

    curve = h100.collective("all_to_all_v", 8)
    sides = []
    for messages in (3000, 2800):
        size = messages * hidden * 2
        pieces = [7.105 + size / 43.73e3, 12.68 + size / 262.0e3, 36.9 + size / 323.2e3]
        sides.append(min(pieces))
        assert float(curve.time_us(size)) == pytest.approx(min(pieces), rel=1e-6)
        assert f"{size:,}" in section("C3")
        for piece in pieces if messages == 3000 else [min(pieces)]:
            assert f"{piece:.2f} us" in section("C3")

    weights = 3 * hidden * width
    read = weights * 2 / 2913e3
    times = {}
    for tokens in (250, 40):
        work = 2 * weights * (tokens + 13.34) / 569.2e6
        times[tokens] = (read**2.506 + work**2.506) ** (1 / 2.506)
        assert f"= {work:.3f} us" in section("C4")
        assert f"= {times[tokens]:.3f} us" in section("C4")
    assert f"{weights:,}" in section("C4")
    assert f"= {read:.3f} us" in section("C4")
    compute = 37.24 + 10 * times[250] + 5 * times[40]
    loads = [250] * 10 + [40] * 5 + [0]
    assert float(h100.expert_ffn("bf16").layer_time_us(loads, hidden, width)) == pytest.approx(
        compute, rel=1e-4
    )
    assert f"= {compute:.2f} us" in section("C4")
    dispatch, combine = sides
    assert (
        f"{dispatch:.2f} + {compute:.2f} + {combine:.2f} ="
        f" {round(dispatch, 2) + round(compute, 2) + round(combine, 2):.2f} us"
    ) in section("C5")


def test_split_of_five_choices() -> None:
    """C6: expert 0 in slots 0 and 5 of 10; five tokens that choose it give 3 and 2."""
    table = np.array([[0, 1, 2, 3, 4, 0, 5, 6, 7, -1]], np.int32)
    routed = route(one_token_trace([0], 5), batch_of(5), Placement(table, 2, 1, 8))
    assert routed.slot_tokens[0, 0, [0, 5]].tolist() == [3, 2]
    assert "Five choices and two replicas are 3 and 2" in section("C6")


def test_batches_not_averages() -> None:
    """C7: loads 10, 2 and 2, 10: mean load 6, 6, mean imbalance 10 / 6."""
    loads = np.array([[10, 2], [2, 10]])
    assert float(imbalance(loads.mean(axis=0))) == 1
    assert float(imbalance(loads).mean()) == pytest.approx(10 / 6)
    assert f"10 / 6 = {10 / 6:.2f}" in section("C7")
