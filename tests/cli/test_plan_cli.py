"""`moesim plan` as a user meets it: outputs, JSON, files, and inputs that cannot work."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run
from moesim.figures import figure
from moesim.placement import load_plan
from moesim.trace.format import LoadTrace, Trace, TraceMeta, save_trace

NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 2
NUM_REQUESTS, REQUEST_TOKENS = 40, 12
Capture = pytest.CaptureFixture[str]


def make_trace(model: str = "tiny") -> Trace:
    """40 requests of 12 tokens; low expert numbers are chosen more often."""
    rng = np.random.default_rng(0)
    tokens = NUM_REQUESTS * REQUEST_TOKENS
    taste = rng.random((tokens, NUM_LAYERS, NUM_EXPERTS)) + 0.06 * np.arange(NUM_EXPERTS)
    request = np.repeat(np.arange(NUM_REQUESTS), REQUEST_TOKENS).astype(np.int32)
    return Trace(
        expert_ids=taste.argsort(axis=2)[:, :, :TOP_K].astype(np.uint8),
        request_ids=request,
        positions=np.tile(np.arange(REQUEST_TOKENS), NUM_REQUESTS).astype(np.int32),
        phases=np.zeros(tokens, np.uint8),
        meta=TraceMeta(model, NUM_EXPERTS, TOP_K, (3, 5), domains=("prose", "code")),
        domain_ids=(request % 2).astype(np.int16),
    )


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small trace, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.npz"
    save_trace(make_trace(), path)
    return path


def plan(trace: Path | str, *args: str, gpus: int = 2, batch_tokens: int = 48) -> int:
    """Run `moesim plan` with a batch size that the small trace fills."""
    size = ["--batch-tokens", str(batch_tokens)] if batch_tokens else []
    return run(["plan", "--trace", str(trace), "--gpus", str(gpus), *size, *args])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_least_command_prints_a_table_and_writes_a_plan(trace: Path, capsys: Capture) -> None:
    assert run(["plan", "--trace", str(trace), "--gpus", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(
        "defaults taken: phase: prefill (0% of the trace's tokens are decode)"
    )
    for stated in ("batch tokens: 4096", "objective: balance", "cluster: h100-sxm-ib"):
        assert stated in lines[0]
    assert lines[1] == (
        "tiny: 2 MoE layers, 8 experts in 8 slots on 2 GPUs of 1 node; objective balance"
    )
    assert lines[2].startswith("held-out: ")
    header = next(line for line in lines if line.startswith("held-out figure"))
    assert header.split()[2:] == ["linear", "eplb", "local_search"]
    assert any(line.startswith("local_search against eplb: imbalance ") for line in lines)
    assert lines[-1] == "wrote plan.json"
    assert "note: the model is not known" in err
    assert "4096 asked" in err  # the requests of the trace cannot fill such a batch
    made = load_plan("plan.json")
    assert made.placement.num_gpus == 2
    assert made.layer_ids == (3, 5)
    assert sorted(made.placement.physical_to_logical[1].tolist()) == list(range(8))
    assert made.solver == "local_search"


def test_json_alone_on_stdout_and_the_same_figures(trace: Path, capsys: Capture) -> None:
    """--json prints one JSON value; its figures are those of the table and of the plan file."""
    assert plan(trace, "--solver", "eplb", "--json", "--out", "a.json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"] == "a.json"
    assert shown["status"] == "feasible"
    assert shown["defaults"]["cluster"] == "h100-sxm-ib"
    assert shown["notices"] == [
        "the model is not known: planned for balance, without predicted times"
    ]
    stored = json.loads(Path("a.json").read_text())
    assert shown["evaluation"] == stored["evaluation"]
    assert stored["evaluation"]["held_out"] is True
    assert plan(trace, "--solver", "eplb", "--out", "b.json") == 0
    table = capsys.readouterr().out
    figures = shown["evaluation"]["plans"]["eplb"]
    for name in ("balancedness", "imbalance", "imbalance_p99", "fan_out", "step_us"):
        if name in figures:
            row = next(x for x in table.splitlines() if x.startswith(figure(name).heading))
            assert figure(name).text(figures[name]["value"]) in row
            assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]


def test_same_seed_same_bytes_but_for_the_run(trace: Path) -> None:
    """INV-6, through the file."""
    raw = []
    for name in ("a.json", "b.json"):
        assert plan(trace, "--seed", "3", "--out", name) == 0
        raw.append(json.loads(Path(name).read_text()))
        assert raw[-1]["provenance"].pop("run")["command"]
    assert json.dumps(raw[0]) == json.dumps(raw[1])
    assert raw[0]["provenance"]["options"]["seed"] == 3


def test_a_directory_trace_gives_the_same_plan(trace: Path) -> None:
    save_trace(make_trace(), "folder")
    for source, name in ((trace, "a.json"), ("folder", "b.json")):
        assert plan(source, "--solver", "greedy", "--out", name) == 0
    a, b = (json.loads(Path(n).read_text()) for n in ("a.json", "b.json"))
    assert a["placement"] == b["placement"]
    assert a["provenance"]["trace"] == b["provenance"]["trace"]


def test_a_known_model_brings_predicted_times(tmp_path: Path, capsys: Capture) -> None:
    """The trace names Mixtral-8x7B: the objective becomes time, and the basis is named."""
    save_trace(make_trace("Mixtral-8x7B"), tmp_path / "trace.npz")
    out = str(tmp_path / "plan.json")
    assert plan(tmp_path / "trace.npz", "--solver", "greedy", "--out", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["objective"] == "time"
    assert shown["basis"] in ("measured", "datasheet", "assumed")
    assert shown["notices"] == [
        "the trace covers 2 of Mixtral-8x7B's 32 MoE layers; figures are of those"
    ]
    figures = shown["evaluation"]["plans"]["greedy"]
    parts = sum(figures[f"{part}_us"]["value"] for part in ("dispatch", "compute", "combine"))
    assert figures["step_us"]["value"] == pytest.approx(parts)
    assert shown["improvement"]["step_us"]["value"] == pytest.approx(
        figures["step_us"]["value"] - shown["evaluation"]["plans"]["eplb"]["step_us"]["value"]
    )


def test_two_nodes_bring_node_figures(tmp_path: Path, capsys: Capture) -> None:
    """On one node the rows about nodes are left out; on two of eight GPUs they are there."""
    save_trace(make_trace("Mixtral-8x7B"), tmp_path / "trace.npz")
    out = str(tmp_path / "plan.json")
    common = ("--solver", "linear", "--out", out, "--redundant-experts", "8")
    assert plan(tmp_path / "trace.npz", *common, gpus=16) == 0
    shown = capsys.readouterr().out
    assert "nodes per token" in shown
    assert "inter-node traffic per token, KB" in shown
    assert "16 slots on 16 GPUs of 2 nodes" in shown
    assert plan(tmp_path / "trace.npz", *common, gpus=8) == 0
    assert "nodes per token" not in capsys.readouterr().out


def test_slots_and_redundant_experts(trace: Path) -> None:
    """8 experts + 4 redundant on 4 GPUs are 3 slots per GPU; --slots 3,5 leaves GPU 0 two empty.
    INV-2 in the written file: every expert in every layer, none twice on a GPU."""
    assert plan(trace, "--redundant-experts", "4", gpus=4) == 0
    placement = load_plan("plan.json").placement
    assert placement.slots_per_gpu == 3
    assert placement.replica_count.sum(axis=1).tolist() == [12, 12]
    for layer in json.loads(Path("plan.json").read_text())["placement"]["physical_to_logical"]:
        assert set(layer) == set(range(8))
        assert all(len(set(layer[3 * gpu : 3 * gpu + 3])) == 3 for gpu in range(4))
    assert plan(trace, "--solver", "greedy", "--slots", "3,5") == 0
    table = load_plan("plan.json").placement.physical_to_logical
    assert (table[:, 3:5] == -1).all()
    assert (np.delete(table, [3, 4], axis=1) >= 0).all()


def test_one_domain(trace: Path, capsys: Capture) -> None:
    assert plan(trace, "--domain", "code", "--solver", "linear", "--json") == 0
    one = json.loads(capsys.readouterr().out)["evaluation"]["num_requests"]
    assert plan(trace, "--solver", "linear", "--json") == 0
    both = json.loads(capsys.readouterr().out)["evaluation"]["num_requests"]
    assert 0 < one < both < NUM_REQUESTS


def test_decode_of_a_prefill_trace_says_so(trace: Path, capsys: Capture) -> None:
    assert plan(trace, "--phase", "decode", "--solver", "linear", batch_tokens=0) == 0
    out, err = capsys.readouterr()
    assert "batch tokens: 256" in out
    assert "note: the trace has no decode tokens" in err


def test_plot_is_a_picture(trace: Path, capsys: Capture) -> None:
    assert plan(trace, "--solver", "linear", "--plot", "load.png") == 0
    assert Path("load.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.splitlines()[-1] == "wrote plan.json and load.png"


def test_names_from_a_file_cannot_forge_lines(tmp_path: Path, capsys: Capture) -> None:
    """A model name with line breaks, escapes and markup stays on its line, as it is."""
    save_trace(make_trace("[bold]x[/]\x1b[31m\nerror: forged"), tmp_path / "t.npz")
    out = str(tmp_path / "plan.json")
    assert plan(tmp_path / "t.npz", "--solver", "linear", "--out", out) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\n[bold]x[/][31m error: forged: 2 MoE layers" in shown


def test_a_trace_cannot_name_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """meta.model may name a preset; as a path it is a name that is not known."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    for name in ("config.json", "./config.json", "/etc/passwd", "x" * 50_000):
        save_trace(make_trace(name), "t.npz")
        assert plan("t.npz", "--solver", "linear") == 0
        assert load_plan("plan.json").provenance["model"] is None


