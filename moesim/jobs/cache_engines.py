"""What engines on the machine do with the model, beside the caching plan of `cache`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.caching.workload import Workload
from moesim.cluster import Machine
from moesim.errors import InputError
from moesim.figures import text_table
from moesim.jobs import inputs
from moesim.model.checkpoint_sizes import has_safetensors
from moesim.model.dtypes import KV_BYTES, bytes_per
from moesim.model.spec import ModelSpec
from moesim.model.weights import Weights, load_weights
from moesim.offloading.engines import engine_name, plan_engines
from moesim.offloading.ktransformers import COUNTS_FILE
from moesim.offloading.task import EnginePlan, Task
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.jobs.inputs import ModelLike


def weights_of(
    model: ModelLike | None, named: str, quant: str | None, expert_dtype: str | None
) -> tuple[Weights, Weights]:
    """The model's weights as asked for, and in its checkpoint's own types.

    Raises InputError where nothing says the model, or two options say its types.
    """
    if quant is not None and expert_dtype is not None:
        raise InputError("`quant` and `expert_dtype` both say the experts' type", "give one")
    given = model if isinstance(model, ModelSpec) else None if model is None else str(model)
    if isinstance(given, str) and given.endswith(".gguf"):
        asked = own = load_weights(given, quant)
    elif isinstance(given, str) and has_safetensors(Path(given)):
        own = load_weights(given)
        asked = own if quant is None else load_weights(given, quant)
    else:
        spec = inputs.model_required(given, named)
        own = load_weights(spec)
        asked = own if quant is None else load_weights(spec, quant)
    if expert_dtype is not None:
        asked = load_weights(replace(asked.spec, expert_dtype=expert_dtype))
    return asked, own


def hot_curve(work: Workload) -> FloatArray:
    """[E + 1] share of the held-out choices that the n most frequent experts of each layer have,
    by the frequencies of the fit requests, mean over layers."""
    ids = np.asarray(work.trace.expert_ids)[work.held_out.token_idx]
    num_layers, num = work.frequency.shape
    share = np.zeros(num + 1)
    for layer in range(num_layers):
        chosen = ids[:, layer].ravel()
        count = np.bincount(chosen[chosen >= 0], minlength=num).astype(np.float64)
        order = np.argsort(-work.frequency[layer], kind="stable")
        share[1:] += np.cumsum(count[order]) / max(1.0, count.sum())
    return share / num_layers


def plans_of(
    weights: tuple[Weights, Weights],
    machine: Machine,
    hot: FloatArray | None,
    options: dict[str, Any],
    engines: tuple[str, ...],
) -> tuple[EnginePlan, ...]:
    """The best plan of each engine; `options`: context, prompt, output, cache_type, memory_gb.

    Raises UnknownNameError for an engine or cache type, InputError for a request that is longer
    than the context.
    """
    bytes_per(KV_BYTES, options["cache_type"])
    if options["prompt"] + options["output"] > options["context"]:
        raise InputError(
            f"`prompt` {options['prompt']} and `output` {options['output']} are more than"
            f" `context` {options['context']}",
            "give a longer context, or a shorter request",
        )
    task = Task(*weights, machine, hot=hot, **options)
    return plan_engines(task, tuple(engine_name(name) for name in engines))


def contexts_of(
    weights: tuple[Weights, Weights],
    machine: Machine,
    hot: FloatArray | None,
    options: dict[str, Any],
    engine: str,
) -> tuple[EnginePlan, ...]:
    """The engine's best plan with twice, four and eight times the context, as far as it runs: what
    a longer KV cache takes from the experts."""
    longer = [options | {"context": options["context"] * times} for times in (2, 4, 8)]
    found = [plan_engines(Task(*weights, machine, hot=hot, **o), (engine,))[0] for o in longer]
    return tuple(plan for plan in found if not plan.problem)


def with_counts(
    plans: tuple[EnginePlan, ...], work: Workload, spec: ModelSpec
) -> tuple[EnginePlan, ...]:
    """The plans, where KTransformers places by frequency with the counts per million tokens of the
    fit requests."""
    counts = np.zeros((spec.num_hidden_layers, spec.num_experts), np.int64)
    counts[list(spec.moe_layer_ids)] = np.rint(work.frequency * 1e6)
    text = json.dumps(counts.tolist(), separators=(",", ":"))
    return tuple(
        replace(plan, files={COUNTS_FILE: text})
        if plan.settings.get("strategy") == "frequency"
        else plan
        for plan in plans
    )


def engines_json(plans: tuple[EnginePlan, ...]) -> dict[str, Any]:
    """By engine, what `export` needs and people ask for; engines that cannot run say why."""
    out: dict[str, Any] = {}
    for plan in plans:
        data = asdict(plan)
        data["launch"] = list(plan.launch)
        data["notes"] = list(plan.notes)
        data["gpus"] = [asdict(gpu) for gpu in plan.gpus]
        out[data.pop("engine")] = data if not plan.problem else {"problem": plan.problem}
    return out


def engine_lines(
    plans: tuple[EnginePlan, ...], longer: tuple[EnginePlan, ...], dynamic: float | None
) -> list[str]:
    """The table of engines, the fastest first, its launch line, its speed with more context, and
    what a dynamic cache leaves on the table."""
    runs = [plan for plan in plans if not plan.problem]
    rows = [
        (
            plan.engine,
            f"{plan.decode_tokens_per_s:.1f}",
            f"{plan.prompt_tokens_per_s:,.0f}",
            " + ".join(f"{gpu.total / 2**30:.1f}" for gpu in plan.gpus),
            f"{plan.gpu_share:.0%}",
            plan.weights,
        )
        for plan in runs
    ]
    head = ("engine", "tokens/s", "prompt tokens/s", "GPU GiB", "experts on GPU", "weights")
    lines = [text_table(head, rows)] if rows else []
    if runs:
        lines += ["", f"{runs[0].engine}:", *(f"  {line}" for line in runs[0].launch)]
        if longer:
            told = "; ".join(
                f"{plan.settings['context']:,}: {plan.decode_tokens_per_s:.1f} tokens/s,"
                f" {plan.gpu_share:.0%} of the experts on the GPU"
                for plan in longer
            )
            lines.append(f"with more context: {told}")
        if runs[0].gpu_share == 1:
            lines.append("all experts fit into GPU memory: nothing is left on the table")
        elif dynamic is not None:
            gain = dynamic / runs[0].decode_tokens_per_s - 1
            lines.append(
                f"left on the table: a dynamic expert cache with such kernels would give"
                f" {dynamic:.1f} tokens/s ({gain:+.0%}); of these engines only builds of llama.cpp"
                " of October 2026 have one, --moe-cache-mib (LRU, not predicted here)"
            )
    lines += [f"  {plan.engine} does not run: {plan.problem}" for plan in plans if plan.problem]
    notes = dict.fromkeys(f"  {plan.engine}: {note}" for plan in runs for note in plan.notes)
    return [*lines, *notes]
