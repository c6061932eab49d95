"""A model's weights tensor by tensor: those of a GGUF file, or what a preset has in a mix of
llama.cpp or in its checkpoint's own types. What engines place and count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesim.errors import InputError, MismatchError
from moesim.model.checkpoint_sizes import checkpoint_sizes, has_safetensors
from moesim.model.ggml import GGML_BY_NAME, QUANTISED_BYTES
from moesim.model.gguf import Tensor, read_gguf
from moesim.model.gguf_spec import Placed, place, spec_of
from moesim.model.mixes import Kind, mix_named, type_in_mix
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec
from moesim.types import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """`tensors` of a model; `spec.stored` has their bytes by class. `from_file`: sizes are those of
    a file, else computed. `note`: what is assumed, empty where nothing is."""

    spec: ModelSpec
    tensors: tuple[Placed, ...]
    source: str
    from_file: bool
    note: str = ""

    @property
    def quantised(self) -> bool:
        """Whether the experts have a type of GGUF files alone."""
        return self.spec.expert_dtype in QUANTISED_BYTES

    def layer_bytes(self, experts: bool) -> IntArray:
        """[num_hidden_layers] bytes of a layer's routed experts, or of all else in it."""
        out = np.zeros(self.spec.num_hidden_layers, np.int64)
        for p in self.tensors:
            if p.layer >= 0 and (p.cls == "experts") == experts:
                out[p.layer] += p.tensor.num_bytes
        return out

    @property
    def embedding_bytes(self) -> int:
        """The embedding table."""
        return sum(p.tensor.num_bytes for p in self.tensors if p.role == "token_embd")

    @property
    def output_bytes(self) -> int:
        """The output head and what else stands after the last layer; the embedding table where it
        is the head too."""
        own = sum(
            p.tensor.num_bytes for p in self.tensors if p.layer < 0 and p.role != "token_embd"
        )
        return own + (self.embedding_bytes if self.spec.tie_word_embeddings else 0)

    @property
    def num_bytes(self) -> int:
        """All tensors."""
        return sum(p.tensor.num_bytes for p in self.tensors)

    @property
    def largest_expert_tensor(self) -> int:
        """Bytes of the largest tensor of routed experts."""
        return max(p.tensor.num_bytes for p in self.tensors if p.cls == "experts")


def load_weights(model: ModelSpec | str, quant: str | None = None) -> Weights:
    """The weights of a model by name, config.json, .gguf file, or folder of safetensors, whose
    headers then give the sizes; `quant`: a mix of llama.cpp (mixes.BASE), by default the model's
    own types.

    Raises InputError where a file is given another mix than its own, and what readers raise.
    """
    if isinstance(model, str) and Path(model).suffix == ".gguf":
        if quant is not None:
            raise InputError(
                f"{model:.200} has its own types, and `quant` {quant:.40} is asked for",
                "leave one of them out",
            )
        spec, placed, _ = spec_of(read_gguf(Path(model)))
        return Weights(spec, placed, spec.source, True)
    spec = load_model(model) if isinstance(model, str) else model
    if isinstance(model, str) and quant is None and has_safetensors(Path(model)):
        return _of_checkpoint(Path(model), spec)
    if spec.source.startswith("GGUF"):
        return _as_stored(spec)
    return _as_stored(spec) if quant is None else _in_mix(spec, mix_named(quant))


def _of_checkpoint(folder: Path, spec: ModelSpec) -> Weights:
    """As the headers of the folder's files have it."""
    placed, experts = checkpoint_sizes(folder, spec)
    own = experts[list(spec.moe_layer_ids)]
    low, high = int(own.min()), int(own.max())
    note = "" if low == high else f"experts have {low / 1e6:.1f} to {high / 1e6:.1f} MB"
    weights = Weights(spec, placed, f"{spec.name}, safetensors in {folder.name}", False, note)
    return replace(weights, spec=_with_stored(spec, weights, types=False))


def _as_stored(spec: ModelSpec) -> Weights:
    """One tensor per class and layer, of the checkpoint's types."""
    made = []
    for name, params, *_ in _matrices(spec):
        cls = place(Tensor(name, (1,), "", 0), spec.name).cls
        dtype = spec.expert_dtype if cls == "experts" else spec.dense_dtype
        size = round(params[0] * params[1] * spec.bytes_per_weight(cls))
        made.append(_placed(name, params, dtype, size))
    return Weights(spec, tuple(made), f"{spec.name} as its checkpoint stores it", False)


