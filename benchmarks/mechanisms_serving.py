"""Rows of `benchmarks/mechanisms.py` on serving and the network; see there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

import moesim
from benchmarks.mechanisms_row import Row
from moesim.jobs.admit import admit
from moesim.jobs.prefill import prefill
from moesim.jobs.serve_composition import serve_composition
from moesim.serving.chunks import chunk_saves
from moesim.serving.deployment import deploy
from moesim.serving.requests import Requests
from moesim.serving.ring import block_bytes
from moesim.serving.step_cost import EngineStepCost

if TYPE_CHECKING:
    from benchmarks.mechanisms import Traces

QWEN = {"model": "Qwen3-30B-A3B", "cluster": "h100-sxm-ib"}
SETTING = "Qwen3-30B-A3B, H100s, requests drawn (Poisson)"


def drawn(
    rate: float, count: int = 600, prompt: str = "lognormal(800;0.8)", output: int = 150
) -> str:
    return f"poisson:rate={rate:g},requests={count},prompt={prompt},output={output}"


def metrics(requests: Any, **options: Any) -> dict[str, Any]:
    return dict(moesim.serve(requests, **{**QWEN, **options}).record["metrics"])


def chunks(traces: Traces) -> Iterator[Row]:
    for trace, model in ((traces.gpt_oss, "gpt-oss-20b"), (traces.deepseek, "DeepSeek-V2-Lite")):
        one = replace(deploy(model, "h100-sxm-ib", tp=1, dp=1), trace=trace)
        cost = EngineStepCost(one)
        saves = chunk_saves(cost, 7)
        parts = []
        for drafts in (3, 7):
            at = int(np.searchsorted(cost.moe_counts, drafts + 1))
            layers, moe = one.model.num_moe_layers, cost.experts
            single = layers * moe.experts_us(float(drafts + 1), moe.load)
            parts.append(f"{drafts} drafts {saves[drafts, at] / single:.1%}")
        yield Row(
            "BlockFFN, active experts of a drafted chunk",
            "arXiv:2507.08771, abstract",
            "up to 3.67x over dense models on end-side devices; over 70% of a chunk of 8 idle",
            f"experts' time of a sequence that verifies a chunk, less than of independent tokens:"
            f" {', '.join(parts)}",
            f"{model}, its trace, one H100, `serve --speculate`",
            "its training makes the tokens of a chunk agree, these models' did not; its factor is"
            " over a dense model, with its own kernels",
        )


def speculation(traces: Traces) -> Iterator[Row]:
    cells = []
    for rate in (2, 16):
        plain, smart, fixed = (
            metrics(drawn(rate), gpus=1, **more)["e2e_mean"]
            for more in (
                {},
                {"speculate": 0.7},
                {"speculate": 0.7, "fixed_drafts": True},
            )
        )
        cells.append(
            f"{rate}/s: {plain / smart:.2f}x by goodput, {plain / fixed:.2f}x with always 4 drafts"
        )
    yield Row(
        "SmartSpec",
        "arXiv:2406.14066, abstract",
        "average request latency up to 3.2x lower than without speculation",
        f"mean end-to-end time lower by, at {'; '.join(cells)}",
        f"{SETTING}, one GPU, acceptance 0.7, drafting a token 5% of a step",
        "acceptance and drafting cost are assumed; verifying reads more experts' weights in a"
        " mixture than in the dense models it was measured on",
    )


def batching(traces: Traces) -> Iterator[Row]:
    requests = drawn(6, prompt="lognormal(2600;0.4)", output=60)
    mixed, small, first = (
        metrics(requests, gpus=1, prefill=name, max_batch_tokens=budget)
        for name, budget in (("mixed", 8192), ("mixed", 2048), ("first", 8192))
    )

    def lower(name: str, than: dict[str, Any]) -> str:
        return f"{first[name] / than[name]:.2f}x"

    yield Row(
        "DeepSpeed-FastGen, Dynamic SplitFuse",
        "arXiv:2401.08671, abstract",
        "up to 2.3x effective throughput, 2x lower latency on average, up to 3.7x lower tail"
        " latency of tokens than systems like vLLM",
        f"chunks beside decodes against prompts first, steps of 8,192 tokens: TPOT p99"
        f" {lower('tpot_p99', mixed)} lower, end to end on average {lower('e2e_mean', mixed)}; with"
        f" steps of 2,048 {lower('tpot_p99', small)} and {lower('e2e_mean', small)}",
        f"{SETTING}, one GPU, 6/s, prompts of 2,600 and outputs of 60 tokens on average",
        "the scheduling alone; its kernels and vLLM of 2023 are not modelled. Each step reads all"
        " experts' weights, so that a mixture pays for small steps",
    )


def best_effort(traces: Traces) -> Iterator[Row]:
    slo = "ttft<1s,tpot<40ms"

    def share(rate: float, **more: Any) -> float:
        made = moesim.serve(drawn(rate, 800), **{**QWEN, "gpus": 1, "slo": slo, **more})
        return float(made.record["slo"]["goodput"]["share"])

    rates = (4, 8, 12, 16, 24, 32, 48)
    best = {}
    for name, more in (
        ("queue", {}),
        ("shorten", {"priorities": [1.0], "level": ["shorten@4=0.25"]}),
        ("small model", {"model": "OLMoE-1B-7B"}),
    ):
        best[name] = max((r for r in rates if share(r, **more) >= 0.95), default=0)
    yield Row(
        "Learned best-effort serving",
        "arXiv:2401.07886, abstract",
        "available at over 10x the request rate of static serving",
        f"95% of requests within {slo} up to {best['queue']}/s as they are, {best['shorten']}/s"
        f" with answers cut to a quarter behind 4 waiting, {best['small model']}/s all to"
        " OLMoE-1B-7B (the last is the highest rate tried)",
        f"{SETTING}, one GPU, rates {', '.join(map(str, rates))}/s",
        "its router is learned and picks among dense models 50 times apart in size (125M to 6.7B);"
        " ours is a rule, and the models are 3 times apart in active parameters",
    )


def routers(traces: Traces) -> Iterator[Row]:
    cells = []
    for rate in (36, 42):
        requests = drawn(rate, 1200, "lognormal(1200;1.4)", 150)
        e2e = {
            name: metrics(requests, gpus=4, replicas=4, router=name, **more)["e2e_mean"]
            for name, more in (
                ("round_robin", {}),
                ("least_loaded", {}),
                ("length_aware", {"length_error": 0.5}),
            )
        }
        ours = e2e["length_aware"]
        cells.append(
            f"{rate}/s: {ours / e2e['round_robin'] - 1:+.1%} against round_robin,"
            f" {ours / e2e['least_loaded'] - 1:+.1%} against least_loaded"
        )
    yield Row(
        "Intelligent router",
        "arXiv:2408.13510, abstract",
        "over 11% lower end-to-end latency than existing approaches (round robin among them)",
        f"mean end-to-end time of length_aware, at {'; '.join(cells)}",
        f"{SETTING}, 4 engines of one GPU, prompts log-normal (1,200; 1.4), lengths predicted"
        " with an error of 0.5",
        "a rule on predicted tokens, not a learned policy; outputs here are all as long. What a"
        " router can save is waiting, which depends on the load",
    )


def shared_prefix(traces: Traces) -> Iterator[Row]:
    cells = []
    for tokens in (1024, 16384):
        blocks = list(range(tokens // 512))
        count = 400
        own = [[*blocks, 10_000 + i] for i in range(count)]
        requests = Requests.of(
            np.zeros(count), np.full(count, tokens + 512), np.full(count, 128), blocks=own
        )
        plain, shared = (
            metrics(requests, gpus=8, tp=8, ep=8, shared_reads=on)["duration_s"]
            for on in (False, True)
        )
        cells.append(f"{tokens:,} tokens {plain / shared:.2f}x")
    yield Row(
        "Hydragen",
        "arXiv:2402.05099, abstract, and that of its ICML 2024 workshop version",
        "throughput of CodeLlama-13b up by over 3x with a prefix of 1,024 tokens and over 30x with"
        " one of 16,384, batches of 1,000, eight A100s",
        f"400 sequences at once that share a beginning, time to serve all: {', '.join(cells)}",
        "Qwen3-30B-A3B, tp8 on 8 H100s, outputs of 128 tokens",
        "this model's queries share 4 KV heads, which makes attention a small part of a step; the"
        " claim's model has Llama 2's architecture (transformers' page of Code Llama), in which"
        " each of 40 heads has keys of its own",
    )


def composition(traces: Traces) -> Iterator[Row]:
    said = serve_composition(
        "poisson:rate=2,requests=500,prompt=256,output=20",
        whole_models=150,
        model="OLMoE-1B-7B",
        cluster="h100-sxm-ib",
        gpus=8,
    ).to_json()
    figures, found = said["figures"], said["found_in"]
    yield Row(
        "Composition of Experts (SN40L)",
        "arXiv:2405.07518, abstract",
        "150 experts on one node of 8: up to 19x fewer machines, models switched 15x to 31x faster"
        " than by a DGX",
        f"8 GPUs instead of {figures['gpus_if_all_in_hbm']:.0f}; found in HBM {found['HBM']:.0%},"
        f" in host memory {found['host memory']:.0%}, on NVMe {found['NVMe']:.0%};"
        f" {said['from_host_us'] / 1e3:.0f} ms to switch from host memory,"
        f" {figures['copying_share']:.0%} of the busy time",
        "150 models of OLMoE-1B-7B's size, 8 H100s, popularity r**-1, batches of one",
        "the slower side of its comparison: a GPU node's host link. Its chip reaches DDR faster;"
        " HBM here is larger, so that fewer GPUs would be saved",
    )


def admission(traces: Traces) -> Iterator[Row]:
    cells = []
    for count in (200, 600):
        rate = 10 if count == 200 else 4
        found = admit(f"random:count={count},gb_per_s={rate}", gpus=32).found
        best = found["exact"]
        cells.append(
            f"{count} flows: genetic {found['genetic'].worth / best.worth:.1%} of"
            f" {'the optimum' if best.proven else 'the best found'}, one path each"
            f" {found['one path each'].worth / best.worth:.1%}"
        )
    yield Row(
        "PFAR, flow admission",
        "arXiv:2009.10822, abstract",
        "genetic algorithm at about 95% of the optimum; exact often in seconds",
        "; ".join(cells),
        "32 GPUs of h100-sxm-roce-leafspine, 4 spines, random flows and priorities",
        "its topologies are semi-random with up to 50 nodes; here paths differ in the spine alone",
    )


def ring(traces: Traces) -> Iterator[Row]:
    for model, gpus in (("Qwen3-30B-A3B", 8), ("DeepSeek-V3", 32)):
        times = prefill(model, tokens=131_072, gpus=gpus, cluster="h200-sxm-ib").times
        whole = times["one rank"].total_us
        cells = (f"{n} {whole / t.total_us:.1f}x" for n, t in times.items() if n != "one rank")
        keys, queries, _ = block_bytes(deploy(model, "h200-sxm-ib", tp=1, dp=gpus), 1.0)
        again = times["ring"].attention_us / times["all-gather"].attention_us - 1
        waits = {n: times[n].exposed_us / 1e3 for n in ("all-gather", "ring", "token-ring")}
        yield Row(
            "TokenRing",
            "arXiv:2412.20501, abstract",
            "less communication time than Ring Attention by using both directions (no factor in the"
            " abstract)",
            f"as fast as one rank: {', '.join(cells)}; waiting for what is sent"
            f" {', '.join(f'{n} {ms:.0f} ms' for n, ms in waits.items())}",
            f"{model}, a prompt of 131,072 tokens, {gpus} H200s",
            f"its gain is where keys and values are as large as queries: here queries are"
            f" {queries / keys:.0f} times as large, and the plain ring hides its messages. A ring's"
            f" rounds read queries again: {again:+.0%} attention over gathering all keys first",
        )


SECTIONS = (
    chunks,
    speculation,
    batching,
    best_effort,
    routers,
    shared_prefix,
    composition,
    admission,
    ring,
)
