"""The main job: same inputs same plan, who is compared with whom, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.cluster import Cluster, load_cluster
from moesim.errors import InfeasibleError, InputError, MismatchError, UnknownNameError
from moesim.jobs.plan import make_plan
from moesim.jobs.plan_result import PlanResult
from moesim.model.names import ModelSpec, load_model
from moesim.placement import parse_plan
from moesim.planning.case import _phase_and_batch
from moesim.planning.request import PlanRequest, check_memory, slots_of
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace

EXPERTS = 8


@pytest.fixture(scope="module")
def trace(build: ModuleType) -> Trace:
    """60 requests of 12 tokens, the first half of them of domain "code"."""
    domains = np.repeat([0, 1], 360)
    drawn: Trace = build.random_trace(
        np.random.default_rng(4),
        720,
        2,
        EXPERTS,
        2,
        request_tokens=12,
        domain_ids=domains,
        domains=("code", "prose", "nothing"),
    )
    return drawn


@pytest.fixture(scope="module")
def cluster(build: ModuleType) -> Cluster:
    made: Cluster = build.small_cluster()
    return made


@pytest.fixture(scope="module")
def model(build: ModuleType) -> ModelSpec:
    made: ModelSpec = build.toy_model(2, EXPERTS, 2)
    return made


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    """Fewer tuning batches and message tokens: what they are worth is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.planning.tuning.NUM_RESAMPLES", 10)
        patch.setattr("moesim.planning.traffic.TRAFFIC_TOKENS", 960)
        yield


@pytest.fixture(scope="module")
def result(trace: Trace, cluster: Cluster, model: ModelSpec) -> PlanResult:
    return make_plan(PlanRequest.of(trace, cluster, model, batch_tokens=96))


def without_run(result: PlanResult) -> str:
    raw = json.loads(result.plan.to_json())
    del raw["provenance"]["run"]
    return json.dumps(raw)


def test_same_inputs_and_seed_same_bytes(
    trace: Trace, cluster: Cluster, model: ModelSpec, result: PlanResult
) -> None:
    """INV-6: all but `provenance.run`; another seed may differ and is recorded."""
    request = PlanRequest.of(trace, cluster, model, batch_tokens=96)
    assert without_run(make_plan(request)) == without_run(result)
    other = make_plan(request.but(seed=1))
    assert other.plan.provenance["options"]["seed"] == 1
    assert other.plan.provenance["options_hash"] != result.plan.provenance["options_hash"]
    assert without_run(other) != without_run(result)


def test_result(result: PlanResult, trace: Trace, cluster: Cluster) -> None:
    """Linear and EPLB beside the chosen, held-out figures with intervals, and where from."""
    assert [c.name for c in result.candidates] == ["linear", "eplb", "local_search"]
    assert result.chosen.name == result.plan.solver == "local_search"
    plan = parse_plan(json.loads(result.plan.to_json()))
    assert (plan.placement.num_gpus, plan.placement.num_nodes) == (4, 2)
    assert plan.layer_ids == trace.meta.layer_ids
    assert plan.evaluation["held_out"] is True
    assert plan.provenance["trace"] == trace.content_hash()
    assert plan.provenance["cluster_hash"] == cluster.cluster_hash()
    _, held_out = split_requests(index_requests(trace, "prefill")[0])
    assert plan.evaluation["num_requests"] == len(held_out.ids) == result.sample.num_requests
    assert set(plan.evaluation["plans"]) == {"linear", "eplb", "local_search"}
    for candidate in result.candidates:
        stored = plan.evaluation["plans"][candidate.name]
        for name, figure in candidate.figures.items():
            assert figure.low <= figure.value <= figure.high, name
            assert stored[name] == figure.to_json()
    step = result.chosen.figures["step_us"]
    parts = [
        result.chosen.figures[f"{part}_us"].value for part in ("dispatch", "compute", "combine")
    ]
    assert step.value == pytest.approx(sum(parts))
    reference = next(c for c in result.candidates if c.name == "eplb")
    for name, delta in result.improvement.items():
        want = result.chosen.figures[name].value - reference.figures[name].value
        assert delta.value == pytest.approx(want, abs=1e-9)


def test_evaluated_tokens_are_held_out(result: PlanResult, trace: Trace) -> None:
    tune, held_out = split_requests(index_requests(trace, "prefill")[0])
    seen = set(trace.request_ids[result.sample.batches.token_idx].tolist())
    assert seen <= set(held_out.ids.tolist())
    assert not seen & set(tune.ids.tolist())


def test_defaults_are_stated(trace: Trace, cluster: Cluster, model: ModelSpec) -> None:
    result = make_plan(PlanRequest.of(trace, cluster, model))
    assert result.defaults["phase"].startswith("prefill")
    assert result.defaults["batch tokens"].startswith("4096")
    assert result.defaults["objective"].startswith("time")
    assert "all-to-all" in result.defaults
    # 60 requests of 12 tokens cannot fill 4,096.
    assert any("fill batches of" in notice for notice in result.notices)


