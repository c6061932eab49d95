"""`moesim cache` on a machine: with and without a trace, and its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moesim
from moesim.caching import planner
from moesim.cluster import load_machine
from moesim.errors import (
    FormatError,
    InfeasibleError,
    InputError,
    MismatchError,
    UnknownNameError,
)
from moesim.jobs.cache_result import CacheJob
from moesim.jobs.export_placement import suffix_of
from moesim.model.weights import load_weights
from moesim.offloading.engines import ENGINES, plan_engines
from moesim.offloading.rates import doubts
from moesim.offloading.task import Task
from moesim.studies.evaluators.cache import CacheParams
from moesim.trace.uniform import uniform_trace
from tests.model.gguf_writer import METADATA, tensors, write_gguf


@pytest.fixture(scope="module")
def job() -> CacheJob:
    return moesim.cache(
        model="Qwen3-30B-A3B", machine="rtx-5060-ti+ddr5-2ch", quant="Q4_K_M", steps=64
    )


def test_without_a_trace_routing_is_uniform_and_said_so(job: CacheJob) -> None:
    assert job.uniform
    assert job.plan.provenance["routing"] == "uniform, assumed"
    assert any("uniform" in note for note in job.notes)
    assert "uniform routing (assumed)" in job.summary()
    assert job.own.hit_rate == pytest.approx(job.plan.num_slots / (48 * 128), abs=0.03)


def test_the_headline_is_an_engine_and_the_cache_stands_beside(job: CacheJob) -> None:
    best = job.best_engine
    assert best is not None
    assert best.engine in ("llama.cpp", "ik_llama.cpp")
    summary = job.summary()
    assert summary.index("llama-server") < summary.index("left on the table")
    assert "Dynamic caches" in summary
    assert best.engine in repr(job)
    found = job.to_json()["engines"][best.engine]
    assert found["decode_tokens_per_s"] == best.decode_tokens_per_s


def test_whole_layers_cost_the_timeline_what_they_cost_the_engine(job: CacheJob) -> None:
    """llama.cpp's placement as the caching timeline runs it, and as the engine's own formula has
    it: within 15%, though one knows steps and the other a mean."""
    row = next(r for r in job.results if "layers on the CPU" in r.name)
    own = next(plan for plan in job.engines if plan.engine == "llama.cpp")
    assert row.tokens_per_s == pytest.approx(own.decode_tokens_per_s, rel=0.15)


def test_export_writes_what_starts_the_engine(job: CacheJob, tmp_path: Path) -> None:
    plan = job.save(tmp_path / "cache.json")
    done = moesim.export(plan, to="llama.cpp", out=tmp_path / "run.sh", model="/m/q 4.gguf")
    text = (tmp_path / "run.sh").read_text()
    assert text.startswith("#!/bin/sh\n")
    assert "llama-server -m '/m/q 4.gguf' -ngl 99" in text
    assert done.launch[0] in text
    moesim.export(plan, to="accelerate", out=tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text())["lm_head"] == 0
    with pytest.raises(InputError, match=r"ends in \.sh"):
        moesim.export(plan, to="llama.cpp", out=tmp_path / "run.txt")
    moesim.export(plan, to="vllm", out=tmp_path / "vllm.sh", model="org/m")
    assert "vllm serve org/m" in (tmp_path / "vllm.sh").read_text()


def test_export_refuses_what_has_no_placement(job: CacheJob, tmp_path: Path) -> None:
    raw = job.plan.to_dict()
    path = tmp_path / "cache.json"
    for engines, error in (
        ({}, MismatchError),
        ({"llama.cpp": {"problem": "does not fit"}}, MismatchError),
        ({"llama.cpp": {"launch": [3], "files": {}, "decode_tokens_per_s": 1.0}}, FormatError),
        ({"llama.cpp": ["x"]}, FormatError),
    ):
        path.write_text(json.dumps(raw | {"engines": engines}))
        with pytest.raises(error):
            moesim.export(path, to="llama.cpp", out=tmp_path / "run.sh")


def test_a_trace_gives_the_frequency_strategy() -> None:
    """The bundled trace is uneven: the most frequent experts have more than their share."""
    job = moesim.cache(
        "sample:debian-moe", machine="rtx-3090+ddr4-2ch", hbm=2.3, steps=64,
        policy="lru", prefetch="none", engine=["KTransformers", "llama.cpp"],
    )  # fmt: skip
    assert not job.uniform
    assert {plan.engine for plan in job.engines} == {"KTransformers", "llama.cpp"}
    assert job.plan.provenance["kernels"] == "engine"


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, tensors())
    job = moesim.cache(model=path, machine="rtx-4090", steps=32)
    best = job.best_engine
    assert best is not None
    assert best.weights == "GGUF file tiny.gguf"
    assert {p.engine for p in job.engines if "GGUF file" in p.problem} == {
        "KTransformers", "vLLM", "accelerate",
    }  # fmt: skip


def test_options_that_contradict() -> None:
    with pytest.raises(InputError, match="both say"):
        moesim.cache(model="Qwen3-30B-A3B", quant="Q4_K_M", expert_dtype="int4")
    with pytest.raises(InputError, match="neither a trace nor a model"):
        moesim.cache(machine="rtx-4090")


def test_the_bar_knows_its_end() -> None:
    """Every stage is announced once, and no more of them than the total says."""
    seen: list[tuple[str, int, int]] = []
    moesim.cache(
        "sample:debian-moe", hbm=1.3, steps=32, policy="lru", prefetch="previous-layer",
        engine=["llama.cpp"], sweep=True, progress=lambda *stage: seen.append(stage),
    )  # fmt: skip
    totals = {total for _, _, total in seen}
    assert len(totals) == 1
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert len(seen) <= totals.pop()


def test_one_gpu_with_offloading_answers_in_tokens_per_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one GPU holds all, placements do not differ: no table of them."""
    monkeypatch.setattr(planner, "usable_predictors", lambda trace: ())
    trace = uniform_trace("debian-moe", tuple(range(12)), 64, 8)
    found = moesim.plan(trace, gpus=1, offload=True, hbm=1.3)
    assert "tokens/s decoded" in found.line()
    assert "tokens/s decoded" in found.summary()
    assert "MoE time per step" not in found.summary()


