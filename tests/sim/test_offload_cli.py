"""`moesim simulate` with cache plans, from outside: figures, files, and what cannot be combined."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.caching.group import plan_group
from moesim.caching.workload import Request
from moesim.cli.main import run
from moesim.cluster import load_cluster
from moesim.jobs.cache import CacheOptions, run_cache
from moesim.model.names import load_model
from moesim.placement import Placement, Plan
from moesim.trace.format import load_token_trace

Run = Callable[..., tuple[int, str, str]]
SAMPLE = "sample:debian-moe"


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory) -> Path:
    """A cache plan for one H100 with 1.5 GB, made from 48 decode steps of two requests."""
    options = CacheOptions(
        machine="h100-sxm", hbm_gb=1.6, policy="lru", prefetch="previous-layer", cpu="on",
        max_steps=48, batch_size=2,
    )  # fmt: skip
    job = run_cache(load_token_trace(SAMPLE, "a test"), options)
    path = tmp_path_factory.mktemp("cache") / "cache.json"
    job.plan.save(path)
    return path


@pytest.fixture(scope="module")
def group_file(tmp_path_factory) -> Path:
    """Experts on two L40S behind one PCIe switch, each with a cache of its own."""
    trace = load_token_trace(SAMPLE, "a test")
    cluster = load_cluster("l40s-pcie", 2)
    table = np.tile(np.arange(64, dtype=np.int32), (12, 1))
    placement = Placement(table, 2, 1, 64)
    asked = Request(1.4, batch_size=2, policy="lfu", prefetch="none", cpu="off", max_steps=32)
    group = plan_group(trace, placement, load_model("debian-moe"), tuple(cluster.gpus), asked)
    path = tmp_path_factory.mktemp("group") / "plan.json"
    Plan(
        "debian-moe", tuple(range(12)), placement, cache=group.to_dict(),
        provenance={"cluster": "l40s-pcie"},
    ).save(path)  # fmt: skip
    return path


@pytest.fixture
def call(capfd) -> Run:
    def go(*args: str) -> tuple[int, str, str]:
        code = run(["simulate", "--trace", SAMPLE, *args])
        out, err = capfd.readouterr()
        return code, out, err

    return go


def test_inv8_the_cache_plans_own_prediction(call, cache_file) -> None:
    """INV-8 through files: over the steps that the cache plan was held out on, the event simulation
    has its tokens per second and hit rate."""
    code, out, _ = call("--plan", str(cache_file), "--steps", "400", "--json")
    assert code == 0
    data = json.loads(out)
    predicted = json.loads(cache_file.read_text())["predicted"]
    found = data["plans"]["plan"]
    tokens = found["num_steps"] * found["tokens_per_step"]
    assert tokens == pytest.approx(predicted["num_tokens"])
    assert found["tokens_per_s"] == pytest.approx(predicted["tokens_per_s"], rel=1e-9)
    assert found["offload"]["hit_rate"] == pytest.approx(predicted["hit_rate"], rel=1e-12)
    moved = found["offload"]["bytes_to_hbm_per_token"]
    assert moved == pytest.approx(predicted["bytes_per_token"], rel=0.01)
    assert data["cache_plan_predicted"]["tokens_per_s"] == predicted["tokens_per_s"]
    assert data["basis"] == "assumed"


def test_compared_with_all_in_memory(call, cache_file) -> None:
    code, out, _ = call(
        "--plan", str(cache_file), "--steps", "16", "--compare", "resident,static", "--json"
    )
    assert code == 0
    plans = json.loads(out)["plans"]
    assert list(plans) == ["plan", "resident", "static"]
    resident = plans["resident"]
    assert resident["offload"]["hit_rate"] == 1.0
    assert resident["offload"]["stall_us"] == resident["offload"]["bytes_to_hbm"] == 0
    assert resident["step_us"]["mean"] < plans["plan"]["step_us"]["mean"]
    for result in plans.values():
        assert sum(result["breakdown_us"].values()) == pytest.approx(result["step_us"]["mean"])
        waiting = result["breakdown_us"]["waiting"]
        assert result["offload"]["stall_us"] == pytest.approx(waiting, abs=1e-6)


def test_a_shared_switch_slows_two_gpus(call, group_file, tmp_path) -> None:
    """The same two caches behind one switch and, on H100, behind one branch each: the uplink is the
    busiest link of the first."""
    line = tmp_path / "line.json"
    code, out, err = call(
        "--plan", str(group_file), "--steps", "8", "--json", "--timeline", str(line)
    )
    assert code == 0
    assert "perfetto" in err
    found = json.loads(out)["plans"]["plan"]
    assert found["busiest_links"][0]["link"] == "host:0->pcie:0:0"
    assert len(found["offload"]["hit_rate_by_gpu"]) == 2
    assert found["breakdown_us"]["dispatch"] > 0
    code, _, err = call("--plan", str(group_file), "--cluster", "h100-sxm-ib", "--steps", "2")
    assert code == 0
    assert "made for l40s, this is h100-sxm" in err
    events = json.loads(line.read_text())["traceEvents"]
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"compute", "comm", "host copies", "dram:0->host:0"} <= threads


def test_the_caches_of_a_plan_may_be_left_out(call, group_file) -> None:
    code, out, _ = call(
        "--plan", str(group_file), "--no-offload", "--compare", "eplb", "--steps", "2", "--json"
    )
    assert code == 0
    plans = json.loads(out)["plans"]
    assert list(plans) == ["plan", "eplb"]
    assert "offload" not in plans["plan"]


def test_batches_by_shared_experts(call, cache_file) -> None:
    """Fewer experts per layer, faster steps, and requests that wait longer at worst."""
    found = {}
    for order in ("fifo", "pre-gated"):
        code, out, _ = call(
            "--plan", str(cache_file), "--steps", "40", "--batch-tokens", "4", "--batching", order,
            "--pool", "16", "--json",
        )  # fmt: skip
        assert code == 0
        found[order] = json.loads(out)["plans"]["plan"]
    fifo, grouped = (found[o]["batching"] for o in ("fifo", "pre-gated"))
    assert grouped["experts_per_layer_and_step"] < 0.95 * fifo["experts_per_layer_and_step"]
    assert found["pre-gated"]["tokens_per_s"] > found["fifo"]["tokens_per_s"]
    assert grouped["wait_ms"]["max"] > fifo["wait_ms"]["max"]


def test_table(call, cache_file) -> None:
    code, out, err = call("--plan", str(cache_file), "--steps", "8")
    assert code == 0
    for text in ("on 1 GPU of 1 node", "in GPU memory", "prefetched", "MB from DRAM", "predicted"):
        assert text in out
    assert "no decode tokens" in err


@pytest.mark.parametrize("args", [["--compare", "resident"], ["--batching", "predicted"]])
def test_inv6_same_bytes(call, cache_file, tmp_path, args) -> None:
    """INV-6."""
    outs = []
    for name in "ab":
        line = tmp_path / f"{name}.json"
        code, out, _ = call(
            "--plan", str(cache_file), "--steps", "6", "--json", "--timeline", str(line), *args
        )
        assert code == 0
        outs.append((out, line.read_bytes()))
    assert outs[0] == outs[1]


WRONG = [
    (["--gpus", "4"], "plans for 1 GPU, 4 GPUs"),
    (["--model", "deepseek-v2-lite"], "same model"),
    (["--phase", "prefill"], "--no-offload"),
    (["--schedule", "two-batch"], "--no-offload"),
    (["--fidelity", "analytic"], "--no-offload"),
    (["--fault", "gpu:0@1"], "faults"),
    (["--rebalance-every", "2"], "rebalancing"),
    (["--compare", "eplb"], "resident"),
    (["--compare", "belady"], "resident"),
    (["--no-offload"], "nothing but a cache plan"),
    (["--batching", "pregated"], "did you mean 'pre-gated'"),
    (["--pool", "8"], "--batching"),
    (["--batching", "fifo", "--pool", "2", "--batch-tokens", "4"], "larger --pool"),
    (["--batch-tokens", "0"], "greater than or equal to 1"),
    (["--steps", "0"], "at least 1"),
]


@pytest.mark.parametrize(("args", "text"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list)
                         else None)  # fmt: skip
def test_wrong_input(call, cache_file, args, text) -> None:
    """Two lines on stderr, nothing on stdout, exit code 2."""
    code, out, err = call("--plan", str(cache_file), "--steps", "2", *args)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_batching_without_a_cache(call) -> None:
    code, out, err = call("--gpus", "8", "--batching", "fifo")
    assert (code, out) == (2, "")
    assert "there is none" in err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "x"), ("max_steps", -1), ("host", {"name": "x"}), ("host", {"cpu_us": "1"}),
        ("host", {"nvme_gb_per_s": 0}), ("expert_dtype", "float13"), ("expert_dtype", 4),
    ],
)  # fmt: skip
def test_hostile_provenance(call, cache_file, tmp_path, field, value) -> None:
    raw = json.loads(cache_file.read_text())
    raw["provenance"][field] = value
    (tmp_path / "c.json").write_text(json.dumps(raw))
    code, out, err = call("--plan", str(tmp_path / "c.json"), "--steps", "1")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "internal" not in err


def test_other_gpu_and_nvme(call, cache_file, tmp_path) -> None:
    """A GPU that no bundled cluster has; experts on NVMe, which then carries bytes."""
    raw = json.loads(cache_file.read_text())
    (tmp_path / "gpu.json").write_text(json.dumps(raw | {"gpu": "rtx-9"}))
    code, _, err = call("--plan", str(tmp_path / "gpu.json"))
    assert code == 2
    assert "--cluster" in err
    far = raw | {"nvme": [list(range(32))] * 12}
    (tmp_path / "far.json").write_text(json.dumps(far))
    code, out, _ = call("--plan", str(tmp_path / "far.json"), "--steps", "4", "--json")
    assert code == 0
    found = json.loads(out)["plans"]["plan"]
    assert found["offload"]["bytes_from_nvme"] > 0
    assert found["bytes_by_link_class"]["nvme"] > 0
