"""`moesim prefill`: one long prompt over many GPUs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moesim.cli.options import ClusterOption, JsonOption, KvDtypeOption
from moesim.cli.output import echo


def prefill(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, config.json or folder with one.")
    ],
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)],
    gpus: Annotated[int, typer.Option(help="GPUs that share it.", min=2)] = 8,
    cluster: ClusterOption = None,
    engine: Annotated[str, typer.Option(help="vllm, sglang or trtllm.")] = "vllm",
    kv_dtype: KvDtypeOption = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Time one long prompt over many GPUs, by schedule of its attention: ring and others.

    Example: moesim prefill --model Qwen3-30B-A3B --tokens 131072 --gpus 8
    """
    from moesim.jobs.prefill import prefill as run

    result = run(model, tokens=tokens, gpus=gpus, cluster=cluster, engine=engine, kv_dtype=kv_dtype)
    echo(json.dumps(result.to_json(), indent=1) if as_json else result.summary())
