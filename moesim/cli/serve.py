"""`moesim serve`: requests through a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.choices import MoeComm, Overlap, Router
from moesim.cli.options import (
    ClusterOption,
    ExpertDtypeOption,
    ExpertGpusOption,
    JsonOption,
    KvDtypeOption,
    MaxBatchTokensOption,
    MemoryFractionOption,
    MicroBatchesOption,
    ModelOption,
    PlotOption,
    PriceOption,
    RerouteOption,
    SeedOption,
)
from moesim.cli.output import echo
from moesim.errors import InputError


def serve(
    context: typer.Context,
    requests: Annotated[
        str,
        typer.Option(
            help="Request log (Azure or BurstGPT CSV, Mooncake JSONL), or arrivals drawn as"
            " poisson:rate=8,requests=2000,prompt=lognormal(1000;0.8),output=200 (gamma: also cv;"
            " constant; lengths=FILE).",
            metavar="FILE|PROCESS",
        ),
    ],
    model: ModelOption = None,
    cluster: ClusterOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="GPUs of the whole service.", show_default="the plan's, tp x dp, or 8", min=1
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Engines that the GPUs are divided among.",
            show_default="as many as the smallest engine that fits allows",
            min=1,
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(help="Tensor parallelism.", show_default="the least that fits", min=1),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option(
            help="Data-parallel attention ranks.", show_default="GPUs of an engine / tp", min=1
        ),
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages of an engine.", min=1)] = 1,
    ep: Annotated[
        int | None,
        typer.Option(
            help="Groups that hold different experts.", show_default="an engine's GPUs", min=1
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, sglang or trtllm.")] = "vllm",
    moe_comm: Annotated[
        MoeComm | None,
        typer.Option(
            help="How tokens reach their experts: all_reduce, all_gather, nccl, deepep, deepep_ll,"
            " deepep_auto, deepep_v2, nvlink or nvlink_one_sided.",
            metavar="EXCHANGE",
            show_default="by DP and nodes",
        ),
    ] = None,
    redundant_experts: Annotated[
        int | None,
        typer.Option(
            help="Further expert slots per layer; experts are then placed by EPLB.",
            show_default="experts in their order",
            min=0,
        ),
    ] = None,
    two_batch_overlap: Annotated[
        Overlap,
        typer.Option(
            help="Halves of a step, one computing while the other communicates: off, prefill,"
            " decode or both."
        ),
    ] = "off",
    expert_gpus: ExpertGpusOption = None,
    micro_batches: MicroBatchesOption = 3,
    dispatch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Rows per GPU that buffers of DeepEP's low-latency kernels hold; more go in"
            " rounds.",
            show_default="256, SGLang 128",
            min=1,
        ),
    ] = None,
    expert_dtype: ExpertDtypeOption = None,
    kv_dtype: KvDtypeOption = "bf16",
    kv_scale: Annotated[
        float, typer.Option(help="Bytes of a compressed KV cache, as a share of its precision's.")
    ] = 1.0,
    kv_window: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sequence that are kept and attended to, the last ones.",
            show_default="all",
            min=1,
        ),
    ] = None,
    max_batch_tokens: MaxBatchTokensOption = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            help="Running sequences of a rank.",
            show_default="the engine's, in vLLM and TensorRT-LLM at most the tokens of a step",
            min=1,
        ),
    ] = None,
    memory_fraction: MemoryFractionOption = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1)] = 16,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse equal beginnings of prompts.",
            show_default="where the log tells them",
        ),
    ] = None,
    shared_reads: Annotated[
        bool,
        typer.Option(
            "--shared-reads",
            help="Read a beginning that sequences share once per step, as Hydragen does.",
        ),
    ] = False,
    prefill: Annotated[
        Literal["mixed", "first"] | None,
        typer.Option(
            help="mixed (chunks beside decodes) or first (prompts before decodes).",
            show_default="the engine's",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Most prompt tokens of one request in a step.", min=1),
    ] = None,
    router: Annotated[
        Router, typer.Option(help="Which engine a request goes to.")
    ] = "least_loaded",
    length_error: Annotated[
        float | None,
        typer.Option(
            help="length_aware predicts each output's length, off by a log-normal factor of this"
            " standard deviation (0: exactly).",
            show_default="all outputs are taken as the mean",
        ),
    ] = None,
    decode_gpus: Annotated[
        int | None,
        typer.Option(
            help="Disaggregate: so many of the GPUs decode, the others compute prompts.", min=1
        ),
    ] = None,
    decode_replicas: Annotated[
        int | None,
        typer.Option(help="Decoding engines.", show_default="as --replicas", min=1),
    ] = None,
    transfer: Annotated[
        float | None,
        typer.Option(help="GB/s of moving a rank's KV cache.", show_default="85 % of its NICs"),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Speculative decoding with this acceptance of a drafted token: 0.7, or of the"
            " first, second, ... token 0.85,0.7,0.6."
        ),
    ] = None,
    drafts: Annotated[
        int, typer.Option(help="Most drafted tokens; how many is chosen by goodput.")
    ] = 4,
    fixed_drafts: Annotated[
        bool, typer.Option("--fixed-drafts", help="Always draft that many.")
    ] = False,
    draft_share: Annotated[
        float | None,
        typer.Option(
            help="Time of drafting one token, as a share of a step.",
            show_default="what the model's multi-token-prediction layer takes; 0.05 without one",
        ),
    ] = None,
    priorities: Annotated[
        str | None,
        typer.Option(help="Draw priorities in these shares, the most urgent first: 0.3,0.7."),
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(
            help="What a request of the first, second, ... priority does on meeting a queue: queue,"
            " refuse@8, shorten@8=0.5 or demote@8 (from 8 waiting). May repeat."
        ),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            help="Several models, each on GPUs of its own, for a share of the requests or those"
            " that --by names: small:model=Qwen3-30B-A3B,gpus=2,share=0.7. Twice or more.",
        ),
    ] = None,
    whole_models: Annotated[
        int | None,
        typer.Option(
            help="Whole models as experts: so many of --model's size on one machine, in HBM, host"
            " memory and NVMe.",
            min=1,
        ),
    ] = None,
    skew: Annotated[
        float, typer.Option(help="Popularity of --whole-models: rank to the power of minus this.")
    ] = 1.0,
    by: Annotated[
        str | None,
        typer.Option(
            help="Column of the log that names the pool or the whole model of a request.",
            show_default="drawn",
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of the experts' placement.")] = None,
    trace: Annotated[
        str | None, typer.Option(help="Routing trace that the requests' routing is drawn from.")
    ] = None,
    reroute: RerouteOption = None,
    domain_mix: Annotated[
        str | None,
        typer.Option(help="Weights of the trace's domains: code=3,law=1.", show_default="its own"),
    ] = None,
    drift_hours: Annotated[
        float | None,
        typer.Option(help="Hours in which the mix goes through all domains once."),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Promises: ttft<2s,tpot<50ms for goodput by request; tpot_p99<50ms for all, exit"
            " code 1 where it is missed."
        ),
    ] = None,
    rebalance_every: Annotated[
        str | None,
        typer.Option(
            help="Steps between two placements of an engine, as 3000; or 1000,3000 for prompt and"
            " decoding engines.",
            show_default="never",
        ),
    ] = None,
    rebalance_stall: Annotated[
        str | None,
        typer.Option(
            help="Ms that each placement stops an engine, as many numbers.",
            show_default="as long as moving all layers takes",
        ),
    ] = None,
    price: PriceOption = None,
    rate_scale: Annotated[float, typer.Option(help="Let requests arrive so much faster.")] = 1.0,
    first: Annotated[
        int | None, typer.Option(help="The first so many requests.", show_default="all", min=1)
    ] = None,
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Leave out rows without prompt or output.")
    ] = False,
    time_unit: Annotated[
        str | None,
        typer.Option(
            help="Unit of a log's times: s, ms, us, ns.", show_default="as docs/serving.md says"
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the blocks of a log's hash_ids.", show_default="from its rows", min=1
        ),
    ] = None,
    until: Annotated[
        float | None, typer.Option(help="Stop after so many seconds.", show_default="the last")
    ] = None,
    seed: SeedOption = 0,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve requests with a deployment: TTFT, TPOT, end-to-end times, throughput, goodput.

    Example: moesim serve --requests azure.csv --model deepseek-v3 --gpus 32 --slo
    "ttft<2s,tpot<100ms"
    """
    from moesim.cli.output import check_targets, given, notice
    from moesim.cli.progress import progress_bar
    from moesim.cli.serve_several import several
    from moesim.jobs.serve import numbers
    from moesim.jobs.serve import serve as run

    check_targets(plot=plot)
    if pool or whole_models is not None:
        several(context, as_json)
        return
    if by is not None:
        raise InputError("`by` without `pool` or `whole_models`", "give one of them, or leave it")
    with progress_bar("serving requests") as progress:
        result = run(
            **given(
                run,
                locals(),
                priorities=None if priorities is None else numbers(priorities, "priorities"),
                speculate=None if speculate is None else numbers(speculate, "speculate"),
                level=level or (),
                price=price or (),
                rebalance_every=_whole(rebalance_every),
                rebalance_stall=numbers(rebalance_stall, "rebalance_stall")
                if rebalance_stall
                else (),
                domain_mix=None if domain_mix is None else _mix(domain_mix),
            )
        )
    if plot is not None:
        result.plot(plot)
        echo(f"wrote {plot}", err=True)
    notice(*result.notices)
    if as_json:
        echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        echo(result.summary())
    if result.missed:
        raise typer.Exit(1)


def _whole(text: str | None) -> list[int]:
    from moesim.jobs.serve import numbers

    found = numbers(text, "rebalance_every") if text else []
    for value in found:
        if value != int(value):
            raise InputError(f"`rebalance_every` {text!r:.60}", "give whole steps")
    return [int(value) for value in found]


def _mix(text: str) -> dict[str, float]:
    from moesim.jobs.serve import numbers

    weights = {}
    for part in text.split(","):
        name, sign, value = part.rpartition("=")
        if not sign:
            raise InputError(f"{part!r:.60} in `domain_mix`", "write NAME=WEIGHT,NAME=WEIGHT")
        weights[name.strip()] = numbers(value, "domain_mix")[0]
    return weights
