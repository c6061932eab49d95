"""`moesim simulate --requests` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli.main import run

PROCESS = "poisson:rate=20,requests=60,prompt=lognormal(400;0.6),output=uniform(5;40)"
OLMOE = ["--model", "OLMoE-1B-7B", "--gpus", "2"]


def simulate(*args: str) -> int:
    return run(["simulate", "--requests", *args])


def as_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert simulate(*args, "--json") == 0
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(PROCESS, *OLMOE, "--slo", "ttft<2s,tpot<50ms") == 0
    out = capsys.readouterr().out
    for text in (
        "defaults taken: cluster: h100-sxm-ib; deployment: 2 x tp1\n",
        "60 requests of poisson:rate=20",
        "60 finished",
        "time to first token",
        "output tokens/s per GPU",
        "KV cache in use",
        "requests waiting",
        "goodput under ttft<2s,tpot<50ms",
        "basis: assumed",
    ):
        assert text in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else on standard output; equal runs differ under provenance.run alone (INV-6); every
    request is counted once (INV-1)."""
    first = as_json(capsys, PROCESS, *OLMOE, "--seed", "3")
    again = as_json(capsys, PROCESS, *OLMOE, "--seed", "3")
    other = as_json(capsys, PROCESS, *OLMOE, "--seed", "4")
    assert (first["format"], first["version"]) == ("moesim-serving-run", 1)
    assert sum(first["counts"].values()) == first["requests"]["num_requests"] == 60
    assert len(first["cdf"]["ttft"]) == 101
    assert first["cdf"]["ttft"][50] == pytest.approx(first["metrics"]["ttft_p50"])
    assert first["cdf"]["e2e"][99] == pytest.approx(first["metrics"]["e2e_p99"])
    series = first["series"]["serving"]
    assert {len(column) for column in series.values()} == {len(series["time_s"])}
    assert any("requests: assumed" in line for line in first["predictions"])
    for record in (first, again, other):
        record["provenance"].pop("run")
    assert first == again
    assert first["metrics"] != other["metrics"]


def test_promises_decide_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(PROCESS, *OLMOE, "--slo", "ttft_p99<5s,tpot_p99<500ms") == 0
    assert simulate(PROCESS, *OLMOE, "--rate-scale", "50", "--slo", "ttft_p99<80ms") == 1
    assert "missed: ttft_p99<80ms: it is " in capsys.readouterr().out
    assert simulate(PROCESS, *OLMOE, "--slo", "tpot<1us") == 1
    error = capsys.readouterr().err
    assert "a step of one sequence takes" in error
    assert "remedy:" in error


def test_faster_arrivals_wait_longer(capsys: pytest.CaptureFixture[str]) -> None:
    """INV-9 for the rate: the same requests faster are not served sooner."""
    slow = as_json(capsys, PROCESS, *OLMOE)["metrics"]
    fast = as_json(capsys, PROCESS, *OLMOE, "--rate-scale", "20")["metrics"]
    assert fast["queue_s_mean"] > slow["queue_s_mean"]
    assert fast["duration_s"] < slow["duration_s"]


