"""Attention and experts apart in simulated steps, in plans, and between the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesim
from moesim.cli.main import run as run_command
from moesim.errors import InputError, MismatchError
from moesim.placement import Placement, Plan, load_plan
from moesim.sim.collectives.base import Stage
from moesim.sim.engine import Engine
from moesim.sim.event import run_step
from moesim.sim.schedules.ping_pong import PingPong
from moesim.sim.work import Chunk, HomeWork, StepWork

TRACE = "sample:debian-olmoe"
ASKED: dict[str, Any] = {"trace": TRACE, "cluster": "h200-sxm-ib", "gpus": 16, "steps": 2}


def by_hand(attention: float, experts: float, way: float, parts: int, layers: int) -> float:
    """GPU 0 is attention, GPU 1 the experts; `way` microseconds of latency in each direction."""
    none = np.zeros((layers, 2))
    home = HomeWork(np.tile([attention, 0.0], (layers, 1)), none, none, none[0], none, none)
    stage = Stage("", np.full((1, layers), way), way, np.zeros((1, layers, 1)), np.ones(1))
    chunk = Chunk(0, np.tile([0.0, experts], (layers, 1)), [stage], [stage], home)
    work = StepWork(layers, 2, 1, home, (chunk,) * parts)
    return run_step(Engine(1), PingPong(parts), work).us


def test_hand_worked_steps() -> None:
    """Attention 3, experts 2, 1 each way. One part: 7 a layer. Two: two layers of 7, the second
    part 3 behind. Three keep attention busy: six times 3, then 4 for the last part's way."""
    assert by_hand(3, 2, 1, parts=1, layers=2) == pytest.approx(14)
    assert by_hand(3, 2, 1, parts=2, layers=2) == pytest.approx(17)
    assert by_hand(3, 2, 1, parts=3, layers=2) == pytest.approx(22)


def test_the_network_does_one_part_at_a_time_each_way() -> None:
    """Attention 1, experts 1, 4 each way, two parts, one layer: the second dispatch waits for the
    first, 1 + 4 + 4 + 1 + 4 = 14; combine and dispatch do not wait for each other."""
    assert by_hand(1, 1, 4, parts=2, layers=1) == pytest.approx(14)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every expert once, in their order over the pool's 8 GPUs."""
    path = tmp_path_factory.mktemp("apart") / "plan.json"
    meta = moesim.load_trace(TRACE).meta
    rows = np.tile(np.arange(meta.num_experts, dtype=np.int32), (meta.num_layers, 1))
    placement = Placement(rows, 8, 1, meta.num_experts)
    Plan(meta.model, meta.layer_ids, placement, attention_gpus=8).save(path)
    return path


def test_one_part_is_the_closed_form(planned: Path) -> None:
    """INV-8 with tokens' homes on other GPUs than the experts."""
    asked = {**ASKED, "plan": planned, "micro_batches": 1}
    event = moesim.simulate(**asked).first
    closed = moesim.simulate(**asked, fidelity="analytic").first
    np.testing.assert_allclose(event.step_us, closed.step_us, rtol=1e-12)
    np.testing.assert_allclose(event.link_bytes, closed.link_bytes, rtol=1e-12)
    np.testing.assert_allclose(event.balancedness, closed.balancedness, rtol=1e-12)


def test_invariants_of_a_step(planned: Path) -> None:
    """Attention's GPUs compute no experts and the others nothing else; no pool is busy beyond the
    step (INV-3), and parts carry the bytes of the whole step (INV-1)."""
    one = moesim.simulate(**ASKED, plan=planned, micro_batches=1)
    three = moesim.simulate(**ASKED, plan=planned, micro_batches=3)
    np.testing.assert_allclose(three.first.link_bytes, one.first.link_bytes)
    for report in (one, three):
        pools = report.first.extra["pools"]
        busy = report.first.gpu_busy
        assert (pools["attention_gpus"], pools["expert_gpus"]) == (8, 8)
        assert busy.max() <= 1 + 1e-9
        step = report.first.step_us
        mean = (busy[:, 8:].mean(axis=1) * step).sum() / step.sum()
        assert pools["experts_busy"] == pytest.approx(mean)
        assert 0 < pools["exchange_share"] <= 1
    parts = dict(zip(("attention", "compute"), (0, 1), strict=True))
    home, held = np.zeros(2), np.zeros(2)
    run = moesim.simulate(**ASKED, plan=planned, timeline_steps=1)
    assert run.timeline is not None
    for event in run.timeline.events:
        if event.get("cat") in parts:
            into = home if event["pid"] < 8 else held
            into[parts[event["cat"]]] += 1
    assert home[0] > 0
    assert held[1] > 0
    assert home[1] == held[0] == 0


