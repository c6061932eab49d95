"""`moesim import-plan`: a serving engine's placement file as a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import JsonOption
from moesim.cli.output import echo


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
    as_json: JsonOption = False,
) -> None:
    """Read the placement that an engine runs with back into a plan, to evaluate or compare it.

    Example: moesim import-plan location.json --from sglang --num-gpus 16 --model DeepSeek-V3
    --out plan.json
    """
    from moesim.cli.output import notice
    from moesim.cli.trace_import import parse_layer_ids
    from moesim.compat import gpus_in_nodes
    from moesim.jobs.export import import_plan as run

    plan = run(
        file,
        engine=engine,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        model=model,
        num_experts=num_experts,
        layer_ids=parse_layer_ids(layer_ids) if layer_ids is not None else None,
        notify=notice,
    )
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
        echo(json.dumps(summary, indent=2))
        return
    echo(
        f"wrote {out}: {placement.num_layers} MoE layers, {placement.num_experts} experts in"
        f" {placement.num_slots} slots on"
        f" {gpus_in_nodes(placement.num_gpus, placement.num_nodes)}"
    )
