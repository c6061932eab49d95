"""accelerate takes our device_map and runs a toy Mixtral with it.

Run with `pytest -m engines tests/offloading`, where accelerate and transformers are installed. No
GPU: what the map puts on GPU 0 stays on the CPU here, which changes devices and no names.
"""

from __future__ import annotations

import json

import pytest

from moesim.cluster import load_machine
from moesim.model.hf.reader import read_config
from moesim.model.weights import load_weights
from moesim.offloading.by_layer import accelerate
from moesim.offloading.task import Task

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch", reason="the engine's code needs torch")
transformers = pytest.importorskip("transformers", reason="the toy is a model of transformers")
tool = pytest.importorskip("accelerate", reason="the engine itself")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_a_toy_mixtral_runs_with_the_map() -> None:
    """Every parameter has a device (`check_device_map`), and a forward pass has its logits."""
    config = transformers.MixtralConfig(**SIZES)
    raw = {**config.to_dict(), "architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16"}
    weights = load_weights(read_config(raw, "toy", "toy", "toy").spec)
    task = Task(weights, weights, load_machine("rtx-4090+ddr5-2ch"), 512, 128, 64)
    plan = accelerate(task)
    found = json.loads(plan.files["device_map.json"])
    model = transformers.MixtralForCausalLM(config).eval()
    tool.utils.check_device_map(model, found)
    here = dict.fromkeys(found, "cpu")
    run = tool.dispatch_model(model, device_map=here, main_device="cpu", force_hooks=True)
    with torch.no_grad():
        logits = run(torch.tensor([[1, 2, 3]])).logits
    assert tuple(logits.shape) == (1, 3, SIZES["vocab_size"])
