"""`moesim model list` and `moesim model show`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesim.cli.model import app
from moesim.errors import FormatError, UnknownNameError
from moesim.model.names import load_model, preset_names

runner = CliRunner()


def test_list_shows_every_preset_whole_even_on_a_narrow_screen() -> None:
    result = runner.invoke(app, ["list"], env={"COLUMNS": "40"})
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name in preset_names():
        assert name in lines
    assert lines["DeepSeek-V3"].split()[1:6] == ["58/61", "8", "of", "256", "7168"]
    assert lines["Mixtral-8x7B"].split()[-2:] == ["46.7B", "12.9B"]
    assert "44.1 MB" in lines["DeepSeek-V3"]


def test_list_json_is_json_alone() -> None:
    result = runner.invoke(app, ["list", "--json"])
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == list(preset_names())
    by_name = {row["name"]: row for row in rows}
    assert "deepseek-ai/DeepSeek-R1" in by_name["DeepSeek-V3"]["aliases"]
    assert by_name["GPT-OSS-20B"]["expert_bytes"] == 13_219_200
    assert all(row["source"] for row in rows)


def test_show_prints_sizes_and_source() -> None:
    result = runner.invoke(app, ["show", "openai/gpt-oss-20b"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for text in ("GPT-OSS-20B", "13.2 MB (as stored)", "49.8 MB", "20.9B", "4.19B", "mxfp4"):
        assert text in result.stdout
    assert "window of 128 tokens in 12 of 24 layers" in result.stdout
    assert "openai/gpt-oss-20b config.json" in result.stdout


def test_show_layers_with_experts() -> None:
    maverick = runner.invoke(app, ["show", "Llama-4-Maverick"]).stdout
    assert "48, MoE in 24 (1 to 47, every 2)" in maverick
    assert "chunked attention" in maverick
    assert "61, MoE in 58 (3 to 60)" in runner.invoke(app, ["show", "DeepSeek-V3"]).stdout


def test_show_json_is_the_spec() -> None:
    result = runner.invoke(app, ["show", "deepseek-v3", "--json"])
    shown = json.loads(result.stdout)
    assert shown == json.loads(json.dumps(load_model("DeepSeek-V3").to_dict()))
    assert shown["derived"]["num_moe_layers"] == 58


def test_show_reads_a_config_and_prints_markup_as_it_is(tmp_path: Path) -> None:
    config = {
        "_name_or_path": "[bold]me/model[x]",
        "model_type": "[/x]",
        "num_hidden_layers": 5,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "mlp_only_layers": [1, 2],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = runner.invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 0
    assert "[bold]me/model[x]" in result.stdout
    assert "[/x]" in result.stdout
    assert "5, MoE in 3 (0, 3, 4)" in result.stdout
    assert "is not known" in result.stdout


def test_show_says_what_was_read_what_was_not_and_what_has_no_effect(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_theta": 1e6,
        "expert_\x1b[31mlayers": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = runner.invoke(app, ["show", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "num_experts 8" in shown
    assert "rope_theta" in rows["no effect on sizes"]
    assert "expert_[31mlayers" in rows["not understood"]
    assert "\x1b" not in shown


def test_show_states_windows_and_layers_for_further_tokens() -> None:
    shown = runner.invoke(app, ["show", "Qwen3.5-397B-A17B"], env={"COLUMNS": "120"}).stdout
    assert "192 MB per sequence" in shown
    assert "gated DeltaNet" in shown
    assert "1 layer, 1 with experts: 6.60B params more" in shown
    flash = runner.invoke(app, ["show", "DeepSeek-V4-Flash"], env={"COLUMNS": "120"}).stdout
    assert "3 of them by hash of the token" in flash
    assert "6.23 kB beyond the windows" in flash


def test_errors_reach_the_caller_as_ours(tmp_path: Path) -> None:
    result = runner.invoke(app, ["show", "mixtral-8x8b"])
    assert isinstance(result.exception, UnknownNameError)
    assert not result.stdout
    path = tmp_path / "config.json"
    path.write_text("{")
    assert isinstance(runner.invoke(app, ["show", str(path)]).exception, FormatError)
    assert runner.invoke(app, ["show"]).exit_code == 2


@pytest.mark.parametrize("heavy", ["numpy", "yaml", "rich.table", "moesim.model.names"])
def test_importing_the_commands_loads_nothing_heavy(heavy: str) -> None:
    code = f"import sys, moesim.cli.model; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
