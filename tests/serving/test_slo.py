"""Promises: what is understood, kept and missed."""

from __future__ import annotations

import re
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.serving.config import ServingConfig
from moesim.serving.deployment import deploy
from moesim.serving.fit import Split, check_possible, default_split
from moesim.serving.requests import Requests
from moesim.serving.slo import METRICS, Bound, parse_slo
from moesim.serving.speculative import Speculation


def test_parse() -> None:
    slo = parse_slo("ttft<2s, tpot_p99<=50ms,e2e_mean<1.5min")
    assert slo.bounds == (
        Bound("ttft", "", 2.0),
        Bound("tpot", "p99", 0.05),
        Bound("e2e", "mean", 90.0),
    )
    assert [b.name for b in slo.per_request] == ["ttft"]
    assert [b.name for b in slo.over_requests] == ["tpot_p99", "e2e_mean"]
    assert str(slo) == "ttft<2s,tpot_p99<50ms,e2e_mean<90s"
    assert parse_slo(str(slo)) == slo
    # With percentiles only, goodput takes them for each request.
    assert [b.name for b in parse_slo("tpot_p99<1ms").per_request] == ["tpot_p99"]


@pytest.mark.parametrize(
    "text",
    [
        "", "ttft", "ttft<2", "ttft<2h", "ttft>2s", "ttft<-2s", "ttft<0s", "ttft<1e999s",
        "ttft<1.2.3s", "ttft<2s,,tpot<1s", "ttft<2s,ttft<3s", "<2s",
    ],
)  # fmt: skip
def test_bad_text(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_slo(text)
    assert error.value.remedy


@pytest.mark.parametrize("name", ["tptt", "ttft_p98", "ttft_", "_p99"])
def test_unknown_figures(name: str) -> None:
    with pytest.raises(UnknownNameError):
        parse_slo(f"{name}<2s")


def test_missed() -> None:
    """0.05 s is not under 50 ms; a figure that no request has is not missed."""
    slo = parse_slo("tpot_p99<50ms,ttft_p50<1s,e2e_max<1s")
    assert len(METRICS) == 18
    metrics = {"tpot_p99": 0.05, "ttft_p50": 0.2, "e2e_max": None}
    assert [b.name for b in slo.missed(metrics)] == ["tpot_p99"]
    with pytest.raises(UnknownNameError):
        slo.missed({})


def test_goodput_by_hand(small: ModuleType) -> None:
    """One at a time, prompt and two more tokens in steps of 1 ms: TTFT 1, 4, 7, 10 ms. Under 5 ms:
    two of four; four requests at once have no rate. A request too large counts as not kept."""
    result = small.serve(
        small.at_once([4, 4, 4, 4], [3] * 4),
        small.tables(1000.0),
        deployment=small.small_deployment(max_sequences=1),
    )
    goodput = result.goodput(parse_slo("ttft<5ms,tpot<2ms"))
    assert goodput["share"] == 0.5
    assert goodput["requests_per_s"] is None
    assert result.goodput(parse_slo("tpot<0.5ms"))["share"] == 0.0
    some = small.serve(small.at_once([4, 400], [1, 1]), small.tables(), capacity=64)
    # A single token has no time per token, and misses no promise about it.
    assert some.goodput(parse_slo("tpot<1ms"))["share"] == 0.5


def test_unserved_requests_are_infinitely_late(small: ModuleType) -> None:
    """One of four is too large: the median is of the served, the p90 is not kept by anything."""
    result = small.serve(small.at_once([4, 4, 4, 400], [3] * 4), small.tables(), capacity=64)
    slo = parse_slo("ttft_p50<1s,e2e_p90<1h,ttft_mean<1h".replace("1h", "60min"))
    figures = result.promised(slo)
    assert figures["ttft_p50"] == pytest.approx(1e-3)
    assert figures["e2e_p90"] == float("inf")
    assert [b.name for b in slo.missed(figures)] == ["e2e_p90", "ttft_mean"]
    assert result.metrics["e2e_p90"] == pytest.approx(3e-3)
    # Linear between order statistics, as numpy: of 1, 4, 7, 10 ms the p90 is 7 + 0.7 x 3.
    alone = small.serve(
        small.at_once([4] * 4, [3] * 4),
        small.tables(),
        deployment=small.small_deployment(max_sequences=1),
    )
    assert alone.metrics["ttft_p90"] == pytest.approx(9.1e-3)


def test_impossible_promises() -> None:
    """Below one step: the number is said, and the verdict is no (exit code 1)."""
    deployment = deploy("OLMoE-1B-7B", "h100-sxm-ib")
    requests = Requests.of([0.0], [500], [10])
    config = ServingConfig()
    check_possible(parse_slo("tpot<50ms,ttft_p99<2s"), deployment, requests, config)
    for text in ("tpot<10us", "tpot_p50<100us", "ttft<1ms", "e2e_p99<1ms"):
        with pytest.raises(InfeasibleError, match=r"takes [0-9.]+ ms") as error:
            check_possible(parse_slo(text), deployment, requests, config)
        assert error.value.exit_code == 1
    # With five tokens per step at best, a fifth of a step's time is possible.
    with pytest.raises(
        InfeasibleError, match=r"a step of one sequence takes ([0-9.]+) ms"
    ) as error:
        check_possible(parse_slo("tpot<1us"), deployment, requests, config)
    step_ms = float(error.value.cause.rsplit("takes ", 1)[1].split()[0])
    third = parse_slo(f"tpot<{step_ms / 3:.4f}ms")
    check_possible(third, deployment, requests, ServingConfig(speculation=Speculation(0.9, 4)))
    with pytest.raises(InfeasibleError):
        check_possible(third, deployment, requests, config)


def test_the_default_split() -> None:
    """DeepSeek-V3 takes 654 GB of experts and 17 GB of other weights in fp8. On 8 H200s of 136 GB
    for the engine a rank holds 82 + 17 = 99 GB: with activations 22% are left, so 32 GPUs are four
    such engines. On H100s (77 GB) it takes 16 at least, and tp 2, since
    low-latency buffers have 3.8 GB of each. Kimi-K2 (1,029 GB) leaves less than a tenth
    on 16 H100s with tp 8 and the buffers that the remedy names, none with more; more is not asked
    of NVLink: the largest cache is taken."""
    from moesim.cluster import load_cluster
    from moesim.model.names import load_model

    def split(name: str, cluster: str, gpus: int, **given: Any) -> Split:
        return default_split(load_model(name), partial(load_cluster, cluster), gpus, **given)

    with pytest.raises(InfeasibleError, match=r"8 x h100.*weights take [0-9.]+") as error:
        split("deepseek-v3", "h100-sxm-ib", 8)
    assert "more GPUs" in error.value.remedy
    assert str(split("deepseek-v3", "h200-sxm-ib", 32)) == "4 x tp1 dp8 ep8"
    assert str(split("deepseek-v3", "h100-sxm-ib", 32)) == "2 x tp2 dp8 ep16"
    assert str(split("deepseek-v3", "h200-sxm-ib", 32, tp=8)) == "4 x tp8"
    assert str(split("deepseek-v3", "h200-sxm-ib", 32, tp=8, replicas=1)) == "1 x tp8 dp4 ep32"
    assert str(split("qwen3-30b-a3b", "h200-sxm-ib", 8)) == "8 x tp1"
    with pytest.raises(InfeasibleError, match="low-latency kernels for 256 rows") as error:
        split("kimi-k2", "h100-sxm-ib", 16)
    said = re.match(r"lower `dispatch_tokens` to (\d+) or less", error.value.remedy)
    assert said is not None
    rows = int(said[1])
    assert str(split("kimi-k2", "h100-sxm-ib", 16, dispatch_tokens=rows)) == "1 x tp8 dp2 ep16"
    with pytest.raises(InfeasibleError):
        split("kimi-k2", "h100-sxm-ib", 16, dispatch_tokens=rows + 1)
    cut = split("mixtral-8x7b", "h100-sxm-ib", 16, replicas=1).engine
    assert (cut.tp, cut.dp, cut.ep, cut.moe_tp) == (1, 16, 8, 2)
    with pytest.raises(InputError, match="cannot be spread over 24 GPUs as replicas 1: experts"):
        split("mixtral-8x7b", "h100-sxm-ib", 24, replicas=1)
    with pytest.raises(InputError, match="12 GPUs are not a whole number"):
        split("mixtral-8x7b", "h100-sxm-ib", 12)
    with pytest.raises(InputError, match="different GPUs"):
        split("qwen3-30b-a3b", "mixed-h100-a100", 16, replicas=2)
    assert split("qwen3-30b-a3b", "mixed-h100-a100", 16).replicas == 1