def _in_mix(spec: ModelSpec, mix: str) -> Weights:
    if spec.attention.kind == "gqa":
        ratio = spec.attention.num_heads // spec.attention.num_kv_heads
    else:
        ratio = 1
    mixing = [x for kind in spec.layer_kinds for x in kind.layer_ids if kind.caches]
    order = {layer: i for i, layer in enumerate(sorted(mixing))}
    made = []
    for name, shape, kind, layer in _matrices(spec):
        if name.endswith("ffn_gate_inp.weight"):
            made.append(_placed(name, shape, "f32", 4 * shape[0] * shape[1]))
            continue
        at = (order.get(layer, 0), len(order)) if kind.startswith("attn") else (
            layer, spec.num_hidden_layers
        )  # fmt: skip
        chosen = type_in_mix(
            mix, kind, shape[0], at, spec.num_experts, ratio, tied=spec.tie_word_embeddings
        )
        block = GGML_BY_NAME[chosen]
        made.append(
            _placed(name, shape, chosen, shape[0] * shape[1] * block.num_bytes // block.weights)
        )
    for layer in range(spec.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            width = spec.hidden_size
            made.append(_placed(f"blk.{layer}.{norm}.weight", (width, 1), "f32", 4 * width))
    weights = Weights(spec, tuple(made), f"{spec.name} in {mix}", False, _note(spec, mix))
    return replace(weights, spec=_with_stored(spec, weights))


def _note(spec: ModelSpec, mix: str) -> str:
    plain = spec.attention.kind == "gqa" and not spec.attention.kinds
    rest = "" if plain else "; attention counted as one matrix of the mix's base type"
    return f"sizes follow llama.cpp's rules for {mix}, a published file may differ{rest}"


def _with_stored(spec: ModelSpec, weights: Weights, *, types: bool = True) -> ModelSpec:
    """The spec with bytes per weight of the tensors, and with their types where asked for."""
    size: dict[str, int] = {}
    by_type: dict[str, dict[str, int]] = {}
    for p in weights.tensors:
        size[p.cls] = size.get(p.cls, 0) + p.tensor.num_bytes
        by = by_type.setdefault(p.cls, {})
        by[p.tensor.type] = by.get(p.tensor.type, 0) + p.tensor.num_bytes

    def most(cls: str) -> str:
        name = max(by_type[cls], key=by_type[cls].__getitem__)
        return {"f16": "fp16", "f32": "fp32"}.get(name, name)

    params = spec.params_by_class
    stored = tuple((c, size[c] / params[c]) for c in sorted(size) if params.get(c))
    if not types:
        return replace(spec, stored=stored)
    return replace(spec, expert_dtype=most("experts"), dense_dtype=most("attention"), stored=stored)


def _placed(name: str, shape: tuple[int, int], dtype: str, size: int) -> Placed:
    return place(Tensor(name, shape, dtype, size), name)


def _matrices(spec: ModelSpec) -> list[tuple[str, tuple[int, int], Kind, int]]:
    """Name, (columns, rows), kind and layer of every matrix, experts of a layer in one."""
    hidden, moe = spec.hidden_size, set(spec.moe_layer_ids)
    if spec.params_by_class["latent"]:
        raise MismatchError(
            f"{spec.name} has experts in a latent space, which is not placed tensor by tensor",
            "give another model, or its .gguf file",
        )
    out: list[tuple[str, tuple[int, int], Kind, int]] = [
        ("token_embd.weight", (hidden, spec.vocab_size), "embedding", -1)
    ]
    if not spec.tie_word_embeddings:
        out.append(("output.weight", (hidden, spec.vocab_size), "output", -1))
    mixing = {x: kind.params for kind in spec.layer_kinds for x in kind.layer_ids}
    without = set(spec.no_ffn_layer_ids)
    for layer in range(spec.num_hidden_layers):
        prefix = f"blk.{layer}."
        out += [(prefix + n, s, k, layer) for n, s, k in _attention(spec, mixing.get(layer, 0))]
        wide: list[tuple[str, int]] = []
        if layer in moe:
            width = spec.moe_intermediate_size
            rows = spec.num_experts
            inner = spec.expert_hidden
            out.append((prefix + "ffn_gate_inp.weight", (hidden, rows), "other", layer))
            gates = ("gate", "up")[3 - spec.ffn_matrices :]
            out += [(f"{prefix}ffn_{g}_exps.weight", (inner, width * rows), "experts", layer)
                    for g in gates]  # fmt: skip
            out.append(
                (f"{prefix}ffn_down_exps.weight", (width, inner * rows), "experts_down", layer)
            )
            if spec.shared_intermediate_size:
                wide.append(("_shexp", spec.shared_intermediate_size))
            if spec.moe_dense_ffns:
                wide.append(("", spec.dense_intermediate_size * spec.moe_dense_ffns))
        elif layer not in without:
            wide.append(("", spec.dense_intermediate_size))
        for end, width in wide:
            gates = ("gate", "up")[3 - spec.ffn_matrices :]
            out += [(f"{prefix}ffn_{g}{end}.weight", (hidden, width), "other", layer)
                    for g in gates]  # fmt: skip
            out.append((f"{prefix}ffn_down{end}.weight", (width, hidden), "ffn_down", layer))
    return out


def _attention(spec: ModelSpec, params: int) -> list[tuple[str, tuple[int, int], Kind]]:
    """Matrices of one layer; where they are not those of grouped queries, all in one."""
    a, hidden = spec.attention, spec.hidden_size
    if params == 0:
        return []
    if a.kind == "gqa" and params == a.layer_params(hidden):
        value = a.v_head_dim or a.head_dim
        return [
            ("attn_q.weight", (hidden, a.num_heads * a.head_dim), "attn_q"),
            ("attn_k.weight", (hidden, a.num_kv_heads * a.head_dim), "attn_k"),
            ("attn_v.weight", (hidden, a.num_kv_heads * value), "attn_v"),
            ("attn_output.weight", (a.num_heads * value, hidden), "attn_output"),
        ]
    return [("attn_qkv.weight", (hidden, -(-params // hidden)), "other")]
