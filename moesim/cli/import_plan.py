"""`moesim import-plan`: a serving engine's placement file as a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def import_plan(
    file: Annotated[Path, typer.Argument(help="The engine's file.", show_default=False)],
    engine: Annotated[
        str, typer.Option("--from", help="Engine, as in moesim export --list.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")],
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs, where the file does not say.")
    ] = None,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes that the GPUs are on.")] = 1,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset or config.json: experts and layers."),
    ] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Experts per layer.")] = None,
    layer_ids: Annotated[
        str | None, typer.Option(help="Absolute numbers of the MoE layers, as 1-26 or 1,3,5.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Read the placement that an engine runs with back into a plan, to evaluate or compare it.

    Example: moesim import-plan location.json --from sglang --num-gpus 16 --model DeepSeek-V3
    --out plan.json
    """
    from moesim.cli.notes import note
    from moesim.cli.trace_import import given_name, parse_layer_ids
    from moesim.errors import FormatError, InputError
    from moesim.exporters.base import ReadOptions
    from moesim.exporters.registry import exporter
    from moesim.model.names import load_model
    from moesim.placement import MAX_PLAN_BYTES

    source = exporter(engine)
    spec = load_model(model) if model is not None else None
    layers = parse_layer_ids(layer_ids) if layer_ids is not None else None
    options = ReadOptions(
        where=str(file),
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        num_experts=num_experts or (spec.num_experts if spec else None),
        layer_ids=layers or (spec.moe_layer_ids if spec else None),
        num_hidden_layers=spec.num_hidden_layers if spec else None,
        model=given_name(str(model), spec.name) if spec else "",
        notify=note,
    )
    try:
        if file.stat().st_size > MAX_PLAN_BYTES:
            raise FormatError(f"{file}: larger than {MAX_PLAN_BYTES} bytes", "no placement is")
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "check the path") from None
    plan = source.decode(data, options)
    plan.save(out)
    placement = plan.placement
    if as_json:
        summary = {
            "file": str(out),
            "engine": engine,
            "num_gpus": placement.num_gpus,
            "num_nodes": placement.num_nodes,
            "num_slots": placement.num_slots,
            "num_experts": placement.num_experts,
            "layer_ids": list(plan.layer_ids),
        }
        typer.echo(json.dumps(summary, indent=2))
        return
    nodes = "1 node" if placement.num_nodes == 1 else f"{placement.num_nodes} nodes"
    typer.echo(
        f"wrote {out}: {placement.num_layers} MoE layers, {placement.num_experts} experts in"
        f" {placement.num_slots} slots on {placement.num_gpus} GPUs of {nodes}"
    )
