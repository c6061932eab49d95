"""`moesim model list` and `moesim model show`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.output import echo

if TYPE_CHECKING:
    from moesim.model.hf.reader import Reading
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
        echo(json.dumps(rows, indent=2))
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
            metavar="NAME_OR_PATH",
            help="A preset, a config.json or a folder that holds one, or a .gguf file.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show one model: its shape, its sizes, the keys read.

    Examples: moesim model show DeepSeek-V3; moesim model show ./my-model/config.json --json
    """
    from moesim.model.names import load_reading

    reading = load_reading(name)
    if as_json:
        echo(json.dumps(reading.spec.to_dict(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(reading.spec.name), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(reading):
        table.add_row(label, Text(value))
    Console().print(table)


def _rows(reading: Reading) -> list[tuple[str, str]]:
    spec = reading.spec
    rows = [
        ("architecture", spec.architecture or "unknown"),
        ("layers", f"{spec.num_hidden_layers}, MoE in {_layers(spec)}{_other_layers(spec)}"),
        ("hidden size", f"{spec.hidden_size:,}"),
        *_expert_rows(spec),
        *_attention_rows(spec),
        ("vocabulary", f"{spec.vocab_size:,}{', tied' if spec.tie_word_embeddings else ''}"),
        ("total params", _count(spec.total_params)),
        ("active params", f"{_count(spec.active_params)} per token, vocabulary tables counted"),
        ("  fewer tables", _fewer_tables(spec)),
        *_size_rows(spec),
        ("source", spec.source),
    ]
    notes = [note for note in (spec.note, spec.attention.note) if note]
    if spec.attention.note in spec.note:
        notes = notes[:1]
    if notes:
        rows.append(("note", "; ".join(notes)))
    return rows + _key_rows(reading)


def _fewer_tables(spec: ModelSpec) -> str:
    """Active parameters as those cards count them that leave tables out."""
    head = _count(spec.active_params - spec.lookup_params)
    none = _count(spec.active_params - spec.embedding_params - spec.lm_head_params)
    return f"{head} without looking up the embedding, {none} without embedding and head"


def _other_layers(spec: ModelSpec) -> str:
    parts = []
    if spec.hash_layer_ids:
        parts.append(f"{len(spec.hash_layer_ids)} of them by hash of the token")
    if spec.no_ffn_layer_ids:
        parts.append(f"{len(spec.no_ffn_layer_ids)} without feed-forward part")
    return "".join(f", {part}" for part in parts)


def _expert_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    zero = f" and {spec.num_zero_experts} that compute nothing" if spec.num_zero_experts else ""
    latent = f" on {spec.expert_hidden:,} latent channels" if spec.expert_hidden_size else ""
    width = f"{spec.num_experts}{zero} of width {spec.moe_intermediate_size:,}{latent}"
    rows = [("experts", f"{width}, top-{spec.top_k}")]
    if spec.n_group > 1:
        rows.append(("expert groups", f"{spec.topk_group} of {spec.n_group}"))
    if spec.num_shared_experts:
        wide = f"{spec.shared_intermediate_size:,} wide in all"
        rows.append(("shared experts", f"{spec.num_shared_experts}, {wide}"))
    if spec.num_dense_ffns:
        beside = f", {spec.moe_dense_ffns} beside the experts" if spec.moe_dense_ffns else ""
        rows.append(("dense layers", f"width {spec.dense_intermediate_size:,}{beside}"))
    return rows


def _attention_rows(spec: ModelSpec) -> list[tuple[str, str]]:
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
    rows = [("attention", f"{attention.kind}: {heads}")]
    for kind in spec.layer_kinds if len(spec.layer_kinds) > 1 else ():
        state = f", state {_bytes(kind.state_bytes)} per sequence" if kind.state_bytes else ""
        size = f"{len(kind.layer_ids)} layers of {_count(kind.params)} params"
        rows.append((f"  {kind.name}", f"{size}{state}"))
    return rows


def _size_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    from moesim.model.dtypes import WEIGHT_BYTES

    flops = _count(spec.expert_flops_per_token)
    rows = [("one expert", f"{_count(spec.expert_params)} params, {flops} flops per token")]
    for dtype in dict.fromkeys((*WEIGHT_BYTES, spec.expert_dtype)):
        if dtype == "fp16" != spec.expert_dtype:
            continue  # as long as bf16
        stored = " (as stored)" if dtype == spec.expert_dtype else ""
        rows.append((f"  in {dtype}", f"{_bytes(spec.expert_bytes(dtype))}{stored}"))
    rows += [
        ("all weights", f"{_bytes(spec.weight_bytes())} as stored"),
        ("  not experts", f"{_bytes(spec.non_expert_bytes())} ({spec.dense_dtype})"),
    ]
    if spec.stored:
        classes = ", ".join(f"{name} {value * 8:.4g}" for name, value in spec.stored)
        rows.append(("  bits per weight", f"{classes}; other classes as their type"))
    if spec.mtp_layers:
        experts = f", {spec.mtp_moe_layers} with experts" if spec.mtp_moe_layers else ""
        more = f"{_count(spec.mtp_params)} params more, not in the totals"
        plural = "s" if spec.mtp_layers > 1 else ""
        rows.append(("further tokens", f"{spec.mtp_layers} layer{plural}{experts}: {more}"))
    cached = f"{_bytes(spec.kv_bytes_per_token())} per token in bf16"
    beyond = spec.kv_bytes_per_token_beyond_windows()
    if beyond != spec.kv_bytes_per_token():
        cached += f", {_bytes(beyond)} beyond the windows"
    rows += [
        ("hidden state", f"{_bytes(spec.token_bytes())} per token in bf16"),
        ("KV cache", cached),
    ]
    if spec.state_bytes:
        rows.append(("state", f"{_bytes(spec.state_bytes)} per sequence, whatever its length"))
    return rows


def _key_rows(reading: Reading) -> list[tuple[str, str]]:
    """What was read of the file, what was noted, and what has no effect on sizes."""
    rows = [("keys read", ", ".join(f"{key} {_short(v)}" for key, v in reading.read.items()))]
    if reading.noted:
        rows.append(("not understood", ", ".join(reading.noted)))
    if reading.harmless:
        some = ", ".join(reading.harmless[:60])
        more = len(reading.harmless) - 60
        rows.append(("no effect on sizes", some + (f" and {more} more" if more > 0 else "")))
    return rows


def _short(value: object) -> str:
    text = "".join(char for char in str(value) if char.isprintable())
    return text if len(text) <= 30 else text[:27] + "..."


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
