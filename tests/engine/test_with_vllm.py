"""The interfaces of vLLM that the plug-in uses, in the wheels of the oldest and newest version.

Run with `pytest -m engines tests/engine`: wheels are downloaded without dependencies, or taken from
`$MOESIM_ENGINE_SOURCES/vllm-VERSION`. No GPU: routers run with stand-ins for what they import.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch", reason="the engines' code needs torch")

VERSIONS = ("0.23.0", "0.33.0")
ROUTERS = "vllm/model_executor/layers/fused_moe/router/"
METHODS = {
    "vllm/v1/worker/gpu_model_runner.py": {
        ("GPUModelRunner", "_prepare_inputs"): ["self", "scheduler_output", "num_scheduled_tokens"],
        ("GPUModelRunner", "_dummy_run"): ["self", "num_tokens"],
    },
    "vllm/v1/worker/gpu/model_runner.py": {
        ("GPUModelRunner", "prepare_inputs"): ["self", "scheduler_output"],
        ("GPUModelRunner", "_dummy_run"): ["self", "num_tokens"],
        ("GPUModelRunner", "eplb_state"): ["self"],
    },
}
TEXTS = {
    "vllm/v1/worker/gpu_input_batch.py": ["self.num_prompt_tokens =", "num_computed_tokens_cpu ="],
    "vllm/v1/worker/gpu/input_batch.py": [
        "req_ids: list[str]",
        "num_reqs: int",
        "num_scheduled_tokens: np.ndarray",
        "num_computed_tokens_np: np.ndarray",
        "prefill_len_np: np.ndarray",
    ],
    "vllm/distributed/eplb/eplb_state.py": [
        "    physical_to_logical_map: torch.Tensor",
        "    logical_to_physical_map: torch.Tensor",
        "    logical_replica_count: torch.Tensor",
        "self.expert_rearrangement_step_interval",
        "self.model_states",
    ],
    "vllm/model_executor/layers/fused_moe/runner/moe_runner.py": [
        "self.router = router",
        "self.moe_config = moe_config",
        "def do_naive_dispatch_combine",
    ],
    "vllm/engine/arg_utils.py": [
        '"--worker-extension-cls"',
        '"--skip-tokenizer-init"',
        '"--load-format"',
        '"--dtype"',
        '"--enable-prefix-caching"',
        '"--data-parallel-size"',
        '"--enable-expert-parallel"',
        '"--enable-eplb"',
        '"--eplb-config"',
    ],
    "vllm/config/parallel.py": [
        "    num_redundant_experts: int",
        "    step_interval: int",
        "    use_async: bool",
    ],
    "vllm/benchmarks/latency.py": ['"--disable-detokenize"', '"--batch-size"'],
    "vllm/plugins/__init__.py": ['"vllm.general_plugins"'],
    "vllm/config/compilation.py": ["static_all_moe_layers", "static_forward_context"],
}


@pytest.fixture(scope="session", params=VERSIONS)
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the Python files of one version's wheel."""
    version = request.param
    given = Path(os.environ.get("MOESIM_ENGINE_SOURCES", "-")) / f"vllm-{version}"
    if given.is_dir():
        return given
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"vllm=={version}"], capture_output=True, text=True
    )
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        pytest.skip(f"no wheel of vllm {version}: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith(".py")])
    found[0].unlink()
    return folder


def test_model_runners_have_the_methods(vllm: Path) -> None:
    """Each with the leading arguments that the hooks pass on."""
    for name, wanted in METHODS.items():
        tree = ast.parse((vllm / name).read_text())
        found = {
            (owner.name, method.name): [a.arg for a in method.args.args]
            for owner in tree.body
            if isinstance(owner, ast.ClassDef)
            for method in owner.body
            if isinstance(method, ast.FunctionDef)
        }
        for key, args in wanted.items():
            assert found[key][: len(args)] == args, (name, key)


def test_states_have_the_fields(vllm: Path) -> None:
    for name, wanted in TEXTS.items():
        text = (vllm / name).read_text()
        assert [w for w in wanted if w not in text] == [], name


def _router_module(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The wheel's own router files, everything else of vLLM a stand-in."""
    stub = MagicMock()
    stub.current_platform.is_cuda_alike.return_value = False
    stub.current_platform.is_xpu.return_value = False
    stub.VLLM_MOE_ROUTING_SIMULATION_STRATEGY = "moesim_replay"
    for name in (
        "vllm",
        "vllm.envs",
        "vllm.logger",
        "vllm.platforms",
        "vllm.triton_utils",
        "vllm.distributed.eplb.eplb_state",
        "vllm.model_executor.layers.fused_moe.config",
        "vllm.v1.worker.ubatching",
    ):
        monkeypatch.setitem(sys.modules, name, stub)
    stub.envs = stub
    made = stub
    for name in ("fused_moe_router", "base_router", "routing_simulator_router"):
        full = (ROUTERS + name).replace("/", ".")
        made = types.ModuleType(full)
        monkeypatch.setitem(sys.modules, full, made)
        source = (vllm / ROUTERS / f"{name}.py").read_text()
        exec(compile(source, f"{name}.py", "exec"), made.__dict__)
    return made


def test_the_wheels_router_answers_with_the_trace(
    vllm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: types.ModuleType
) -> None:
    """select_experts of the wheel's RoutingSimulatorRouter, 3 tokens, top-2 of 4."""
    from moesim.engine import vllm_hooks
    from moesim.engine.content import build_content
    from moesim.engine.state import Replay

    module = _router_module(vllm, monkeypatch)
    vllm_hooks.install("moesim_replay", "unused")
    init = inspect.signature(module.RoutingSimulatorRouter.__init__)
    newer = "kernel_routing_method_type" in init.parameters
    more = {"kernel_routing_method_type": None} if newer else {}
    router = module.RoutingSimulatorRouter(top_k=2, global_num_experts=4, **more)
    ids = np.array([[[0, 1]], [[2, 0]], [[3, 2]]])
    replay = Replay(build_content(build.make_trace(ids, 4), (0,)), torch.device("cpu"), 8, 0)
    monkeypatch.setitem(vllm_hooks._now, "replay", replay)
    router._moesim_layer = 0
    n = np.array([3])
    replay.counting = True
    replay.prepare(["a"], n, np.array([0]), n)
    weights, chosen = router.select_experts(torch.zeros(3, 1), torch.zeros(3, 4))
    assert chosen.tolist() == ids[:, 0].tolist()
    assert weights.tolist() == [[0.5, 0.5]] * 3
    assert replay.check()["wrong_layers"] == []
