"""`recommend`: the search beside an exhaustive one, what is said of an answer, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

import moesim
from moesim.cli.main import run
from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.model.attention import Cache
from moesim.model.names import load_model
from moesim.serving.config import ServingConfig
from moesim.serving.deployment import deploy
from moesim.serving.engines import engine_profile
from moesim.serving.run import simulate_serving
from moesim.serving.speculative import Speculation
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.synthetic import synthetic_requests
from moesim.studies.recommend.bounds import most
from moesim.studies.recommend.firm import HELD_OUT_TPOT, firmness
from moesim.studies.recommend.layouts import Bench, Layout
from moesim.studies.recommend.need import need_of
from moesim.studies.recommend.others import best_of, others
from moesim.studies.recommend.search import Searched, cheapest, families
from moesim.studies.recommend.shapes import Place, Shape, shapes

MODEL, CLUSTER = "gpt-oss-20b", "h200-sxm-ib"
SLO = "ttft_p99<300ms,tpot_p99<12ms"


DRAFTS = Speculation(0.85, 1, draft_share=0.0, fixed=True)


def bench(rate: float, slo: str = SLO, engine: str = "vllm", **more: object) -> Bench:
    need = need_of(slo, rate, 1000, 200, None, 0)
    options = {"expert_dtype": None, "kv_dtype": "bf16"}
    model = load_model(MODEL)
    if more.get("speculation") is not None:  # a layer like the others, which drafts
        caches = (Cache(elements=2 * 8 * 64, heads=8),)
        one = model.total_params // model.num_hidden_layers
        model = replace(model, mtp_layers=1, mtp_moe_layers=1, mtp_params=one, mtp_caches=caches)
    return Bench(Place(model, CLUSTER, engine_profile(engine), options, **more), need)


@pytest.fixture(scope="module")
def asked() -> dict[str, object]:
    return {
        "gpu": "h200-sxm",
        "rate": 60.0,
        "prompt": 1000,
        "output": 200,
        "slo": SLO,
        "gpus": 4,
        "alternatives": False,
    }


@pytest.fixture(scope="module")
def result(asked):
    return moesim.recommend(MODEL, **asked)


@pytest.mark.parametrize(
    ("rate", "more"),
    [
        (30.0, {}),
        (45.0, {"speculation": DRAFTS}),
        (10.0, {"decode_cluster": "a100-sxm-ib"}),
    ],
)
def test_no_smaller_layout_keeps_the_promises(rate, more) -> None:
    """The slow reference: every layout of up to 2 GPUs of every shape, pipeline stages among them,
    all simulated; with speculation; with decoding on another type of GPU, by dollars."""
    own = bench(rate, **more)
    found = cheapest(own, 2, Searched())
    kept = [layout for layout in every_layout(own, 2) if own.run(layout, own.need.rate).kept]
    assert found[0].kept
    assert own.size(found[0].layout) == min(own.size(layout) for layout in kept)


def every_layout(own: Bench, gpus: int) -> list[Layout]:
    out = [
        Layout(shape, n)
        for shape in shapes(own.place, "mixed", gpus)
        for n in range(1, gpus // shape.num_gpus + 1)
    ]
    pairs = product(shapes(own.place, "prefill", gpus), shapes(own.place, "decode", gpus))
    out += [Layout(a, 1, b, 1) for a, b in pairs if a.num_gpus + b.num_gpus <= gpus]
    return out


@pytest.mark.parametrize("role", ["mixed", "prefill", "decode"])
@pytest.mark.parametrize(("pp", "drafts"), [(1, None), (2, None), (1, DRAFTS)])
def test_a_bound_is_not_below_what_the_simulation_serves(role, pp, drafts) -> None:
    """At 1.15 times the bound the simulated engine misses a promise; what a closed form leaves out
    (queues, uneven steps) only makes the engine slower."""
    own = bench(1.0, speculation=drafts)
    shape = Shape(1, 1, 1, "all_reduce", 0, pp=pp)
    cost = own.engine(shape)[1]
    bound = most(role, cost, own.need, 8192, drafts)
    assert bound.rate > 0
    layout = {
        "mixed": Layout(shape, 1),
        "prefill": Layout(shape, 1, shape, 8),
        "decode": Layout(shape, 8, shape, 1),
    }[role]
    assert not own.run(layout, 1.15 * bound.rate).kept


def test_the_bound_of_decoding_is_littles_law() -> None:
    """N sequences, a step of t seconds, 200 tokens each: N / (200 t) requests/s, at the most N
    whose step keeps the promise."""
    own = bench(1.0)
    cost = own.engine(Shape(1, 1, 1, "all_reduce", 0))[1]
    bound = most("decode", cost, own.need, 8192)
    assert bound.binds == "TPOT"
    step_s = 0.012
    sequences = bound.rate * 200 * step_s
    context = sequences * (1000 + 200 / 2)
    assert cost.one_us([sequences], [context], [0], [0], [0]) / 1e6 == pytest.approx(0.012, rel=0.1)


def test_options_keep_the_promises_and_are_in_order(result) -> None:
    answer = result.record["answers"][0]
    options = answer["options"]
    assert answer["kept"]
    assert all(option["kept"] for option in options)
    keys = [(o["num_gpus"], max(o["promises"].values())) for o in options]
    assert keys == sorted(keys)
    looks = [tuple((r["gpus"], r["tp"]) for r in o["roles"].values()) for o in options]
    assert len(set(looks)) == len(looks)
    fewer = answer["fewer"]
    assert fewer is None or fewer["num_gpus"] < options[0]["num_gpus"]


def test_money_is_rate_times_price(result) -> None:
    """$ per million output tokens = $/h / (requests/s x output x 3,600 s / 10^6)."""
    for option in result.record["answers"][0]["options"]:
        tokens = 60.0 * 200 * 3600 / 1e6
        assert option["usd_per_hour"] == pytest.approx(option["num_gpus"] * 3.8)
        assert option["usd_per_million_output_tokens"] == pytest.approx(
            option["usd_per_hour"] / tokens
        )


def test_serving_the_answer_gives_the_same_figures(result) -> None:
    option = result.record["answers"][0]["options"][0]
    roles = list(option["roles"].values())
    need = need_of(SLO, 60.0, 1000, 200, None, 0)
    place = Place(load_model(MODEL), CLUSTER, engine_profile("vllm"), {})
    parts = [
        place.deployment(Shape(r["tp"], r["dp"], r["ep"], r["moe_comm"], r["max_batch_tokens"]))
        for r in roles
    ]
    config = ServingConfig(
        replicas=roles[0]["engines"],
        decode=parts[1] if len(parts) > 1 else None,
        decode_replicas=roles[1]["engines"] if len(parts) > 1 else 1,
    )
    served = simulate_serving(parts[0], need.requests(60.0), config)
    for name in ("ttft_p99", "tpot_p99"):
        assert served.metrics[name] == option["figures"][name]


def test_slower_steps_never_need_fewer_gpus(result) -> None:
    answer = result.record["answers"][0]
    gpus = answer["options"][0]["num_gpus"]
    for row in answer["firm"]["if_steps_differ_by"].values():
        assert row["slower_gpus"] is None or row["slower_gpus"] >= gpus
        assert row["faster_gpus"] <= gpus


def test_same_question_same_answer(result, asked) -> None:
    again = moesim.recommend(MODEL, **asked)
    assert json.dumps(again.to_json()) == json.dumps(result.to_json())
    assert again.files == result.files


def test_goodput_of_given_gpus_rises_with_them(asked) -> None:
    rest = {k: v for k, v in asked.items() if k not in ("rate", "gpus")}
    rates = [
        moesim.recommend(MODEL, gpus=n, maximize="goodput", **rest).record["answers"][0]["options"][
            0
        ]["requests_per_s"]
        for n in (1, 2)
    ]
    assert rates[1] > 1.5 * rates[0] > 0


def test_a_log_is_replayed_as_it_is(tmp_path: Path, asked) -> None:
    log = synthetic_requests("poisson:rate=20,requests=2000,prompt=500,output=100")
    rest = {k: v for k, v in asked.items() if k not in ("rate", "prompt", "output")}
    found = moesim.recommend(MODEL, requests=log, **rest).record
    assert found["asked"]["requests"]["num_requests"] == 2000
    assert found["asked"]["prompt_tokens"] == 500
    with pytest.raises(InputError, match="said twice"):
        moesim.recommend(MODEL, requests=log, prompt=5, **rest)


def test_several_answers_side_by_side(asked) -> None:
    rest = {k: v for k, v in asked.items() if k not in ("gpu", "rate")}
    found = moesim.recommend(
        [MODEL], gpu=["h200-sxm", "a100-sxm"], rate=5.0, **(rest | {"gpus": 2})
    )
    assert [one["gpu"] for one in found.record["answers"]] == ["h200-sxm", "a100-sxm"]
    assert found.record["answers"][1]["firm"]["held_out_tpot_error"] is None
    assert "no service was measured on a100-sxm" in found.summary()
    assert set(found.to_frame()["gpu"]) == {"h200-sxm", "a100-sxm"}
    assert {name.split("/")[0] for name in found.files} == {
        "GPT-OSS-20B-h200-sxm-ib-vllm",
        "GPT-OSS-20B-a100-sxm-ib-vllm",
    }


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"slo": None}, "nothing is promised"),
        ({"rate": None}, "neither a rate nor a log"),
        ({"rate": 0.0}, "`rate` 0.0"),
        ({"gpus": None, "maximize": "goodput"}, "without `gpus`"),
        ({"cluster": CLUSTER}, "both name the hardware"),
        ({"gpu": None, "cluster": "mixed-h100-a100"}, "mixes a100-sxm and h100-sxm"),
        ({"kv_dtype": "fp9"}, "unknown kv_dtype 'fp9'"),
        ({"gpu": "h20-sxm"}, "no bundled cluster is made of h20-sxm"),
    ],
)
def test_what_is_not_clear_is_refused(asked, change, error) -> None:
    with pytest.raises(InputError, match=error):
        moesim.recommend(MODEL, **(asked | change))


def test_unknown_gpus_and_impossible_promises(asked) -> None:
    with pytest.raises(UnknownNameError, match="h2000"):
        moesim.recommend(MODEL, **(asked | {"gpu": "h2000"}))
    with pytest.raises(InfeasibleError, match=r"closed forms need [\d,]+ GPUs or more"):
        moesim.recommend(MODEL, **(asked | {"rate": 5000.0, "gpus": 2}))
    with pytest.raises(InfeasibleError, match="a promise cannot be kept"):
        moesim.recommend(MODEL, **(asked | {"slo": "tpot_p99<1us"}))


def test_the_command(tmp_path: Path, capsys) -> None:
    args = ["recommend", "--model", MODEL, "--rate", "5", "--no-alternatives"]
    args += ["--slo", SLO, "--gpus", "2"]
    out = tmp_path / "answer"
    assert run([*args, "--out", str(out), "--plot", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr()
    assert "1 h200-sxm: 1 x 1 (tp1)" in said.out
    assert "prompt: 1000 tokens; output: 300 tokens" in said.out
    written = json.loads((out / "recommendation.json").read_text())
    assert written["format"] == "moesim-recommendation"
    assert {p.name for p in out.iterdir()} == {
        "recommendation.json", "serving.sh", "bench.sh",
    }  # fmt: skip
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert run([*args, "--out", str(out)]) == 2
    assert "it exists already" in capsys.readouterr().err
    assert run([*args[:-4], "--slo", "tpot_p99<1us"]) == 1


def test_redundant_experts_are_tried_where_that_is_asked_for() -> None:
    own = bench(5.0)
    plain = list(shapes(own.place, "prefill", 8))
    assert not any(shape.redundant for shape in plain)
    asked = replace(own.place, redundancy=True)
    more = [shape for shape in shapes(asked, "prefill", 8) if shape.redundant]
    assert {(shape.ep, shape.redundant) for shape in more} == {(2, 2), (4, 4), (8, 8)}


def test_stages_are_tried_in_engines_that_do_both() -> None:
    """Of up to 4 GPUs: tp 1 with 2 or 4 stages, tp 2 with 2; each with experts whole or cut."""
    found = {(s.tp, s.ep, s.pp) for s in shapes(bench(5.0).place, "mixed", 4) if s.pp > 1}
    assert found == {(1, 1, 2), (1, 1, 4), (2, 2, 2), (2, 1, 2)}
    assert all(s.pp == 1 for s in shapes(bench(5.0).place, "decode", 4))
    drafting = bench(5.0, speculation=DRAFTS).place
    assert all(s.pp == 1 for s in shapes(drafting, "mixed", 4))


def test_what_is_searched_beside_it() -> None:
    """A precision only where the GPU computes in it, a checkpoint only where one is published,
    speculation only where the model drafts, experts apart only where asked for."""

    def names(model: str, cluster: str, **more: bool) -> list[str]:
        options = {"expert_dtype": None, "kv_dtype": "bf16"}
        place = Place(load_model(model), cluster, engine_profile("vllm"), options)
        return [one.ask for one in others(place, more.get("experts_apart", False))]

    redundant = "--redundant-experts"
    assert names("gpt-oss-20b", "a100-sxm-ib") == [redundant]
    assert names("gpt-oss-20b", "h100-sxm-ib") == ["--kv-dtype fp8", redundant]
    assert names("Qwen3-30B-A3B", "h100-sxm-ib")[1] == "--model Qwen/Qwen3-30B-A3B-FP8"
    nvfp4 = "--model nvidia/DeepSeek-V3.1-NVFP4 --kv-dtype fp8"
    assert names("DeepSeek-V3", "b200-ib")[1:] == [nvfp4, "--speculate 0.85", redundant]
    assert nvfp4 not in names("DeepSeek-V3", "h200-sxm-ib")
    assert names("gpt-oss-20b", "a100-sxm-ib", experts_apart=True) == [redundant, ""]


def test_another_is_said_only_where_it_is_better() -> None:
    """What is returned needs fewer GPUs than the answer, or serves more than it."""
    own = bench(60.0, slo="ttft_p99<300ms,tpot_p99<6ms")
    answer = cheapest(own, 4, Searched(), keep=1)[0]
    for other in others(own.place, True):
        found = best_of(Bench(other.place, own.need, own.prices), own, answer, 4, False)
        assert found is None or (found.kept and found.layout.num_gpus < answer.layout.num_gpus)


def test_speculation_needs_a_model_that_drafts() -> None:
    with pytest.raises(InputError, match="GPT-OSS-20B has no layers that predict further tokens"):
        moesim.recommend(MODEL, rate=5.0, slo=SLO, gpus=2, speculate=0.8)


def test_families_are_of_shapes_that_hold_the_longest_request() -> None:
    own = bench(5.0)
    searched = Searched()
    for family in families(own, 2, searched):
        assert family.front.most.rate > 0
    assert searched.shapes > 0


def test_how_firm_is_what_the_report_says() -> None:
    report = Path(__file__).parents[2] / "reports" / "serving-accuracy" / "results.json"
    lines = json.loads(report.read_text())["errors"]["held out"]
    found = {
        line["engine"]: (line["tpot_median"], line["tpot_p90"])
        for line in lines
        if line["model"] == "all" and line["engine"] in HELD_OUT_TPOT
    }
    assert found.keys() == HELD_OUT_TPOT.keys()
    for engine, errors in HELD_OUT_TPOT.items():
        assert found[engine] == pytest.approx(errors, abs=0.006)


def test_an_engine_without_a_cache_serves_next_to_nothing() -> None:
    """Weights that leave no cache at all: a bound of (almost) no requests, and no error."""
    cost = EngineStepCost(deploy("DeepSeek-V3", "h100-sxm-ib", dp=8))
    need = need_of(SLO, 60.0, 1000, 200, None, 0)
    assert most("decode", cost, need, 8192).rate < 1e-6


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0, float("nan")])
def test_a_share_of_memory_that_is_none_is_bad_input(share: float) -> None:
    """Not a service that no layout can serve."""
    with pytest.raises(InputError, match="memory_fraction"):
        moesim.recommend(model="GPT-OSS-20B", rate=1.0, slo="ttft_p99<2s", memory_fraction=share)


@pytest.mark.parametrize(
    ("engine", "staged"), [("sglang", True), ("trtllm", True), ("vllm", False)]
)
def test_prompts_in_stages_where_the_engine_sends_their_caches(engine: str, staged: bool) -> None:
    """Engines that only decode have none; those that do both have them in every engine."""
    place = Place(load_model("GPT-OSS-120B"), "l40s-pcie", engine_profile(engine), {})
    found = {
        role: {shape.pp for shape in shapes(place, role, 8)}
        for role in ("mixed", "prefill", "decode")
    }
    assert found["mixed"] == {1, 2, 4, 8}
    assert found["prefill"] == ({1, 2, 4, 8} if staged else {1})
    assert found["decode"] == {1}


def test_no_error_is_claimed_of_pipeline_stages() -> None:
    """On H200s, of which engines without stages were measured."""
    place = Place(load_model("GPT-OSS-20B"), "h200-sxm-ib", engine_profile("sglang"), {})
    need = need_of("ttft_p99<2s", 2.0, 500, 50, None, 0)
    bench = Bench(place, need)
    layout = Layout(Shape(1, 1, 1, "all_reduce", 8192, pp=2), 1)
    found = firmness(bench, bench.run(layout, 2.0), 4)
    assert found.to_json() == {"held_out_tpot_error": None, "unlike": "with pipeline stages"}
