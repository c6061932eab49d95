"""`moesim calibrate` and `moesim validate` as a user runs them, on two CPU ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'moesim[torch]')")

from moesim.cli.main import run
from moesim.cost.calibration import load_calibration


def test_calibrate_one_rank(inputs, tmp_path, capsys) -> None:
    shape = json.dumps(inputs.shape.to_json())
    host = tmp_path / "host.yaml"
    command = ["calibrate", "--out", str(host), "--model", shape, "--device", "cpu", "--json"]
    command += ["--ranks", "1", "--max-tokens", "64", "--max-bytes", "65536", "--budget", "0.005"]
    assert run([*command, "--section", "ffn", "--section", "permute", "--timeout", "60"]) == 0
    assert set(json.loads(capsys.readouterr().out)["num_rows"]) >= {"ffn", "permute"}
    made = load_calibration(host)
    assert ("fp32", "torch loop") in made.experts
    assert made.copy("reduce").time_us(1e5) > 0


def test_calibrated_then_validated(inputs, forked, tmp_path, capsys) -> None:
    shape = json.dumps(inputs.shape.to_json())
    host = tmp_path / "host.yaml"
    assert run(["calibrate", "--from-raw", str(forked.raw), "--out", str(host), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = summary["num_rows"]
    assert {"launch", "all_to_all_v", "permute", "ffn", "collectives", "single_expert"} <= set(rows)
    made = load_calibration(host)
    for kind in ("all_to_all_v", "all_to_all", "all_gather", "reduce_scatter", "all_reduce"):
        groups = {r["group_size"] for r in summary["links"] if r["kind"] == kind}
        assert groups == {2, 4}
        assert all(made.collective(kind, size).group_measured for size in groups)
    shares = {r["share"] for r in summary["links"] if r["kind"] == "all_to_all_v"}
    assert shares == {1.0, 0.5, 0.125, 0.0}
    assert [fan for fan, _ in made.copy("reduce").fans] == [2.0, 8.0]

    out = tmp_path / "measured.json"
    command = ["validate", "--trace", str(inputs.trace), "--model", shape, "--device", "cpu"]
    names = ("linear", "round_robin", "replicas", "empty_slots")
    for name in names:
        command += ["--plan", str(inputs.plans[name])]
    command += ["--tokens", "16", "--batches", "2", "--out", str(out), "--json"]
    wide = ["--max-median-error", "1e9", "--max-p90-error", "1e9", "--min-spearman", "-1"]
    code = run([*command, "--calibration", str(host), *wide, "--timeout", "60"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert printed["within_tolerance"]
    assert {c["plan"] for c in printed["cases"]} == set(names)
    check_record(json.loads(out.read_text()))

    again = ["validate", "--measured", str(out), "--calibration", str(host)]
    assert run([*again, "--max-median-error", "0"]) == 1
    assert "out of tolerance" in capsys.readouterr().out
    assert run(["validate", "--measured", str(out)]) == 0
    assert "us per layer" in capsys.readouterr().out


def check_record(record: dict) -> None:
    """Four plans, two batches: every result whole, every choice served once."""
    assert record["format"] == "moesim-measured"
    assert len(record["checks"]) == 4
    assert max(c["relative_error"] for c in record["checks"]) < 1e-5
    assert len(record["results"]) == 2 * 4
    rows = {}
    for result in record["results"]:
        phases = np.array(result["phase_us"])
        assert phases.shape == (3, 2, 5)
        assert (phases > 0).all()
        # INV-1: as many rows in each batch whatever the plan; INV-3: at most one a choice travels.
        served = np.array(result["slot_rows"]).sum(axis=1)
        assert rows.setdefault(result["batch"], served.tolist()) == served.tolist()
        assert (np.array(result["messages"]).sum(axis=(1, 2)) <= served).all()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (["--plan", "four"], "plan four is for 4 GPUs"),
        (["--model", "olmoe"], "the trace has 8 experts per layer"),
        (["--plot", "v.txt"], "cannot plot to v.txt"),
        (["--measured", "nowhere.json"], "cannot read nowhere.json"),
        (["--calibration", "nowhere.yaml"], "nowhere.yaml"),
        (["--out", "nowhere/m.json"], "there is no folder nowhere"),
    ],
)
def test_wrong_input(inputs, capsys, change, cause) -> None:
    plans = ["--plan", str(inputs.plans["linear"])]
    if change[0] == "--plan":
        plans, change = [*plans, "--plan", str(inputs.plans["four"])], []
    shape = json.dumps(inputs.shape.to_json())
    command = ["validate", *plans, "--trace", str(inputs.trace)]
    command += change if "--model" in change else ["--model", shape, *change]
    assert run(command) == 2
    err = capsys.readouterr().err
    assert cause in err
    assert "remedy: " in err


def test_cache_plan_on_one_rank(inputs, tmp_path, capsys) -> None:
    from moesim.caching.plan import CachePlan

    path = tmp_path / "cache.json"
    slots, pinned = (2, 3, 4), ((7,), (), ())
    CachePlan("tiny", "toy", 8, (0, 1, 2), slots, pinned).save(path)
    shape = json.dumps(inputs.shape.to_json())
    command = ["validate", "--cache-plan", str(path), "--trace", str(inputs.trace)]
    command += ["--model", shape, "--device", "cpu", "--timeout", "60", "--json"]
    assert run([*command, "--max-median-error", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["cache"] for c in found["caches"]] == [
        f"lru, 2-4 and 0.333 pinned of 8 experts per layer, lookahead {n}" for n in (0, 1)
    ]
    assert found["caches"][0]["copies_per_token"] > 0
    assert all(c["measured_us"] > 0 and c["predicted_us"] > 0 for c in found["caches"])
    assert run(["validate", "--cache-plan", str(path)]) == 2
    assert "with a trace" in capsys.readouterr().err


def test_cache_plans_of_any_policy_are_validated(inputs, tmp_path, capsys) -> None:
    """A static plan with no slot in one layer, and one by score: both replayed and compared."""
    from moesim.caching.plan import CachePlan

    command = ["validate", "--trace", str(inputs.trace), "--device", "cpu", "--timeout", "60"]
    for policy in ("static", "score"):
        path = tmp_path / f"{policy}.json"
        CachePlan("tiny", "toy", 8, (0, 1, 2), (0, 1, 4), ((),) * 3, policy=policy).save(path)
        command += ["--cache-plan", str(path)]
    command += ["--model", json.dumps(inputs.shape.to_json()), "--max-median-error", "1e9"]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["caches"]
    assert [c["cache"].split(",")[0] for c in found] == ["static", "static", "score", "score"]
    for on_demand, ahead in (found[:2], found[2:]):
        assert on_demand["copies_per_token"] == ahead["copies_per_token"] > 0
    other = tmp_path / "other.json"
    CachePlan("tiny", "toy", 8, (3, 4, 5), (2, 2, 2), ((),) * 3).save(other)
    assert run(["validate", "--trace", str(inputs.trace), "--cache-plan", str(other)]) == 2
    assert "or their layer numbers differ" in capsys.readouterr().err
