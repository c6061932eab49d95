"""A benchmark's file beside the prediction, and constants refitted to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moesim
from moesim.cli.main import run
from moesim.errors import FormatError, InputError
from moesim.serving.engines import ENGINES, engine_profile
from moesim.studies.recommend.measured import compare_measured, read_benchmark


@pytest.fixture(scope="module")
def answer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recommend") / "answer"
    found = moesim.recommend(
        "gpt-oss-20b",
        gpu="h200-sxm",
        rate=5.0,
        slo="ttft_p99<1s,tpot_p99<20ms",
        gpus=1,
        alternatives=False,
    )
    return found.save(folder)


def result(**changes: object) -> dict[str, object]:
    """What `vllm bench serve` writes, of 1,000 requests of 1,000 and 300 tokens at 5/s."""
    return {
        "backend": "vllm", "request_rate": 5.0, "max_concurrency": None, "completed": 1000,
        "total_input_tokens": 1_000_000, "total_output_tokens": 300_000,
        "mean_ttft_ms": 95.0, "median_ttft_ms": 90.0, "p99_ttft_ms": 130.0,
        "mean_tpot_ms": 7.1, "median_tpot_ms": 7.0, "p99_tpot_ms": 9.0,
    } | changes  # fmt: skip


def written(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n")
    return path


def test_refitting_meets_the_medians(answer, tmp_path) -> None:
    found = compare_measured(answer, written(tmp_path / "b.json", result()))
    assert found.refitted["tpot_p50"] == pytest.approx(7.0e-3, rel=0.02)
    assert found.refitted["ttft_p50"] == pytest.approx(90e-3, rel=0.05)
    assert found.measured.figures["ttft_p99"] == 0.130
    assert "off" in found.summary()


@pytest.mark.parametrize(
    ("tokens", "changed", "kept"),
    [(512, "kernel_us", "eager_layer_us"), (8192, "eager_layer_us", "kernel_us")],
)
def test_the_refitted_engine_is_one(answer, tmp_path, tokens, changed, kept) -> None:
    """Steps of 512 tokens are replayed as graphs, so that the host's layers say nothing of them."""
    record = json.loads((answer / "recommendation.json").read_text())
    role = record["answers"][0]["options"][0]["roles"]["serving"]
    role |= {"max_batch_tokens": tokens, "max_sequences": min(role["max_sequences"], tokens)}
    written(tmp_path / "recommendation.json", record)
    bench = written(tmp_path / "b.json", result())
    out = tmp_path / "mine.yaml"
    args = ["recommend", "--measured", str(bench), "--answer", str(tmp_path), "--out", str(out)]
    assert run(args) == 0
    mine = engine_profile(str(out))
    assert mine.name == "vllm"
    assert getattr(mine, kept) == getattr(ENGINES["vllm"], kept)
    assert getattr(mine, changed) != getattr(ENGINES["vllm"], changed)
    served = moesim.serve(
        "poisson:rate=5,requests=200,prompt=1000,output=300",
        model="gpt-oss-20b", cluster="h200-sxm-ib", gpus=1, engine=str(out),
        max_batch_tokens=tokens,
    )  # fmt: skip
    assert served.record["metrics"]["tpot_p50"] == pytest.approx(7.0e-3, rel=0.1)


def test_a_refitted_file_predicts_another_run(answer, tmp_path, capsys) -> None:
    """With the constants of a run its own medians are met without refitting."""
    bench = written(tmp_path / "b.json", result())
    out = tmp_path / "mine.yaml"
    args = ["recommend", "--measured", str(bench), "--answer", str(answer)]
    assert run([*args, "--out", str(out)]) == 0
    found = compare_measured(answer, bench, engine=str(out))
    assert found.predicted["tpot_p50"] == pytest.approx(7.0e-3, rel=0.02)
    assert found.predicted["ttft_p50"] == pytest.approx(90e-3, rel=0.05)
    assert not found.unmet
    assert run([*args, "--engine", "vllm", "--engine", "sglang"]) == 2
    assert "several of --engine" in capsys.readouterr().err


