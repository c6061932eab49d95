"""Small GGUF files, byte by byte as ggml-org/ggml docs/gguf.md has them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.model.ggml import GGML_BY_NAME, GGML_TYPES

NUMBER_OF = {kind.name: number for number, kind in GGML_TYPES.items()}
ALIGN = 32


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value(found: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(found, bool):
        return struct.pack("<I?", 7, found)
    if isinstance(found, int):
        return struct.pack("<II", 4, found)
    if isinstance(found, float):
        return struct.pack("<If", 6, found)
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    inner = b"".join(value(item)[4:] for item in found)
    kind = struct.unpack("<I", value(found[0])[:4])[0]
    return struct.pack("<IIQ", 9, kind, len(found)) + inner


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    version: int = 3,
) -> Path:
    """A file with tensors (name, shape, type) of zeros."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(found) for key, found in metadata.items())
    offset = 0
    for name, shape, kind in tensors:
        layout = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, NUMBER_OF[kind], offset)
        head += text(name) + layout
        count = 1
        for size in shape:
            count *= size
        offset += count // GGML_BY_NAME[kind].weights * GGML_BY_NAME[kind].num_bytes
        offset = -(-offset // ALIGN) * ALIGN
    head += bytes(-len(head) % ALIGN)
    path.write_bytes(head + bytes(offset))
    return path


METADATA = {
    "general.architecture": "qwen3moe",
    "general.name": "tiny",
    "qwen3moe.block_count": 2,
    "qwen3moe.embedding_length": 256,
    "qwen3moe.attention.head_count": 4,
    "qwen3moe.attention.head_count_kv": 2,
    "qwen3moe.attention.key_length": 64,
    "qwen3moe.attention.value_length": 64,
    "qwen3moe.expert_count": 4,
    "qwen3moe.expert_used_count": 2,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(2000)],
    "qwen3moe.rope.freq_base": 1e6,
}


def tensors(down: tuple[str, str] = ("q6_k", "q4_k")) -> list[tuple[str, tuple[int, ...], str]]:
    """Two layers of hidden 256, 4 query and 2 KV heads of 64, 4 experts of width 256; `down`: the
    type of the down projections of each layer."""
    out: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (256, 512), "q4_k")]
    for layer in range(2):
        blk = f"blk.{layer}."
        out += [
            (blk + "attn_norm.weight", (256,), "f32"),
            (blk + "attn_q.weight", (256, 256), "q4_k"),
            (blk + "attn_k.weight", (256, 128), "q4_k"),
            (blk + "attn_v.weight", (256, 128), "q6_k"),
            (blk + "attn_output.weight", (256, 256), "q4_k"),
            (blk + "ffn_norm.weight", (256,), "f32"),
            (blk + "ffn_gate_inp.weight", (256, 4), "f32"),
            (blk + "ffn_gate_exps.weight", (256, 256, 4), "q4_k"),
            (blk + "ffn_up_exps.weight", (256, 256, 4), "q4_k"),
            (blk + "ffn_down_exps.weight", (256, 256, 4), down[layer]),
        ]
    return [*out, ("output_norm.weight", (256,), "f32"), ("output.weight", (256, 512), "q6_k")]
