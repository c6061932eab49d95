"""Published figures of engines on people's machines, predicted anew: reports/offloading-people.

    python benchmarks/offloading_people.py [--data ../shared/data]

Reads reports/offloading-people/facts.yaml, writes results.json and README.md beside it. With
--data, hit rates of frequent experts come from the real trace there; without it those rows are left
out. About a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesim.caching.curves import miss_table
from moesim.caching.events import decode_stream
from moesim.caching.planner import Request, make_workload, plan_cache
from moesim.caching.rates import engine_rates
from moesim.caching.simulate import CacheSettings, layer_choices, run_policy
from moesim.cluster import Machine, load_machine
from moesim.cluster.machine import _assembled, load_host
from moesim.cluster.machine_schema import MachineFile
from moesim.cluster.schema import GpuFile
from moesim.jobs.cache_engines import hot_curve
from moesim.model.hf.reader import read_config
from moesim.model.names import load_model
from moesim.model.weights import Weights, load_weights
from moesim.offloading.by_layer import accelerate, vllm
from moesim.offloading.ktransformers import at_experts
from moesim.offloading.llama_cpp import fixed, llama_cpp
from moesim.offloading.rates import MARGIN_BYTES
from moesim.offloading.task import Task
from moesim.trace.batches import index_requests
from moesim.trace.format import Trace, TraceMeta, load_token_trace
from moesim.trace.uniform import uniform_trace

MIB = 1 << 20
EAGER_LAYER_S = 1.2e-3
MIXES: dict[str, tuple[str, str, dict[str, float]]] = {
    # types of experts and attention, bytes per weight where they are others: as the sources say
    "BF16_MXFP4": ("mxfp4", "bf16", {}),
    "IQ4_XS_MIX": ("iq4_xs", "q5_k", {"tables": 210 / 256}),
    "IQ4_K_MIX": ("iq4_k", "iq4_k", {"experts": 4.9 / 8, "attention": 4.9 / 8, "tables": 34 / 32}),
    "IQ3_K_MIX": ("iq3_k", "iq6_k", {"experts": (110 + 110 + 144) / 256 / 3, "tables": 34 / 32}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("reports/offloading-people"))
    args = parser.parse_args()
    facts = yaml.safe_load((args.out / "facts.yaml").read_text(encoding="utf-8"))
    machines = {name: machine_of(name, raw) for name, raw in facts["machines"].items()}
    trace = args.data / "deepseek-v2-lite.npz"
    rows = [
        *runs(facts, machines),
        *memory(facts, machines),
        *ktransformers(facts, machines, trace if trace.exists() else None),
        *hits(facts),
        *moe_infinity(facts, machines, trace if trace.exists() else None),
        *moe_gen(facts, machines),
    ]
    results = {"rows": rows, "medians": medians(rows), "orders": orders(rows)}
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (args.out / "results.json").write_text(text, encoding="utf-8")
    (args.out / "README.md").write_text(page(results), encoding="utf-8")
    print(json.dumps(results["medians"], indent=1))


def machine_of(name: str, raw: dict[str, Any]) -> Machine:
    file = MachineFile.model_validate(
        {"format": "moesim-machine", "version": 1, "name": "m", **raw}
    )
    gpus = tuple(
        gpu.spec() if isinstance(gpu, GpuFile) else load_machine(gpu).gpus[0] for gpu in file.gpus
    )
    host = load_host(file.host) if isinstance(file.host, str) else file.host.host()
    return _assembled(name, gpus, host)


def weights_of(model: str, quant: str) -> Weights:
    if quant not in MIXES:
        return load_weights(model, quant)
    experts, dense, stored = MIXES[quant]
    spec = replace(load_model(model), expert_dtype=experts, dense_dtype=dense)
    return load_weights(replace(spec, stored=tuple(stored.items())))


def row(
    group: str, what: str, unit: str, published: float, predicted: float, source: str, **more: Any
) -> dict[str, Any]:
    return {
        "group": group,
        "what": what,
        "unit": unit,
        "published": published,
        "predicted": float(f"{predicted:.4g}"),
        "error": float(f"{predicted / published - 1:.3f}"),
        "source": source,
        "fitted": False,
        **more,
    }


def machine_named(name: str, machines: dict[str, Machine]) -> Machine:
    return machines[name] if name in machines else load_machine(name)


def runs(facts: dict[str, Any], machines: dict[str, Machine]) -> list[dict[str, Any]]:
    out, source = [], ""
    for run in facts["runs"]:
        source = source if run["source"] == "the same" else run["source"]
        engine = run.get("engine", "llama.cpp")
        quant = run.get("quant")
        weights = load_weights(run["model"]) if quant is None else weights_of(run["model"], quant)
        task = Task(
            weights,
            weights,
            machine_named(run["machine"], machines),
            run.get("context", run["prompt"] + run["output"]),
            run["prompt"],
            run["output"],
            run.get("cache_type", "fp16"),
        )
        if engine == "vLLM":
            plan = vllm(replace(task, checkpoint=load_weights(run["model"])))
            what = f"vLLM, {run['model']} on {run['machine']}"
        elif engine == "KTransformers":
            plan = at_experts(task, run["gpu_experts"])
            what = (
                f"KTransformers, {run['model']} on {run['machine']}, {run['gpu_experts']} experts"
                f" of a layer on the GPU, {run['prompt']:,} tokens"
            )
        else:
            plan = fixed(roomy(task), run["cpu_layers"], run["ubatch"], engine)
            what = (
                f"{engine}, {run['model']} {run['quant']} on {run['machine']}, {run['cpu_layers']}"
                f" layers on the CPU, -ub {run['ubatch']}"
            )
        more = {"fitted": run.get("fitted", False)}
        if "decode" in run:
            out.append(
                row(run["group"], what, "tokens/s", run["decode"], plan.decode_tokens_per_s,
                    source, **more)
            )  # fmt: skip
        if "prompt_rate" in run:
            out.append(
                row(f"{run['group']}, prompts", what, "prompt tokens/s", run["prompt_rate"],
                    plan.prompt_tokens_per_s, source, **more)
            )  # fmt: skip
    return out


def roomy(task: Task) -> Task:
    """The task without the margin: people fill their GPUs to the brim."""
    gpus = task.machine.gpus
    if task.machine.host.unified:
        return task
    total = min(gpu.hbm_gb for gpu in gpus) * 2**30
    return replace(task, memory_gb=(total + 2 * MARGIN_BYTES) / 1e9)


def memory(facts: dict[str, Any], machines: dict[str, Machine]) -> list[dict[str, Any]]:
    out = []
    for fact in facts["memory"]:
        weights = weights_of(fact["model"], fact["quant"])
        name = f"{fact['model']} {fact['quant']}"
        if "weights_of_last_layers" in fact:
            layers = weights.layer_bytes(experts=True) + weights.layer_bytes(experts=False)
            found = float(layers[-fact["weights_of_last_layers"] :].sum()) / MIB
            what = f"{name}, the last {fact['weights_of_last_layers']} layers"
            out.append(row("memory", what, "MiB", fact["weights"], found, fact["source"]))
            continue
        task = Task(
            weights, weights, machine_named(fact["machine"], machines), fact["context"],
            cache_type=fact.get("cache_type", "fp16"),
        )  # fmt: skip
        plan = fixed(roomy(task), fact["cpu_layers"], fact["ubatch"])
        gpu = plan.gpus[0]
        compute = gpu.compute
        total = fact["weights"] + fact["kv"] + fact["compute"]
        what = (
            f"{name}, {fact['cpu_layers']} layers on the CPU: weights {gpu.weights / MIB:.0f} of"
            f" {fact['weights']:.0f}, KV {gpu.kv / MIB:.0f} of {fact['kv']:.0f}, compute"
            f" {compute / MIB:.0f} of {fact['compute']:.0f}"
        )
        out.append(
            row("memory", what, "MiB", round(total, 2), (gpu.weights + gpu.kv + compute) / MIB,
                fact["source"])
        )  # fmt: skip
    return out


def ktransformers(
    facts: dict[str, Any], machines: dict[str, Machine], trace: Path | None
) -> list[dict[str, Any]]:
    fact, out = facts["ktransformers"], []
    spec = read_config(fact["config"], "facts.yaml", "Qwen3-Next-80B-A3B", "facts.yaml").spec
    weights = load_weights(spec)
    task = Task(weights, weights, machines[fact["machine"]], 4096, 300, 300)
    hot = None
    if trace is not None:
        work = make_workload(load_token_trace(trace, "the report"), Request(24.0, max_steps=2048))
        curve = hot_curve(work)
        hot = np.interp(np.linspace(0, 1, 513), np.linspace(0, 1, len(curve)), curve)
    for strategy in ("random", "uniform", "front-loading", "frequency"):
        if strategy == "frequency" and hot is None:
            continue
        name = "uniform" if strategy == "random" else strategy
        asked = replace(task, hot=hot) if strategy == "frequency" else task
        for share, published in zip(fact["share"], fact[strategy], strict=True):
            found = at_experts(asked, 512 * share / 100, name).decode_tokens_per_s
            what = f"{strategy}, {share}% of the experts on the GPUs"
            out.append(
                row("KTransformers", what, "tokens/s", published, found, fact["source"],
                    fitted=share in (0, 100))
            )  # fmt: skip
    return out


def zipf_trace(fact: dict[str, Any], exponent: float, seed: int = 0) -> Trace:
    """Tokens that draw experts by a Zipf law, a ranking of its own for each layer and request."""
    rng = np.random.default_rng(seed)
    num, k, tokens, requests = (fact[x] for x in ("experts", "top_k", "tokens", "requests"))
    layers = 4
    log_p = -exponent * np.log(np.arange(1, num + 1))
    ids = np.empty((tokens * requests, layers, k), np.int16)
    for r in range(requests):
        for layer in range(layers):
            order = rng.permutation(num)
            drawn = rng.gumbel(size=(tokens, num)) + log_p
            top = np.argpartition(-drawn, k, axis=1)[:, :k]
            ids[r * tokens : (r + 1) * tokens, layer] = order[top]
    return Trace(
        ids,
        np.repeat(np.arange(requests, dtype=np.int32), tokens),
        np.tile(np.arange(tokens, dtype=np.int32), requests),
        np.ones(tokens * requests, np.uint8),
        TraceMeta("zipf", num, k, tuple(range(layers))),
    )


def lru_hits(trace: Trace, pinned_half: bool = False) -> np.ndarray:
    """[E + 1] share of accesses that LRU serves, empty at first, mean over layers; with the hottest
    half of the slots pinned, where asked for."""
    stream = decode_stream(index_requests(trace, "decode")[0], 1)
    num, settings = trace.num_experts, CacheSettings("lru", warm=False)
    share = np.zeros(num + 1)
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids)[:, layer].ravel()
        frequency = np.bincount(ids, minlength=num).astype(np.float64)
        table = np.tile(frequency, (trace.num_layers, 1))
        choices = layer_choices(trace, stream, layer, table)
        if not pinned_half:
            run = run_policy(choices, settings)
            share += run.hits() / run.events.num_accesses
            continue
        order = np.argsort(-frequency, kind="stable")
        total = run_policy(choices, settings).events.num_accesses
        for slots in range(0, num + 1, 31):
            run = run_policy(choices, settings, order[: slots // 2])
            missed = miss_table(run)[slots - slots // 2].sum()
            share[slots] += 1 - missed / total
    return share / trace.num_layers


def hits(facts: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for fact in facts["hits"]:
        at = fact["slots"].index(fact["fitted_slots"])
        target = fact["lru"][at] / 100
        low, high = 0.0, 2.0
        for _ in range(9):
            middle = (low + high) / 2
            found = lru_hits(zipf_trace(fact, middle))[fact["fitted_slots"]]
            low, high = (middle, high) if found < target else (low, middle)
        trace = zipf_trace(fact, (low + high) / 2)
        curve = lru_hits(trace)
        name = f"LRU, Zipf exponent {(low + high) / 2:.2f}"
        for i, (slots, published) in enumerate(zip(fact["slots"], fact["lru"], strict=True)):
            what = f"{name}, {slots} of {fact['experts']} slots"
            out.append(
                row("hit rates", what, "%", published, 100 * curve[slots], fact["source"],
                    fitted=i == at)
            )  # fmt: skip
        if "pinned_half" in fact:
            half = lru_hits(trace, pinned_half=True)
            for slots, published in zip(fact["slots"][:-1], fact["pinned_half"], strict=False):
                near = slots - slots % 31
                found = half[near] + curve[slots] - curve[near]
                what = f"hottest half pinned, {slots} slots"
                out.append(row("hit rates", what, "%", published, 100 * found, fact["source"]))
        if "static_32" in fact:
            ids = np.asarray(trace.expert_ids)
            first, second = np.array_split(ids, 2)
            found = np.mean([covered(first[:, x], second[:, x], 512) for x in range(ids.shape[1])])
            what = "32 experts most frequent in one half, share of the other"
            out.append(
                row("hit rates", what, "%", fact["static_32"], 100 * float(found), fact["source"])
            )
    return out


def covered(first: np.ndarray, second: np.ndarray, num: int, top: int = 32) -> float:
    best = np.argsort(-np.bincount(first.ravel(), minlength=num), kind="stable")[:top]
    return float(np.isin(second, best).mean())


def moe_infinity(
    facts: dict[str, Any], machines: dict[str, Machine], trace: Path | None
) -> list[dict[str, Any]]:
    fact, out = facts["moe_infinity"], []
    machine = machines[fact["machine"]]
    for each in fact["rows"]:
        weights = load_weights(each["model"])
        task = Task(weights, weights, machine, 2048, 1024, 256)
        if each["engine"] == "vLLM":
            seconds = 1 / vllm(task).decode_tokens_per_s
        elif each["engine"] == "accelerate":
            seconds = 1 / accelerate(task).decode_tokens_per_s
        else:
            seconds = cached_s(each["model"], machine, trace)
        what = f"{each['engine']}, {each['model']}, 16-bit"
        out.append(
            row("MoE-Infinity's table", what, "s per token", each["seconds"], seconds,
                fact["source"], fitted=each.get("fitted", False))
        )  # fmt: skip
    return out


def cached_s(model: str, machine: Machine, trace: Path | None) -> float:
    """Seconds per token of a cache that fetches every miss, in three quarters of the GPU, with
    eager layers; the real trace where there is one of the model."""
    spec = load_model(model)
    known = trace is not None and model == "DeepSeek-V2-Lite"
    found = (
        load_token_trace(trace, "the report")
        if known and trace is not None
        else uniform_trace(spec.name, spec.moe_layer_ids, spec.num_experts, spec.real_top_k)
    )
    if known:
        found = replace(found, meta=replace(found.meta, model=model))
    rates = replace(engine_rates(spec, machine), layer_us=EAGER_LAYER_S * 1e6)
    request = Request(24 * 2**30 / 1e9 * 0.75 + 1.0, 1, 1024, "activation", "none", "off",
                      max_steps=256)  # fmt: skip
    return 1 / plan_cache(make_workload(found, request), rates, request).timeline.tokens_per_s


def moe_gen(facts: dict[str, Any], machines: dict[str, Machine]) -> list[dict[str, Any]]:
    fact, out = facts["moe_gen"], []
    for each in fact["rows"]:
        weights = load_weights(each["model"], "F16")
        plan = llama_cpp(Task(weights, weights, machines[fact["machine"]], 1024, 512, 256))
        what = f"llama.cpp, {each['model']} F16"
        out.append(
            row("MoE-Gen's table", what, "tokens/s", each["decode"], plan.decode_tokens_per_s,
                fact["source"])
        )  # fmt: skip
        out.append(
            row("MoE-Gen's table, prompts", what, "prompt tokens/s", each["prompt_rate"],
                plan.prompt_tokens_per_s, fact["source"])
        )  # fmt: skip
    return out


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of absolute errors by group, and over all rows of speed and of hits; fitted rows are
    left out of all but their own groups."""
    groups = dict.fromkeys(r["group"] for r in rows)
    out = {}
    for group in groups:
        own = [abs(r["error"]) for r in rows if r["group"] == group]
        counted = [abs(r["error"]) for r in rows if r["group"] == group and not r["fitted"]]
        used = counted or own
        out[group] = {"rows": len(used), "median": round(statistics.median(used), 3)}
    for name, left_out in (
        ("all but memory and fitted rows", {"memory"}),
        ("the same without KTransformers", {"memory", "KTransformers"}),
    ):
        speed = [abs(r["error"]) for r in rows if not r["fitted"] and r["group"] not in left_out]
        out[name] = {
            "rows": len(speed),
            "median": round(statistics.median(speed), 3),
            "within 20%": round(sum(e <= 0.2 for e in speed) / len(speed), 2),
        }
    return out


