"""`moesim simulate` from outside: output, files, determinism, wrong input; INV-5, INV-6, INV-9."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.main import run
from moesim.cluster import find_cluster_file, load_cluster
from moesim.model.names import load_model
from moesim.placement import Placement, Plan
from moesim.sim.collectives.registry import build_exchange
from moesim.sim.event import run_event
from moesim.sim.home import HomeModel
from moesim.sim.prepare import Models, one_batch
from moesim.sim.schedules.sequential import Sequential
from moesim.sim.steps import step_work
from moesim.sim.timeline import StepTimeline
from moesim.trace.format import save_trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace_file(tmp_path: Path, trace) -> Path:
    save_trace(trace, tmp_path / "t.npz")
    return tmp_path / "t.npz"


@pytest.fixture
def call(capfd, trace_file) -> Run:
    """Run `moesim simulate` on the toy trace: (exit code, stdout, stderr)."""

    def go(*args: str, trace: str | None = None) -> tuple[int, str, str]:
        code = run(["simulate", "--trace", trace or str(trace_file), *args])
        out, err = capfd.readouterr()
        return code, out, err

    return go


def plan_file(path: Path, gpus: int = 8, *, layers: int = 3, experts: int = 64, **more) -> Path:
    table = np.tile(np.arange(experts, dtype=np.int32)[::-1], (layers, 1))
    placement = Placement(np.ascontiguousarray(table), gpus, max(1, gpus // 8), experts)
    Plan("debian-moe", tuple(range(layers)), placement, **more).save(path)
    return path


def test_json_adds_up(call, tmp_path) -> None:
    """Parts add up to the step, plans are compared on the same batches, and stdout is JSON only."""
    plan = plan_file(tmp_path / "p.json")
    code, out, _ = call("--plan", str(plan), "--compare", "linear,eplb", "--steps", "3", "--json")
    assert code == 0
    data = json.loads(out)
    assert list(data["plans"]) == ["plan", "linear", "eplb"]
    assert data["phase"] == "decode"
    assert data["batch_tokens"] == 256
    assert data["basis"] in ("measured", "datasheet", "assumed")
    for result in data["plans"].values():
        mean = result["step_us"]["mean"]
        assert sum(result["breakdown_us"].values()) == pytest.approx(mean)
        assert result["tokens_per_s"] == pytest.approx(256 / mean * 1e6)
        assert len(result["gpu_busy"]) == 8
        assert result["busiest_links"][0]["busy"] <= 1
    assert data["plans"]["plan"]["relative_step"] == 1
    assert data["plans"]["eplb"]["balancedness"] > data["plans"]["linear"]["balancedness"]


def test_fidelities_agree(call) -> None:
    """INV-8 through the command line."""
    both = {}
    for fidelity in ("event", "analytic"):
        _, out, _ = call("--gpus", "16", "--steps", "2", "--fidelity", fidelity, "--json")
        both[fidelity] = json.loads(out)["plans"]["linear"]
    event, closed = both["event"], both["analytic"]
    assert event["step_us"]["mean"] == pytest.approx(closed["step_us"]["mean"], rel=1e-12)
    assert event["bytes_by_link_class"] == pytest.approx(closed["bytes_by_link_class"])
    for name, value in closed["breakdown_us"].items():
        assert event["breakdown_us"][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "args",
    [
        ["--schedule", "two-batch"],
        ["--slow", "3=0.5", "--speed-spread", "0.1", "--speed-period", "0.2"],
        ["--capacity-factor", "1.0", "--drop", "random"],
        ["--fault", "gpu:2@0.2-1", "--detect", "0.1", "--restart", "0.5"],
        ["--mtbf", "30", "--repair", "1", "--detect", "0.1", "--restart", "0.1"],
        ["--rebalance-every", "1", "--rebalance-window", "2", "--rebalance-async"],
    ],
    ids=lambda a: a[0],
)
def test_same_seed_same_bytes(call, tmp_path, args) -> None:
    """INV-6: output and timeline, byte for byte."""
    outs = []
    for name in ("a", "b"):
        line = tmp_path / f"{name}.json"
        code, out, _ = call(
            "--gpus", "8", "--steps", "3", "--json", "--timeline", str(line), "--seed", "3", *args
        )
        assert code == 0
        outs.append((out, line.read_bytes()))
    assert outs[0] == outs[1]


def test_table(call) -> None:
    code, out, err = call("--gpus", "8", "--steps", "2", "--fault", "gpu:1@0.1", "--restart", "1")
    assert code == 0
    for text in ("step, mean", "waiting", "GPU 0", "busiest links", "available", "gpu:1 at 0.1"):
        assert text in out
    assert "defaults taken" in out
    assert "covers 3 of debian-moe's 12" in err


def test_compare_with_solvers_that_need_tokens(call) -> None:
    """They see tuning tokens, and a notice says which schedule they are made for, unless it is the
    one simulated."""
    asked = ("--gpus", "8", "--all-to-all", "nccl", "--compare", "exflow", "--steps", "2")
    code, out, err = call(*asked, "--json")
    assert code == 0
    assert list(json.loads(out)["plans"]) == ["linear", "exflow"]
    assert "exflow is made for --schedule context-coherent, this is sequential" in err
    code, _, err = call(*asked, "--schedule", "context-coherent")
    assert code == 0
    assert "made for" not in err


def test_solvers_that_need_tokens_where_there_are_counts(call) -> None:
    code, _, err = call("--gpus", "8", "--rebalance-every", "1", "--rebalance-solver", "exflow")
    assert code == 2
    assert "greedy or local_search" in err
    assert "objective`" not in err


def test_timeline_is_a_chrome_trace(call, tmp_path) -> None:
    """Rows for GPU streams and links; slices of one row never overlap, and cover the step."""
    line = tmp_path / "line.json"
    code, out, err = call("--gpus", "8", "--steps", "2", "--timeline", str(line), "--json")
    assert code == 0
    assert "perfetto" in err
    data = json.loads(line.read_text())
    events = data["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"GPU 0", "GPU 7", "links", "compute", "comm", "gpu:0->nvswitch:0"} <= names
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            rows.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
    for spans in rows.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1e-6
    last = max(end for spans in rows.values() for _, end in spans)
    steps = json.loads(out)["plans"]["linear"]["step_us"]
    assert 0.9 * steps["mean"] < last < 1.1 * steps["mean"]


def test_timeline_shows_the_first_steps_only(trace, batches, models_of, linear_of) -> None:
    models = models_of(8)
    line = StepTimeline(models.links, 8, 2)
    run_event(models, Sequential(), trace, batches, linear_of(models), timeline=line)
    assert {e["args"]["step"] for e in line.events if "step" in e.get("args", {})} == {0, 1}


WRONG = [
    pytest.param(["--gpus", "9"], "not a whole number", id="size"),
    pytest.param(["--gpus", "128"], "some would hold none", id="more GPUs than experts"),
    pytest.param(["--schedule", "pipelned"], "did you mean 'pipelined'", id="schedule"),
    pytest.param(["--all-to-all", "deepp"], "did you mean 'deepep'", id="all-to-all"),
    pytest.param(["--compare", "eplbb"], "did you mean 'eplb'", id="solver"),
    pytest.param(["--cluster", "h100"], "h100-sxm-ib", id="cluster"),
    pytest.param(["--model", "DeepSeek-V3"], "name the model", id="model"),
    pytest.param(["--fidelity", "exact"], "analytic", id="fidelity"),
    pytest.param(["--batch-tokens", "0"], "greater than or equal to 1", id="no tokens"),
    pytest.param(["--steps", "0"], "at least 1", id="no steps"),
    pytest.param(["--fidelity", "analytic", "--slow", "1=0.5"], "event", id="slow analytic"),
    pytest.param(["--fidelity", "analytic", "--schedule", "two-batch"], "event", id="analytic"),
    pytest.param(["--fidelity", "analytic", "--fault", "gpu:1@1"], "event", id="fault analytic"),
    pytest.param(["--slow", "99=0.5"], "0 to 7", id="no such GPU"),
    pytest.param(["--fault", "gpu:99@5"], "0 to 7", id="no such GPU to fail"),
    pytest.param(["--fault", "link:x@5"], "known", id="no such link"),
    pytest.param(["--drop", "first"], "--capacity-factor", id="drop without capacity"),
    pytest.param(["--capacity-factor", "-1"], "above 0", id="capacity"),
    pytest.param(["--chunks", "2"], "pipelined", id="chunks"),
    pytest.param(["--schedule", "pipelined", "--chunks", "0"], "1 to 64", id="no chunks"),
    pytest.param(["--repair", "5"], "mean time between", id="repair"),
    pytest.param(["--mtbf", "-1"], "above 0", id="mtbf"),
    pytest.param(["--rebalance-async"], "--rebalance-every", id="rebalance"),
    pytest.param(["--drift"], "--drift", id="no domains"),
    pytest.param(["--timeline", "/nowhere/x.json"], "folder that exists", id="timeline"),
    pytest.param(["--plan", "/nowhere.json"], "moesim plan", id="no plan"),
]


@pytest.mark.parametrize(("args", "remedy"), WRONG)
def test_wrong_input(call, args, remedy) -> None:
    """Two lines on stderr, nothing on stdout, exit code 2."""
    size = [] if "--gpus" in args else ["--gpus", "8"]
    code, out, err = call(*size, "--steps", "2", *args)
    assert code == 2
    assert out == ""
    assert remedy in err
    assert "Traceback" not in err


def test_plans_that_do_not_fit(call, tmp_path) -> None:
    """Another number of GPUs, layers, experts or model: cause and remedy."""
    cases = [
        (plan_file(tmp_path / "a.json", 16), ["--gpus", "8"], "plan is for 16 GPUs"),
        (plan_file(tmp_path / "b.json", layers=2), [], "the plan 2 of 64"),
        (plan_file(tmp_path / "c.json", experts=32), [], "plan 3 of 32"),
    ]
    for plan, args, cause in cases:
        code, out, err = call("--plan", str(plan), "--steps", "1", *args)
        assert (code, out) == (2, "")
        assert cause in err
    layers = json.loads(plan_file(tmp_path / "e.json").read_text())
    layers["layer_ids"][2] += 1
    (tmp_path / "e.json").write_text(json.dumps(layers))
    code, _, err = call("--plan", str(tmp_path / "e.json"))
    assert code == 2
    assert "layer 3 in the plan, 2 in the trace" in err
    other = json.loads((tmp_path / "b.json").read_text())
    other["model"] = "OLMoE-1B-7B"
    (tmp_path / "d.json").write_text(json.dumps(other))
    code, _, err = call("--plan", str(tmp_path / "d.json"), "--model", "debian-moe")
    assert code == 2
    assert "same model" in err


def test_a_fault_that_leaves_an_expert_nowhere_is_a_verdict(call) -> None:
    code, out, err = call("--gpus", "8", "--fault", "gpu:0@0.1", "--on-loss", "fail")
    assert (code, out) == (1, "")
    assert "expert 0 of layer 0 is on no GPU" in err
    assert "redundant" in err


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(("nvlink_us: 0.4", "nvlink_us: -1"), "nvlink_us", id="negative latency"),
        pytest.param(("      gb_per_s: 50\n", "      gb_per_s: 0\n"), "gb_per_s", id="no rate"),
        pytest.param(("num_spines: 4", "num_spines: 0"), "spine", id="no spine"),
        pytest.param(("  - count: 2", "  - count: nan"), "count", id="not a number"),
    ],
)
def test_clusters_that_cannot_be(call, tmp_path, change, cause) -> None:
    text = find_cluster_file("h100-sxm-ib").read_text()
    assert change[0] in text
    text = text.replace(*change)
    if "num_spines" in change[0]:
        text = text.replace("rail_forwarding: nvlink", "rail_forwarding: none")
    file = tmp_path / "c.yaml"
    file.write_text(text)
    code, out, err = call("--cluster", str(file), "--gpus", "16")
    assert (code, out) == (2, "")
    assert cause in err


def test_hostile_traces(call, tmp_path) -> None:
    for name, content in (("empty.npz", b""), ("text.npz", b"hello"), ("cut.npz", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        code, out, err = call("--gpus", "8", trace=str(tmp_path / name))
        assert (code, out) == (2, "")
        assert "Traceback" not in err
    counts = tmp_path / "counts.npz"
    meta = (
        '{"format": "moesim-trace", "version": 1, "num_experts": 4, "top_k": 1, "layer_ids": [0]}'
    )
    np.savez(counts, meta=np.array(meta), expert_load=np.ones((2, 1, 4), np.int64))
    code, _, err = call("--gpus", "4", trace=str(counts))
    assert code == 2
    assert "token-level" in err


def models_on(cluster, all_to_all: str = "nccl") -> Models:
    model = load_model("debian-moe")
    step, links, exchange = build_exchange(all_to_all, cluster, model, phase="decode")
    return Models(cluster, step, links, exchange, HomeModel(cluster, model, (0, 1, 2)))


def step_us(models: Models, trace, batch, placement, home) -> float:
    from moesim.sim.engine import Engine
    from moesim.sim.event import run_step

    step = step_work(models, trace, batch, placement, Sequential(), home)
    return run_step(Engine(models.links.num_links), Sequential(), step.work).us


def test_relabelling_gpus(trace, batches) -> None:
    """INV-5: GPUs renamed within their nodes, and the two nodes swapped, with placement and homes
    renamed alike, cost the same. One GPU is slow, so that a mix-up would show."""
    cluster = load_cluster("h100-sxm-ib", 16).with_speed(3, 0.7)
    rng = np.random.default_rng(4)
    slots = rng.permuted(np.tile(np.arange(64, dtype=np.int32), (3, 1)), axis=1).reshape(3, 16, 4)
    batch = one_batch(batches, 0)
    home = rng.integers(0, 16, len(batch.token_idx)).astype(np.int32)
    base = step_us(
        models_on(cluster), trace, batch, Placement(slots.reshape(3, -1).copy(), 16, 2, 64), home
    )
    within = np.concatenate([rng.permutation(8), 8 + rng.permutation(8)])
    swapped = np.concatenate([np.arange(8, 16), np.arange(8)])
    for order in (within, swapped, within[swapped]):
        renamed = cluster.relabel(order)
        moved = Placement(np.ascontiguousarray(slots[:, order].reshape(3, -1)), 16, 2, 64)
        homes = np.argsort(order)[home].astype(np.int32)
        again = step_us(models_on(renamed), trace, batch, moved, homes)
        assert again == pytest.approx(base, rel=1e-12)


def test_more_is_never_slower(trace, batches, models_of, linear_of) -> None:
    """INV-9: a faster GPU, fewer tokens, or every link faster never make a step slower."""
    models, batch = models_of(8), one_batch(batches, 0)
    placement = linear_of(models)
    home = (np.arange(len(batch.token_idx)) % 8).astype(np.int32)
    base = step_us(models, trace, batch, placement, home)
    for gpu in range(8):
        faster = models_on(load_cluster("h100-sxm-ib", 8).with_speed(gpu, 2.0))
        assert step_us(faster, trace, batch, placement, home) <= base * (1 + 1e-12)
    for keep in (200, 100, 10, 1):
        fewer = dataclasses.replace(
            batch, token_idx=batch.token_idx[:keep], indptr=np.array([0, keep])
        )
        assert step_us(models, trace, fewer, placement, home[:keep]) <= base
