"""`moesim export`: a plan as the file that a serving engine loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption
from moesim.cli.output import echo


def export(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="Plan file.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--to", help="Engine; --list names them.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="What to write [default: PLAN's name, the engine and its suffix]."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Preset or config.json [default: the plan's model]; of a cache plan, its path.",
        ),
    ] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers, dense ones too, if the model is unknown.")
    ] = None,
    mtp_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Multi-token-prediction layers to write rows for, where the engine needs them.",
            show_default="the model's, if known",
        ),
    ] = None,
    fill_layers: Annotated[
        str | None,
        typer.Option(
            help="MoE layers that the plan lacks, as 0-2, to place in order: those that route by"
            " token id."
        ),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(
            "--apply", help="With --to megatron: checkpoint folder to renumber into --out."
        ),
    ] = None,
    list_engines: Annotated[bool, typer.Option("--list", help="List the engines.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plan for SGLang, TensorRT-LLM, vLLM, vllm-ascend, omni-infer, EPLB or Megatron-Core.

    Prints the lines that start the engine with it. What the engine cannot express is refused. A
    cache plan (moesim cache --out) becomes the script that starts llama.cpp, ik_llama.cpp,
    KTransformers or vLLM, or accelerate's device_map.

    Example: moesim export plan.json --to sglang --out location.json
    """
    from moesim.cli.output import notice
    from moesim.cli.trace_import import parse_layer_ids
    from moesim.errors import InputError
    from moesim.exporters.registry import EXPORTERS
    from moesim.jobs.export import export as run
    from moesim.jobs.export_placement import suffix_of

    if list_engines:
        _list(as_json)
        return
    if plan_file is None:
        raise InputError("no plan was named", "name a plan file, or --list the engines")
    if engine is None:
        raise InputError("--to is missing", f"name an engine: {', '.join(EXPORTERS.names())}")
    suffix = suffix_of(plan_file, engine)
    if apply is not None:
        if engine != "megatron":
            raise InputError(f"--apply is not for {engine}", "use it with --to megatron")
        if out is None:
            raise InputError("--out is missing", "name the folder of the new checkpoint")
        _apply(plan_file, apply, out, model, num_hidden_layers, as_json)
        return
    if out is None:
        out = Path(f"{plan_file.stem}.{engine}{suffix}")
        notice(f"--out not given, writing {out}")
    done = run(
        plan_file,
        to=engine,
        out=out,
        model=model,
        num_hidden_layers=num_hidden_layers,
        mtp_layers=mtp_layers,
        fill_layers=parse_layer_ids(fill_layers, "--fill-layers") if fill_layers else (),
        notify=notice,
    )
    echo(json.dumps(done.to_json(), indent=2) if as_json else done.summary())


def _list(as_json: bool) -> None:
    from moesim.exporters.registry import EXPORTERS, exporter
    from moesim.jobs.export_placement import TITLE

    found = {name: exporter(name) for name in EXPORTERS.names()}
    rows = {name: (made.TITLE, made.ACCEPTED_BY) for name, made in found.items()}
    rows |= {name: (title, name) for name, title in TITLE.items()}
    if as_json:
        listing = {n: {"title": title, "accepted_by": by} for n, (title, by) in rows.items()}
        echo(json.dumps(listing, indent=2))
        return
    for name, (title, by) in rows.items():
        echo(f"{name:<14} {title}\n{'':<14} accepted by {by}")


def _apply(
    plan_file: Path,
    source: Path,
    target: Path,
    model: str | None,
    num_hidden_layers: int | None,
    as_json: bool,
) -> None:
    from moesim.cli.output import notice
    from moesim.exporters.base import ExportOptions
    from moesim.exporters.checkpoint import permute_checkpoint
    from moesim.jobs import inputs

    plan, _ = inputs.plan_of(plan_file, apart=True).mtp_apart()
    options = ExportOptions(
        spec=inputs.model_or_named(model, plan.model),
        num_hidden_layers=num_hidden_layers,
        notify=notice,
    )
    changed = permute_checkpoint(plan, source, target, options)
    if as_json:
        echo(json.dumps({"checkpoint": str(target), "num_changed_tensors": changed}))
        return
    echo(
        f"wrote {target}: {changed} tensors renumbered in {len(plan.layer_ids)} layers; experts"
        f" placed in order over {plan.placement.num_gpus} GPUs are now the plan"
    )
