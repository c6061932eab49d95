"""`moesim model list` and `moesim model show`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec

app = typer.Typer(help="Model shapes: presets and Hugging Face config.json.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the model presets.

    Example: moesim model list
    """
    from moesim.model.names import load_model, preset_aliases, preset_names

    specs = [load_model(name) for name in preset_names()]
    if as_json:
        rows = [
            {
                "name": spec.name,
                "aliases": list(preset_aliases(spec.name)),
                "num_moe_layers": spec.num_moe_layers,
                "num_hidden_layers": spec.num_hidden_layers,
                "num_experts": spec.num_experts,
                "top_k": spec.top_k,
                "hidden_size": spec.hidden_size,
                "moe_intermediate_size": spec.moe_intermediate_size,
                "expert_dtype": spec.expert_dtype,
                "expert_bytes": spec.expert_bytes(),
                "total_params": spec.total_params,
                "active_params": spec.active_params,
                "source": spec.source,
            }
            for spec in specs
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for title in ("MoE\nlayers", "experts", "hidden\nsize", "expert\nwidth", "dtype"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("one\nexpert", "total\nparams", "active\nparams"):
        table.add_column(title, justify="right", no_wrap=True)
    for spec in specs:
        table.add_row(
            spec.name,
            f"{spec.num_moe_layers}/{spec.num_hidden_layers}",
            f"{spec.top_k} of {spec.num_experts}",
            str(spec.hidden_size),
            str(spec.moe_intermediate_size),
            spec.expert_dtype,
            _bytes(spec.expert_bytes()),
            _count(spec.total_params),
            _count(spec.active_params),
        )
    console = Console()
    if console.width < 84:
        console = Console(width=84)
    console.print(table)
    console.print("\nRepository ids such as Qwen/Qwen3-30B-A3B are names too; --json lists them.")


@app.command("show")
def show_model(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_PATH", help="A preset, a config.json, or a folder that holds one."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show one model's shape and the sizes that follow from it.

    Examples: moesim model show DeepSeek-V3; moesim model show ./my-model/config.json --json
    """
    from moesim.model.names import load_model

    spec = load_model(name)
    if as_json:
        typer.echo(json.dumps(spec.to_dict(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(spec.name), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(spec):
        table.add_row(label, Text(value))
    Console().print(table)


def _rows(spec: ModelSpec) -> list[tuple[str, str]]:
    from moesim.model.dtypes import WEIGHT_BYTES

    attention = spec.attention
    heads = f"{attention.num_heads} heads of {attention.head_dim}"
    if attention.kind == "mla":
        queries = f"queries {attention.q_lora_rank}" if attention.q_lora_rank else "full queries"
        heads += f", latent {attention.kv_lora_rank} + {attention.qk_rope_head_dim}, {queries}"
    else:
        heads += f", {attention.num_kv_heads} KV heads"
    if attention.window_tokens:
        heads += (
            f"; window of {attention.window_tokens} tokens in "
            f"{len(attention.window_layer_ids)} of {spec.num_hidden_layers} layers"
        )
    if attention.linear_layer_ids:
        heads += f"; {len(attention.linear_layer_ids)} layers of linear attention"
    rows = [
        ("architecture", spec.architecture or "unknown"),
        ("layers", f"{spec.num_hidden_layers}, MoE in {_layers(spec)}"),
        ("hidden size", f"{spec.hidden_size:,}"),
        (
            "experts",
            f"{spec.num_experts} of width {spec.moe_intermediate_size:,}, top-{spec.top_k}",
        ),
    ]
    if spec.n_group > 1:
        rows.append(("expert groups", f"{spec.topk_group} of {spec.n_group}"))
    if spec.num_shared_experts:
        rows.append(
            (
                "shared experts",
                f"{spec.num_shared_experts}, {spec.shared_intermediate_size:,} wide in all",
            )
        )
    if spec.dense_intermediate_size:
        rows.append(("dense layers", f"width {spec.dense_intermediate_size:,}"))
    rows += [
        ("attention", f"{attention.kind}: {heads}"),
        ("vocabulary", f"{spec.vocab_size:,}{', tied' if spec.tie_word_embeddings else ''}"),
        ("total params", _count(spec.total_params)),
        ("active params", f"{_count(spec.active_params)} a token, vocabulary tables counted"),
        (
            "one expert",
            f"{_count(spec.expert_params)} params, {_count(spec.expert_flops_per_token)} "
            "flops a token",
        ),
    ]
    for dtype in WEIGHT_BYTES:
        if dtype == "fp16" != spec.expert_dtype:
            continue  # as long as bf16
        stored = " (as stored)" if dtype == spec.expert_dtype else ""
        rows.append((f"  in {dtype}", f"{_bytes(spec.expert_bytes(dtype))}{stored}"))
    rows += [
        ("all weights", f"{_bytes(spec.weight_bytes())} as stored"),
        ("  not experts", f"{_bytes(spec.non_expert_bytes())} ({spec.dense_dtype})"),
        ("hidden state", f"{_bytes(spec.token_bytes())} a token in bf16"),
        ("KV cache", f"{_bytes(spec.kv_bytes_per_token())} a token in bf16"),
        ("source", spec.source),
    ]
    notes = [note for note in (spec.note, attention.note) if note]
    return rows + ([("note", "; ".join(notes))] if notes else [])


def _layers(spec: ModelSpec) -> str:
    ids = spec.moe_layer_ids
    if len(ids) == spec.num_hidden_layers:
        return "all"
    step = ids[1] - ids[0] if len(ids) > 1 else 1
    if ids == tuple(range(ids[0], ids[-1] + 1, step)):
        every = f", every {step}" if step > 1 else ""
        return f"{len(ids)} ({ids[0]} to {ids[-1]}{every})"
    return f"{len(ids)} ({', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})"


def _bytes(size: int) -> str:
    return f"{_count(size, ('B', 'kB', 'MB', 'GB', 'TB'), ' ')}"


def _count(value: float, units: tuple[str, ...] = ("", "K", "M", "B", "T"), gap: str = "") -> str:
    """Three significant digits with a decimal unit: 46.7B, 44.1 MB."""
    step = 0
    while value >= 999.5 and step + 1 < len(units):
        value /= 1000
        step += 1
    digits = 0 if step == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{gap}{units[step]}".rstrip()
