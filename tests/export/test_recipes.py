"""The recipes' moesim commands run as they stand, on small dumps of each engine, and print what the
recipes show."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moesim.cli.export import export
from moesim.cli.import_plan import import_plan
from moesim.cli.plan import plan as plan_command
from moesim.cli.trace_import import import_trace
from moesim.model.names import load_model
from moesim.placement import Placement, Plan, load_plan
from moesim.safetensors_file import TensorInfo, write_header
from moesim.trace.format import load_trace

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.md"))

app = typer.Typer()
app.command("export")(export)
app.command("import-plan")(import_plan)
app.command("import")(import_trace)
app.command("plan")(plan_command)


def blocks(page: Path) -> list[str]:
    """The fenced code blocks of a page that name no language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if not name]


def commands(page: Path) -> list[list[str]]:
    """Words of each `moesim` command in the page's code blocks, in order."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("moesim ")]


def run(words: list[str]) -> str:
    if words[:2] == ["trace", "import"]:
        words = words[1:]
    result = CliRunner().invoke(app, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def routed(spec, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    order = rng.random((tokens, spec.num_hidden_layers, spec.num_experts)).argsort(axis=2)
    ids = order[:, :, : spec.top_k].astype(np.int32)
    dense = np.setdiff1d(np.arange(spec.num_hidden_layers), spec.moe_layer_ids)
    ids[:, dense] = 0
    return ids


def random_plan(spec, gpus: int, extra: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    table = np.stack(
        [
            np.concatenate(
                [
                    np.concatenate([held, rng.permutation(np.setdiff1d(
                        np.arange(spec.num_experts), held))[:extra]])
                    for held in rng.permutation(spec.num_experts).reshape(gpus, -1)
                ]
            )
            for _ in spec.moe_layer_ids
        ]
    ).astype(np.int32)  # fmt: skip
    placement = Placement(table, gpus, 1, spec.num_experts)
    Plan(
        spec.name,
        spec.moe_layer_ids,
        placement,
        replica_policy="nearest",
        evaluation={"all_to_all": "deepep"},
    ).save(path)


def write_dumps(folder: Path) -> None:
    """What the engines of the recipes leave behind."""
    spec = load_model("Qwen3-30B-A3B")
    ids = routed(spec, 7)
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.uint8))
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    choice = {"routed_experts": base64.b64encode(buffer.getvalue()).decode()}
    (folder / "responses.jsonl").write_text(json.dumps({"choices": [choice], "usage": usage}))
    bare = base64.b64encode(ids.tobytes()).decode()
    answer = {"meta_info": {**usage, "routed_experts": bare}}
    (folder / "answers.jsonl").write_text(json.dumps(answer))
    load = np.bincount(ids[:, 0].reshape(-1), minlength=128).tolist()
    record = {
        "record_type": "eplb_load_stats",
        "version": 1,
        "step": 0,
        "expert_load": [load] * 48,
        "p2l_map": [list(range(128))] * 48,
    }
    (folder / "stats.jsonl").write_text(json.dumps(record))
    statistic = folder / "expert_statistic"
    statistic.mkdir()
    deepseek = load_model("DeepSeek-V3")
    (statistic / "meta_info.json").write_text('{"num_experts": 256, "num_experts_per_token": 8}')
    rng = np.random.default_rng(0)
    names = [f"{step}_{layer}" for step in (100, 101) for layer in deepseek.moe_layer_ids]
    with (statistic / "rank0.safetensors").open("wb") as out:
        write_header(out, {n: TensorInfo("I64", (256,), 0, 2048) for n in names}, {})
        for _ in names:
            out.write(rng.integers(1, 99, 256).tobytes())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_dumps(tmp_path)
    return tmp_path


def expanded(words: list[str], place: Path) -> list[str]:
    """Words with file patterns replaced by the files, as the shell does."""
    out = []
    for word in words:
        out += [str(file) for file in sorted(place.glob(word))] if "*" in word else [word]
    return out


def needs(words: list[str], place: Path, model: str, gpus: int) -> None:
    """Make what a command reads that an earlier, slower step of the page would have left."""
    extra = 0 if "--apply" in words else 1 if gpus == 32 else 2
    if words[:2] == ["export", "plan.json"]:
        random_plan(load_model(model), gpus, extra, place / "plan.json")


@pytest.mark.parametrize("page", RECIPES, ids=lambda p: p.stem)
def test_moesim_commands_of_the_recipe(page: Path, place: Path) -> None:
    if page.stem == "sglang":
        torch = pytest.importorskip("torch", reason="the recorder's files need torch")
        spec = load_model("Qwen3-30B-A3B")
        (place / "recording").mkdir()
        ids = np.full((48, 5, 8), -1, np.int32)
        ids[:] = routed(spec, 5).transpose(1, 0, 2)
        record = {
            "forward_pass_id": 0, "rank": 0, "input_ids": [1] * 5, "positions": list(range(5)),
            "extend_seq_lens": [5], "forward_mode": 1, "topk_ids_of_layer": torch.tensor(ids),
        }  # fmt: skip
        torch.save(
            {
                "records": [record],
                "last_physical_to_logical_map": torch.arange(128).repeat(48, 1),
            },
            place / "recording" / "expert_distribution_recorder_1_0.pt",
        )
    deepseek = page.stem == "tensorrt-llm"
    model, gpus = ("DeepSeek-V3", 32) if deepseek else ("Qwen3-30B-A3B", 8)
    ran = 0
    for words in commands(page):
        if words[0] == "plan" or "--apply" in words:
            continue
        needs(words, place, model, gpus)
        output = run(expanded(words, place))
        ran += 1
        if words[0] == "export":
            launch = output.split("start with\n", 1)[1].split("\nnote: ")[0].split()
            assert " ".join(launch) in " ".join("\n".join(blocks(page)).split()), output
    assert ran >= 3
    back = load_plan(place / "back.json").placement
    plan = load_plan(place / "plan.json").placement
    np.testing.assert_array_equal(back.physical_to_logical, plan.physical_to_logical)


def test_counts_of_the_tensorrt_llm_recipe_become_a_plan(place: Path) -> None:
    """Its plan command, with a shorter search: 32 x 9 slots for 256 experts from counts alone."""
    page = DOCS / "recipes" / "tensorrt-llm.md"
    run(["import", "expert_statistic", "--model", "DeepSeek-V3", "--out", "load.npz"])
    (words,) = [words for words in commands(page) if words[0] == "plan"]
    run([*words, "--solver", "greedy"])
    plan = load_plan(place / "plan.json")
    assert plan.placement.num_slots == 288
    assert plan.placement.num_nodes == 4
    assert plan.layer_ids == load_trace(place / "load.npz").meta.layer_ids
    assert plan.evaluation["num_steps"] == 1


def test_import_and_export_of_the_quick_start(place: Path) -> None:
    """Its commands before and after planning, with a plan of the bundled trace's model."""
    (place / "responses.jsonl").rename(place / "dump.jsonl")
    random_plan(load_model("debian-moe"), 8, 0, place / "plan.json")
    ran = []
    for words in commands(DOCS / "quick-start.md"):
        if words[0] == "export" or words[:2] == ["trace", "import"]:
            run(words)
            ran.append(words[words.index("--out") + 1])
    assert ran == ["trace.npz", "placement.json"]
    assert all((place / name).stat().st_size for name in ran)


def test_engines_page_names_every_format_and_engine() -> None:
    from moesim.exporters.registry import EXPORTERS
    from moesim.trace.importers.registry import IMPORTERS

    text = (DOCS / "engines.md").read_text()
    for name in (*IMPORTERS.own, *EXPORTERS.own):
        assert f"| `{name}` |" in text
