"""Published figures of engines on people's machines, predicted anew: reports/offloading-people.

    python -m benchmarks.offloading_people [--data ../shared/data]

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

from benchmarks.offloading_hits import dynamic_curve, expert_cache, hits, pinning_in_traces, row
from moesim.caching.planner import plan_cache
from moesim.caching.rates import engine_rates
from moesim.caching.workload import Request, make_workload
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
from moesim.offloading.rates import MARGIN_BYTES, NO_GRAPH_US
from moesim.offloading.task import EnginePlan, Task
from moesim.trace.format import load_token_trace
from moesim.trace.uniform import uniform_trace

MIB = 1 << 20
EAGER_LAYER_S = 1.2e-3
LAUNCHES_PER_PRODUCT = 2
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
        *expert_cache(facts),
        *moe_infinity(facts, machines, trace if trace.exists() else None),
        *moe_gen(facts, machines),
    ]
    results = {"rows": rows, "medians": medians(rows), "orders": orders(rows)}
    if trace.exists():
        results["orders"]["the same in real traces"] = pinning_in_traces(args.data)
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
            plan = as_built(plan, task, run)
            what = (
                f"{engine}, {run['model']} {run['quant']} on {run['machine']}, {run['cpu_layers']}"
                f" layers on the CPU, -ub {run['ubatch']}"
            )
        more = {"fitted": run.get("fitted", False), "why": run.get("why", "")}
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


def as_built(plan: EnginePlan, task: Task, run: dict[str, Any]) -> EnginePlan:
    """The plan under a build that lacks what run["lacks"] names: CUDA graphs cost NO_GRAPH_US per
    layer of a token (those with anything on the CPU run without them anyway); without batched
    products a prompt launches quantisation and product of each expert's every matrix."""
    spec, lacks = task.weights.spec, run.get("lacks", ())
    token, prompt = 1 / plan.decode_tokens_per_s, task.prompt / plan.prompt_tokens_per_s
    if "graphs" in lacks and not run["cpu_layers"]:
        token += spec.num_hidden_layers * NO_GRAPH_US * 1e-6
    if "batched products" in lacks:
        products = spec.num_moe_layers * spec.num_experts * spec.ffn_matrices
        launches = products * LAUNCHES_PER_PRODUCT * -(-task.prompt // run["ubatch"])
        prompt += launches * task.machine.gpus[0].kernel_launch_us * 1e-6
    return replace(plan, decode_tokens_per_s=1 / token, prompt_tokens_per_s=task.prompt / prompt)


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
    curves = {}
    if trace is not None:
        work = make_workload(load_token_trace(trace, "the report"), Request(24.0, max_steps=2048))
        found = {"frequency": hot_curve(work), "dynamic-expert-update": dynamic_curve(work)}
        grid = np.linspace(0, 1, 513)
        curves = {k: np.interp(grid, np.linspace(0, 1, len(v)), v) for k, v in found.items()}
    strategies = {"random": "uniform", "uniform": "uniform", "front-loading": "front-loading"}
    for strategy, name in (strategies | dict.fromkeys(curves, "frequency")).items():
        asked = replace(task, hot=curves.get(strategy))
        for share, published in zip(fact["share"], fact[strategy], strict=True):
            rate = at_experts(asked, 512 * share / 100, name).decode_tokens_per_s
            what = f"{strategy}, {share}% of the experts on the GPUs"
            out.append(
                row("KTransformers", what, "tokens/s", published, rate, fact["source"],
                    fitted=share in (0, 100))
            )  # fmt: skip
    return out


def moe_infinity(
    facts: dict[str, Any], machines: dict[str, Machine], trace: Path | None
) -> list[dict[str, Any]]:
    fact, out = facts["moe_infinity"], []
    machine = machines[fact["machine"]]
    for each in fact["rows"]:
        weights = load_weights(each["model"])
        task = Task(weights, weights, machine, 2048, 1024, 256)
        if each["engine"] == "vLLM":
            seconds = 1 / vllm(task, experts_only=False).decode_tokens_per_s
        elif each["engine"] == "accelerate":
            seconds = 1 / accelerate(task).decode_tokens_per_s
        else:
            seconds = cached_s(each["model"], machine, trace)
        what = f"{each['engine']}, {each['model']}, 16-bit"
        out.append(
            row("MoE-Infinity's table", what, "s per token", each["seconds"], seconds,
                fact["source"], fitted=each.get("fitted", False), why=each.get("why", ""))
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
                fact["source"], why=each["why"])
        )  # fmt: skip
        out.append(
            row("MoE-Gen's table, prompts", what, "prompt tokens/s", each["prompt_rate"],
                plan.prompt_tokens_per_s, fact["source"], why=each["why"])
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
    names = ("uniform", "front-loading", "frequency", "dynamic-expert-update")
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

    python -m benchmarks.offloading_people --data ../shared/data

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
TAIL = Path(__file__).with_name("offloading_people_tail.md")


def is_close(r: dict[str, Any]) -> bool:
    """Whether a row needs no cause: fitted, or within 20%."""
    return bool(r["fitted"] or abs(r["error"]) <= 0.2)


def causes_of(rows: list[dict[str, Any]], cause: str) -> str:
    """Errors of the rows that have this cause."""
    errors = [r["error"] for r in rows if r["why"] == cause and not is_close(r)]
    return ", ".join(f"{error:+.0%}" for error in errors)


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
        causes = dict.fromkeys(r["why"] for r in own if not is_close(r))
        lines += ["", *(f"- {causes_of(own, cause)}: {cause}." for cause in causes)]
    return "\n".join(lines) + "\n\n" + TAIL.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
