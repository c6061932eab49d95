"""What a plug-in replays: routing, rows and placement from a trace and a plan."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.engine.content import build_content, load_content, save_content
from moesim.errors import FormatError, InputError, MismatchError
from moesim.placement import Placement, Plan

IDS = np.array([[[0, 1], [2, 3]], [[2, 0], [1, 3]], [[3, 2], [0, 1]]])
"""3 tokens, 2 layers, top-2 of 4 experts."""


def plan_of(table: list[list[int]], gpus: int = 2) -> Plan:
    slots = np.array(table, np.int32)
    return Plan("toy", (0, 1), Placement(slots, gpus, 1, 4))


def test_without_a_plan_the_table_is_the_trace(build: ModuleType) -> None:
    content = build_content(build.make_trace(IDS, 4), (0, 1))
    assert content.table.tolist() == IDS.transpose(1, 0, 2).tolist()
    assert (content.placement, content.num_slots, content.num_gpus) == ("none", 4, 1)


def test_a_plan_without_replicas_is_a_renumbering(build: ModuleType) -> None:
    """Layer 0 holds 3,1 | 0,2: expert 0 is slot 2, 1 is 1, 2 is 3, 3 is 0. Token 0 chose 0, 1."""
    content = build_content(
        build.make_trace(IDS, 4), (0, 1), plan=plan_of([[3, 1, 0, 2], [0, 1, 2, 3]])
    )
    assert content.placement == "renumbered"
    assert content.table[0].tolist() == [[2, 1], [3, 2], [0, 3]]
    assert content.table[1].tolist() == IDS[:, 1].tolist()


def test_a_plan_with_replicas_keeps_experts_and_carries_the_slots(build: ModuleType) -> None:
    table = [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]
    content = build_content(build.make_trace(IDS, 4), (0, 1), plan=plan_of(table))
    assert (content.placement, content.num_slots) == ("eplb", 6)
    assert content.table[0].tolist() == IDS[:, 0].tolist()
    assert content.physical_to_logical is not None
    assert content.physical_to_logical.tolist() == table


def test_layers_are_taken_in_order_or_repeated(build: ModuleType) -> None:
    trace = build.make_trace(IDS, 4)
    assert build_content(trace, (1,)).layer_of.tolist() == [0]
    assert build_content(trace, (1, 2, 3), repeat_layers=True).layer_of.tolist() == [0, 1, 0]
    with pytest.raises(MismatchError, match="3 MoE layers, the trace 2"):
        build_content(trace, (1, 2, 3))


def test_a_layer_of_the_model_by_its_number(build: ModuleType) -> None:
    content = build_content(build.make_trace(IDS, 4), (3, 7))
    assert content.layer(7) == 1
    with pytest.raises(MismatchError, match="layer 4"):
        content.layer(4)


def test_phases_without_rows_take_the_other_phase(build: ModuleType) -> None:
    """A trace of prefill alone: the decode order holds its rows too."""
    content = build_content(build.make_trace(IDS, 4, request_ids=[5, 5, 9]), (0, 1))
    assert content.prefill.order.tolist() == content.decode.order.tolist() == [0, 1, 2]
    assert content.prefill.starts.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("ids", "word"), [([[[0, -1]]], "fewer experts"), ([[[1, 1]]], "one expert twice")]
)
def test_choices_that_no_engine_makes_are_refused(build: ModuleType, ids: list, word: str) -> None:
    with pytest.raises(InputError, match=word):
        build_content(build.make_trace(ids, 4), (0,))


def test_plans_of_other_layers_or_with_empty_slots_are_refused(build: ModuleType) -> None:
    trace = build.make_trace(IDS, 4)
    with pytest.raises(MismatchError, match="layers"):
        build_content(
            trace, (0, 1), plan=Plan("toy", (0,), Placement(np.array([[0, 1, 2, 3]]), 2, 1, 4))
        )
    with pytest.raises(MismatchError, match="empty"):
        build_content(trace, (0, 1), plan=plan_of([[0, 1, 2, 3, -1, -1]] * 2, gpus=3))


def test_a_file_is_read_back_whole(build: ModuleType, tmp_path: Path) -> None:
    made = build_content(
        build.make_trace(IDS, 4), (0, 1), plan=plan_of([[0, 1, 2, 3, 0, 1]] * 2), seed=3
    )
    save_content(made, tmp_path / "r.npz")
    read = load_content(tmp_path / "r.npz")
    assert read.table.tolist() == made.table.tolist()
    for name in ("moe_layer_ids", "num_experts", "num_gpus", "placement", "seed", "about"):
        assert getattr(read, name) == getattr(made, name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no replay file"):
        load_content(tmp_path / "none.npz")
    np.savez(tmp_path / "t.npz", meta=np.array('{"format": "moesim-trace"}'))
    with pytest.raises(FormatError, match="format is not"):
        load_content(tmp_path / "t.npz")
    meta = '{"format": "moesim-engine-replay", "version": 2}'
    np.savez(tmp_path / "v.npz", meta=np.array(meta))
    with pytest.raises(FormatError, match="version 2"):
        load_content(tmp_path / "v.npz")
    np.savez(tmp_path / "a.npz", meta=np.array(meta.replace("2", "1")), extra=np.zeros(1))
    with pytest.raises(FormatError, match=r"not understood \['extra'\]"):
        load_content(tmp_path / "a.npz")
