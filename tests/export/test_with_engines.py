"""Our files through the engines' own code, on a CPU. Run with `pytest -m engines tests/export`.

Wheels are downloaded without dependencies, and the modules that read our files (or write what we
read) are run with stand-ins for what needs a GPU. Engines that are not on the package index as
wheels are taken from `$MOESIM_ENGINE_SOURCES/NAME/FILE` where that is set; the tests skip
otherwise. docs/engines.md has the table of what was checked with which version.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import shlex
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import yaml

from moesim.exporters import eplb, omni_infer, sglang, tensorrt_llm, vllm, vllm_ascend, vllm_pr41141
from moesim.exporters.base import ExportOptions, ReadOptions
from moesim.exporters.launch import sglang as sglang_launch
from moesim.exporters.launch import vllm as vllm_launch
from moesim.exporters.launch.base import Role, Service
from moesim.placement import Placement, Plan
from moesim.trace.importers import megatron, sglang_recorder, trtllm
from moesim.trace.importers import vllm as vllm_import
from moesim.trace.importers.base import ImportOptions
from moesim.trace.importers.build import to_logical

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch", reason="the engines' code needs torch")

SOURCES = os.environ.get("MOESIM_ENGINE_SOURCES", "")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Callable[..., Path]:
    """wheel(name, version) -> folder with the Python files of that wheel."""
    found: dict[str, Path] = {}

    def fetch(name: str, version: str, python: str = "") -> Path:
        key = f"{name}-{version}"
        given = Path(SOURCES) / key
        if SOURCES and given.is_dir():
            return given
        if key not in found:
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary"]
            command += [":all:", "--dest", str(folder), f"{name}=={version}"]
            if python:
                command += ["--python-version", python]
            run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            files = list(folder.glob("*.whl"))
            if run.returncode or not files:
                pytest.skip(f"the wheel of {name} {version} cannot be had here")
            with zipfile.ZipFile(files[0]) as archive:
                names = [n for n in archive.namelist() if n.endswith(".py")]
                archive.extractall(folder, names)
            files[0].unlink()
            found[key] = folder
        return found[key]

    return fetch


def source(name: str, file: str) -> Path:
    """A file of an engine that is not on the package index; skips when it was not given."""
    path = Path(SOURCES) / name / file
    if not SOURCES or not path.is_file():
        pytest.skip(
            f"no wheel of {name} on the index; put {file} into $MOESIM_ENGINE_SOURCES/{name}"
        )
    return path


def definitions(path: Path, names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    """Run the named functions and classes of a file, with `given` as its other globals."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    body = [node for node in tree.body if isinstance(node, kinds) and node.name in names]
    assert {node.name for node in body} == names
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *body], []))
    space = {"torch": torch, "np": np, "json": json, "Path": Path, **given}
    exec(compile(module, str(path), "exec"), space)
    return space


