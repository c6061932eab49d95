"""`moesim engine replay` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.cli.main import run


def test_a_sample_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled trace of 8 layers names its model, a preset of 8 MoE layers."""
    out = tmp_path / "replay"
    assert run(["engine", "replay", "--trace", "sample:debian-olmoe", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "debian-olmoe, 8 MoE layers" in text
    assert f"sh {out}/launch.sh bench latency" in text
    assert (out / "launch.sh").is_file()


def test_json_says_what_the_engine_is_started_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OLMoE-1B-7B has 16 layers, the trace 8: repeated, and said."""
    args = ["engine", "replay", "--trace", "sample:debian-olmoe", "--model", "OLMoE-1B-7B"]
    args += ["--repeat-layers", "--out", str(tmp_path / "r"), "--json"]
    assert run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_moe_layers"] == 16
    assert found["placement"] == "none"
    assert found["environment"]["VLLM_PLUGINS"] == "moesim_replay"
    assert "the trace's 8 layers are repeated over the model's 16" in found["notes"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--model", "OLMoE-1B-7B"], "the model has 16 MoE layers, the trace 8"),
        (["--model", "GPT-OSS-20B"], "64 experts, GPT-OSS-20B has 32"),
        (["--engine", "sglang"], "unknown engine 'sglang'"),
        (["--num-hidden-layers", "9"], "9 layers of a model that has 8"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["engine", "replay", "--trace", "sample:debian-olmoe", "--out", str(tmp_path / "r")]
    assert run([*args, *more]) == 2
    shown = capsys.readouterr().err
    assert word in shown
    assert "remedy: " in shown