@pytest.mark.parametrize(("given", "read"), [(None, "none"), ("none", "none"), ("auto", "auto")])
def test_a_study_reads_none_as_a_word(given: str | None, read: str) -> None:
    """YAML has `none` as a word and `null` as nothing, `--set` reads both as nothing."""
    params = CacheParams(cluster="h100-sxm-ib", trace="t", prefetch=given, cpu=False)
    assert (params.prefetch, params.cpu) == (read, "off")


def test_longer_contexts_cost_experts(job: CacheJob) -> None:
    assert "with more context: " in job.summary()
    first = job.best_engine
    assert first is not None
    shares = [first.gpu_share, *(plan.gpu_share for plan in job.longer)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]
    assert len(job.to_json()["more_context"]) == len(job.longer)


def test_a_request_longer_than_the_context_and_an_unknown_cache_type_are_refused() -> None:
    ask = {"model": "Qwen3-30B-A3B", "machine": "rtx-4090+ddr5-2ch", "steps": 16}
    with pytest.raises(InputError, match="more than"):
        moesim.cache(**ask, context=1024, prompt=1000, output=100)
    with pytest.raises(UnknownNameError):
        moesim.cache(**ask, cache_type="q9_0")


@pytest.mark.parametrize(
    ("cache_type", "runs"),
    [("q8_0", ("llama.cpp", "ik_llama.cpp")), ("fp8", ("KTransformers", "vLLM"))],
)
def test_cache_types_are_those_of_the_engine(cache_type: str, runs: tuple[str, ...]) -> None:
    weights = load_weights("Qwen3-30B-A3B")
    machine = load_machine("rtx-4090+ddr5-2ch")
    plans = plan_engines(Task(weights, weights, machine, cache_type=cache_type), tuple(ENGINES))
    refused = {plan.engine for plan in plans if "no KV cache of" in plan.problem}
    assert refused == set(ENGINES) - set(runs)


def test_frequency_comes_with_its_counts(tmp_path: Path) -> None:
    """KTransformers by the frequency of a trace: `moesim export` writes the tensor that its loader
    takes, [1, layers, experts]."""
    torch = pytest.importorskip("torch")
    job = moesim.cache(trace="sample:debian-moe", machine="rtx-4090+ddr5-8ch", steps=16,
                       engine=("KTransformers",), policy="lru", prefetch="none")  # fmt: skip
    plan = job.save(tmp_path / "cache.json")
    said: list[str] = []
    moesim.export(plan, to="KTransformers", out=tmp_path / "my run.sh", notify=said.append)
    script = (tmp_path / "my run.sh").read_text()
    assert """--init-expert-location "$(dirname "$0")"/'my run.pt'""" in script
    assert any("my run.pt" in line for line in said)
    counts = torch.load(tmp_path / "my run.pt", weights_only=True)["logical_count"]
    assert counts.dtype == torch.int64
    assert tuple(counts.shape) == (1, 12, 64)
    assert counts.sum(dim=2).sub(8e6).abs().max() < 64
    raw = json.loads(Path(plan).read_text())
    for bad in ("[[1, -2]]", "[[0.5]]", "[1]", "x", 3, "[[1], [1, 2]]"):
        raw["engines"]["KTransformers"]["files"]["expert_counts.json"] = bad
        (tmp_path / "bad.json").write_text(json.dumps(raw))
        with pytest.raises(FormatError, match="damaged"):
            moesim.export(tmp_path / "bad.json", to="KTransformers", out=tmp_path / "run.sh")


def test_figures_without_a_run_or_a_datasheet_are_said() -> None:
    assert doubts(load_machine("rtx-4090+ddr5-2ch")) == ()
    assert "16-bit rate assumed" in doubts(load_machine("rtx-pro-6000+ddr5-4ch"))[0]
    (line,) = doubts(load_machine("2xr9700+ddr5-2ch"))
    assert "no published run of r9700" in line
    job = moesim.cache(model="GPT-OSS-20B", machine="r9700+ddr5-2ch", context=1024, steps=4)
    assert line in job.summary()


def test_export_says_what_it_places_by(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read cache plan"):
        suffix_of(tmp_path / "none.json", "llama.cpp")


def test_serve_keeps_to_a_machine_and_refuses_what_it_would_offload() -> None:
    """The machine's one GPU unasked; what does not fit names offloading and a command for it."""
    log = "poisson:rate=1,requests=5,prompt=100,output=10"
    served = moesim.serve(log, model="GPT-OSS-20B", cluster="rtx-4090+ddr5-2ch")
    assert "on 1 x rtx-4090" in served.summary()
    with pytest.raises(InfeasibleError, match="without offloading") as refused:
        moesim.serve(log, model="GPT-OSS-120B", cluster="rtx-4090+ddr5-2ch")
    assert "moesim cache --machine rtx-4090+ddr5-2ch --model GPT-OSS-120B" in refused.value.remedy