def stand_in(monkeypatch, name: str, **attributes: Any) -> None:
    """A module called `name` (and its parents) that has nothing but `attributes`."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


class Log:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.fixture
def plan(make_plan) -> Plan:
    """8 experts in 12 slots of 4 ranks, layers 1 and 3 of 5."""
    return make_plan(layer_ids=(1, 3), num_nodes=2)


def load_module(monkeypatch, path: Path, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("backend", ["none", "deepep"])
def test_sglang_loads_our_map(wheel, monkeypatch, tmp_path, plan, backend):
    """compute_initial_expert_location_metadata on the exported file, on rank 2 of 4."""
    root = wheel("sglang", "0.5.23") / "sglang" / "srt" / "eplb"
    file = tmp_path / "location.json"
    file.write_bytes(sglang.encode(plan, ExportOptions(num_hidden_layers=5)))
    moe = SimpleNamespace(
        init_expert_location=str(file),
        ep_num_redundant_experts=4,
        ep_join_mode=None,
        moe_a2a_backend=backend,
        ep_dispatch_algorithm="static" if backend == "deepep" else None,
    )
    parallel = SimpleNamespace(ep_size=4, elastic_ep_initial_size=None, nnodes=2, tp_size=4)
    stand_in(
        monkeypatch,
        "sglang.srt.runtime_context",
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_exec=lambda: SimpleNamespace(moe=moe),
        get_parallel=lambda: parallel,
        get_resources=lambda: SimpleNamespace(),
    )
    stand_in(
        monkeypatch,
        "sglang.srt.elastic_ep.elastic_ep",
        elastic_expanded_world_enabled=lambda: False,
    )
    shape = SimpleNamespace(num_layers=5, num_logical_experts=8, num_groups=None)
    model = SimpleNamespace(get_model_config_for_expert_location=lambda _: shape)
    stand_in(monkeypatch, "sglang.srt.model_loader", get_model_architecture=lambda _: (model, None))
    module = load_module(monkeypatch, root / "expert_location.py", "sglang_expert_location")
    metadata = module.compute_initial_expert_location_metadata(
        SimpleNamespace(hf_config=None), moe_ep_rank=2
    )
    table = metadata.physical_to_logical_map.numpy()
    np.testing.assert_array_equal(table[[1, 3]], plan.placement.physical_to_logical)
    np.testing.assert_array_equal(table[0], np.arange(12) % 8)
    assert metadata.num_local_physical_experts == 3
    inverse = plan.placement.logical_to_physical()
    for row, layer in enumerate((1, 3)):
        for expert in range(8):
            slots = set(metadata.logical_to_all_physical(layer, expert))
            ours = {s for s in inverse[row, expert].tolist() if s >= 0}
            assert slots <= ours if backend == "deepep" else slots == ours
    back = sglang.decode(file.read_bytes(), ReadOptions("f", num_gpus=4, layer_ids=(1, 3)))
    np.testing.assert_array_equal(
        back.placement.physical_to_logical, plan.placement.physical_to_logical
    )


def test_sglang_counts_slots_as_we_do(wheel):
    """Our mapping of slot counts to experts is that of the recorder."""
    path = wheel("sglang", "0.5.23") / "sglang" / "srt" / "eplb" / "expert_distribution.py"
    name = "_convert_global_physical_count_to_logical_count"
    theirs = definitions(path, {name}, {})[name]
    rng = np.random.default_rng(0)
    mapping = np.stack([rng.permutation(np.arange(12) % 8) for _ in range(3)])
    count = rng.integers(0, 99, (5, 3, 12))
    expected = theirs(torch.tensor(count), 3, 8, torch.tensor(mapping)).numpy()
    np.testing.assert_array_equal(to_logical(count, mapping, "here"), expected)


def test_sglang_recorder_files_as_it_writes_them(wheel, tmp_path):
    """Its per-token accumulator dumps two passes; we read the tokens back."""
    path = wheel("sglang", "0.5.23") / "sglang" / "srt" / "eplb" / "expert_distribution.py"
    mapping = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])
    metadata = SimpleNamespace(
        num_layers=2, num_physical_experts=6, physical_to_logical_map=mapping
    )
    schedule = SimpleNamespace(chunked_prefill_size=4)
    exec_ = SimpleNamespace(overlap=SimpleNamespace(enable_two_batch_overlap=False))
    directory = SimpleNamespace(get=lambda: str(tmp_path))
    names = {
        "_SinglePassGatherer", "_DetailSinglePassGatherer", "_Accumulator", "_DetailAccumulator",
        "_UtilizationRateAccumulatorMixin", "_convert_per_token_to_global_physical_count",
        "_dump_to_file",
    }  # fmt: skip
    space = definitions(
        path,
        names,
        {
            "ABC": object,
            "Optional": Optional,
            "get_schedule": lambda: schedule,
            "get_exec": lambda: exec_,
            "get_device_namespace": lambda: SimpleNamespace(device="cpu"),
            "reports_expert_balancedness": lambda: False,
            "envs": SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=directory),
            "time": SimpleNamespace(time=lambda: 1.0),
            "logger": Log(),
            "_SINGLE_PASS_GATHERER_KEY_PRIMARY": "primary",
        },
    )
    gatherer = space["_DetailSinglePassGatherer"](metadata, 0)
    accumulator = space["_DetailAccumulator"](metadata, 0)
    passes = [
        (1, [7, 8, 9], [0, 1, 2], [3], [[[0, 1], [2, 3], [4, 2]], [[0, 1], [1, 2], [5, 3]]]),
        (2, [6], [3], None, [[[5, 3]], [[2, 0]]]),
    ]
    for number, (mode, tokens, positions, lengths, slots) in enumerate(passes):
        batch = SimpleNamespace(
            input_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            extend_seq_lens_cpu=lengths,
            forward_mode=SimpleNamespace(value=mode),
        )
        gatherer.reset()
        gatherer.on_forward_pass_start(batch)
        for layer, ids in enumerate(slots):
            gatherer.on_select_experts(layer, torch.tensor(ids, dtype=torch.int32))
        accumulator.append(number, "primary", gatherer.collect(), {})
    accumulator.dump("file")
    (file,) = tmp_path.glob("*.pt")
    trace = sglang_recorder.read([file], ImportOptions(num_experts=4))
    assert trace.expert_ids.tolist() == [
        [[0, 1], [3, 2]],
        [[2, 3], [2, 1]],
        [[0, 2], [3, 0]],
        [[1, 3], [1, 3]],
    ]
    assert trace.token_ids.tolist() == [7, 8, 9, 6]
    assert trace.phases.tolist() == [0, 0, 0, 1]
    assert trace.request_ids.tolist() == [0, 0, 0, 0]


def test_vllm_places_experts_as_we_say(wheel, tmp_path):
    """determine_expert_map of every rank against the plan that we export and read back."""
    root = wheel("vllm", "0.33.0") / "vllm"
    path = root / "model_executor" / "layers" / "fused_moe" / "expert_map_manager.py"
    place = definitions(path, {"determine_expert_map"}, {})["determine_expert_map"]
    parser = definitions(
        root / "utils" / "argparse_utils.py",
        {"FlexibleArgumentParser"},
        {**vars(argparse), "yaml": yaml, "logger": Log(), "Any": Any, "sys": sys},
    )["FlexibleArgumentParser"]
    for strategy in ("linear", "round_robin"):
        row = vllm._order(strategy, 8, 4).astype(np.int32)
        plan = Plan("", (0,), Placement(row[None], 4, 1, 8))
        file = tmp_path / f"{strategy}.yaml"
        file.write_bytes(vllm.encode(plan, ExportOptions()))
        arguments = parser.load_config_file(None, str(file))
        assert "--enable-expert-parallel" in arguments
        at = arguments.index("--expert-placement-strategy")
        for rank in range(4):
            count, local, _ = place(4, rank, 8, arguments[at + 1])
            held = torch.nonzero(local >= 0).flatten().tolist()
            assert held == sorted(row[rank * 2 : rank * 2 + 2].tolist())
            assert count == 2


def words(lines: list[str]) -> set[str]:
    """Option names in command lines."""
    return {w for line in lines for w in shlex.split(line, comments=True) if w.startswith("--")}


def test_launch_lines_use_options_that_exist(wheel, tmp_path, plan):
    """Every option that we print is in the engines' argument definitions."""
    fields = wheel("sglang", "0.5.23") / "sglang" / "srt" / "arg_groups"
    text = "".join(file.read_text() for file in sorted(fields.rglob("*.py")))
    for option in words(sglang.launch(plan, tmp_path / "f.json")):
        name = option.removeprefix("--").replace("-", "_")
        assert f'"{option}"' in text or f'"{name}"' in text, option
    file = wheel("vllm", "0.33.0") / "vllm" / "engine" / "arg_utils.py"
    text = file.read_text()
    used = words(vllm.launch(plan, tmp_path / "f.yaml")) - {"--config"}
    used |= words(vllm_pr41141.launch(plan, tmp_path / "f.jsonl"))
    used |= words(vllm_ascend.launch(plan, tmp_path / "f.json"))
    used |= {"--" + key for key in yaml.safe_load(vllm.encode(linear(), ExportOptions()))}
    for option in used:
        assert f'"{option}"' in text, option


