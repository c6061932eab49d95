"""`moesim whatif`: files and options, verdicts, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moesim.cli.main import run

STATIC = (
    "model: qwen3-30b-a3b", "cluster: h200-sxm-ib", "input_tokens: 256", "output_tokens: 16",
    "num_requests: 16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def study(*more: str) -> str:
    Path("study.yaml").write_text(
        "fixed:\n" + "".join(f"  {line}\n" for line in STATIC) + "\n".join(more) + "\n"
    )
    return "study.yaml"


def whatif(*args: str) -> int:
    return run(["whatif", *args, "--backend", "serial"])


def test_a_file_and_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    path = study("grid: {gpus: [1, 2], concurrency: [4, 8]}", "slo: tpot_mean<1s", "minimize: gpus")
    assert whatif(path, "--plot", "s.png") == 0
    out, err = capsys.readouterr()
    assert "answer: gpus 1, concurrency 8" in out
    assert "asked again over all points" in out
    assert "assumed" in out
    assert "points evaluated" in err
    data = json.loads(Path("study.json").read_text())
    assert (data["format"], data["version"]) == ("moesim-study", 1)
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert len(data["points"]) == 4
    assert data["answer"]["params"] == {"gpus": 1, "concurrency": 8}
    # Run again: nothing is computed, the same bytes.
    before = Path("study.json").read_bytes()
    assert whatif(path) == 0
    assert "0 points evaluated" in capsys.readouterr().err
    assert Path("study.json").read_bytes() == before


def test_options_alone_and_over_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "qwen3-30b-a3b", "--cluster", "h200-sxm-ib", "--gpus", "1,2"]
    options += [
        "--set",
        "num_requests=16",
        "--set",
        "input_tokens=256",
        "--set",
        "output_tokens=16",
    ]
    options += ["--sensitivity", "0", "--json"]
    assert whatif(*options, "--vary", "concurrency=4,8", "--out", "a.json") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(Path("a.json").read_text())
    assert json.loads(printed)["axes"] == {"gpus": [1, 2], "concurrency": [4, 8]}
    path = study("grid: {gpus: [1, 2, 4], concurrency: [4, 8]}")
    assert whatif(path, "--gpus", "2", "--sensitivity", "0", "--json", "--out", "b.json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fixed"]["gpus"] == 2
    assert data["axes"] == {"concurrency": [4, 8]}


def test_nothing_keeps_the_promise(capsys: pytest.CaptureFixture[str]) -> None:
    path = study("grid: {gpus: [1, 2]}", "slo: tpot_mean<1us", "minimize: gpus")
    assert whatif(path) == 1
    out = capsys.readouterr().out
    assert "no point keeps the promises (tpot_mean<1us)" in out
    assert re.search(r"nearest: gpus (.) \(\1 x tp1\) misses tpot_mean<1us", out)
    assert json.loads(Path("study.json").read_text())["answer"] is None


def test_processes_keep_their_commas_and_models_have_answers_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two processes and two models are four points, none refused; each model has its answer, and
    every row says its engines."""
    two = "constant:rate=20,requests=20,output=8,constant:rate=40,requests=20,output=8"
    asked = ["--requests", two, "--model", "qwen3-30b-a3b,gpt-oss-20b", "--gpus", "2"]
    asked += ["--cluster", "h200-sxm-ib", "--sensitivity", "0", "--per", "model"]
    assert whatif(*asked, "--minimize", "ttft_p99") == 0
    out = capsys.readouterr().out
    assert "4 points: 4 evaluated" in out
    data = json.loads(Path("study.json").read_text())
    assert data["evaluator"] == "requests"
    assert data["axes"]["requests"] == [
        "constant:rate=20,requests=20,output=8",
        "constant:rate=40,requests=20,output=8",
    ]
    assert [a["value"] for a in data["answers"]] == ["qwen3-30b-a3b", "gpt-oss-20b"]
    assert {p["engines"] for p in data["points"]} == {"2 x tp1"}
    assert "model gpt-oss-20b: answer: " in out
    defaults, head = out.splitlines()[1:3]
    assert defaults == "defaults taken: engine vllm, pp 1, kv_dtype bf16, router least_loaded"
    for column in ("engines", "TTFT p99, ms", "tok/s per GPU", "$/h"):
        assert column in head
    assert whatif(*asked, "--requests", "nowhere.csv") == 2
    assert "nowhere.csv" in capsys.readouterr().err


def test_runs_without_a_steady_state_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """200 requests per second of 2,000 tokens end after a tenth of a second: nothing has ended."""
    asked = ["--requests", "constant:rate=200,requests=20,output=2000", "--gpus", "1"]
    asked += ["--model", "gpt-oss-20b", "--cluster", "h200-sxm-ib", "--sensitivity", "0"]
    assert whatif(*asked, "--minimize", "ttft_p99") == 0
    out = capsys.readouterr().out
    assert "the one point (1 x tp1): no steady state, so no rates" in out
    assert "the answer's run has no steady state" in out
    point = json.loads(Path("study.json").read_text())["points"][0]
    assert point["figures"]["output_tokens_per_s"] is None
    assert "cost_usd_per_million_output_tokens" not in point["figures"]