def test_what_no_constant_explains_is_said(answer, tmp_path) -> None:
    """A TPOT below the kernels' own: constants end at 0, and the run is not met."""
    fast = result(median_tpot_ms=1.0, mean_tpot_ms=1.0, p99_tpot_ms=1.0)
    found = compare_measured(answer, written(tmp_path / "b.json", fast))
    assert "tpot_p50" in found.unmet
    assert (found.engine.eager_layer_us, found.engine.kernel_us) == (0.0, 0.0)
    assert "not met" in found.summary()
    assert found.to_json()["unmet"] == ["tpot_p50"]


def test_the_last_line_of_sglangs_file_counts(tmp_path) -> None:
    file = written(tmp_path / "b.jsonl", result(completed=1), result(request_rate=7.0))
    assert read_benchmark(file).rate == 7.0
    assert read_benchmark(file).prompt == 1000


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"request_rate": "inf"}, InputError, "all requests were sent at once"),
        ({"completed": 0}, FormatError, "no request was completed"),
        ({"median_tpot_ms": "fast"}, FormatError, "median_tpot_ms is 'fast'"),
        ({"total_input_tokens": None}, FormatError, "total_input_tokens is None"),
        ({"request_rate": "trace"}, InputError, "as a trace says"),
        ({"burstiness": 0.5}, InputError, "arrivals of burstiness 0.5"),
        ({"ramp_up_strategy": "linear"}, InputError, "the rate rose"),
        ({"median_tpot_ms": 0}, FormatError, "no TTFT and TPOT above 0"),
        ({"total_output_tokens": 10**400}, FormatError, "total_output_tokens is 1000"),
        ({"failed": 200}, InputError, "1,000 of 1,200 requests were completed"),
        ({"num_prompts": 1100}, InputError, "1,000 of 1,100"),
        ({"num_prompts": None}, FormatError, "num_prompts is None"),
        ({"request_throughput": 2.0}, InputError, "5 requests/s were to be sent and 2 served"),
        (
            {"request_throughput": 2.0, "max_concurrency": 8},
            InputError,
            "held to 8 requests at a time",
        ),
    ],
)
def test_what_is_no_such_result(tmp_path, changes, error, said) -> None:
    with pytest.raises(error, match=said):
        read_benchmark(written(tmp_path / "b.json", result(**changes)))


def test_other_files_are_refused(answer, tmp_path, capsys) -> None:
    with pytest.raises(FormatError, match="no result of a serving benchmark"):
        read_benchmark(written(tmp_path / "b.json", {"a": 1}))
    bench = written(tmp_path / "b.json", result())
    with pytest.raises(FormatError, match="no recommendation"):
        compare_measured(tmp_path, bench)
    theirs = written(tmp_path / "s.jsonl", result(backend="sglang-oai"))
    with pytest.raises(InputError, match="is of sglang, the answer is of vllm"):
        compare_measured(answer, theirs)
    assert run(["recommend", "--measured", str(bench)]) == 2
    assert "--measured and --answer go together" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: vllm\nkernel_us: -1\nrequest_ms: 1\nbasis: measured\nsource: x\n")
    with pytest.raises(FormatError, match="kernel_us is -1"):
        engine_profile(str(bad))


def test_an_engine_whose_name_is_no_text_is_refused(tmp_path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("{name: [vllm], request_ms: 1, kernel_us: 1, basis: measured, source: s}")
    with pytest.raises(FormatError, match="no engine's constants"):
        engine_profile(str(path))


@pytest.mark.parametrize("asked", [None, 1.5, {}, {"slo": "ttft_p99<1s", "seed": -0.5}])
def test_an_answer_whose_question_is_damaged_is_refused(answer, tmp_path, asked) -> None:
    record = json.loads((answer / "recommendation.json").read_text())
    (tmp_path / "recommendation.json").write_text(json.dumps(record | {"asked": asked}))
    with pytest.raises(FormatError, match="no recommendation"):
        compare_measured(tmp_path, written(tmp_path / "b.json", result()))


@pytest.mark.parametrize(
    ("name", "value"), [("pp", {"a": 1}), ("tp", 0), ("moe_comm", "pigeon"), ("kv_dtype", [])]
)
def test_an_answer_with_a_damaged_role_is_refused_by_name(answer, tmp_path, name, value) -> None:
    record = json.loads((answer / "recommendation.json").read_text())
    next(iter(record["answers"][0]["options"][0]["roles"].values()))[name] = value
    (tmp_path / "recommendation.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=rf"no recommendation \(answers.*{name}"):
        compare_measured(tmp_path, written(tmp_path / "b.json", result()))
