"""`moesim trace capture`: a routing trace of a Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.output import echo, notice


def capture(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder, or id on the Hugging Face hub.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(help="One a line (.txt), or JSON lines with prompt and domain (.jsonl)."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Decode tokens per request; 0 records prefill alone.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.")] = 8,
    max_prompt_tokens: Annotated[int, typer.Option(help="Cut prompts to so many tokens.")] = 2048,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the likeliest token.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same tokens.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda:N, or balanced over all GPUs.")
    ] = "auto",
    gate_weights: Annotated[
        bool, typer.Option("--gate-weights/--no-gate-weights", help="Record them as well.")
    ] = True,
    candidates: Annotated[
        int, typer.Option(help="Record the best so many experts of each router; 0 for none.")
    ] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    name: Annotated[str, typer.Option(help="Model name to note down.")] = "",
    license_text: Annotated[str, typer.Option("--license", help="Licence to note down.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Record which experts a model's tokens choose, prefill and decode apart.

    A capture that was stopped goes on when the same command is run again.

    Example: moesim trace capture --model allenai/OLMoE-1B-7B-0924 --prompts p.jsonl --out t.npz
    """
    from importlib.util import find_spec

    from moesim.cli.progress import progress_bar
    from moesim.errors import InputError

    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise InputError(
            f"capture needs {' and '.join(missing)}", "install it with: pip install moesim[capture]"
        )
    from moesim.trace.capture import CaptureOptions
    from moesim.trace.capture import capture as run

    options = CaptureOptions(
        model=model,
        prompts=prompts,
        out=out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_prompt_tokens=max_prompt_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        gate_weights=gate_weights,
        candidates=candidates,
        chat=chat,
        name=name,
        license=license_text,
    )
    with progress_bar("prompts") as progress:
        result = run(options, notice, progress)
    meta = result.meta
    if as_json:
        summary = {
            "file": str(out),
            "model": meta.model,
            "num_requests": result.num_requests,
            "num_prefill_tokens": result.num_prefill_tokens,
            "num_decode_tokens": result.num_decode_tokens,
            "num_layers": meta.num_layers,
            "num_experts": meta.num_experts,
            "top_k": meta.top_k,
            "layer_ids": list(meta.layer_ids),
            "domains": list(meta.domains),
        }
        echo(json.dumps(summary, indent=2))
        return
    echo(
        f"wrote {out}: {result.num_prefill_tokens:,} prefill and {result.num_decode_tokens:,}"
        f" decode tokens of {result.num_requests:,} requests, {meta.num_layers} MoE layers,"
        f" top-{meta.top_k} of {meta.num_experts} experts"
    )
