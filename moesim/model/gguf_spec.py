"""From the header of a GGUF file to a ModelSpec: shapes out of its tensors, checked against its
metadata; bytes per weight of each class exactly as stored.

Tensor names and metadata keys are those of ggml-org/llama.cpp (src/llama-arch.cpp,
gguf-py/gguf/constants.py). A tensor whose name is not known is refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

from moesim.errors import FormatError, plain
from moesim.model.attention import AttentionSpec, Cache, LayerKind
from moesim.model.gguf import GgufFile, Tensor
from moesim.model.spec import ModelSpec

WINDOW_PERIOD = {
    "gpt-oss": 2,
    **dict.fromkeys(
        ("llama", "qwen2moe", "qwen3moe", "olmoe", "glm4moe", "deepseek2", "minimax-m2", "dots1",
         "granitemoe", "qwen3next", "qwen35moe", "bailingmoe2", "ernie4_5-moe", "hunyuan-moe"), 0
    ),
}  # fmt: skip
"""Architectures that are read. Every n-th layer sees all the past, the others a window; 0: no
window."""
_FLOATS = {"f16": "fp16", "f32": "fp32"}
_CLASSES = {
    "experts": ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"),
    "router": ("ffn_gate_inp", "exp_probs_b"),
    "shared": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp"),
    "dense": ("ffn_gate", "ffn_up", "ffn_down"),
    "attention": (
        "attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "attn_q_a",
        "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "attn_sinks",
        "ssm_in", "ssm_ba", "ssm_beta", "ssm_alpha", "ssm_beta_alpha", "ssm_conv1d", "ssm_dt",
        "ssm_a", "ssm_out",
    ),
    "other": (
        "attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "attn_q_a_norm", "attn_kv_a_norm",
        "post_attention_norm", "post_ffw_norm", "ssm_norm", "layer_output_norm",
    ),
}  # fmt: skip
CLASS_OF = {name: cls for cls, names in _CLASSES.items() for name in names}
_TOP = {
    "token_embd": "tables", "output": "tables", "output_norm": "other", "rope_freqs": "other",
    "rope_factors_long": "other", "rope_factors_short": "other",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d{1,4})\.(.+?)(\.weight|\.bias)?")
_DIFFERENT = "fetch the file again, or convert the model with a current llama.cpp"


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor with its class (TENSOR_CLASSES), its layer (-1: none) and its bare name."""

    tensor: Tensor
    cls: str
    layer: int
    role: str


def place(tensor: Tensor, where: str) -> Placed:
    """What a tensor's name says. Raises FormatError for a name that is not known."""
    found = _LAYER.fullmatch(tensor.name)
    if found is None:
        role = tensor.name.removesuffix(".weight").removesuffix(".bias")
        cls = _TOP.get(role)
        layer = -1
    else:
        role, layer = found[2], int(found[1])
        cls = "mtp" if role.startswith("nextn.") else CLASS_OF.get(role)
    if cls is None:
        raise FormatError(
            f"{where}: tensor {plain(tensor.name)} is of no kind that is known",
            "give the model's config.json instead",
        )
    return Placed(tensor, cls, layer, role)


def spec_of(file: GgufFile) -> tuple[ModelSpec, tuple[Placed, ...], dict[str, Any]]:
    """The model of a file, its tensors without those of multi-token prediction, and the metadata
    that were read. Raises FormatError for an architecture or tensor that is not known, for tensors
    that contradict the metadata, and for a model without routed experts."""
    return _Shapes(file).spec()