def test_lines_that_start_services_use_options_that_exist(wheel):
    """Servers, routers and benchmarks, with prompts and decoding apart and together."""
    one = {
        "tp": 2, "dp": 8, "ep": 16, "moe_tp": 1, "kv_dtype": "fp8", "max_batch_tokens": 8192,
        "max_sequences": 256, "memory_fraction": 0.9, "gpus_per_node": 8,
        "two_batch_overlap": "both", "redundant_experts": 16,
    }  # fmt: skip
    apart = [
        Role("prefill", 2, moe_comm="deepep", **one),
        Role("decode", 1, moe_comm="deepep_ll", **one),
    ]
    known = {
        vllm_launch: ("vllm", "0.33.0", ("engine/arg_utils.py", "entrypoints", "benchmarks")),
        sglang_launch: ("sglang", "0.5.23", ("srt/arg_groups", "srt/server_args.py", "benchmark")),
    }
    for module, (name, version, parts) in known.items():
        root = wheel(name, version) / name
        router = wheel(f"{name}-router", {"vllm": "0.1.17", "sglang": "0.3.2"}[name])
        files = [
            file for part in parts for file in sorted([root / part, *(root / part).rglob("*.py")])
        ]
        text = "".join(file.read_text() for file in files if file.is_file())
        front = "".join(file.read_text() for file in router.rglob("router_args.py"))
        front += "".join(file.read_text() for file in router.rglob("launch_router.py"))
        staged = [Role("serving", 3, moe_comm="all_gather", pp=2, **one)]
        for roles in (apart, [Role("serving", 3, moe_comm="all_gather", **one)], staged):
            written = module.files(Service("org/model", roles, 10.0, 1000.0, 100.0, 256, drafts=1))
            for file, lines in written.items():
                for option in words(lines.replace("\\\n", " ").splitlines()):
                    bare = option.removeprefix("--")
                    said = front if file == "router.sh" else text
                    found = (f'"{option}"', f'"{bare.replace("-", "_")}"', f'}}{bare}"')
                    field = f"    {bare.replace('-', '_')}: A["
                    assert any(f in said for f in (*found, field)), (file, option)