def test_everything_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Disaggregated replicas, priorities, levels, speculation, routing by domain, and a plot."""
    plot = tmp_path / "run.png"
    record = as_json(
        capsys, PROCESS, "--trace", "sample:debian-moe", "--gpus", "4", "--decode-gpus", "2",
        "--replicas", "2", "--router", "length_aware", "--priorities", "0.5,0.5",
        "--level", "queue", "--level", "demote@3", "--speculate", "0.7", "--drafts", "3",
        "--prefill", "first", "--chunk-tokens", "256", "--drift-hours", "1", "--transfer", "10",
        "--max-sequences", "16", "--plot", str(plot),
    )  # fmt: skip
    assert record["model"] == "debian-moe"
    assert record["num_gpus"] == 4
    assert record["counts"]["finished"] == 60
    assert set(record["series"]) == {"serving", "decode"}
    assert [row["priority"] for row in record["by_level"]] == [0, 1]
    assert 0 <= record["metrics"]["drafts_mean"] <= 3
    assert sum(record["service"]["domains"].values()) == pytest.approx(1.0)
    assert any(line.startswith("drift") for line in record["predictions"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "code", "cause"),
    [
        (["none.csv", "--model", "mixtral"], 2, "cannot read none.csv"),
        ([PROCESS], 2, "nothing says which model is served"),
        ([PROCESS, "--model", "nomodel"], 2, "unknown model"),
        ([PROCESS, "--model", "deepseek-v3", "--gpus", "8"], 1, "weights take"),
        ([PROCESS, *OLMOE, "--slo", "soon"], 2, "no promise"),
        ([PROCESS, *OLMOE, "--replicas", "3"], 2, "2 GPUs do not divide among 3 replicas"),
        ([PROCESS, *OLMOE, "--decode-gpus", "2"], 2, "none is left for prompts"),
        ([PROCESS, *OLMOE, "--tp", "3"], 2, "cannot be spread over 2 GPUs as tp 3"),
        ([PROCESS, *OLMOE, "--router", "nearest"], 2, "unknown router"),
        ([PROCESS, *OLMOE, "--prefill", "never"], 2, "unknown prefill 'never'"),
        ([PROCESS, *OLMOE, "--level", "drop@3"], 2, "--level 'drop@3'"),
        ([PROCESS, *OLMOE, "--speculate", "1.5"], 2, "acceptance of 1.5"),
        ([PROCESS, *OLMOE, "--domain-mix", "code=1"], 2, "without a routing trace"),
        ([PROCESS, *OLMOE, "--priorities", "a"], 2, "holds no number"),
        ([PROCESS, *OLMOE, "--plot", "x.txt"], 2, "cannot plot"),
        ([PROCESS, *OLMOE, "--prefix-cache"], 2, "do not tell their content"),
        ([PROCESS, "--model", "mixtral", "--trace", "sample:debian-moe"], 2, "chooses among 64"),
        ([PROCESS, *OLMOE, "--steps", "3"], 2, ""),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, cause: str
) -> None:
    assert simulate(*args) == code
    captured = capsys.readouterr()
    assert cause in captured.err
    assert "Traceback" not in captured.err


def test_unsorted_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46,9,9\n2023-11-16 18:15:45,9,9\n"
    )
    assert simulate(str(path), *OLMOE) == 2
    error = capsys.readouterr().err
    assert "log.csv line 3 is 1 s earlier than the one above it" in error
    assert "remedy: sort the file by time" in error


def test_the_other_simulate_is_still_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--fidelity" in out
    assert "--requests" not in out
    assert simulate("x", "--help") == 0
    shown = capsys.readouterr()
    assert "--fidelity" not in shown.out
    assert shown.err == "note: simulate --requests is moesim serve now, and goes away in 0.2\n"


def test_a_rule_of_routing_first_is_the_trace_that_it_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`--reroute` gives what the rerouted file gives; the note counts what changed; without a trace
    it is refused. Expert 0 alone (rule prune) takes longer than the experts as routed."""
    sample, few, one = "sample:debian-olmoe", str(tmp_path / "few.npz"), str(tmp_path / "one.npz")
    assert run(["trace", "slice", sample, "--requests", "8", "--out", few]) == 0
    assert run(["trace", "reroute", few, "--as", "prune:keep=8", "--out", one]) == 0
    capsys.readouterr()
    common = [PROCESS, "--gpus", "2", "--replicas", "1"]
    asked = ["--requests", *common, "--json", "--trace"]
    assert run(["serve", *asked, few, "--reroute", "prune:keep=8"]) == 0
    ruled = json.loads(capsys.readouterr().out)
    assert any(n.startswith("rerouted: prune:keep=8,by=load: ") for n in ruled["notices"])
    found = {}
    for name in (few, one):
        assert run(["serve", *asked, name]) == 0
        found[name] = json.loads(capsys.readouterr().out)["metrics"]
    assert ruled["metrics"] == found[one] != found[few]
    assert run(["serve", "--requests", *common, *OLMOE[:2], "--reroute", "random"]) == 2
    assert "--reroute without --trace" in capsys.readouterr().err