def test_unknown_model_is_planned_for_balance(trace: Trace, cluster: Cluster) -> None:
    result = make_plan(PlanRequest.of(trace, cluster, None, batch_tokens=96))
    assert result.step is None
    assert result.plan.objective == "balance"
    assert "step_us" not in result.chosen.figures
    assert any("model is not known" in notice for notice in result.notices)
    with pytest.raises(InputError, match="needs the model's sizes"):
        make_plan(PlanRequest.of(trace, cluster, None, objective="time"))


def test_uneven_slots_are_compared_with_greedy(trace: Trace, cluster: Cluster) -> None:
    """EPLB needs equal GPUs; INV-2 with the slots that were named."""
    request = PlanRequest.of(trace, cluster, None, slots=(5, 1, 2, 3), batch_tokens=96)
    result = make_plan(request)
    assert [c.name for c in result.candidates] == ["linear", "greedy", "local_search"]
    table = result.plan.placement.physical_to_logical.reshape(2, 4, -1)
    assert ((table >= 0).sum(axis=2) == [5, 1, 2, 3]).all()


def test_one_domain_alone(trace: Trace, cluster: Cluster) -> None:
    result = make_plan(PlanRequest.of(trace, cluster, None, domain="prose", batch_tokens=96))
    assert result.plan.provenance["options"]["domain"] == "prose"
    _, held_out = split_requests(index_requests(trace.take(np.arange(360, 720)))[0])
    assert result.sample.num_requests == len(held_out.ids) < 30


@pytest.mark.parametrize(
    ("num_gpus", "options", "want"),
    [
        (4, {}, [2, 2, 2, 2]),
        (4, {"redundant_experts": 4}, [3, 3, 3, 3]),
        (4, {"slots": (12,)}, [3, 3, 3, 3]),
        (4, {"slots": (2, 3, 1, 2)}, [2, 3, 1, 2]),
        (1, {"slots": (9,)}, [9]),
        (16, {"redundant_experts": 8}, [1] * 16),
    ],
)
def test_slots(trace: Trace, num_gpus: int, options: dict[str, Any], want: list[int]) -> None:
    sized = load_cluster("h100-sxm-ib", num_gpus)
    assert slots_of(EXPERTS, PlanRequest.of(trace, sized, None, **options)).tolist() == want


