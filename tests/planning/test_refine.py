"""Robust plans, plans to move to and home ranks: by hand, through make_plan, and on the command
line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run
from moesim.cluster import Cluster
from moesim.cost.routing import home_ranks
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.jobs.plan import make_plan
from moesim.jobs.plan_result import PlanResult
from moesim.model.names import ModelSpec
from moesim.placement import Placement, load_plan
from moesim.planning.home_ranks import choose_predictor, predict_homes
from moesim.planning.migration import movers
from moesim.planning.request import PlanRequest
from moesim.planning.robust import (
    OTHER,
    Losses,
    Robust,
    cvar,
    domain_requests,
    parse_robust,
    solve_robust,
)
from moesim.sim.engine import Engine
from moesim.sim.migrate import holdings, plan_moves
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace, save_trace

EXPERTS = 8
Capture = pytest.CaptureFixture[str]


def two_tastes(build: ModuleType, model: str = "toy") -> Trace:
    """80 requests of 12 tokens; domain "low" chooses experts 0 to 3 mostly, "high" 4 to 7."""
    rng = np.random.default_rng(8)
    domain = np.repeat(np.arange(80) % 2, 12)
    taste = rng.random((960, 2, EXPERTS))
    taste += 0.7 * ((np.arange(EXPERTS) >= 4) == domain[:, None, None])
    ids = np.argsort(-taste, axis=2)[:, :, :2]
    trace: Trace = build.make_trace(
        ids,
        EXPERTS,
        request_ids=np.repeat(np.arange(80), 12),
        domain_ids=domain,
        domains=("low", "high"),
        model=model,
    )
    return trace


@pytest.fixture(scope="module")
def trace(build: ModuleType) -> Trace:
    return two_tastes(build)


@pytest.fixture(scope="module")
def cluster(build: ModuleType) -> Cluster:
    made: Cluster = build.small_cluster()
    return made


@pytest.fixture(scope="module")
def model(build: ModuleType) -> ModelSpec:
    made: ModelSpec = build.toy_model(2, EXPERTS, 2)
    return made


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.planning.tuning.NUM_RESAMPLES", 10)
        patch.setattr("moesim.planning.traffic.TRAFFIC_TOKENS", 960)
        yield


@pytest.fixture(scope="module")
def ask(trace: Trace, cluster: Cluster, model: ModelSpec) -> Callable[..., PlanResult]:
    def asked(**changes: Any) -> PlanResult:
        request = PlanRequest.of(trace, cluster, model, batch_tokens=96)
        return make_plan(request.but(**changes))

    return asked


# --- robust


def test_cvar_by_hand() -> None:
    losses = np.array([1.0, 5.0, 2.0, 4.0])
    assert cvar(losses, 0.0) == 3.0
    assert cvar(losses, 0.5) == 4.5
    assert cvar(losses, 0.99) == 5.0


def test_losses_by_hand() -> None:
    """Two GPUs of two experts. Loads 3 1 | 2 2 are even; 4 2 | 1 1 has 6 over an even 4."""
    counts = np.array([[[3, 1, 2, 2]], [[4, 2, 1, 1]]], np.float32)
    problem = Problem(counts=counts, capacity=np.array([2, 2]), num_nodes=1)
    placement = Placement(np.array([[0, 1, 2, 3]], np.int32), 2, 1, 4)
    assert Losses(problem, counts).of(placement) == pytest.approx([1.0, 1.5])


@pytest.mark.parametrize(
    "text", ["worst", "cvar:1", "cvar:-0.1", "cvar:x", "cvar:nan", "", "cvar:"]
)
def test_unknown_robustness(text: str) -> None:
    if text == "cvar:":
        assert parse_robust(text) == Robust("cvar", 0.9)
        return
    with pytest.raises(InputError, match=r"worst-domain, unseen, or cvar:0\.9"):
        parse_robust(text)


def test_parse_robust() -> None:
    assert parse_robust("worst-domain") == Robust("worst-domain")
    assert str(parse_robust("cvar:0.5")) == "cvar:0.5"
    assert parse_robust("cvar:") == parse_robust("cvar") == Robust("cvar", 0.9)


def test_the_rare_domain_is_heard() -> None:
    """Nine batches of taste A for one of taste B. Loads of A: 4 4 2 2 1 1 1 1, of B: 6 0 6 0 0 0
    2 2. The best for the mean looks after A; the worst domain can only gain by parting 0 and 2."""
    a = np.tile(np.array([4, 4, 2, 2, 1, 1, 1, 1], np.float32), (9, 1, 1))
    b = np.array([[[6, 0, 6, 0, 0, 0, 2, 2]]], np.float32)
    counts = np.concatenate((a, b))
    problem = Problem(counts=counts, capacity=np.full(4, 2), num_nodes=1)
    solver = find_solver("local_search")
    together = Placement(np.array([[0, 2, 1, 3, 4, 5, 6, 7]], np.int32), 4, 1, 8)
    plain = replace(solver.solve(problem), placement=together)
    found = solve_robust(solver, problem, plain, Robust("worst-domain"), {"a": a, "b": b})
    # Even is 4 per GPU: together, B has 12; parted, 6, which is the largest expert.
    assert found.plain_worst == pytest.approx(3.0)
    assert found.worst == pytest.approx(1.5)


@pytest.mark.parametrize("robust", [Robust("worst-domain"), Robust("cvar", 0.8)])
def test_robust_never_worse_on_tuning_data(ask: Callable[..., PlanResult], robust: Robust) -> None:
    result = ask(robust=robust, objective="balance")
    said = result.plan.evaluation["robust"]
    assert said["objective"] == str(robust)
    assert said["tuning"]["worst"] <= said["tuning"]["plain_worst"]
    assert result.chosen.name == "local_search, robust"
    assert set(said["held_out"]["plans"]) == {"linear", "eplb", "local_search", result.chosen.name}
    for plan in said["held_out"]["plans"].values():
        assert set(plan["domains"]) == {"low", "high"}
        assert plan["cvar"] >= plan["mean"]
    assert said["price"]["figure"] == "imbalance"
    assert any(line.startswith(f"price of {robust}") for line in result.lines)


def test_small_domains_are_joined(trace: Trace) -> None:
    index, _ = index_requests(trace, "prefill")
    assert set(domain_requests(trace, index, 100)) == {"low", "high"}
    assert set(domain_requests(trace, index, 481)) == {OTHER}
    assert domain_requests(trace, index, 961) == {}
    few = index.select(np.arange(80) < 13)  # 7 of low (84 tokens), 6 of high (72)
    assert set(domain_requests(trace, few, 73)) == {"low"}
    assert set(domain_requests(trace, few, 85)) == {OTHER}


def test_robust_refusals(ask: Callable[..., PlanResult], trace: Trace) -> None:
    with pytest.raises(InputError, match="objective traffic is about messages"):
        ask(robust=Robust("cvar", 0.9), objective="traffic")
    with pytest.raises(MismatchError, match="has no domains"):
        ask(trace=replace(trace, domain_ids=None), robust=Robust("worst-domain"))
    with pytest.raises(MismatchError, match="two are needed"):
        ask(domain="low", robust=Robust("worst-domain"))


# --- migration


def test_moving_time_by_hand(build: ModuleType, cluster: Cluster, model: ModelSpec) -> None:
    """Two experts of 600,000 bytes cross from GPU 0 to 1 and two back: each direction of each
    GPU's link carries 1,200,000 bytes; the event simulation of the same moves takes as long."""
    from moesim.cost.step import build_step_model

    step = build_step_model(cluster, model, all_to_all="nccl")
    old = Placement(np.arange(8, dtype=np.int32)[None], 4, 2, 8)
    new = Placement(np.array([[2, 3, 0, 1, 4, 5, 6, 7]], np.int32), 4, 2, 8)
    away = movers(old, cluster, model, step)
    plan = away.plan(new)
    assert plan.num_moves == 4
    assert plan.bytes_from_gpus == 4 * model.expert_bytes()
    assert plan.bytes_from_host == 0
    links = cluster.routes().links(0, 1)
    slowest = float(away.mover.us_per_byte[links].max())
    latency = float(cluster.routes().latency_us[0, 1])
    assert plan.us == pytest.approx(2 * model.expert_bytes() * slowest + latency)
    engine = Engine(away.num_links)
    moves = plan_moves(
        holdings(old.physical_to_logical.reshape(1, 4, 2)),
        new.physical_to_logical.reshape(1, 4, 2),
        old.node_of_gpu,
    )
    sent = [engine.network.send(flow) for flow in away.mover.flows(moves)]
    engine.env.run(until=engine.env.all_of(sent))
    assert engine.now_us == pytest.approx(plan.us)
    assert away.plan(old).num_moves == 0
    assert away.plan(old).us == 0.0