def linear() -> Plan:
    return Plan("", (0,), Placement(np.arange(8, dtype=np.int32)[None], 4, 1, 8))


def test_vllm_derives_the_same_inverse(wheel, plan):
    """compute_logical_maps on our EPLB tensors."""
    path = wheel("vllm", "0.33.0") / "vllm" / "distributed" / "eplb" / "eplb_state.py"
    maps = definitions(path, {"compute_logical_maps"}, {})["compute_logical_maps"]
    raw = np.load(io.BytesIO(eplb.encode(plan, ExportOptions())))
    inverse, count = maps(torch.tensor(raw["physical_to_logical"]), 8)
    np.testing.assert_array_equal(inverse.numpy(), raw["logical_to_physical"])
    np.testing.assert_array_equal(count.numpy(), raw["replica_count"])


def test_vllm_encodes_what_we_decode(wheel, tmp_path):
    """numpy2base64 of a captured array, through our importer."""
    path = wheel("vllm", "0.33.0") / "vllm" / "utils" / "serial_utils.py"
    encode = definitions(path, {"numpy2base64"}, {"io": io, "pybase64": base64})["numpy2base64"]
    ids = np.random.default_rng(0).random((7, 3, 8)).argsort(axis=2)[:, :, :2]
    file = tmp_path / "r.jsonl"
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    for dtype in (np.uint8, np.uint16):
        choice = {"routed_experts": encode(ids.astype(dtype))}
        file.write_text(json.dumps({"choices": [choice], "usage": usage}))
        trace = vllm_import.read([file], ImportOptions(num_experts=8))
        np.testing.assert_array_equal(trace.expert_ids, ids)