def orders(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Whether the order of strategies is the published one, at each share of KTransformers' table
    where published strategies differ by more than 3%."""
    table = {tuple(r["what"].split(", ")): r for r in rows if r["group"] == "KTransformers"}
    names = ("uniform", "front-loading", "frequency")
    right = wrong = 0
    shares = dict.fromkeys(share for _, share in table)
    for share in shares:
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if (a, share) not in table or (b, share) not in table:
                    continue
                first, second = table[a, share], table[b, share]
                if abs(first["published"] / second["published"] - 1) < 0.03:
                    continue
                same = (first["published"] < second["published"]) == (
                    first["predicted"] < second["predicted"]
                )
                right, wrong = right + same, wrong + (not same)
    lru = [r for r in rows if r["group"] == "hit rates" and r["what"].startswith("LRU")]
    pinned = [r for r in rows if r["what"].startswith("hottest half")]
    above = sum(a["predicted"] > b["predicted"] for a, b in zip(lru, pinned, strict=False))
    return {
        "KTransformers' strategies": f"{right} of {right + wrong} pairs in the published order",
        "LRU above the hottest half pinned": f"{above} of {len(pinned)} sizes, published all",
    }


HEAD = """# Engines on people's machines: published and predicted

Regenerate with

    python benchmarks/offloading_people.py --data ../shared/data --out reports/offloading-people

Published figures with their sources and settings are in `facts.yaml`; `results.json` has every row
of this page. Predictions are those of `moesim/offloading/`, with the placement that the source
names. Rows marked *fitted* are those that its constants were set on, by hand, or that were in view
when they were (the RTX 3090 runs of gpt-oss-120b, and 0% and 100% of KTransformers' table), or one
point of a curve that one parameter was set on; they count nowhere.

What this rests on beside that: the machines as far as the sources name them (`facts.yaml` says
what is assumed), one conversation at a time, and for KTransformers' frequency strategy the
unevenness of another model's routing (DeepSeek-V2-Lite's trace). Hit rates come from tokens drawn
by a Zipf law, its exponent set on the one row marked.

"""
TAIL = """
## Not reproduced

- That LRU beats pinning the hottest half (kekzl/imp#2061): tokens drawn by a law that never
  changes favour pinning; what real text asks for drifts. The published 10% for 32 fixed experts
  of 512 is between the law's one ranking per request (6%) and one for all.
- KTransformers' dynamic update between prompts (its column is in `facts.yaml`): not modelled.
- llama.cpp#27861's 18.4 to 24.2 tokens/s: the model's shape and the host's memory are not named
  well enough; its hit rates are above.
- MoE-Gen's rows of llama.cpp with DeepSeek-V2 and R1 (23/1 and 5.7/0.9 tokens/s): 16-bit
  attention alone is larger than the GPU, and layers left to the CPU as a whole (-ngl) are not
  modelled.
- MoE-Gen's own and vLLM's rows: throughput of large batches, and one conversation is modelled
  here. Its llama.cpp rows above are likely such too: 328 prompt tokens/s of Mixtral-8x7B would
  copy the 73 GB that the GPU does not hold in 1.6 s, above what PCIe Gen4 carries, were ubatches
  of 512 alone.
- The fit of prompts: tile, overlap and shares were set on the rows marked fitted; the runs under
  "wholly on the GPU" and "small cards" were in view when it was decided which mechanisms to have.
- The Quadro RTX 5000's 37.0 tokens/s on six cores: 1.7 weights per cycle and core give 23. It is
  a build of September 2026, the fitted rows of AVX2 are of 2025; faster CPU kernels would explain
  it.
- 1.6 tokens/s beside an EPYC 7343 with 64 GB: the row is above and counts; other published runs
  of the same placement are fifteen times as fast, so something else (paging, one thread, a NUMA
  node without memory) decided there.

## Seen: llama.cpp's own accounting

llama.cpp of October 2026 (the CPU wheel of xllamacpp 2026.10.11549) was given a GGUF header
written from moesim's table of Qwen3-30B-A3B Q4_K_M over a file of zeros, with flash attention. It
loads, so tensor names, shapes and types are those that it wants, and `-ot` of an exported file
moves the tensors that it names ("buffer type overridden"). In MiB:

| buffer | context, -ub | llama.cpp | moesim |
|---|---|---|---|
| model | any | 17,691.34 | 17,691.29 |
| KV cache | 16,384 | 1,536.00 | 1,536.00 |
| compute | 16,384, 2048 | 416.07 | 1,219.00 |
| compute | 16,384, 512 | 104.02 | 304.75 |
| compute | 32,768, 512 | 120.02 | 304.75 |

Compute is an upper bound for such builds: they reserve the logits of one token, earlier ones
those of a whole ubatch (ggml-org/llama.cpp#23527), which the logs above have. Without them it is
`4 x ubatch x (top-k x (2 x width + hidden) + 8 x hidden) + 2 x ubatch x context` to 0.1 MiB in
all three (a mask of four bytes, expected before the third was run, gave 136). No GPU was there to
see CUDA's buffer, so moesim keeps the older, larger one. A toy model of random weights answers
too, of moesim's size (4.48 MiB). accelerate 1.15 runs a toy Mixtral with an exported device_map
(`pytest -m engines tests/offloading`). Flags of exported lines stand in the parsers of llama.cpp
build 11434 and of ik_llama.cpp, and in KTransformers' pages; the files of vLLM were not run.

That wheel also has `--moe-cache-mib`: an LRU cache of experts in GPU memory, experts that it
lacks copied (build 11434 has no such flag; tetherto/qvac-fabric-llm.cpp#232 describes one).
moesim's caching plans answer what such a cache is worth (`policy lru`, `cpu off`), no engine's
row does yet. One published run to hold it against: 28.9 tokens/s by `--fit` and 50.6 with a tenth
of the experts cached, 77.8% hits, Qwen3.8-Flash-Next Q4_0 on an RTX 5090
(tetherto/qvac-fabric-llm.cpp#237; host not named).
"""


def page(results: dict[str, Any]) -> str:
    rows, found = results["rows"], results["medians"]
    lines = [HEAD, "| group | rows counted | median error |", "|---|---|---|"]
    lines += [f"| {name} | {m['rows']} | {m['median']:.1%} |" for name, m in found.items()]
    total, rest = list(found.values())[-2:]
    lines += [
        "",
        f"{total['within 20%']:.0%} of the rows that count are within 20%,"
        f" {rest['within 20%']:.0%} of those without KTransformers."
        f" {'; '.join(f'{k}: {v}' for k, v in results['orders'].items())}.",
    ]
    for group in dict.fromkeys(r["group"] for r in rows):
        own = [r for r in rows if r["group"] == group]
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| what | unit | published | predicted | error | source |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['what']}{' (*fitted*)' if r['fitted'] and group != 'fitted' else ''} |"
            f" {r['unit']} | {r['published']:,g} | {r['predicted']:,g} | {r['error']:+.0%} |"
            f" {r['source']} |"
            for r in own
        ]
    return "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    main()