def test_moves_are_never_predicted_to_lose(ask: Callable[..., PlanResult]) -> None:
    old = ask(solver="linear").plan
    for steps in (1e-3, 10.0, 1e9):
        result = ask(old_plan=old, steps_between_moves=steps)
        said = result.plan.evaluation["migration"]
        assert said["step_us"] * steps + said["time_us"] <= said["step_us_in_use"] * steps * (
            1 + 1e-9
        )
        assert said["moved_experts"] <= said["without_weighing"]["moved_experts"]
        assert {c.name for c in result.candidates} >= {"in use", "local_search"}
        if steps < 1:
            assert said["moved_experts"] == 0
            assert np.array_equal(
                result.plan.placement.physical_to_logical, old.placement.physical_to_logical
            )
            assert any("0 experts, the plan in use stays" in line for line in result.lines)
    assert said["moved_experts"] > 0
    again = ask(old_plan=result.plan, steps_between_moves=1000.0).plan.evaluation["migration"]
    assert again["step_us"] * 1000 + again["time_us"] <= again["step_us_in_use"] * 1000 * (1 + 1e-9)
    assert again["step_us_in_use"] == pytest.approx(said["step_us"], rel=1e-9)


def test_slots_follow_the_plan_in_use(ask: Callable[..., PlanResult]) -> None:
    old = ask(solver="eplb", redundant_experts=4).plan
    result = ask(old_plan=old)
    assert result.plan.placement.num_slots == 12
    assert result.defaults["slots"] == "12 per layer, as the plan in use has"
    with pytest.raises(MismatchError, match="3 slots per GPU, the new one 4"):
        ask(old_plan=old, redundant_experts=8)


