"""`moesim export` and `moesim import-plan` from the outside."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moesim.cli.export import export
from moesim.cli.import_plan import import_plan
from moesim.errors import MoesimError
from moesim.exporters.registry import EXPORTERS
from moesim.placement import load_plan

app = typer.Typer()
app.command("export")(export)
app.command("import-plan")(import_plan)


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def plan_file(tmp_path, make_plan):
    """Mixtral-8x7B on 4 GPUs of 3 slots."""
    plan = make_plan(layer_ids=tuple(range(32)), model="Mixtral-8x7B")
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("engine", "suffix"),
    [
        ("sglang", ".json"),
        ("tensorrt-llm", ".yaml"),
        ("vllm-pr41141", ".jsonl"),
        ("vllm-ascend", ".json"),
        ("eplb", ".npz"),
    ],
)
def test_there_and_back(plan_file, tmp_path, engine, suffix):
    out, back = tmp_path / f"engine{suffix}", tmp_path / "back.json"
    result = run("export", plan_file, "--to", engine, "--out", out)
    assert "accepted by" in result.stdout
    assert str(out) in result.stdout
    run("import-plan", out, "--from", engine, "--out", back, "--num-gpus", 4, "--model",
        "Mixtral-8x7B")  # fmt: skip
    first, second = load_plan(plan_file), load_plan(back)
    np.testing.assert_array_equal(
        first.placement.physical_to_logical, second.placement.physical_to_logical
    )
    assert second.layer_ids == first.layer_ids
    assert second.model == "Mixtral-8x7B"
    assert engine.split("-")[0][:4] in second.solver.lower()


def test_json_output_and_default_name(plan_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", plan_file, "--to", "sglang", "--json")
    summary = json.loads(result.stdout)
    assert summary["file"] == "plan.sglang.json"
    assert (tmp_path / "plan.sglang.json").stat().st_size == summary["num_bytes"]
    assert summary["launch"][0].startswith("python -m sglang.launch_server --model-path Mixtral")
    assert "--out not given" in result.stderr
    back = run("import-plan", "plan.sglang.json", "--from", "sglang", "--num-gpus", 4, "--model",
               "Mixtral-8x7B", "--out", "b.json", "--json")  # fmt: skip
    assert json.loads(back.stdout)["num_slots"] == 12


def test_refusals_write_nothing(plan_file, tmp_path):
    out = tmp_path / "out.json"
    for args, message in [
        (["--to", "megatron", "--out", out], "holds every expert once"),
        (["--to", "vllm", "--out", tmp_path / "o.yaml"], "holds every expert once"),
        (["--to", "sglang", "--out", tmp_path / "o.txt"], "wants a file that ends in .json"),
        (["--to", "sglang", "--model", "DeepSeek-V3", "--out", out], "the plan has 8 experts"),
        (["--to", "sglan", "--out", out], "unknown engine"),
        (["--to", "sglang", "--apply", tmp_path, "--out", out], "--apply is not for sglang"),
        (["--to", "megatron", "--apply", tmp_path], "--out is missing"),
        ([], "--to is missing"),
    ]:
        with pytest.raises(MoesimError, match=message):
            run("export", plan_file, *args)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(MoesimError, match="no plan was named"):
        run("export")


def test_layers_of_an_unknown_model(tmp_path, make_plan):
    make_plan(layer_ids=(1, 2), model="home-made").save(tmp_path / "plan.json")
    out = tmp_path / "o.json"
    with pytest.raises(MoesimError, match="dense ones included, is not known"):
        run("export", tmp_path / "plan.json", "--to", "sglang", "--out", out)
    result = run("export", tmp_path / "plan.json", "--to", "sglang", "--out", out,
                 "--num-hidden-layers", 4)  # fmt: skip
    assert "no known preset" in result.stderr
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 4
    back = tmp_path / "b.json"
    run("import-plan", out, "--from", "sglang", "--num-gpus", 4, "--layer-ids", "1-2",
        "--out", back)  # fmt: skip
    assert load_plan(back).layer_ids == (1, 2)


def test_import_plan_errors(tmp_path):
    bad = tmp_path / "x.json"
    bad.write_text("{}")
    for args, message in [
        ([tmp_path / "none.json", "--from", "sglang"], "cannot read"),
        ([bad, "--from", "sglang"], "wrong keys"),
        ([bad, "--from", "nope"], "unknown engine"),
        ([bad, "--from", "megatron"], "is not of format"),
    ]:
        with pytest.raises(MoesimError, match=message):
            run("import-plan", *args, "--out", tmp_path / "o.json")
    assert not (tmp_path / "o.json").exists()


def test_list_names_all_engines():
    text = run("export", "--list").stdout
    assert all(name in text for name in EXPORTERS.names())
    listing = json.loads(run("export", "--list", "--json").stdout)
    assert "0.33.0" in listing["vllm"]["accepted_by"]
