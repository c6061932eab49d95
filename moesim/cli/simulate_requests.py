"""`moesim simulate --requests`: requests through a service."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from moesim.errors import InputError


def simulate_requests(
    requests: Annotated[
        str,
        typer.Option(
            help="Request log (Azure or BurstGPT CSV, Mooncake JSONL), or arrivals drawn as"
            " poisson:rate=8,requests=2000,prompt=lognormal(1000;0.8),output=200 (gamma: also cv;"
            " constant; lengths=FILE).",
            metavar="FILE|PROCESS",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Preset or config.json.", show_default="the plan's or trace's"),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster name or YAML file.", show_default="h100-sxm-ib")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="GPUs of the whole service.", show_default="the plan's, or 8", min=1),
    ] = None,
    replicas: Annotated[
        int, typer.Option(help="Engines that the GPUs are divided among.", min=1)
    ] = 1,
    tp: Annotated[
        int | None,
        typer.Option(help="Tensor parallelism.", show_default="the least that fits", min=1),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option(help="Data-parallel attention ranks.", show_default="GPUs / tp", min=1),
    ] = None,
    ep: Annotated[
        int | None,
        typer.Option(help="Groups that hold different experts.", show_default="all GPUs", min=1),
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, sglang or trtllm.")] = "vllm",
    moe_comm: Annotated[
        str | None,
        typer.Option(
            help="all_reduce, all_gather, nccl, deepep or deepep_ll.",
            show_default="by DP and nodes",
        ),
    ] = None,
    expert_dtype: Annotated[
        str | None, typer.Option(help="Experts' weights.", show_default="the model's")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="KV cache: bf16 or fp8.")] = "bf16",
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step of one rank.", show_default="the engine's", min=1),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(help="Running sequences of a rank.", show_default="the engine's", min=1),
    ] = None,
    memory_fraction: Annotated[
        float | None,
        typer.Option(help="Share of GPU memory in use.", show_default="the engine's"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1)] = 16,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse equal beginnings of prompts.",
            show_default="where the log tells them",
        ),
    ] = None,
    prefill: Annotated[
        str | None,
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
        str, typer.Option(help="round_robin, least_loaded or length_aware.")
    ] = "least_loaded",
    decode_gpus: Annotated[
        int | None,
        typer.Option(
            help="Disaggregate: so many of the GPUs decode, the others compute prompts.", min=1
        ),
    ] = None,
    decode_replicas: Annotated[int, typer.Option(help="Decoding engines.", min=1)] = 1,
    transfer: Annotated[
        float | None,
        typer.Option(help="GB/s of moving a rank's KV cache.", show_default="85 % of its NICs"),
    ] = None,
    speculate: Annotated[
        float | None,
        typer.Option(help="Speculative decoding with this acceptance of a drafted token."),
    ] = None,
    drafts: Annotated[
        int, typer.Option(help="Most drafted tokens; how many is chosen by goodput.")
    ] = 4,
    fixed_drafts: Annotated[
        bool, typer.Option("--fixed-drafts", help="Always draft that many.")
    ] = False,
    draft_share: Annotated[
        float, typer.Option(help="Time of drafting one token, as a share of a step.")
    ] = 0.05,
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
    plan: Annotated[Path | None, typer.Option(help="Plan of the experts' placement.")] = None,
    trace: Annotated[
        str | None, typer.Option(help="Routing trace that the requests' routing is drawn from.")
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.", min=0)] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Picture: time series and CDFs (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Serve requests with a deployment: TTFT, TPOT, end-to-end times, throughput, goodput.

    Example: moesim simulate --requests azure.csv --model deepseek-v3 --gpus 32 --slo
    "ttft<2s,tpot<100ms"
    """
    from moesim.cli.progress import progress_bar
    from moesim.cli.simulate_input import writable
    from moesim.cli.simulate_requests_input import (
        Parallelism,
        level_rules,
        load_service,
        read_requests,
        routing_of,
    )
    from moesim.cli.simulate_requests_print import print_run
    from moesim.jobs.serve import simulate_serving
    from moesim.serving.config import ServingConfig
    from moesim.serving.fit import check_possible
    from moesim.serving.record import run_record
    from moesim.serving.slo import parse_slo
    from moesim.serving.speculative import Speculation

    writable(plot)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    if prefill not in (None, "mixed", "first"):
        raise InputError(f"--prefill {prefill}", "give mixed or first")
    promises = parse_slo(slo) if slo is not None else None
    defaults: dict[str, str] = {}
    arriving = read_requests(
        requests, first, skip_empty, rate_scale, priorities, seed, time_unit, block_tokens
    )
    deployment, decode = load_service(
        model,
        cluster,
        plan,
        trace,
        Parallelism(gpus, replicas, tp, dp, ep, decode_gpus, decode_replicas),
        {
            "engine": engine,
            "moe_comm": moe_comm,
            "expert_dtype": expert_dtype,
            "kv_dtype": kv_dtype,
            "max_batch_tokens": max_batch_tokens,
            "max_sequences": max_sequences,
            "memory_fraction": memory_fraction,
        },
        defaults,
    )
    config = ServingConfig(
        replicas=replicas,
        router=router,  # type: ignore[arg-type]
        decode=decode,
        decode_replicas=decode_replicas,
        transfer_gb_per_s=transfer,
        block_size=block_size,
        prefix_cache=prefix_cache,
        chunk_tokens=chunk_tokens,
        prefill_first=None if prefill is None else prefill == "first",
        speculation=(
            None if speculate is None else Speculation(speculate, drafts, draft_share, fixed_drafts)
        ),
        levels=level_rules(level or []),
        routing=routing_of(deployment, domain_mix, drift_hours, seed),
        until_s=float("inf") if until is None else until,
        seed=seed,
    )
    if promises is not None:
        check_possible(promises, deployment, arriving, config)
    begin = time.perf_counter()
    with progress_bar("serving requests") as progress:
        result = simulate_serving(deployment, arriving, config, progress=progress)
    record = run_record(
        deployment,
        arriving,
        config,
        result,
        slo=promises,
        defaults=defaults,
        notices=arriving.notices,
        seconds=time.perf_counter() - begin,
    )
    if plot is not None:
        from moesim.draw.serving import plot_serving

        plot_serving(record, plot)
        typer.echo(f"wrote {plot}", err=True)
    if as_json:
        typer.echo(json.dumps(record, indent=1, allow_nan=False))
    else:
        print_run(record)
    if record["slo"] is not None and record["slo"]["missed"]:
        raise typer.Exit(1)
