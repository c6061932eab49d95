"""`moesim.reroute` and `moesim trace reroute`: the trace, the counts and the held-out figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import moesim
from moesim.cli.main import run
from moesim.compat import trace_fits_model
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.placement import Placement, Plan
from moesim.trace.format import Trace, load_trace, save_trace

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trace(build: ModuleType) -> Trace:
    """40 requests of 8 prefill tokens, 2 layers, 8 experts of very uneven load, top-2."""
    made: Trace = build.random_trace(np.random.default_rng(0), 320, 2, 8, 2, skew=2.0)
    return made


def test_random_routing_is_more_even(trace: Trace) -> None:
    done = moesim.reroute(trace, "random", gpus=4, batch_tokens=64)
    assert done.after["imbalance"].value < done.before["imbalance"].value
    assert done.changes.choices == 320 * 2 * 2
    assert set(done.to_frame().index) >= {"imbalance", "fan_out"}
    assert "experts in order on 4 GPUs, prefill batches of 64" in done.summary()


def test_before_is_what_the_trace_does_and_a_rule_that_keeps_all_changes_nothing(
    trace: Trace,
) -> None:
    done = moesim.reroute(trace, "drop:factor=8,keep=first", gpus=4, batch_tokens=64)
    assert done.changes.kept == done.changes.choices
    assert done.before == done.after


def test_the_plan_is_what_figures_are_of(trace: Trace, tmp_path: Path) -> None:
    """All experts on one GPU: one GPU per token, before and after."""
    table = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    plan = Plan("toy", (0, 1), Placement(table, 1, 1, 8))
    done = moesim.reroute(trace, "random", plan=plan, batch_tokens=64)
    assert done.before["fan_out"].value == done.after["fan_out"].value == 1.0
    with pytest.raises(InputError, match="the plan is for 1 GPUs"):
        moesim.reroute(trace, "random", plan=plan, gpus=2)
    other = replace(plan, model="another")
    with pytest.raises(InputError, match="another"):
        moesim.reroute(trace, "random", plan=other)


def test_more_gpus_than_experts(trace: Trace) -> None:
    with pytest.raises(InputError, match="8 experts on 9 GPUs"):
        moesim.reroute(trace, "random", gpus=9)


def test_the_command_writes_and_prints(trace: Trace, tmp_path: Path, capsys: Capture) -> None:
    save_trace(trace, tmp_path / "t.npz")
    out = tmp_path / "r.npz"
    args = ["trace", "reroute", str(tmp_path / "t.npz"), "--as", "drop:factor=1,keep=position"]
    assert run([*args, "--out", str(out), "--gpus", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    back = load_trace(out)
    assert isinstance(back, Trace)
    changes = said["changes"]
    assert changes["kept"] == int((np.asarray(back.expert_ids) >= 0).sum())
    assert changes["choices"] == changes["kept"] + changes["dropped"]
    assert (said["rule"], said["keep"]) == ("drop", "position")
    assert run([*args, "--gpus", "4"]) == 0
    assert "on held-out requests:" in capsys.readouterr().out


def test_what_is_missing_takes_two_lines(trace: Trace, tmp_path: Path, capsys: Capture) -> None:
    save_trace(trace, tmp_path / "t.npz")
    assert run(["trace", "reroute", str(tmp_path / "t.npz"), "--as", "base"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: rule base needs candidate scores",
        "remedy: capture the trace anew with moesim trace capture --candidates",
    ]


def test_rules_are_listed_and_shown(capsys: Capture) -> None:
    assert run(["routing", "list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert {"drop", "base", "skip-layer"} <= set(names)
    for name in names:
        assert run(["routing", "show", name]) == 0
        assert "left out  " in capsys.readouterr().out
    assert run(["routing", "show", "drup"]) == 2


def test_a_trace_with_another_top_k_still_fits_its_model(trace: Trace) -> None:
    """A rule changes top-k on purpose, so that a trace that says so is not refused."""
    model = load_model("OLMoE-1B-7B")
    meta = replace(
        trace.meta, num_experts=64, top_k=2, layer_ids=tuple(range(model.num_moe_layers))
    )
    with pytest.raises(InputError):
        trace_fits_model(meta, model)
    assert trace_fits_model(replace(meta, source={"reroute": [{"rule": "k"}]}), model) == []