ERRORS: dict[str, tuple[list[str], int, str, str]] = {
    "more GPUs than experts": (
        ["--gpus", "16"],
        2,
        "16 GPUs for 8 experts",
        "at most 8 GPUs, or --redundant-experts 8",
    ),
    "experts do not divide": (
        ["--gpus", "3"],
        2,
        "8 slots do not divide over 3 GPUs",
        "--redundant-experts 1",
    ),
    "too few slots": (["--slots", "6"], 1, "8 experts do not fit 6 slots", "at least 8 slots"),
    "slots do not divide": (["--slots", "9"], 2, "9 slots do not divide", "--slots 10"),
    "an expert twice on a GPU": (["--slots", "18"], 1, "hold an expert twice", "fewer slots"),
    "slots of other GPUs": (["--slots", "8,8,8"], 2, "names 3 GPUs, there are 2", "every GPU"),
    "slots are not numbers": (["--slots", "a,b"], 2, "not a list of slot counts", "8,8,4"),
    "negative redundancy": (["--redundant-experts", "-8"], 2, "negative", "0 or more"),
    "huge redundancy": (["--redundant-experts", "1000000000"], 1, "expert twice", "fewer"),
    "too many GPUs": (["--gpus", "99999999"], 2, "99,999,999 GPUs", "65,536"),
    "no such node size": (
        ["--gpus", "12", "--redundant-experts", "4"],
        2,
        "12",
        "ask for 8 or 16 GPUs",
    ),
    "unknown solver": (["--solver", "eplbb"], 2, "unknown solver 'eplbb'", "mean 'eplb'?"),
    "unequal slots for eplb": (
        ["--solver", "eplb", "--slots", "3,5"],
        2,
        "same number of slots",
        "--solver greedy",
    ),
    "unknown objective": (["--objective", "tme"], 2, "unknown objective 'tme'", "mean 'time'?"),
    "unknown phase": (["--phase", "decod"], 2, "unknown phase", "mean 'decode'?"),
    "unknown domain": (["--domain", "prse"], 2, "unknown domain 'prse'", "mean 'prose'?"),
    "unknown cluster": (["--cluster", "h100-sxm-ibb"], 2, "unknown cluster", "mean 'h100-sxm-ib'"),
    "unknown model": (["--model", "Mixtral-8x7"], 2, "unknown model", "ixtral-8x7"),
    "unknown library": (["--all-to-all", "ncl"], 2, "all-to-all", "mean 'nccl'?"),
    "unknown replica policy": (["--replica-policy", "splt"], 2, "replica", "mean 'split'?"),
    "model of another shape": (
        ["--model", "OLMoE-1B-7B"],
        2,
        "8 experts, top-2",
        "--model",
    ),
    "time without a model": (["--objective", "time"], 2, "needs the model's sizes", "--model"),
    "a model too large": (
        ["--model", "Mixtral-8x7B", "--gpus", "1"],
        1,
        "needs 93",
        "more GPUs",
    ),
    "no time": (["--time-limit", "nan"], 2, "'nan' is no number", "--help"),
    "endless time": (["--time-limit", "inf"], 2, "'inf' is no number", "--help"),
    "negative time": (["--time-limit", "-1"], 2, "a time limit of", "such as 60"),
    "no folder": (["--out", "missing/plan.json"], 2, "no folder missing", "that exists"),
    "out is a folder": (["--out", "."], 2, "is a directory", "name a file"),
    "no folder for the plot": (["--plot", "missing/a.png"], 2, "no folder", "that exists"),
    "a plot of no kind": (["--plot", "a.exe"], 2, "cannot plot to a.exe", ".png"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_cause_and_remedy_and_write_nothing(
    name: str, trace: Path, capsys: Capture
) -> None:
    args, code, cause, remedy = ERRORS[name]
    before = contents(trace.parent)
    given = ["--gpus", "2", *args] if "--gpus" not in args else args
    assert run(["plan", "--trace", str(trace), "--batch-tokens", "48", *given]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert cause in lines[0]
    assert lines[1].startswith("remedy: ")
    assert remedy in lines[1]
    assert contents(trace.parent) == before


def test_a_failure_leaves_the_old_plan(trace: Path) -> None:
    Path("plan.json").write_text("old")
    assert plan(trace, "--solver", "eplb", "--slots", "3,5") == 2
    assert Path("plan.json").read_text() == "old"
    assert sorted(p.name for p in trace.parent.iterdir()) == ["plan.json", "trace.npz"]


@pytest.fixture
def load(trace: Path) -> Path:
    """Eight steps of counts; expert e gets 10 + 10 e tokens and a little noise."""
    drawn = np.random.default_rng(0).poisson(
        np.broadcast_to(10.0 + 10 * np.arange(NUM_EXPERTS), (8, NUM_LAYERS, NUM_EXPERTS))
    )
    path = trace.parent / "load.npz"
    save_trace(LoadTrace(drawn.astype(np.int64), make_trace().meta), path)
    return path


def test_a_load_trace_gives_a_plan_for_balance(load: Path, capsys: Capture) -> None:
    picture = load.parent / "load.png"
    assert plan(load, "--plot", str(picture), batch_tokens=0) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(
        "defaults taken: objective: balance (counts say nothing of messages)"
    )
    assert lines[2].startswith("held-out: 4 steps after those tuned on; ")
    assert not any(line.startswith(("GPUs per token", "MoE time", "predicted")) for line in lines)
    assert lines[-1] == f"wrote plan.json and {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    made = load_plan("plan.json")
    assert (made.objective, made.evaluation["num_steps"]) == ("balance", 4)
    figures = made.evaluation["plans"]
    assert figures["local_search"]["imbalance"]["value"] < figures["linear"]["imbalance"]["value"]


def test_one_step_of_counts_is_not_called_held_out(load: Path, capsys: Capture) -> None:
    meta = make_trace().meta
    save_trace(LoadTrace(np.ones((1, NUM_LAYERS, NUM_EXPERTS), np.int64), meta), "one.npz")
    assert plan("one.npz", batch_tokens=0) == 0
    out = capsys.readouterr().out
    assert "NOT held out: the trace has one step" in out
    assert "figure, not held out" in out
    assert load_plan("plan.json").evaluation["held_out"] is False


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--objective", "time"], "--objective time"),
        (["--phase", "decode"], "--phase decode"),
        (["--batch-tokens", "64"], "--batch-tokens 64"),
        (["--domain", "code"], "--domain code"),
        (["--replica-policy", "lp"], "--replica-policy lp"),
        (["--robust", "worst-domain"], "--robust"),
        (["--home-ranks", "oracle"], "--home-ranks oracle"),
        (["--offload"], "--offload"),
    ],
)
def test_a_load_trace_is_refused_by_name_what_needs_tokens(
    load: Path, capsys: Capture, option: list[str], words: str
) -> None:
    before = contents(load.parent)
    assert plan(load, *option, batch_tokens=0) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert f"{words} needs token-level routing" in cause
    assert "expert_ids" in remedy
    assert contents(load.parent) == before


class Payload:
    """Unpickling it creates a file, which must never happen."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.target),))


Arrays = dict[str, np.ndarray]


def changed_meta(arrays: Arrays, **values: Any) -> np.ndarray:
    return np.array(json.dumps({**json.loads(str(arrays["meta"])), **values}))


HOSTILE: dict[str, Callable[[Arrays], Arrays]] = {
    "no tokens": lambda a: {n: x if n == "meta" else x[:0] for n, x in a.items()},
    "id too large": lambda a: {**a, "expert_ids": a["expert_ids"] + 200},
    "an expert twice": lambda a: {**a, "expert_ids": np.zeros_like(a["expert_ids"])},
    "float ids": lambda a: {**a, "expert_ids": a["expert_ids"].astype(np.float32)},
    "layers missing": lambda a: {**a, "expert_ids": a["expert_ids"][:, :1]},
    "lengths differ": lambda a: {**a, "positions": a["positions"][:10]},
    "one request": lambda a: {**a, "request_ids": np.zeros_like(a["request_ids"])},
    "negative request": lambda a: {**a, "request_ids": a["request_ids"] - 5},
    "no such phase": lambda a: {**a, "phases": a["phases"] + np.uint8(7)},
    "NaN gates": lambda a: {**a, "gate_weights": np.full(a["expert_ids"].shape, np.nan, "f4")},
    "array missing": lambda a: {n: x for n, x in a.items() if n != "phases"},
    "meta missing": lambda a: {n: x for n, x in a.items() if n != "meta"},
    "meta not JSON": lambda a: {**a, "meta": np.array("{" * 100_000)},
    "other version": lambda a: {**a, "meta": changed_meta(a, version=2)},
    "huge expert count": lambda a: {**a, "meta": changed_meta(a, num_experts=10**18)},
    "top-k over experts": lambda a: {**a, "meta": changed_meta(a, top_k=99)},
    "domain without name": lambda a: {**a, "meta": changed_meta(a, domains=["one"])},
}


def assert_refused(source: str, folder: Path, capsys: Capture) -> None:
    before = contents(folder)
    assert plan(source) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[0] for line in err.splitlines()] == ["error", "remedy"]
    assert "internal" not in err
    assert contents(folder) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_traces_are_refused(name: str, trace: Path, capsys: Capture) -> None:
    with np.load(trace) as arrays:
        np.savez(trace.parent / "bad.npz", **HOSTILE[name](dict(arrays)))
    assert_refused("bad.npz", trace.parent, capsys)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.6, 0.9, 0.99])
def test_truncated_traces_are_refused(kept: float, trace: Path, capsys: Capture) -> None:
    data = trace.read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(data))
    (trace.parent / "bad.npz").write_bytes(data[:size])
    assert_refused("bad.npz", trace.parent, capsys)


@pytest.mark.parametrize("array", ["request_ids", "meta", "expert_ids"])
def test_pickles_are_never_loaded(array: str, trace: Path, capsys: Capture) -> None:
    target = trace.parent / "made-by-pickle"
    objects = np.empty(3, object)
    objects[:] = [Payload(target)] * 3
    with np.load(trace) as arrays:
        np.savez(trace.parent / "bad.npz", **{**dict(arrays), array: objects})
    assert_refused("bad.npz", trace.parent, capsys)
    assert not target.exists()


def test_an_array_that_claims_more_than_it_holds(trace: Path, capsys: Capture) -> None:
    """A header of 10**15 tokens over a few bytes must not be believed."""
    with np.load(trace) as arrays:
        meta = str(arrays["meta"])
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000, 2, 2), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile("bad.npz", "w") as archive:
        archive.writestr("expert_ids.npy", b"\x93NUMPY\x01\x00\x76\x00" + header + b"\x00" * 64)
        with archive.open("meta.npy", "w") as member:
            np.lib.format.write_array(member, np.array(meta))
    assert plan("bad.npz") == 2
    assert "shorter than its shape" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    "source", ["missing.npz", "sample:debian-moo", "sample:../debian-moe", "sample:", ".", "a\0b"]
)
def test_sources_that_are_not_there(source: str, trace: Path, capsys: Capture) -> None:
    assert_refused(source, trace.parent, capsys)


def test_the_nearest_sample_is_proposed(capsys: Capture) -> None:
    assert plan("sample:debian-moo") == 2
    assert "did you mean 'debian-moe'?" in capsys.readouterr().err


def test_a_cluster_file_with_a_tag_is_refused(trace: Path, capsys: Capture) -> None:
    evil = trace.parent / "evil.yaml"
    evil.write_text("!!python/object/apply:os.mkdir ['made-by-yaml']\n")
    before = contents(trace.parent)
    assert plan(trace, "--cluster", str(evil)) == 2
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error",
        "remedy",
    ]
    assert contents(trace.parent) == before
    assert not (trace.parent / "made-by-yaml").exists()
