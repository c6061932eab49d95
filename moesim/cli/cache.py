"""`moesim cache`: what stays in GPU memory when not all experts fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption, MaybeTraceOption, ModelOption, PlotOption, SeedOption
from moesim.cli.output import echo


def cache(
    trace: MaybeTraceOption = None,
    model: ModelOption = None,
    machine: Annotated[
        str,
        typer.Option(
            help="GPU and host, as rtx-4090+ddr5-2ch or 2xrtx-3090, or a YAML file;"
            " moesim topology list names the parts."
        ),
    ] = "l40s",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this engine: llama.cpp, ik_llama.cpp, KTransformers, vLLM, accelerate;"
            " repeat.",
            show_default="all",
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Types that llama.cpp makes of the model, such as Q4_K_M or IQ4_XS."),
    ] = None,
    hbm: Annotated[
        float | None,
        typer.Option(help="GB of GPU memory for the model.", show_default="the GPU's"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests decoded at once.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of context per request.", min=0)] = 2048,
    cache_type: Annotated[
        str, typer.Option(help="Type of the KV cache in engines, such as q8_0.")
    ] = "fp16",
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt that engines are tuned for.",
            min=1,
            show_default="half of --context",
        ),
    ] = None,
    output: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the answer, likewise.", min=1, show_default="an eighth of --context"
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="static, lru, lfu, lfru, score, activation; auto tries all.")
    ] = "auto",
    prefetch: Annotated[
        str,
        typer.Option(
            help="none, popularity, previous-layer, token-id, history, learned, neural (torch),"
            " oracle; auto tries those that are fitted in seconds."
        ),
    ] = "auto",
    cpu: Annotated[
        str, typer.Option(help="Let the CPU compute missing experts: on, off; auto tries both.")
    ] = "auto",
    expert_dtype: Annotated[
        str | None, typer.Option(help="Store experts as this type, such as int4 or fp8.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Mixed precision: average bits per expert, from widths 1, 2 and 3."),
    ] = None,
    bit_errors: Annotated[
        Path | None,
        typer.Option(help=".npy of quantisation errors [layers, experts, 3]; default: 4^-bits."),
    ] = None,
    dram: Annotated[float | None, typer.Option(help="GB of host memory for experts.")] = None,
    dram_gb_per_s: Annotated[
        float | None, typer.Option(help="Rate at which the CPU reads an expert's weights.")
    ] = None,
    cpu_us: Annotated[
        float | None, typer.Option(help="Fixed time of one expert on the CPU, microseconds.")
    ] = None,
    cpu_tflops: Annotated[
        float | None, typer.Option(help="CPU rate on an expert of many tokens.")
    ] = None,
    nvme_gb_per_s: Annotated[
        float | None, typer.Option(help="Read rate of NVMe, for experts beyond --dram.")
    ] = None,
    ilp: Annotated[
        bool,
        typer.Option("--ilp", help="Choose bits by integer program; show slots' and tiers'."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Decode steps simulated in each set.", min=16)] = 4096,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Cache plan file to write.")] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """What runs on a machine that does not hold the model: engines' best placements, and caches.

    The table's first rows are of engines that exist, with the line that starts the fastest; then
    comes what a dynamic cache of experts would do: slots per layer, pinned experts, policy,
    prefetch, CPU. A quarter of the trace's requests gives frequencies and fits predictors, a
    quarter chooses, and every figure printed comes from the other half. Without a trace routing is
    assumed uniform.

    Example: moesim cache --machine rtx-4090+ddr5-2ch --model GPT-OSS-120B --quant MXFP4_MOE
    """
    from moesim.cli.output import check_targets, given, notice, wrote
    from moesim.cli.progress import stage_bar
    from moesim.jobs.cache import cache as run

    check_targets(out, plot=plot)
    options = given(run, locals(), sweep=plot is not None)
    with stage_bar() as progress:
        job = run(**options | {"progress": progress})
    if out is not None:
        job.save(out)
    if plot is not None:
        job.plot(plot)
    notice(*job.notes)
    if as_json:
        echo(json.dumps(job.to_json(), indent=1))
        return
    echo(job.summary())
    if out is not None or plot is not None:
        echo(wrote(out, plot))