def test_simulate_and_serve_take_the_pools_from_the_plan(planned: Path) -> None:
    """No option names the pools; both commands read them from the plan file."""
    plan = load_plan(planned)
    assert (plan.attention_gpus, plan.placement.num_gpus) == (8, 8)
    asked = {n: v for n, v in ASKED.items() if n != "gpus"}
    assert moesim.simulate(**asked, plan=planned).first.extra["pools"]["attention_gpus"] == 8
    drawn = "poisson:rate=4,requests=20,prompt=100,output=10"
    served = moesim.serve(drawn, plan=planned, cluster="h200-sxm-ib", seed=1)
    assert served.record["deployment"]["expert_gpus"] == 8
    assert served.record["pools"]["attention_gpus"] == 8


def test_a_plan_for_time_sees_who_sends(tmp_path: Path) -> None:
    """Objective time prices messages from attention's GPUs: dispatch of a row to a pool on another
    node crosses the network whatever the placement."""
    made = moesim.plan(
        TRACE,
        cluster="h200-sxm-ib",
        gpus=16,
        expert_gpus=8,
        solver="greedy",
        phase="decode",
        all_to_all="nccl",
    )
    figures = made.chosen.figures
    assert made.reference.name == "eplb"
    assert figures["node_fan_out"].value == pytest.approx(1.0)
    assert made.plan.bound is not None
    assert made.plan.objective_value is not None
    assert made.plan.bound <= made.plan.objective_value
    path = made.save(tmp_path / "p.json")
    run = moesim.simulate(
        **{**ASKED, "steps": 16}, plan=path, micro_batches=1, moe_only=True, all_to_all="nccl",
        compare=("linear", "eplb"),
    )  # fmt: skip
    assert set(run.results) == {"plan", "linear", "eplb"}
    assert float(run.first.step_us.mean()) == pytest.approx(figures["step_us"].value, rel=0.05)


def test_page(planned: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "run.json", tmp_path / "page.html"
    out.write_text(json.dumps(moesim.simulate(**ASKED, plan=planned).to_json()), encoding="utf-8")
    asked = ["report", str(out), str(planned), "--out", str(page)]
    assert run_command(asked, debug=True) == 0
    text = page.read_text(encoding="utf-8")
    assert "Attention and experts apart" in text
    assert "attention is on 8 GPUs before them" in text


def test_refusals(planned: Path) -> None:
    for options, text in (
        ({"expert_gpus": 16}, "leave at least one GPU"),
        ({"expert_gpus": 8, "schedule": "two-batch"}, "schedule two-batch with experts"),
        ({"expert_gpus": 8, "fault": ["gpu:3@1-2"]}, "faults with experts"),
        ({"expert_gpus": 8, "all_to_all": "two-level"}, "two-level all-to-all"),
        ({"expert_gpus": 8, "fidelity": "analytic"}, "parts between two pools"),
        ({"expert_gpus": 8, "micro_batches": 0}, "`micro_batches` 0"),
    ):
        with pytest.raises(InputError, match=text):
            moesim.simulate(**ASKED, **options)
    with pytest.raises(MismatchError, match="places experts on 8 GPUs"):
        moesim.simulate(**ASKED, plan=planned, expert_gpus=4)
    with pytest.raises(InputError, match="which this command does not know"):
        moesim.plan(TRACE, gpus=8, old_plan=planned)
    for extra in ({"robust": "cvar:0.9"}, {"home_ranks": "predicted"}, {"offload": True}):
        with pytest.raises(InputError, match="on GPUs of their own"):
            moesim.plan(TRACE, gpus=16, expert_gpus=8, **extra)
