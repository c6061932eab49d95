"""The real evaluators: sizes filled in, scales that act the right way, figures that agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.draw.study import scaled
from moesim.errors import InfeasibleError, InputError, MismatchError, UnknownNameError
from moesim.figures import FIGURES
from moesim.jobs.inputs import rerouted
from moesim.jobs.plan import plan
from moesim.studies.evaluators.requests import _percentiles
from moesim.studies.registry import EVALUATORS, get_evaluator
from moesim.studies.space import make_point
from moesim.studies.text import heading, number
from moesim.trace.format import load_token_trace, load_trace, save_trace

STATIC: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "cluster": "h200-sxm-ib",
    "tp": 2,
    "input_tokens": 256,
    "output_tokens": 16,
    "concurrency": 8,
    "num_requests": 16,
}
ROUTED: dict[str, Any] = {
    "trace": "sample:debian-olmoe",
    "gpus": 4,
    "solver": "eplb",
    "batch_tokens": 256,
}


def figures(name: str, **params: Any) -> dict[str, float | None]:
    evaluator = get_evaluator(name)
    return dict(evaluator.evaluate(evaluator.check(params)).figures)


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_is_described(name: str) -> None:
    evaluator = get_evaluator(name)
    assert evaluator.name == name
    names = {f.name for f in evaluator.figures}
    assert {evaluator.goal, evaluator.throughput} <= names
    assert set(evaluator.front) <= names | {"gpus", "cost"}
    assert set(evaluator.scales.values()) <= set(evaluator.params.model_fields)
    assert all(FIGURES[f.name].base == f.base for f in evaluator.figures)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"tp": 2, "dp": 2, "replicas": 2}, (8, "2 x tp2 dp2 ep4")),
        ({"gpus": 16, "dp": 4}, (16, "4 x tp1 dp4 ep4")),
        ({"gpus": 8, "tp": 2, "pp": 2, "replicas": 2}, (8, "2 x tp2 pp2")),
        ({}, (8, "8 x tp1")),
    ],
)
def test_sizes_are_filled_in(given: dict[str, int], want: tuple[int, str]) -> None:
    """As `moesim serve` splits the same GPUs; every point says it."""
    evaluator = get_evaluator("static")
    few = {"input_tokens": 64, "output_tokens": 2, "concurrency": 1, "num_requests": 1}
    asked = {"model": "mixtral-8x7b", "cluster": "h200-sxm-ib", **few, **given}
    params = evaluator.check(asked)
    assert (params["gpus"], evaluator.evaluate(params).engines) == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpus": 7, "dp": 2}, "7 GPUs cannot be divided over dp 2"),
        ({"gpus": 8, "tp": 3}, "8 GPUs cannot be divided over tp 3"),
        ({"gpus": 8, "tp": 0}, "tp 0"),
        ({"dp": 1.5}, "dp 1.5"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"memory_fraction": 2.0}, "memory_fraction 2.0"),
    ],
)
def test_sizes_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        get_evaluator("static").check({"model": "mixtral-8x7b", **given})


def test_combinations_of_a_grid_that_do_not_go_together_are_refused_points() -> None:
    point = make_point(get_evaluator("static"), {"model": "mixtral-8x7b", "gpus": 2, "tp": 4})
    assert isinstance(point.error, MismatchError)
    assert "2 GPUs cannot be divided over tp 4" in str(point.error)
    assert (point.params["gpus"], point.params["tp"], point.params["dp"]) == (2, 4, None)


def test_static_scales_act_the_right_way() -> None:
    base = figures("static", **STATIC)
    tpot = base["tpot_mean"]
    assert tpot is not None
    for scale, value, slower in (
        ("network_scale", 0.5, True),
        ("compute_scale", 0.5, True),
        ("compute_scale", 2.0, False),
        ("load_scale", 4.0, True),
    ):
        other = figures("static", **STATIC, **{scale: value})["tpot_mean"]
        assert other is not None
        assert (other > tpot) is slower, scale
    # Long prompts: the GPU with the popular experts is waited for.
    long = {**STATIC, "tp": 1, "dp": 4, "input_tokens": 4096}
    even, skewed = (figures("static", **long, imbalance_scale=f)["ttft_mean"] for f in (0.1, 3.0))
    assert even is not None
    assert skewed is not None
    assert even < skewed


def test_replicas_share_the_load() -> None:
    one = figures("static", **STATIC)
    two = figures("static", **{**STATIC, "concurrency": 16, "replicas": 2})
    # Two replicas with eight requests in flight each, as one has: the same times, twice the rate.
    assert two["tpot_p99"] == one["tpot_p99"]
    assert two["output_tokens_per_s"] == pytest.approx(2 * one["output_tokens_per_s"])  # type: ignore[operator]
    assert two["output_tokens_per_s_per_gpu"] == pytest.approx(one["output_tokens_per_s_per_gpu"])


def test_a_model_that_does_not_fit_is_infeasible_with_numbers() -> None:
    with pytest.raises(InfeasibleError, match=r"weights take \d+"):
        figures("static", **{**STATIC, "model": "deepseek-v3"})


def test_a_solver_needs_a_trace_and_redundancy_does_not() -> None:
    with pytest.raises(InputError, match="places experts by a routing trace"):
        figures("static", **STATIC, solver="eplb")
    wide = {**STATIC, "tp": 1, "dp": 4, "input_tokens": 4096}
    in_order, redundant = (figures("static", **wide, **r) for r in ({}, {"redundant_experts": 16}))
    assert redundant["ttft_mean"] < in_order["ttft_mean"]  # type: ignore[operator]
    assert redundant["kv_token_capacity"] < in_order["kv_token_capacity"]  # type: ignore[operator]


def test_requests_by_arrivals() -> None:
    common = {k: v for k, v in STATIC.items() if k in ("model", "cluster", "tp")}
    asked = "constant:rate=20,requests=40,prompt=256,output=16"
    base = figures("requests", **common, requests=asked, goodput_slo="ttft<1s")
    assert base["served_share"] == 1.0
    assert base["goodput_share"] == 1.0
    busy = figures("requests", **common, requests=asked, load_scale=50.0)
    assert busy["ttft_p99"] > base["ttft_p99"]  # type: ignore[operator]
    assert busy["goodput_share"] is None
    first = figures("requests", **common, requests=asked, max_requests=2)
    assert (first["served_share"], first["requests_per_s"]) == (1.0, None)
    two = {"gpus": 4, "decode_gpus": 2, "transfer_gb_per_s": 40.0}
    apart = figures("requests", **common, requests=asked, **two)
    assert apart["served_share"] == 1.0


def test_requests_that_are_not_served_are_infinitely_late() -> None:
    class Result:
        status = np.array([1, 1, 1, 2])
        ttft_s = np.array([1.0, 2.0, 3.0, np.nan])

    # Sorted: 1, 2, 3, infinity. The median lies half-way between 2 and 3, p90 beyond 3.
    found = _percentiles("ttft", Result())  # type: ignore[arg-type]
    assert found == {"ttft_p50": 2.5, "ttft_p90": None, "ttft_p99": None}


def test_plan_figures_add_up_and_scale() -> None:
    base = figures("plan", **ROUTED)
    step = base["step_us"]
    assert step is not None
    parts = [base[n] for n in ("dispatch_us", "compute_us", "combine_us")]
    assert step == pytest.approx(sum(p for p in parts if p is not None), rel=1e-6)
    # Whole requests fill a batch of 256 tokens almost.
    rate = base["tokens_per_s"]
    assert rate is not None
    assert 200 < rate * step / 1e6 <= 256
    # Imbalance i beyond 1 scaled by 2: the experts' time by (1 + 2 (i - 1)) / i.
    imbalance, compute = base["imbalance"], base["compute_us"]
    assert imbalance is not None
    assert compute is not None
    wider = figures("plan", **ROUTED, imbalance_scale=2.0)
    assert wider["compute_us"] == pytest.approx(compute * (2 * imbalance - 1) / imbalance)
    slow = figures("plan", **ROUTED, network_scale=0.01)
    assert slow["dispatch_us"] > base["dispatch_us"]  # type: ignore[operator]
    assert slow["compute_us"] == pytest.approx(compute)


def test_step_is_what_simulate_says() -> None:
    quick = {**ROUTED, "solver": "linear", "steps": 4, "moe_only": True}
    event = figures("step", **quick)
    closed = figures("step", **quick, fidelity="analytic")
    assert event["step_us"] == pytest.approx(closed["step_us"], rel=1e-6)
    slow = figures("step", **quick, fidelity="analytic", network_scale=0.01)
    assert slow["step_us"] > closed["step_us"]  # type: ignore[operator]


def test_more_cache_more_hits() -> None:
    common = {"trace": "sample:debian-olmoe", "cluster": "l40s-pcie", "max_steps": 64}
    common |= {"policy": "lru", "prefetch": "none", "cpu": "off"}
    small, large = (figures("cache", **common, hbm_gb=gb) for gb in (1.3, 1.8))
    assert small["num_slots"] < large["num_slots"]  # type: ignore[operator]
    assert small["hit_rate"] < large["hit_rate"]  # type: ignore[operator]
    quick = figures("cache", **common, hbm_gb=1.3, host_link_scale=4.0)
    assert quick["tokens_per_s"] >= small["tokens_per_s"]  # type: ignore[operator]


def test_the_key_follows_content_not_place(tmp_path: Any) -> None:
    from moesim.trace.format import load_trace, save_trace

    trace = load_trace("sample:debian-olmoe")
    for name in ("a.npz", "b.npz"):
        save_trace(trace, tmp_path / name)
    evaluator = get_evaluator("plan")
    keys = {
        make_point(evaluator, {**ROUTED, "trace": source}).key
        for source in ("sample:debian-olmoe", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    }
    assert len(keys) == 1
    save_trace(trace.take(slice(0, 1000)), tmp_path / "a.npz")  # type: ignore[union-attr]
    changed = make_point(evaluator, {**ROUTED, "trace": str(tmp_path / "a.npz")})
    assert changed.key not in keys


def test_a_size_that_is_none_is_the_points_own_error_and_a_missing_file_is_not() -> None:
    point = make_point(get_evaluator("plan"), {**ROUTED, "gpus": 9})
    assert point.error is not None
    assert "not a whole number" in point.error.cause
    with pytest.raises(InputError, match=r"no trace at nowhere\.npz"):
        make_point(get_evaluator("plan"), {**ROUTED, "trace": "nowhere.npz"})
    for wrong, words in (
        ({"requests": "nowhere.csv"}, "nowhere.csv"),
        ({"requests": "poisson:rat=8"}, "key of poisson 'rat'"),
        ({"model": "DeepSeek-V33"}, "DeepSeek-V33"),
        ({"engine": "vlm"}, "unknown engine 'vlm'"),
        ({"kv_dtype": "fp7"}, "unknown kv_dtype 'fp7'"),
    ):
        asked = {"model": "mixtral-8x7b", "requests": "poisson:rate=8", **wrong}
        with pytest.raises(InputError, match=words):
            make_point(get_evaluator("requests"), asked)


def test_a_rule_of_routing_as_a_parameter(tmp_path: Path) -> None:
    """The same figures as of a trace rerouted beforehand, and a remark on what changed; a capacity
    of 1 evens out loads."""
    trace = load_token_trace("sample:debian-olmoe", "a test").take(slice(4_000))
    save_trace(trace, tmp_path / "part.npz")
    rule = "drop:factor=1,keep=position"
    asked = {**ROUTED, "trace": str(tmp_path / "part.npz"), "solver": "linear", "phase": "prefill"}
    evaluator = get_evaluator("plan")
    whole = evaluator.evaluate(evaluator.check(asked))
    found = evaluator.evaluate(evaluator.check({**asked, "reroute": rule}))
    assert found.figures["imbalance"] < whole.figures["imbalance"]
    before, changed = rerouted(trace, rule, batch_tokens=256)
    assert changed in found.notes
    assert changed not in whole.notes
    planned = plan(before, gpus=4, solver="linear", phase="prefill", batch_tokens=256)
    assert planned.chosen.figures["imbalance"].value == found.figures["imbalance"]
    same = plan(trace, gpus=4, solver="linear", phase="prefill", batch_tokens=256, reroute=rule)
    assert same.plan.evaluation["reroute"] == changed
    assert same.chosen.figures["imbalance"].value == found.figures["imbalance"]


def test_rules_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="drp"):
        make_point(get_evaluator("plan"), {**ROUTED, "reroute": "drp:factor=1"})
    static = get_evaluator("static")
    with pytest.raises(InputError, match="without"):
        static.evaluate(static.check({**STATIC, "reroute": "drop:factor=1"}))
    some = load_trace("sample:debian-olmoe").take(np.arange(200))
    weighed = replace(some, gate_weights=np.ones(some.expert_ids.shape, np.float16))
    with pytest.raises(MismatchError, match="plan") as found:
        rerouted(weighed, "expanded-drop:factor=1,by=room")
    assert "moesim trace reroute --plan" in found.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"expert_gpus": 4, "micro_batches": 2},
        {"speculate": 0.8, "drafts": 2, "draft_share": 0.1},
        {"speculate": 0.8, "drafts": 1, "fixed_drafts": True},
        {"moe_comm": "deepep_ll", "dispatch_tokens": 8},
    ],
)
def test_a_parameter_is_what_serve_has(options: dict[str, Any]) -> None:
    """Pools, speculation by a drafter or the model's own layer, and buffers, to the last digit."""
    import moesim

    drawn = "poisson:rate=8,requests=40,prompt=200,output=40"
    asked = {"model": "GLM-4.5-Air", "cluster": "h200-sxm-ib", "gpus": 8, "replicas": 1, "seed": 1}
    point = figures("requests", requests=drawn, **asked, **options)
    served = moesim.serve(drawn, **asked, **options).record["metrics"]
    for name in ("ttft_mean", "tpot_mean", "e2e_mean"):
        assert point[name] == served[name]
    plain = figures("requests", requests=drawn, **asked)
    assert point["tpot_mean"] != plain["tpot_mean"]


