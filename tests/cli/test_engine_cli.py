"""`moesim engine` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.cli.main import run
from moesim.serving.engines import engine_profile


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


HOST = ["engine", "host", "--trace", "sample:debian-olmoe", "--model", "OLMoE-1B-7B"]
HOST += ["--cluster", "h200-sxm-ib"]


def test_a_host_becomes_a_file_that_engine_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 ms for 16 layers, twice, are 1.5 ms per layer; the large step is the GPU's."""
    out = tmp_path / "host.yaml"
    steps = ["--step", "1x1024=24", "--step", "2x1024=24", "--step", "16x1024=93"]
    assert run([*HOST, *steps, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["host_bound"] for s in found["steps"]] == [True, True, False]
    profile = engine_profile(str(out))
    assert (profile.enqueue_layer_us, profile.eager_layer_us) == (1500.0, 0.0)
    assert profile.prompt_step_us == found["engine"]["prompt_step_us"] > 0


def test_steps_of_no_one_host_are_doubted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Smaller steps that take longer: no pace of a host gives them."""
    steps = ["--step", "1x1024=60", "--step", "2x1024=30", "--step", "16x1024=93"]
    assert run([*HOST, *steps, "--out", str(tmp_path / "h.yaml")]) == 0
    assert "note: these steps do not give one host" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "word"),
    [
        (["1x1024=24", "2x1024=24"], "give 3 different sizes"),
        (["1x1024"], "step '1x1024'"),
        (["1x512=9", "2x1024=24", "16x1024=93"], "replayed as CUDA graphs"),
        (["1x1024=nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_steps_that_give_no_host_are_refused(
    steps: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "host.yaml"
    given = [part for s in steps for part in ("--step", s)]
    assert run([*HOST, *given, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert word in shown
    assert not out.exists()
