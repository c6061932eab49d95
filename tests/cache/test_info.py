"""`offload_info` and the `moesim cache` command."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.caching.info import limit_tokens, offload_info
from moesim.caching.plan import load_cache_plan
from moesim.cli.main import run
from moesim.errors import MismatchError
from moesim.trace.format import LoadTrace, TraceMeta, save_trace


def test_info_of_a_small_trace(toys: ModuleType) -> None:
    trace = toys.random_trace(0, tokens=70)
    info = offload_info(trace, (4, 16, 256))
    data = json.loads(json.dumps(info.to_dict(), allow_nan=False))
    assert data["srp"]["256"]["model"] is None
    assert 0 < data["srp"]["4"]["model"] < 1
    assert data["srp"]["16"]["model"] > data["srp"]["16"]["uniform"]
    assert data["sch"]["4"]["1.0"]["model"] >= data["sch"]["4"]["0.5"]["model"]
    assert len(data["token_sparsity"]) == 2
    assert data["token_sparsity"] == pytest.approx([0.75, 0.75])
    text = info.lines()
    assert any("SRP" in line for line in text)
    assert all(len(line) < 160 for line in text)


def test_trace_info_offload(
    toys: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trace(toys.random_trace(0, tokens=70), tmp_path / "toy.npz")
    assert run(["trace", "info", str(tmp_path / "toy.npz"), "--offload"]) == 0
    assert "local routing consistency" in capsys.readouterr().out
    assert run(["trace", "info", str(tmp_path / "toy.npz"), "--offload", "--json"]) == 0
    assert "srp" in json.loads(capsys.readouterr().out)["offload"]
    load = LoadTrace(np.ones((1, 2, 4), np.int64), TraceMeta("m", 4, 2, (0, 1)))
    save_trace(load, tmp_path / "counts.npz")
    assert run(["trace", "info", str(tmp_path / "counts.npz"), "--offload"]) == 2
    assert "--offload needs token-level routing" in capsys.readouterr().err


def test_load_traces_are_refused_by_name() -> None:
    load = LoadTrace(np.ones((1, 2, 4), np.int64), TraceMeta("m", 4, 2, (0, 1)), "counts.npz")
    with pytest.raises(MismatchError, match=r"--offload needs token-level.*counts\.npz"):
        offload_info(load)


def test_limit_keeps_whole_requests(toys: ModuleType) -> None:
    requests = toys.all_requests(toys.random_trace(0, num_requests=6, tokens=10))
    for most, kept in ((5, 1), (25, 2), (1000, 6)):
        assert len(limit_tokens(requests, most, 0).ids) == kept


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled trace in 1.3 GB: a plan file, JSON with nothing else, exit 0."""
    out = tmp_path / "cache.json"
    command = [
        "cache", "--trace", "sample:debian-moe", "--hbm", "1.3", "--steps", "64",
        "--prefetch", "previous-layer", "--policy", "lru",
    ]  # fmt: skip
    assert run([*command, "--json", "--ilp", "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    own = next(row for row in data["results"] if row["name"] == "this plan")
    assert own["tokens_per_s"] <= data["offline_bound"]["tokens_per_s"]
    (slots,) = data["ilp"]
    assert slots["status"] == "optimal"
    assert slots["integer_program"] == pytest.approx(slots["own"])
    plan = load_cache_plan(out)
    assert plan.policy == "lru"
    assert plan.predicted["tokens_per_s"] == own["tokens_per_s"]
    assert run([*command, "--plot", str(tmp_path / "speed.png")]) == 0
    shown = capsys.readouterr()
    assert "offline bound" in shown.out
    assert "prefill tokens are used" in shown.err
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_integer_programs_of_tiers_and_bits(
    toys: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 experts of 3 bits and scales take 22 MB each: the integer program is at least as good as
    the plan; MC-MoE's program at least as good as the greedy choice."""
    config = {
        "model_type": "mixtral", "num_hidden_layers": 3, "hidden_size": 4096,
        "intermediate_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1000,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    trace = toys.random_trace(0, num_requests=16, tokens=40, layers=3)
    save_trace(trace, tmp_path / "toy.npz")
    command = [
        "cache", "--trace", str(tmp_path / "toy.npz"), "--model", str(tmp_path / "config.json"),
        "--hbm", "1.5", "--context", "0", "--bits", "2", "--prefetch", "none", "--policy", "lfu",
        "--dram", "0.2", "--ilp", "--json",
    ]  # fmt: skip
    assert run(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in data["ilp"]] == ["slots and tiers", "bits"]
    for row in data["ilp"]:
        assert row["bound"] <= row["integer_program"] * (1 + 1e-9)
        assert row["integer_program"] <= row["own"] * (1 + 1e-6)
        assert row["own"] <= row["integer_program"] * 1.1
        assert row["in_plan"] == (row["what"] == "bits")
    assert sum(map(len, data["plan"]["nvme"])) > 0
    assert np.array(data["plan"]["bits"]).mean() <= 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--hbm", "1"], 1, "need"),
        (["--hbm", "1.3", "--policy", "fifo"], 2, "fifo"),
        (["--hbm", "1.3", "--prefetch", "psychic"], 2, "psychic"),
        (["--hbm", "1.3", "--cpu", "perhaps"], 2, "perhaps"),
        (["--machine", "abacus"], 2, "abacus"),
        (["--hbm", "nan"], 2, "'nan' is no number"),
        (["--hbm", "1.3", "--dram", "0.1", "--nvme-gb-per-s", "-1"], 2, "nvme_gb_per_s"),
        (["--hbm", "1.3", "--bits", "1"], 1, "need"),
        (["--hbm", "1.3", "--bit-errors", "none.npy", "--bits", "2"], 2, "none.npy"),
        (["--plot", "speed.gif"], 2, "gif"),
        (["--out", "nowhere/at/all.json"], 2, "no folder"),
        (["--model", "mixtral-8x7b"], 2, "12 MoE layers, 64 experts"),
        (["--expert-dtype", "roman"], 2, "roman"),
    ],
)
def test_command_refuses(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "--trace", "sample:debian-moe", "--steps", "16", *arguments]) == code
    shown = capsys.readouterr()
    assert says in shown.err.replace("\n", " ")
    assert "remedy: " in shown.err
    assert "Traceback" not in shown.err


def test_command_refuses_a_load_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = LoadTrace(np.ones((1, 2, 4), np.int64), TraceMeta("m", 4, 2, (0, 1)))
    save_trace(load, tmp_path / "counts.npz")
    assert run(["cache", "--trace", str(tmp_path / "counts.npz")]) == 2
    assert "moesim cache needs token-level routing" in capsys.readouterr().err


def test_everything_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "--trace", "sample:debian-moe", "--hbm", "4", "--steps", "16"]) == 0
    assert "everything fits" in capsys.readouterr().out
