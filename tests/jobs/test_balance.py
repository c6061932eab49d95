"""`moesim.balance`: the verdict, its words, and what it refuses."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest

import moesim
from moesim.cli.main import run
from moesim.errors import InputError, UnknownNameError
from moesim.jobs.balance_points import crossings
from moesim.jobs.balance_result import BalanceResult


def skewed(build: ModuleType, skew: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    return build.random_trace(rng, 2048, 3, 16, 2, skew=skew, request_tokens=16)


def compare(build: ModuleType, skew: float = 1.0, **options: object) -> BalanceResult:
    given = {"schemes": ("plan", "eplb-sglang", "moonep"), "steps": 400, "batch_tokens": 64}
    return moesim.balance(
        skewed(build, skew),
        cluster=build.small_cluster(1, 4),
        model=build.toy_model(3, 16, 2),
        redundant_experts=0,
        **(given | options),
    )


def test_a_plan_beats_doing_nothing_on_skewed_experts(build: ModuleType) -> None:
    result = compare(build, schemes=("plan-balance",))
    assert [row.name for row in result.rows] == ["none", "plan-balance"]
    assert result.rows[0].against_none.value == 0
    assert result.best is not None
    assert result.best.name == "plan-balance"
    assert result.worth_it
    assert "take plan-balance: -" in result.verdict()[0]
    assert "moesim plan --objective balance" in result.verdict()[1]
    shown = result.to_json()
    assert shown["best"] == "plan-balance"
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert result.to_frame().loc["plan-balance", "against_none"] < 0
    assert len(repr(result)) < 2000


def test_stalls_are_charged_and_named(build: ModuleType) -> None:
    """A plan of 500 ms every 100 steps costs more than any step saves."""
    result = compare(build, schemes=("eplb-asked",), interval=100, window=50, rebalance_plan=500.0)
    row = result.rows[1]
    assert row.outcome.num_plans == pytest.approx(4)
    assert row.value("stall_us_per_plan") >= 500e3
    assert row.step_us.value - row.parts_us["stalls"] < row.parts_us["stalls"]
    assert not result.worth_it
    assert result.verdict()[0] == "leave balancing off: nothing beats doing nothing"
    assert "eplb-asked: leave it off: +" in result.verdict()[1]
    assert "stalls 527.1 ms every 100 steps" in result.verdict()[1]
    assert row.pays_from_steps is not None
    assert row.pays_from_steps > 100


def test_redundant_slots_are_charged_in_decode(build: ModuleType) -> None:
    """An expert of 600 kB in 3 layers and 1 slot a GPU: 1.8 MB; the charge is the step's time over
    what is left of the KV cache."""
    trace = skewed(build, 1.0)
    decode = type(trace)(
        **{
            **{name: getattr(trace, name) for name in trace.__dataclass_fields__},
            "phases": np.ones(trace.num_tokens, np.uint8),
        }
    )
    result = moesim.balance(
        decode,
        cluster=build.small_cluster(1, 4),
        model=build.toy_model(3, 16, 2),
        redundant_experts=4,
        schemes=("plan+r",),
        steps=400,
        batch_tokens=64,
    )
    row = result.rows[1]
    assert result.charged_for_kv
    assert row.kv_bytes_less == 3 * 600_000
    assert row.kv_share is not None
    assert 1 + row.charged.value == pytest.approx((1 + row.against_none.value) / row.kv_share)


def test_names_and_numbers_that_cannot_be_used(build: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="eplb"):
        compare(build, schemes=("eplbb",))
    with pytest.raises(InputError, match="3 redundant experts"):
        moesim.balance(
            skewed(build, 1.0),
            cluster=build.small_cluster(1, 4),
            model=build.toy_model(3, 16, 2),
            redundant_experts=3,
        )
    with pytest.raises(InputError, match="layers_per_chunk"):
        compare(build, interval=10, layers_per_chunk=1, rebalance_async=True)
    with pytest.raises(InputError, match="number of GPUs"):
        moesim.balance(skewed(build, 1.0))


def test_same_inputs_same_answer(build: ModuleType) -> None:
    assert compare(build).to_json() == compare(build).to_json()


def test_command_prints_the_verdict_and_exits_with_it(build, tmp_path, capsys) -> None:
    """The bundled sample: EPLB at SGLang's defaults alone does not pay, so the exit is 1."""
    path = tmp_path / "b.json"
    args = [
        "balance",
        "--trace",
        "sample:debian-moe",
        "--gpus",
        "8",
        "--steps",
        "1200",
        "--batch-tokens",
        "512",
    ]
    args += ["--schemes", "eplb-sglang+r", "--out", str(path), "--json"]
    code = run(args)
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(path.read_text())
    assert code == (0 if said["best"] else 1)
    assert set(said["schemes"]) == {"none", "eplb-sglang+r"}