def test_vllm_pull_request_loads_our_record(tmp_path, plan):
    path = source("vllm-pr41141", "eplb_state.py")
    loader = definitions(path, {"EplbState"}, {"logger": Log()})["EplbState"]
    state = object.__new__(loader)
    state.device = torch.device("cpu")
    file = tmp_path / "m.jsonl"
    file.write_bytes(vllm_pr41141.encode(plan, ExportOptions()))
    table, inverse, count = state._load_initial_mapping(str(file), 2, 12, 8, 4, 5)
    np.testing.assert_array_equal(table.numpy(), plan.placement.physical_to_logical)
    np.testing.assert_array_equal(count.numpy(), plan.placement.replica_count)
    ours = plan.placement.logical_to_physical()
    np.testing.assert_array_equal(inverse.numpy()[:, :, : ours.shape[2]], ours)


def test_vllm_ascend_loads_our_map(wheel, monkeypatch, tmp_path, plan):
    """init_eplb_config for every layer and rank: slots and redundancy are the plan's."""
    root = wheel("vllm-ascend", "0.23.0", "3.12")
    path = root / "vllm_ascend" / "eplb" / "core" / "eplb_utils.py"
    stand_in(monkeypatch, "vllm.logger", logger=Log())
    stand_in(
        monkeypatch,
        "vllm.model_executor.layers.fused_moe.expert_map_manager",
        determine_expert_map=None,
    )
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)
    module = load_module(monkeypatch, path, "ascend_eplb_utils")
    file = tmp_path / "map.json"
    file.write_bytes(vllm_ascend.encode(plan, ExportOptions()))
    config = SimpleNamespace(expert_map_path=str(file), dynamic_eplb=False, num_redundant_experts=0)
    for layer in range(2):
        slots = plan.placement.physical_to_logical[layer].reshape(4, 3)
        placed, physical = module.expert_file_to_tensor(str(file), layer)
        np.testing.assert_array_equal(placed.numpy(), slots)
        assert physical == 12
        for rank in range(4):
            moe = SimpleNamespace(num_experts=8, ep_size=4, ep_rank=rank)
            every, local, log2phy, redundant = module.init_eplb_config(config, layer, moe)
            assert redundant == 4
            assert every.shape == (4, 8)
            for place, expert in enumerate(slots[rank]):
                assert int(local[expert]) == place
            flat = slots.reshape(-1)
            assert [int(flat[slot]) for slot in log2phy] == list(range(8))