def test_static_drafts_and_steps_have_pools() -> None:
    """In flight: a drafted token accepted in 8 of 10 is worth 1.8 a step, less what it costs."""
    asked = {"model": "GLM-4.5-Air", "cluster": "h200-sxm-ib", "tp": 8, "concurrency": 8}
    plain, drafting = (
        figures("static", **asked),
        figures("static", **asked, speculate=0.8, drafts=1),
    )
    assert plain["tpot_mean"] is not None
    assert drafting["tpot_mean"] is not None
    assert plain["tpot_mean"] / 1.8 < drafting["tpot_mean"] < plain["tpot_mean"]
    step = {"trace": "sample:debian-moe", "gpus": 8, "solver": "linear", "steps": 2}
    pools = figures("step", **step, expert_gpus=4, micro_batches=1, cluster="h200-sxm-ib")
    together = figures("step", **step, cluster="h200-sxm-ib")
    assert pools["step_us"] != together["step_us"]


def test_shares_are_shown_in_per_cent() -> None:
    """A share of 0.331 reads 33.1% in the table, and 33.10 on an axis in %."""
    figures = {"kv_used_peak": {"label": "KV cache in use", "unit": FIGURES["kv_used_peak"].base}}
    assert number(0.331, figures["kv_used_peak"]["unit"]) == "33.1%"
    assert heading("kv_used_peak", figures) == "KV cache in use"
    drawn = scaled({"figures": figures}, "kv_used_peak")
    assert (drawn.axis, drawn.said(0.331)) == ("KV cache in use (%)", "33.10 %")