def test_plans_of_something_else_are_refused(ask: Callable[..., PlanResult]) -> None:
    old = ask(solver="linear").plan
    with pytest.raises(MismatchError, match="for other, the trace is of toy"):
        ask(old_plan=replace(old, model="other"))
    with pytest.raises(MismatchError, match="MoE layer 0 is the model's layer 5"):
        ask(old_plan=replace(old, layer_ids=(5, 6)))
    one = replace(old.placement, physical_to_logical=old.placement.physical_to_logical[:1])
    with pytest.raises(MismatchError, match="2 MoE layers of 8 experts, the plan in use 1"):
        ask(old_plan=replace(old, placement=one, layer_ids=(0,)))
    with pytest.raises(MismatchError, match="for 2 GPUs in 1 node"):
        ask(old_plan=replace(old, placement=replace(old.placement, num_gpus=2, num_nodes=1)))
    with pytest.raises(InputError, match="use `objective` time"):
        ask(old_plan=old, objective="balance")
    with pytest.raises(InputError, match="above 0"):
        ask(old_plan=old, steps_between_moves=float("nan"))


# --- home ranks


def test_predictors_need_their_data(trace: Trace) -> None:
    assert choose_predictor("predicted", trace, "decode") == "prefix"
    assert choose_predictor("predicted", trace, "prefill") == "domain"
    with_ids = replace(trace, token_ids=np.zeros(trace.num_tokens, np.int32))
    assert choose_predictor("predicted", with_ids, "prefill") == "tokens"
    with pytest.raises(MismatchError, match="no token ids"):
        choose_predictor("tokens", trace, "prefill")
    with pytest.raises(MismatchError, match="tokens routed before"):
        choose_predictor("prefix", trace, "prefill")
    with pytest.raises(UnknownNameError, match="unknown home ranks"):
        choose_predictor("nearest", trace, "prefill")


