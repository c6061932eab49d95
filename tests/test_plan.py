"""Placements and plan files: what they derive, round trips, wrong and hostile content."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError
from moesim.placement import Placement, Plan, load_plan, parse_plan

# Two nodes of one GPU with three slots; GPU 1 has room for two only. Expert 1 has two replicas.
TABLE = [[1, 2, 0, 3, 1, -1]]


def placement(table: Any = TABLE, gpus: int = 2, nodes: int = 2, experts: int = 4) -> Placement:
    return Placement(np.array(table, np.int32), gpus, nodes, experts)


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {"model": "toy", "layer_ids": (5,), "placement": placement(), **changes}
    return Plan(**given)


def test_derived_tables_by_hand() -> None:
    it = placement()
    assert (it.num_layers, it.num_slots, it.slots_per_gpu) == (1, 6, 3)
    assert it.gpu_of_slot.tolist() == [0, 0, 0, 1, 1, 1]
    assert it.node_of_gpu.tolist() == [0, 1]
    assert it.replica_count.tolist() == [[1, 2, 1, 1]]
    assert it.logical_to_physical().tolist() == [[[2, -1], [0, 4], [1, -1], [3, -1]]]


@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_tables_invert_each_other(
    build: ModuleType, seed: int, layers: int, experts: int, gpus: int, spare: int
) -> None:
    """INV-2: each slot of logical_to_physical holds that expert, and none is left out."""
    per_gpu = min(experts, -(-experts // gpus) + spare)
    it = build.random_placement(np.random.default_rng(seed), layers, experts, gpus, 1, per_gpu)
    slots = it.logical_to_physical()
    assert (slots >= 0).sum() == layers * it.num_slots
    for layer in range(layers):
        for expert in range(experts):
            own = [p for p in slots[layer, expert] if p >= 0]
            assert own == sorted(set(own))
            assert len(own) == it.replica_count[layer, expert]
            assert (it.physical_to_logical[layer, own] == expert).all()


@pytest.mark.parametrize(
    ("table", "sizes", "cause"),
    [
        ([0, 1], (1, 1, 2), "shape"),
        (np.zeros((0, 4)), (1, 1, 2), "shape"),
        ([[0, 1, 2]], (2, 1, 3), "3 slots do not divide over 2 GPUs"),
        ([[0, 1]], (0, 1, 2), "do not divide over 0 GPUs"),
        ([[0, 1, 2]], (3, 2, 3), "3 GPUs do not divide over 2 nodes"),
        ([[0, 1]], (1, 0, 2), "do not divide over 0 nodes"),
        ([[0, 1]], (1, 1, 3), "3 experts do not fit 2 slots"),
        ([[-1, -1]], (1, 1, 0), "0 experts do not fit"),
        ([[0, 2]], (1, 1, 2), "from 0 to 2, outside 0..1"),
        ([[0, -2, 1]], (1, 1, 2), "from -2 to 1"),
        ([[0, 1, 2], [0, 1, -1]], (3, 1, 3), "layer 1: expert 2 has no slot"),
        ([[0, 1, 2, 2]], (2, 1, 3), "layer 0: GPU 1 holds expert 2 twice"),
    ],
)
def test_impossible_placements(table: Any, sizes: tuple[int, int, int], cause: str) -> None:
    """INV-2 holds for every Placement there is."""
    with pytest.raises(FormatError, match=cause) as caught:
        placement(table, *sizes)
    assert caught.value.remedy


def test_empty_slots_are_not_doubles() -> None:
    assert placement([[0, 1, -1, -1]], 1, 1, 2).replica_count.tolist() == [[1, 1]]


def test_round_trip(tmp_path: Path) -> None:
    given = plan(
        layer_ids=(7,),
        replica_policy="nearest",
        objective="time",
        solver="local_search",
        status="time_limit",
        objective_value=1.25,
        bound=1.0,
        gap=0.2,
        evaluation={"held_out": True, "plans": {"é": {"value": 0.1}}},
        provenance={"run": {"command": "moesim plan"}},
        cache={"slots": [1, 2]},
    )
    given.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    for name in ("model", "layer_ids", "replica_policy", "objective", "solver", "status"):
        assert getattr(again, name) == getattr(given, name)
    for name in ("objective_value", "bound", "gap", "evaluation", "provenance", "cache"):
        assert getattr(again, name) == getattr(given, name)
    assert np.array_equal(again.placement.physical_to_logical, TABLE)
    assert (again.placement.num_gpus, again.placement.num_nodes) == (2, 2)
    assert again.to_json() == given.to_json()


def test_file_layout() -> None:
    """The fields of version 1, one line a layer, so that plans can be compared with diff."""
    text = plan().to_json()
    raw = json.loads(text)
    assert (raw["format"], raw["version"]) == ("moesim-plan", 1)
    assert (raw["num_gpus"], raw["num_nodes"], raw["num_slots"]) == (2, 2, 6)
    assert raw["num_experts"] == 4
    assert raw["layer_ids"] == [5]
    assert raw["placement"] == {"physical_to_logical": TABLE}
    assert "\n   [1,2,0,3,1,-1]\n" in text
    assert "cache" not in raw


def test_smallest_file_that_other_tools_may_write() -> None:
    raw = json.loads(plan().to_json())
    needed = ("format", "version", "num_gpus", "num_nodes", "num_slots", "layer_ids", "placement")
    again = parse_plan({name: raw[name] for name in needed})
    assert (again.model, again.replica_policy, again.status) == ("", "split", "feasible")
    assert again.placement.num_experts == 4


def edited(path: list[Any], value: Any) -> Callable[[], dict[str, Any]]:
    def build_raw() -> dict[str, Any]:
        raw = json.loads(plan().to_json())
        at = raw
        for key in path[:-1]:
            at = at[key]
        if value is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return raw

    return build_raw


ROW = ["placement", "physical_to_logical", 0]
WRONG = {
    "list": list,
    "no format": edited(["format"], ...),
    "other version": edited(["version"], 2),
    "version as text": edited(["version"], "1"),
    "true GPUs": edited(["num_gpus"], True),
    "GPUs as float": edited(["num_gpus"], 2.0),
    "no GPUs": edited(["num_gpus"], 0),
    "huge GPUs": edited(["num_gpus"], 1 << 40),
    "slots missing": edited(["num_slots"], ...),
    "other slots": edited(["num_slots"], 4),
    "experts beyond slots": edited(["num_experts"], 1 << 24),
    "too few experts": edited(["num_experts"], 3),
    "placement a list": edited(["placement"], []),
    "no rows": edited(["placement", "physical_to_logical"], []),
    "row of text": edited(ROW, "123456"),
    "short row": edited(ROW, [1, 2, 0, 3, 1]),
    "float expert": edited([*ROW, 0], 1.0),
    "true expert": edited([*ROW, 0], True),
    "huge expert": edited([*ROW, 0], 1 << 62),
    "expert -2": edited([*ROW, 0], -2),
    "all empty": edited(ROW, [-1] * 6),
    "layers missing": edited(["layer_ids"], ...),
    "layer negative": edited(["layer_ids"], [-1]),
    "layer twice": edited(["layer_ids"], [5, 5]),
    "more layers": edited(["layer_ids"], [5, 6]),
    "policy": edited(["replica_policy"], "fastest"),
    "policy a list": edited(["replica_policy"], ["split"]),
    "status": edited(["status"], "done"),
    "value true": edited(["objective_value"], True),
    "value text": edited(["objective_value"], "1"),
    "evaluation a list": edited(["evaluation"], [1]),
    "cache text": edited(["cache"], "x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(WRONG[name]()))
    with pytest.raises(FormatError) as caught:
        load_plan(file)
    assert caught.value.cause.startswith(f"{file}: ")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "\x00",
        '{"objective_value": NaN}',
        '{"objective_value": -Infinity}',
        '{"evaluation": {"x": 1e999}}',
        '{"num_gpus": ' + "9" * 5000 + "}",
        "\ufeff{}",
    ],
)
def test_not_json(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match="not JSON"):
        load_plan(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(FormatError, match="not JSON"):
        load_plan(file)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot read plan") as caught:
            load_plan(path)
        assert not isinstance(caught.value, FormatError)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["moesim-plan", "split", "feasible"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_fuzzed_plans_parse_or_say_why(data: st.DataObject) -> None:
    """One to three fields replaced by anything: either FormatError, or a plan that can be saved."""
    raw = json.loads(plan(cache={"slots": [1]}).to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(raw)))
        if name == "placement" and data.draw(st.booleans()):
            slot = data.draw(st.integers(0, 5))
            raw = copy.deepcopy(raw)
            raw["placement"] = {"physical_to_logical": [list(TABLE[0])]}
            raw["placement"]["physical_to_logical"][0][slot] = data.draw(JSON_VALUES)
        else:
            raw[name] = data.draw(JSON_VALUES)
    error = saved_again(json.dumps(raw))
    if error is not None:
        assert error.cause
        assert error.remedy


def saved_again(text: str) -> FormatError | None:
    """Load, save and load `text`; the error where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(text, encoding="utf-8")
        try:
            loaded = load_plan(file)
        except FormatError as error:
            return error
        loaded.save(file)
        assert load_plan(file).to_json() == loaded.to_json()
        return None