@pytest.mark.parametrize(
    ("num_gpus", "options", "cause", "remedy"),
    [
        (3, {}, "8 slots do not divide over 3 GPUs", "`redundant_experts` 1"),
        (16, {}, "16 GPUs for 8 experts", "at most 8 GPUs, or `redundant_experts` 8"),
        (3, {"slots": (10,)}, "10 slots do not divide over 3 GPUs", "`slots` 12"),
        (4, {"slots": (2, 2)}, "`slots` names 2 GPUs, there are 4", "one number for every GPU"),
        (4, {"redundant_experts": -1}, "negative", "0 or more"),
    ],
)
def test_slots_that_do_not_come_out(
    trace: Trace, num_gpus: int, options: dict[str, Any], cause: str, remedy: str
) -> None:
    sized = load_cluster("h100-sxm-ib", num_gpus)
    with pytest.raises(InputError, match=cause) as caught:
        slots_of(EXPERTS, PlanRequest.of(trace, sized, None, **options))
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_memory_by_hand() -> None:
    """Qwen3-30B-A3B: 128 experts of 9.437 MB in bf16 in each of 48 layers on one 80 GB GPU."""
    model, cluster = load_model("Qwen3-30B-A3B"), load_cluster("h100-sxm-ib", 1)
    # 3 x 2,048 x 768 weights x 2 B = 9,437,184 B an expert; 100 a layer are 45.3 GB and fit with
    # the rest, 128 are 58.0 GB and do too; 76 GB usable less the rest holds at most 160 or so.
    rest = model.non_expert_bytes()
    most = int((cluster.gpus[0].hbm_gb * 1e9 * 0.95 - rest) // (9_437_184 * 48))
    check_memory(model, cluster, np.array([most]))
    with pytest.raises(InfeasibleError, match="GB on GPU 0") as caught:
        check_memory(model, cluster, np.array([most + 1]))
    assert caught.value.exit_code == 1
    assert "`ignore_memory`" in caught.value.remedy


def test_memory_is_checked_unless_told_otherwise(trace: Trace, build: ModuleType) -> None:
    cluster = build.small_cluster()
    huge = build.toy_model(2, EXPERTS, 2, hidden_size=1 << 20, moe_intermediate_size=1 << 12)
    request = PlanRequest.of(trace, cluster, huge, objective="balance", batch_tokens=96)
    with pytest.raises(InfeasibleError, match="toy needs"):
        make_plan(request)
    assert make_plan(request.but(check_memory=False)).plan.status == "feasible"


@pytest.mark.parametrize(
    ("options", "kind", "cause"),
    [
        ({"solver": "local_serch"}, UnknownNameError, "unknown solver"),
        ({"objective": "tyme"}, UnknownNameError, "unknown objective"),
        ({"domain": "poetry"}, UnknownNameError, "unknown domain"),
        ({"domain": "nothing"}, InputError, "no token of the trace"),
        ({"all_to_all": "nickel"}, UnknownNameError, "all-to-all library"),
        ({"dedup": "rack"}, UnknownNameError, "deduplication"),
        ({"replica_policy": "closest"}, UnknownNameError, "unknown replica policy"),
        ({"batch_tokens": 0}, InputError, "at least 1"),
        ({"seed": -1}, InputError, "seed"),
        ({"time_limit_s": float("nan")}, InputError, "time limit"),
    ],
)
def test_refusals(
    trace: Trace,
    cluster: Cluster,
    model: ModelSpec,
    options: dict[str, Any],
    kind: type[InputError],
    cause: str,
) -> None:
    with pytest.raises(kind, match=cause) as caught:
        make_plan(PlanRequest.of(trace, cluster, model, **options))
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_names_are_checked_before_the_work(
    trace: Trace, cluster: Cluster, model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error must not cost the minutes that a large trace's tuning data take."""

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("moesim.planning.case.tuning_counts", never)
    for options in ({"solver": "local_serch"}, {"replica_policy": "closest"}):
        with pytest.raises(InputError):
            make_plan(PlanRequest.of(trace, cluster, model, **options))


@pytest.mark.parametrize(
    ("sizes", "cause"),
    [
        ((2, 16, 2), "8 experts, top-2; toy has 2, 16, top-2"),
        ((2, EXPERTS, 4), "top-2; toy has 2, 8, top-4"),
        ((1, EXPERTS, 2), "the trace has 2 MoE layers"),
    ],
)
def test_another_models_trace(
    trace: Trace, cluster: Cluster, build: ModuleType, sizes: tuple[int, int, int], cause: str
) -> None:
    with pytest.raises(MismatchError, match=cause):
        make_plan(PlanRequest.of(trace, cluster, build.toy_model(*sizes)))


def test_part_of_the_layers_is_said(trace: Trace, cluster: Cluster, build: ModuleType) -> None:
    model = build.toy_model(5, EXPERTS, 2)
    result = make_plan(PlanRequest.of(trace, cluster, model, objective="balance", batch_tokens=96))
    assert "the trace covers 2 of toy's 5 MoE layers; figures are of those" in result.notices


def test_a_trace_without_domains(build: ModuleType, cluster: Cluster) -> None:
    plain = build.random_trace(np.random.default_rng(0), 48, 1, EXPERTS, 2)
    with pytest.raises(MismatchError, match="no domains"):
        make_plan(PlanRequest.of(plain, cluster, None, domain="code"))


@pytest.mark.filterwarnings("error")
def test_an_empty_trace_is_refused_without_warnings(trace: Trace, cluster: Cluster) -> None:
    with pytest.raises(InputError, match="no tokens"):
        make_plan(PlanRequest.of(trace.take(np.array([], np.int64)), cluster, None))


def test_one_request_cannot_be_split(build: ModuleType, cluster: Cluster) -> None:
    lone = build.random_trace(np.random.default_rng(0), 48, 1, EXPERTS, 2, request_tokens=48)
    with pytest.raises(InputError, match="1 request"):
        make_plan(PlanRequest.of(lone, cluster, None))


def test_phase_follows_the_trace(trace: Trace, cluster: Cluster) -> None:
    decode = replace(trace, phases=np.ones(trace.num_tokens, np.uint8))
    defaults: dict[str, str] = {}
    assert _phase_and_batch(PlanRequest.of(decode, cluster, None), decode, defaults) == (
        "decode",
        256,
    )
    assert defaults["phase"] == "decode (100% of the trace's tokens are decode)"


def test_solvers_of_another_schedule_are_judged_under_it(
    trace: Trace, cluster: Cluster, model: ModelSpec
) -> None:
    """Decode steps under both schedules; prefill steps under one, and a line says so."""
    asked = PlanRequest.of(trace, cluster, model, solver="exflow", batch_tokens=16)
    decode = replace(trace, phases=np.ones_like(trace.phases))
    judged = make_plan(PlanRequest.of(decode, cluster, model, solver="exflow", batch_tokens=16))
    own = judged.plan.evaluation["own_schedule"]
    assert own["schedule"] == "context-coherent"
    assert set(own["step_us"]) == {"linear", "eplb", "exflow"}
    assert min(own["step_us"].values()) > 0
    assert any("under it, over nccl" in line for line in judged.lines)
    plain = make_plan(asked)
    assert "own_schedule" not in plain.plan.evaluation
    assert any("decode tokens only" in line for line in plain.lines)