def test_requests_feel_stalls_and_smaller_caches(build: ModuleType) -> None:
    """Requests decide where there are any: with a plan of 500 ms every 100 steps the time per
    output token is worse, and the table and JSON say so."""
    result = compare(
        build,
        schemes=("eplb-asked",),
        interval=100,
        window=50,
        rebalance_plan=500.0,
        requests="poisson:rate=100,requests=400,prompt=20,output=200",
        slo="tpot<100ms",
    )
    assert result.served is not None
    assert list(result.served) == ["none", "eplb-asked"]
    assert result.served["none"].tpot.value == 0.0
    assert result.served["eplb-asked"].tpot.low > 0
    figures = {name: found.figures for name, found in result.served.items()}
    assert figures["eplb-asked"]["tpot_p99"] > figures["none"]["tpot_p99"]
    assert "goodput_share" in figures["none"]
    said = result.summary()
    assert "eplb-asked: leave it off: +" in said
    assert "% TPOT (" in said
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["served"]["none"]["tpot_mean"]
    with pytest.raises(InputError, match="about requests"):
        compare(build, slo="tpot<100ms")


def test_crossings_by_hand() -> None:
    """+2% at 100 tokens, -2% at 10,000: half way in the logarithm, 1,000. A gain that never changes
    its sign crosses nowhere."""
    (where,) = crossings({100: 0.02, 10_000: -0.02})
    assert where == (pytest.approx(1000.0), True)
    assert crossings({100: -0.02, 10_000: -0.01}) == []


def test_break_even_tries_other_batches_and_paces(build: ModuleType) -> None:
    result = compare(build, schemes=("eplb-sglang",), steps=4000, batch_tokens=64, break_even=True)
    assert result.points is not None
    assert list(result.points.by_batch["eplb-sglang"]) == [4, 16, 64, 256, 1024]
    assert list(result.points.by_steps["eplb-sglang"]) == [250, 1000, 4000, 16000]
    (said,) = [line for line in result.points.lines() if "tokens per step" in line]
    assert said.startswith("eplb-sglang: pays ")
    assert set(result.to_json()["break_even"]) == {"batch_tokens", "steps"}


def test_few_held_out_requests_are_a_notice(build: ModuleType) -> None:
    """Twelve requests of 16 tokens: about half are held out, fewer than the ten that intervals
    need; 128 requests leave enough."""
    rng = np.random.default_rng(0)
    few = build.random_trace(rng, 192, 3, 16, 2, skew=1.0, request_tokens=16)
    group = {"cluster": build.small_cluster(1, 4), "model": build.toy_model(3, 16, 2)}
    short = {"schemes": ("plan-balance",), "steps": 40, "batch_tokens": 16}
    said = moesim.balance(few, redundant_experts=0, **group, **short).notices
    assert any("only: intervals over requests are far too narrow" in line for line in said)
    many = moesim.balance(skewed(build, 1.0), redundant_experts=0, **group, **short).notices
    assert not any("far too narrow" in line for line in many)


def test_flags_of_vllm_are_complete(build: ModuleType) -> None:
    """vLLM refuses its balancer without expert parallelism."""
    result = compare(build, schemes=("eplb-vllm",))
    assert result.rows[1].outcome.enable.startswith("vLLM: --enable-expert-parallel --enable-eplb")