class _Shapes:
    def __init__(self, file: GgufFile) -> None:
        self.file, self.where = file, str(file.path)
        self.read: dict[str, Any] = {}
        self.arch = str(self.key("general.architecture"))
        if self.arch not in WINDOW_PERIOD:
            raise FormatError(
                f"{self.where}: architecture {plain(self.arch)} is not read from GGUF files",
                f"give the model's config.json; read are {', '.join(sorted(WINDOW_PERIOD))}",
            )
        placed = [place(tensor, self.where) for tensor in file.tensors]
        self.layers = self.count("block_count") - self.count("nextn_predict_layers", 0)
        self.mtp = [p for p in placed if p.cls == "mtp" or p.layer >= self.layers]
        left_out = {id(p) for p in self.mtp}
        self.placed = tuple(p for p in placed if id(p) not in left_out)
        self.by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for p in self.placed:
            if not p.tensor.name.endswith(".bias"):
                self.by_layer[p.layer][p.role] = p.tensor

    def key(self, name: str, default: Any = None) -> Any:
        found = self.file.metadata.get(name, default)
        if found is None:
            raise FormatError(f"{self.where}: has no {name} in its metadata", _DIFFERENT)
        if name in self.file.metadata:
            self.read[name] = found
        return found

    def count(self, name: str, default: int | None = None) -> int:
        found = self.key(f"{self.arch}.{name}", default)
        if isinstance(found, list) and len(set(found) - {0}) == 1:
            found = max(found)
        if not isinstance(found, int) or not 0 <= found < 1 << 31:
            raise FormatError(
                f"{self.where}: {self.arch}.{name} is {plain(repr(found), 60)}, not one number",
                "give the model's config.json instead",
            )
        return int(found)

    def spec(self) -> tuple[ModelSpec, tuple[Placed, ...], dict[str, Any]]:
        found = set(self.by_layer) - {-1}
        if len(found) != self.layers or found != set(range(self.layers)):
            raise FormatError(f"{self.where}: not every one of {self.layers} layers is there",
                              _DIFFERENT)  # fmt: skip
        hidden = self.count("embedding_length")
        embedding = self.by_layer[-1].get("token_embd")
        if embedding is None or embedding.shape[0] != hidden:
            raise FormatError(
                f"{self.where}: token_embd is absent or not {hidden} wide", _DIFFERENT
            )
        moe = tuple(x for x in range(self.layers) if "ffn_down_exps" in self.by_layer[x])
        if not moe:
            raise FormatError(f"{self.where}: no layer has routed experts", "give a MoE model")
        down = self.by_layer[moe[0]]["ffn_down_exps"]
        experts = self.count("expert_count")
        for layer in moe:
            shape = self.by_layer[layer]["ffn_down_exps"].shape
            if shape != (down.shape[0], hidden, experts):
                raise FormatError(
                    f"{self.where}: experts of layer {layer} have shape {shape}, wanted"
                    f" {(down.shape[0], hidden, experts)}",
                    _DIFFERENT,
                )
        shared = self._width("ffn_down_shexp", hidden)
        spec = ModelSpec(
            name=str(self.file.metadata.get("general.name", "") or self.file.path.stem)[:200],
            source=f"GGUF file {self.file.path.name}",
            num_hidden_layers=self.layers,
            moe_layer_ids=moe,
            hidden_size=hidden,
            moe_intermediate_size=down.shape[0],
            num_experts=experts,
            top_k=self.count("expert_used_count"),
            vocab_size=embedding.shape[1],
            attention=self._attention(),
            num_shared_experts=max(1, self.count("expert_shared_count", 1)) if shared else 0,
            shared_intermediate_size=shared,
            dense_intermediate_size=self._width("ffn_down", hidden),
            tie_word_embeddings="output" not in self.by_layer[-1],
            architecture=self.arch,
            mtp_params=sum(p.tensor.num_weights for p in self.mtp),
            mtp_layers=self.count("nextn_predict_layers", 0),
            other_params=sum(p.tensor.num_weights for p in self.placed if p.cls == "other"),
            expert_dtype=self._most_common_type("experts"),
            dense_dtype=self._most_common_type("attention"),
        )
        return self._stored(spec), self.placed, self.read

    def _width(self, role: str, hidden: int) -> int:
        """Width of a feed-forward part, 0 where no layer has one."""
        widths = {t[role].shape for t in self.by_layer.values() if role in t}
        if len(widths) > 1 or any(shape[1] != hidden for shape in widths):
            raise FormatError(f"{self.where}: {role} has several shapes", _DIFFERENT)
        return next(iter(widths))[0] if widths else 0

    def _most_common_type(self, cls: str) -> str:
        sizes: Counter[str] = Counter()
        for p in self.placed:
            if p.cls == cls:
                sizes[p.tensor.type] += p.tensor.num_bytes
        name = sizes.most_common(1)[0][0] if sizes else "f16"
        return _FLOATS.get(name, name)

    def _stored(self, spec: ModelSpec) -> ModelSpec:
        """With bytes per weight of every class; classes count what ModelSpec counts."""
        size: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for p in self.placed:
            size[p.cls] += p.tensor.num_bytes
            if len(p.tensor.shape) > 1 and not p.tensor.name.endswith(".bias"):
                weights[p.cls] += p.tensor.num_weights
        params = spec.params_by_class
        for cls in ("experts", "router", "dense", "tables"):
            if params[cls] != weights[cls]:
                raise FormatError(
                    f"{self.where}: its shapes make {params[cls]:,} weights of class {cls}, its"
                    f" tensors hold {weights[cls]:,}",
                    "give the model's config.json instead",
                )
        stored = tuple((c, size[c] / params[c]) for c in sorted(size) if params.get(c))
        return replace(spec, stored=stored)

    def _attention(self) -> AttentionSpec:
        heads, kv_heads = self.count("attention.head_count"), self.count("attention.head_count_kv")
        if heads < 1:
            raise FormatError(
                f"{self.where}: {self.arch}.attention.head_count is 0",
                "give the model's config.json instead",
            )
        key = self.count("attention.key_length", self.count("embedding_length") // heads)
        value = self.count("attention.value_length", key)
        linear = tuple(x for x in range(self.layers) if "ssm_out" in self.by_layer[x])
        softmax = [x for x in range(self.layers) if x not in linear]
        latent = any("attn_kv_a_mqa" in self.by_layer[x] for x in softmax)
        rank, rope = 0, 0
        if latent:
            rank, rope = self.count("attention.kv_lora_rank"), self.count("rope.dimension_count")
            key = self.count("attention.key_length_mla", key)
            value = self.count("attention.value_length_mla", value)
            entry = rank + rope
        else:
            entry = kv_heads * (key + value)
        self._check_keys(softmax, rank + rope if latent else kv_heads * key, latent)
        window = self.count("attention.sliding_window", 0)
        period = WINDOW_PERIOD[self.arch]
        if window and not period and softmax:
            raise FormatError(
                f"{self.where}: a window of {window} tokens in layers that are not known",
                "give the model's config.json instead",
            )
        windowed = [x for x in softmax if period and window and (x + 1) % period]
        full = [x for x in softmax if x not in windowed]
        kinds = [
            *self._kinds("full attention", full, (Cache(entry, 0 if latent else kv_heads),), 0),
            *self._kinds("sliding window", windowed, (Cache(entry, kv_heads, window or 1),), 0),
            *self._kinds("linear attention", list(linear), (), self._state() if linear else 0),
        ]
        return AttentionSpec(
            kind="mla" if latent else "gqa",
            num_heads=heads,
            num_kv_heads=heads if latent else kv_heads,
            head_dim=key,
            q_lora_rank=self.count("attention.q_lora_rank", 0) if latent else 0,
            kv_lora_rank=rank,
            qk_nope_head_dim=key - rope if latent else 0,
            qk_rope_head_dim=rope,
            v_head_dim=value if latent or value != key else 0,
            window_tokens=window if windowed else 0,
            window_layer_ids=tuple(windowed),
            kinds=tuple(kinds),
        )

    def _kinds(
        self, name: str, layers: list[int], caches: tuple[Cache, ...], state: int
    ) -> list[LayerKind]:
        """A kind for each number of weights that its layers have."""
        by_params: dict[int, list[int]] = defaultdict(list)
        for layer in layers:
            tensors = self.by_layer[layer]
            by_params[
                sum(
                    t.num_weights
                    for role, t in tensors.items()
                    if CLASS_OF[role] == "attention" and len(t.shape) > 1
                )
            ].append(layer)
        return [LayerKind(name, tuple(ids), n, caches, state) for n, ids in by_params.items()]

    def _check_keys(self, layers: list[int], width: int, latent: bool) -> None:
        role = "attn_kv_a_mqa" if latent else "attn_k"
        for layer in layers:
            found = self.by_layer[layer].get(role)
            if found is not None and found.shape[1] != width:
                raise FormatError(
                    f"{self.where}: keys of layer {layer} are {found.shape[1]} wide, its metadata"
                    f" say {width}",
                    _DIFFERENT,
                )
            if found is None and (latent or "attn_qkv" not in self.by_layer[layer]):
                raise FormatError(f"{self.where}: layer {layer} has no {role}", _DIFFERENT)

    def _state(self) -> int:
        """Bytes of one sequence in a gated DeltaNet layer, in 32 bits (llama.cpp keeps it so)."""
        inner, state = self.count("ssm.inner_size"), self.count("ssm.state_size")
        groups, kernel = self.count("ssm.group_count"), self.count("ssm.conv_kernel")
        return 4 * (inner * state + (kernel - 1) * (inner + 2 * groups * state))
