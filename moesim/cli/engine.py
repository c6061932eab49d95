"""`moesim engine`: a routing trace inside a serving engine, and the host that it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import ClusterOption, JsonOption, ModelOption, SeedOption, TraceOption
from moesim.cli.output import echo

app = typer.Typer(
    help="Serving engines: replay a routing trace inside one, and tell its machine's host.",
    no_args_is_help=True,
)
LayersOption = Annotated[
    int | None,
    typer.Option(
        "--num-hidden-layers",
        min=1,
        help="Cut the model to its first layers [default: all].",
    ),
]


@app.callback()
def _group() -> None:
    pass


@app.command("replay")
def replay(
    trace: TraceOption,
    engine: Annotated[str, typer.Option("--engine", help="Serving engine: vllm.")] = "vllm",
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Placement to serve with [default: the engine's own, 1 GPU]."),
    ] = None,
    model: ModelOption = None,
    num_hidden_layers: LayersOption = None,
    repeat_layers: Annotated[
        bool,
        typer.Option("--repeat-layers", help="Repeat a trace that has fewer layers."),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path(
        "engine-replay"
    ),
    as_json: JsonOption = False,
) -> None:
    """Write what a vLLM of your own needs to serve a recorded routing, with a plan's placement.

    The model has real sizes and random weights; its router is replaced by the trace. Install moesim
    where vLLM (0.23 or newer) runs; its plug-in is loaded by launch.sh.

    Example: moesim engine replay --trace sample:debian-olmoe --out replay
    """
    from moesim.engine.folder import write_replay
    from moesim.engine.launch import environment
    from moesim.errors import InputError, UnknownNameError
    from moesim.placement import load_plan
    from moesim.trace.format import load_token_trace

    if engine != "vllm":
        raise UnknownNameError("engine", engine, ["vllm"])
    routing = load_token_trace(trace, "moesim engine replay")
    name = model or routing.meta.model
    if not name:
        raise InputError("the trace names no model", "give a preset or a config.json as model")
    written = write_replay(
        routing,
        out,
        model=name,
        plan=None if plan is None else load_plan(plan).together(),
        num_hidden_layers=num_hidden_layers,
        repeat_layers=repeat_layers,
        seed=seed,
    )
    content = written.content
    if as_json:
        summary = {
            "engine": engine,
            "folder": str(out),
            "model": name,
            "num_moe_layers": len(content.moe_layer_ids),
            "placement": content.placement,
            "num_gpus": content.num_gpus,
            "num_slots": content.num_slots,
            "environment": environment(out / "replay.npz"),
            "arguments": written.arguments,
            "notes": list(written.notes),
        }
        echo(json.dumps(summary, indent=2))
        return
    for note in written.notes:
        echo(f"note: {note}", err=True)
    how = {
        "none": "the engine's own placement",
        "renumbered": "the plan, experts renumbered so that linear placement is it",
        "eplb": "the plan with its replicas, through the engine's load balancer",
    }
    gpus = "1 GPU" if content.num_gpus == 1 else f"{content.num_gpus} GPUs"
    echo(
        f"wrote {out}: {name}, {len(content.moe_layer_ids)} MoE layers, random weights\n"
        f"placement: {how[content.placement]}; {gpus}\n\nstart with\n\nsh {out}/launch.sh"
    )
    if content.num_gpus == 1:
        echo(
            f"sh {out}/launch.sh bench latency --batch-size 64 --input-len 512 --output-len 64"
            " --disable-detokenize"
        )


@app.command("host")
def host(
    trace: TraceOption,
    step: Annotated[
        list[str],
        typer.Option(
            "--step",
            help="Prompts of one step and its time: 4x1024=41.7 in ms, or =FILE of vllm bench"
            " latency; three sizes or more.",
            metavar="RxP=MS|FILE",
        ),
    ],
    model: ModelOption = None,
    num_hidden_layers: LayersOption = None,
    cluster: ClusterOption = None,
    engine: Annotated[str, typer.Option("--engine", help="vllm, sglang or trtllm.")] = "vllm",
    out: Annotated[Path, typer.Option("--out", "-o", help="Engine file to write.")] = Path(
        "host.yaml"
    ),
    as_json: JsonOption = False,
) -> None:
    """Find a machine's host from measured steps with prompts of a replay on one GPU.

    Writes a file for --engine: what a step adds, and what a layer takes to enqueue.

    Example: moesim engine host --trace sample:debian-olmoe --model OLMoE-1B-7B --cluster
    h200-sxm-ib --step 1x1024=20.2 --step 4x1024=32.6 --step 16x1024=93.0
    """
    from moesim.cluster import DEFAULT_CLUSTER
    from moesim.jobs.engine_host import engine_host

    found = engine_host(
        trace,
        step,
        model=model,
        num_hidden_layers=num_hidden_layers,
        cluster=cluster or DEFAULT_CLUSTER,
        engine=engine,
    )
    found.save(out)
    echo(json.dumps(found.to_json(), indent=2) if as_json else f"{found.summary()}\nwrote {out}")