def test_models_that_fit_nowhere_are_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert whatif("--model", "deepseek-v3", "--gpus", "1,2") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "weights take 673.1" in out
    assert "no point can be run" in out


def test_all_infeasible_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    path = study("grid: {gpus: [1, 2]}", "slo: tpot_mean<1s", "minimize: gpus")
    assert whatif(path, "--model", "deepseek-v3") == 1
    assert "infeasible (1): DeepSeek-V3 on 1 x h200-sxm" in capsys.readouterr().out


HOSTILE: list[tuple[str, str]] = [
    ("grid: !!python/object/apply:os.system ['touch pwned']", "tags|could not determine"),
    ("grid: {gpus: [1, 1]}", "grid.gpus: 1 appears twice"),
    ("grid: {gpus: [.nan]}", "must be finite"),
    ("grid: {gpus: [1]}\ngrid: {gpus: [2]}", "'grid' appears twice"),
    ("gird: {gpus: [1]}", "unknown key gird"),
    ("grid: {gpus: {from: 1, to: 9999, step: 1}, concurrency: {from: 1, to: 9999, step: 1}}",
     "99,980,001 points"),
    ("grid: {gpus: [1e400]}", "must be a whole number"),
    ("grid: {load: [.inf]}", "must be finite"),
    ("prices: {h200-sxm: -3}", "greater than 0"),
    ("slo: tpot_p98<50ms", "unknown figure"),
    ("slo: tpot_p99<50ms,tpot_p99<20ms", "bound twice"),
    ("minimize: gpus\nmaximize: throughput", "ask one of the two"),
    ("evaluator: oracle", "unknown evaluator 'oracle'"),
    ("- 1", "not valid YAML|not a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), HOSTILE)
def test_bad_files(capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    assert whatif(study(text)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "\nremedy: " in err
    assert "internal" not in err
    assert re.search(words, err), err
    assert not Path("pwned").exists()
    assert not Path("study.json").exists()


BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["--vary", "gpus"], "no assignment"),
    (["--gpus", "1,2", "--vary", "gpus=4,8"], "gpus is given twice"),
    (["--gpus", "1,x"], "gpus x: must be a whole number"),
    (["--gpus", "1", "--price", "free"], "is no price"),
    (["--gpus", "1", "--price", "h100-sxm=nan"], "is no price"),
    (["--gpus", "1", "--price", "h1=2"], "GPU with a price 'h1'"),
    (["--gpus", "1", "--plot", "x.doc"], "cannot plot"),
    (["--gpus", "1", "--out", "no/where.json"], "no folder"),
    (["--gpus", "1", "--search", "99999"], "more than 2,000"),
    (["--gpus", "1", "--sensitivity", "3"], "sensitivity"),
    (["--gpus", "1", "--set", "concurency=3"], "did you mean 'concurrency'"),
    (["--gpus", "9"], "9 GPUs are not a whole number"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert whatif(study(), *options) == 2
    err = capsys.readouterr().err
    assert words in err, err
    assert "internal" not in err


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("cloud", "unknown backend 'cloud'"),
        ("local:0", "no number of processes"),
        ("local:many", "no number of processes"),
        ("serial:2", "takes no number"),
        ("dask", "is not an address"),
        ("dask://host", "is not an address"),
        ("dask://host:99999", "is not an address"),
        ("dask://user@host:1/path", "is not an address"),
    ],
)
def test_bad_backends(capsys: pytest.CaptureFixture[str], backend: str, words: str) -> None:
    assert run(["whatif", study(), "--gpus", "1", "--backend", backend]) == 2
    assert words in capsys.readouterr().err


def test_a_backend_that_does_not_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="the package distributed is not installed")
    monkeypatch.setattr("moesim.backend.CONNECT_S", 0.5)
    assert run(["whatif", study(), "--gpus", "1", "--backend", "dask://127.0.0.1:1"]) == 2
    assert "no Dask scheduler answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_library_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    assert run(["whatif", study(), "--gpus", "1", "--backend", f"{scheme}://127.0.0.1:1"]) == 2
    err = capsys.readouterr().err
    assert f"the package {package} is not installed" in err
    assert f"moesim[{scheme}]" in err


def test_hostile_names_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    name: dict[str, Any] = {"name": "\x1b[2Jx\nanswer: forged"}
    Path("n.yaml").write_text(json.dumps({**name, "fixed": {"gpus": 1, "model": "mixtral-8x7b"}}))
    assert whatif("n.yaml", "--cluster", "h200-sxm-ib", "--set", "num_requests=4") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("answer: forged") for line in out.splitlines())
