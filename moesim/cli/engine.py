"""`moesim engine replay`: a routing trace, and a plan, inside a serving engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption, ModelOption, SeedOption, TraceOption
from moesim.cli.output import echo

app = typer.Typer(help="Serving engines: replay a routing trace inside one.", no_args_is_help=True)


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
    num_hidden_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Cut the model to its first layers [default: all]."),
    ] = None,
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
    from moesim.trace.pools import own_experts

    if engine != "vllm":
        raise UnknownNameError("engine", engine, ["vllm"])
    routing = load_token_trace(trace, "moesim engine replay")
    own_experts(routing, "moesim engine replay")
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
