"""docs/models.md and verification/models say what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moesim.model.hf.families import FAMILIES
from moesim.model.hf.methods import METHODS
from moesim.model.hf.schemes import READ
from moesim.model.names import load_model

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "models.md").read_text()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "verification" / "models" / "check_configs.py"
    spec = importlib.util.spec_from_file_location("check_configs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_configs"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_every_architecture() -> None:
    table = DOC.split("Known architectures, by `model_type`:")[1].split("Files of several towers")[
        0
    ]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert sorted(set(re.findall("`([^`]+)`", " ".join(rows)))) == sorted(FAMILIES)


def test_the_page_and_the_refusal_list_every_method() -> None:
    table = DOC.split("### Stored types")[1].split("Which weights a method covers")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name.replace("_", "-") for name in re.findall("`([^`]+)`", " ".join(cells))}
    assert named - {"quant-method"} == set(READ)
    assert set(READ) <= set(METHODS)


def test_the_script_compares_with_what_is_published(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A model of GPT-OSS-20B's shape under its published name agrees; half its layers do not.
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "vocab_size": 201088,
    }
    path = tmp_path / "openai--gpt-oss-20b_config.json"
    path.write_text(json.dumps(config))
    (tmp_path / "dense_config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert script.main(tmp_path) == 0
    out = capsys.readouterr().out
    assert "20.91 / 20.91" in out
    assert "dense" not in out
    path.write_text(json.dumps({**config, "num_hidden_layers": 12}))
    assert script.main(tmp_path) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_published_caches_are_those_of_the_presets(script: ModuleType) -> None:
    figures = script.published()
    assert script.value("2 * (3 + 4) / 7") == 2
    for name, preset in {
        "deepseek-ai--DeepSeek-V4-Pro": "DeepSeek-V4-Pro",
        "moonshotai--Kimi-K3": "Kimi-K3",
        "XiaomiMiMo--MiMo-V2-Flash": "MiMo-V2-Flash",
        "MiniMaxAI--MiniMax-M3": "MiniMax-M3",
        "zai-org--GLM-5.2": "GLM-5.2",
        "google--gemma-4-26B-A4B": "Gemma-4-26B-A4B",
    }.items():
        assert load_model(preset).kv_bytes_per_token() == figures[name].kv