def test_tensorrt_llm_takes_our_config(tmp_path, plan):
    """MoeLoadBalancerConfig from our YAML, and the checks that its layers make."""
    path = source("tensorrt-llm", "llm_args.py")
    import pydantic

    class StrictBaseModel(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

    config = definitions(
        path,
        {"MoeLoadBalancerConfig"},
        {
            "StrictBaseModel": StrictBaseModel,
            "Field": pydantic.Field,
            "PrivateAttr": pydantic.PrivateAttr,
            "Optional": Optional,
            "Dict": dict,
            "List": list,
        },
    )
    kind = config["MoeLoadBalancerConfig"]
    kind.model_rebuild(_types_namespace=config)
    file = tmp_path / "balancer.yaml"
    file.write_bytes(tensorrt_llm.encode(plan, ExportOptions()))
    balancer = kind(**yaml.safe_load(file.read_text()))
    for rank in range(4):
        balancer.setup(ep_rank=rank, ep_size=4)
        assert (balancer.slot_start, balancer.slot_end) == (3 * rank, 3 * rank + 3)
        for row, layer in enumerate((1, 3)):
            found = balancer.get_layer_initial_global_assignments(layer)
            assert set(found) == set(range(8))
            assert found == plan.placement.physical_to_logical[row].tolist()


def test_tensorrt_llm_statistics_as_it_writes_them(monkeypatch, tmp_path):
    """Its recorder on two ranks, three iterations and two layers; we read the counts back."""
    path = source("tensorrt-llm", "expert_statistic.py")
    pytest.importorskip("safetensors.torch", reason="TensorRT-LLM writes with safetensors")
    folder = tmp_path / "statistic"
    values = {"EXPERT_STATISTIC_ITER_RANGE": "10-12", "EXPERT_STATISTIC_PATH": str(folder)}
    stand_in(monkeypatch, "tensorrt_llm.logger", logger=Log())
    sys.modules["tensorrt_llm"].envs = SimpleNamespace(get_env=values.get)
    module = load_module(monkeypatch, path, "trt_expert_statistic")
    expected = np.zeros((2, 2, 8), np.int64)
    rng = np.random.default_rng(0)
    for rank in range(2):
        module.ExpertStatistic.expert_statistic_obj = None
        module.ExpertStatistic.create(rank)
        for iteration in range(9, 13):
            module.ExpertStatistic.set_iter(iteration)
            for layer in (3, 4):
                ids = rng.random((5, 8)).argsort(axis=1)[:, :2]
                module.ExpertStatistic.set_layer(layer)
                module.ExpertStatistic.maybe_add_info(8, torch.tensor(ids))
                if 10 <= iteration < 12:
                    np.add.at(expected[iteration - 10, layer - 3], ids.reshape(-1), 1)
    load = trtllm.read([folder], ImportOptions())
    np.testing.assert_array_equal(load.expert_load, expected)
    assert load.meta.layer_ids == (3, 4)


def test_eplb_results_are_read(monkeypatch):
    """rebalance_experts of its README's example; its order of replicas is arbitrary."""
    module = load_module(monkeypatch, source("eplb", "eplb.py"), "eplb_original")
    weight = torch.tensor(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    tables = [t.numpy() for t in module.rebalance_experts(weight, 16, 4, 2, 8)]
    out = io.BytesIO()
    np.savez(out, **dict(zip(eplb.ARRAYS, tables, strict=True)))
    plan = eplb.decode(out.getvalue(), ReadOptions("t.npz", num_gpus=8, num_nodes=2))
    assert plan.placement.physical_to_logical[0].tolist() == [
        5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1
    ]  # fmt: skip


def test_omni_infer_loads_our_pattern(monkeypatch, tmp_path, plan):
    """Its own validation, and the place of each expert on its device."""
    path = source("omni-infer", "expert_mapping.py")
    mapping = SimpleNamespace(PlacementMapping=lambda *args: None)
    stand_in(monkeypatch, "omni_planner.config", Config=object)
    sys.modules["omni_planner"].omni_placement = mapping
    module = load_module(monkeypatch, path, "omni_expert_mapping")
    file = tmp_path / "pattern.npy"
    file.write_bytes(omni_infer.encode(plan, ExportOptions()))
    settings = {"pattern_path": str(file)}
    config = SimpleNamespace(
        max_moe_layer_num=2, getattr=lambda name, default: settings.get(name, default)
    )
    loaded = module.ExpertMapping(config, "cpu", 0, 4, 2, False, 8)
    assert loaded.get_deployed_experts_per_layer() == [12, 12]
    slots = omni_infer.decode(file.read_bytes(), ReadOptions("p")).placement.physical_to_logical
    for layer in range(2):
        for gpu in range(4):
            for place, expert in enumerate(slots[layer].reshape(4, 3)[gpu]):
                exists, position = loaded.is_expert_on_current_rank(layer, int(expert), gpu, 2)
                assert exists
                assert position == place


def test_megatron_records_what_we_read(wheel, monkeypatch, tmp_path):
    """RouterReplay of megatron-core records two layers; the saved list comes back."""
    root = wheel("megatron-core", "0.16.1")
    path = root / "megatron" / "core" / "transformer" / "moe" / "router_replay.py"
    module = load_module(monkeypatch, path, "megatron_router_replay")
    routers = [module.RouterReplay() for _ in range(2)]
    module.RouterReplay.set_global_router_replay_action(module.RouterReplayAction.RECORD)
    rng = np.random.default_rng(0)
    expected = []
    for router in routers:
        scores = torch.tensor(rng.random((6, 8)))
        _, ids = router.get_replay_topk(
            scores, 2, None, None, lambda s, k, num_groups, group_topk: torch.topk(s, k, dim=1)
        )
        expected.append(ids.numpy())
    file = tmp_path / "replay.pt"
    torch.save(module.RouterReplay.get_recorded_data(), file)
    trace = megatron.read([file], ImportOptions(num_experts=8))
    np.testing.assert_array_equal(trace.expert_ids, np.stack(expected, axis=1))
