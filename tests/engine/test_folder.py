"""Model folders, launch lines and the folder of `moesim engine replay`."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.engine.folder import write_replay
from moesim.engine.launch import arguments, options, script
from moesim.engine.model_folder import ARCHITECTURES, hf_config, spec_of
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.model.names import load_model, preset_config, preset_names
from moesim.placement import Placement, Plan

KNOWN = [n for n in preset_names() if preset_config(n)["model_type"] in ARCHITECTURES]


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_keeps_its_shape(name: str) -> None:
    config = hf_config(name)
    made, wanted = spec_of(config, name), load_model(name)
    assert (made.moe_layer_ids, made.attention) == (wanted.moe_layer_ids, wanted.attention)
    assert made.expert_params == wanted.expert_params
    assert config["architectures"] == [ARCHITECTURES[config["model_type"]]]


@pytest.mark.parametrize("name", sorted(set(preset_names()) - set(KNOWN)))
def test_a_model_type_without_a_known_class_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="model_type of preset"):
        hf_config(name)


def test_a_cut_model_has_its_first_layers() -> None:
    """DeepSeek-V2-Lite: layer 0 is dense, so 4 layers hold MoE layers 1, 2, 3."""
    assert spec_of(hf_config("DeepSeek-V2-Lite", 4), "x").moe_layer_ids == (1, 2, 3)
    with pytest.raises(InputError, match="28 layers of a model that has 27"):
        hf_config("DeepSeek-V2-Lite", 28)


def test_quantisation_is_left_out_and_said(tmp_path: Path) -> None:
    config = hf_config("GPT-OSS-20B")
    assert "quantization_config" not in config
    assert "bf16" in config["moesim_note"]


def test_a_config_of_ones_own_is_kept(tmp_path: Path) -> None:
    own = {**hf_config("OLMoE-1B-7B"), "architectures": ["Mine"], "odd": 1}
    (tmp_path / "config.json").write_text(json.dumps(own))
    for given in (tmp_path, tmp_path / "config.json"):
        config = hf_config(str(given))
        assert (config["architectures"], config["odd"]) == (["Mine"], 1)


def test_options_read_back_as_given() -> None:
    values = arguments(Path("/a b/model"), "eplb", 4, 2)
    words = shlex.split(options(values))
    assert "--enable-eplb" in words
    assert "--no-enable-prefix-caching" in words
    at = words.index("--eplb-config")
    assert json.loads(words[at + 1])["num_redundant_experts"] == 2
    assert words[words.index("--data-parallel-size") + 1] == "4"


def test_one_gpu_has_no_expert_parallelism() -> None:
    assert "enable_expert_parallel" not in arguments(Path("m"), "none", 1, 0)


def test_the_script_is_a_shell_script(tmp_path: Path) -> None:
    """Run with a stand-in named vllm, it passes the model and sets the variables."""
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$MOESIM_REPLAY|$VLLM_PLUGINS|$*"\n')
    (tmp_path / "vllm").chmod(0o755)
    replay = tmp_path / "it's here" / "replay.npz"
    text = script(replay, arguments(tmp_path / "m", "none", 1, 0))
    (tmp_path / "launch.sh").write_text(text)
    found = {}
    for words in ([], ["bench", "latency"]):
        found[len(words)] = subprocess.run(
            ["sh", str(tmp_path / "launch.sh"), *words],
            env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert found[0].startswith(f"{replay}|moesim_replay|serve {tmp_path / 'm'} --load-format dummy")
    assert f"|bench latency --model {tmp_path / 'm'} " in found[2]


def test_a_folder_has_model_replay_and_script(build: ModuleType, tmp_path: Path) -> None:
    """A trace of 64 experts, top-8, for debian-olmoe (8 layers), under a plan with replicas."""
    trace = build.random_trace(np.random.default_rng(0), 20, 8, 64, 8)
    slots = np.tile(np.concatenate([np.arange(64), [5, 6]]), (8, 1)).astype(np.int32)
    plan = Plan("debian-olmoe", tuple(range(8)), Placement(slots, 2, 1, 64))
    written = write_replay(trace, tmp_path / "out", model="debian-olmoe", plan=plan)
    assert sorted(p.name for p in written.folder.iterdir()) == ["launch.sh", "model", "replay.npz"]
    assert '"num_redundant_experts": 2' in (tmp_path / "out/launch.sh").read_text()
    assert any("no decode tokens" in note for note in written.notes)


def test_a_trace_of_another_model_is_refused(build: ModuleType, tmp_path: Path) -> None:
    trace = build.make_trace(np.array([[[0, 1]]]), 4)
    with pytest.raises(MismatchError, match="4 experts, OLMoE-1B-7B has 64"):
        write_replay(trace, tmp_path, model="OLMoE-1B-7B")