def test_prefix_never_looks_at_the_token_itself_or_later(trace: Trace) -> None:
    """Changing a request's tokens from position 5 on changes no prediction up to position 5."""
    index, _ = index_requests(trace, "decode")
    tune, held_out = split_requests(index)
    placement = Placement(np.tile(np.arange(8, dtype=np.int32), (2, 1)), 4, 2, 8)

    def predicted(some: Trace) -> Any:
        return predict_homes(
            some, tune, placement, "prefix", policy="split", dedup="gpu", far=2.0
        ).saved

    mine = held_out.token_idx[: held_out.indptr[1]]
    ids = trace.expert_ids.copy()
    ids[mine[5:]] = (ids[mine[5:]] + 3) % EXPERTS
    before, after = predicted(trace), predicted(replace(trace, expert_ids=ids))
    assert np.array_equal(before[mine[:6]], after[mine[:6]])
    assert not np.allclose(before[mine[6:]], after[mine[6:]])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_homes_help_and_keep_the_loads(ask: Callable[..., PlanResult], phase: Any) -> None:
    """Ranks take as many tokens as before and expert loads stay; fewer bytes cross nodes, fewest
    with the oracle."""
    result = ask(home_ranks="predicted", phase=phase, solver="linear")
    name = "homes by prefix" if phase == "decode" else "homes by domain"
    by_name = {c.name: c.figures for c in result.candidates}
    sent = [by_name[n]["inter_node_bytes"].value for n in ("linear", name, "homes by oracle")]
    assert sent[0] > sent[1] >= sent[2]
    for row in (name, "homes by oracle"):
        assert by_name[row]["imbalance"].value == by_name["linear"]["imbalance"].value
        assert by_name[row]["fan_out"].value == by_name["linear"]["fan_out"].value
    assert result.plan.evaluation["home_ranks"]["placement"] == "linear"


def test_ranks_take_equal_shares(trace: Trace) -> None:
    index, _ = index_requests(trace, "prefill")
    tune, held_out = split_requests(index)
    placement = Placement(np.tile(np.arange(8, dtype=np.int32), (2, 1)), 4, 2, 8)
    from moesim.trace.batches import draw_batches

    batches = draw_batches(held_out, "prefill", 96, 3, 0)
    predictor = predict_homes(
        trace, tune, placement, "domain", policy="split", dedup="gpu", far=2.0
    )
    homes = predictor.homes(batches)
    plain = home_ranks(trace, batches, 4)
    for b in range(3):
        span = slice(batches.indptr[b], batches.indptr[b + 1])
        assert np.array_equal(np.bincount(homes[span]), np.bincount(plain[span]))


def test_recorded_ranks_are_not_predicted(ask: Callable[..., PlanResult], trace: Trace) -> None:
    ranked = replace(trace, rank_ids=np.arange(trace.num_tokens, dtype=np.int32) % 4)
    with pytest.raises(InputError, match="which rank each token was on"):
        ask(trace=ranked, home_ranks="predicted")


# --- command line


@pytest.fixture
def folder(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_trace(two_tastes(build), tmp_path / "trace.npz")
    return tmp_path


def plan(*args: str) -> int:
    common = ["plan", "--trace", "trace.npz", "--gpus", "4", "--batch-tokens", "96"]
    return run([*common, *args])


def test_robust_on_the_command_line(folder: Path, capsys: Capture) -> None:
    assert plan("--robust", "worst-domain", "--solver", "greedy") == 0
    shown = capsys.readouterr().out
    assert "max/even work, worst domain" in shown
    assert "price of worst-domain: imbalance" in shown
    assert load_plan(folder / "plan.json").evaluation["robust"]["objective"] == "worst-domain"
    assert plan("--robust", "best") == 2
    assert "use worst-domain, unseen, or cvar:0.9" in capsys.readouterr().err


def test_from_on_the_command_line(folder: Path, capsys: Capture) -> None:
    assert plan("--out", "old.json") == 0
    capsys.readouterr()
    assert plan("--from", "old.json") == 2
    assert "use --objective time" in capsys.readouterr().err
    assert plan("--from", "missing.json") == 2
    assert "cannot read plan missing.json" in capsys.readouterr().err
    raw = json.loads((folder / "old.json").read_text())
    raw["model"] = "another"
    (folder / "other.json").write_text(json.dumps(raw))
    assert plan("--from", "other.json") == 2
    assert "the plan in use is for another" in capsys.readouterr().err
    assert plan("--steps-between-moves", "10") == 2
    assert "without --from" in capsys.readouterr().err


def test_homes_on_the_command_line(folder: Path, capsys: Capture) -> None:
    assert plan("--home-ranks", "domain", "--solver", "eplb") == 0
    shown = capsys.readouterr().out
    assert "homes by domain" in shown
    assert "homes by oracle" in shown
    assert plan("--home-ranks", "tokens", "--solver", "eplb") == 2
    assert "the trace has no token ids" in capsys.readouterr().err
