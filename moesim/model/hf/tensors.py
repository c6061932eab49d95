"""Weight matrices of a model by their checkpoint names: what quantisation is told by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesim.model.hf.families import Family
from moesim.model.hf.mixers import Mixer
from moesim.model.spec import ModelSpec


@dataclass(frozen=True)
class Named:
    """Weights of one class that share their names: `layer` -1 where they are in none."""

    tensor_class: str
    layer: int
    names: tuple[str, ...]
    params: int
    quantised: bool = True


_PAIRS = (("gate_proj", "w1", "gate_up_proj"), ("up_proj", "w3", "gate_up_proj"))
_DOWN = ("down_proj", "w2")
_SHARED = ("shared_experts", "shared_expert", "share_expert", "shared_mlp")


def layer_tensors(spec: ModelSpec, mixers: list[Mixer | None], family: Family) -> list[Named]:
    """Every matrix of every layer, and the tables. Experts are told by the first of a layer."""
    out: list[Named] = []
    moe, none = set(spec.moe_layer_ids), set(spec.no_ffn_layer_ids)
    for layer, mixer in enumerate(mixers):
        for tensor in mixer.tensors if mixer is not None else ():
            assert mixer is not None
            names = tuple(_join(mixer.module, name) for name in tensor.names)
            out.append(Named("attention", layer, names, tensor.params, tensor.quantised))
        if layer in moe:
            out += _moe(spec, layer, family)
        elif layer not in none:
            out += _ffn(
                "dense", layer, spec.dense_ffn_params, spec.ffn_matrices, (family.dense_module,)
            )
    out.append(
        Named("tables", -1, ("embed_tokens", "embeddings", "wte"), spec.embedding_params, False)
    )
    if spec.lm_head_params:
        out.append(Named("tables", -1, ("lm_head", "head", "output"), spec.lm_head_params, False))
    if spec.other_params:
        out.append(Named("other", -1, (), spec.other_params, False))
    return out


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _moe(spec: ModelSpec, layer: int, family: Family) -> Iterator[Named]:
    module = family.experts_module
    experts = spec.num_experts * spec.expert_params
    yield from _ffn(
        "experts",
        layer,
        experts,
        spec.ffn_matrices,
        (_join(module, "experts.0"), _join(module, "experts")),
    )
    router = tuple(_join(module, name) for name in ("gate", "router", "router.proj"))
    yield Named("router", layer, router, spec.router_params, False)
    if spec.shared_expert_params:
        inside = tuple(_join(module, name) for name in _SHARED)
        places = (*inside, *_SHARED) if module else ("mlp",)
        yield from _ffn("shared", layer, spec.shared_expert_params, spec.ffn_matrices, places)
    if spec.latent_params:
        names = ("fc1_latent_proj", "fc2_latent_proj", "routed_expert_down_proj")
        yield Named(
            "latent", layer, tuple(_join(module, name) for name in names), spec.latent_params
        )
    if spec.moe_dense_ffns:
        params = spec.moe_dense_ffns * spec.dense_ffn_params
        places = (family.dense_module, f"{family.dense_module}.0")
        yield from _ffn("dense", layer, params, spec.ffn_matrices, places)


def _ffn(
    tensor_class: str, layer: int, params: int, matrices: int, places: tuple[str, ...]
) -> Iterator[Named]:
    leaves = (*_PAIRS, _DOWN) if matrices == 3 else (_PAIRS[1], _DOWN)
    for leaf in leaves:
        names = tuple(_join(place, name) for place in places for name in leaf)
        yield Named(tensor_class, layer, names, params // matrices)
