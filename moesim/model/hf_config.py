"""Read a Hugging Face `config.json` into a ModelSpec.

Key names and their meaning are those of the configuration and modelling files in
huggingface/transformers (src/transformers/models/, releases 4.57 and 5.x) and of the models' own
repositories. Nothing is executed and nothing is fetched. A key that a known architecture needs and
that is absent is an error, unless its absence has one meaning in transformers for every checkpoint
(num_key_value_heads, head_dim, decoder_sparse_step, moe_layer_freq, tie_word_embeddings).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError
from moesim.model.hf_quant import stored_dtypes
from moesim.model.spec import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, AttentionSpec, ModelSpec

MAX_FILE_BYTES = 4 << 20

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between architectures: which key is the experts' width, which keys it needs."""

    expert_width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    required: tuple[str, ...] = ()
    window: str = ""  # layers with sliding_window if layer_types is absent: "all", "even", unknown


_WIDTH = "intermediate_size"
_DEEPSEEK = _Family(required=("n_shared_experts",))
_LLAMA4 = _Family(expert_width=_WIDTH, dense_width="intermediate_size_mlp")
_MIXTRAL = _Family(expert_width=_WIDTH, window="all")
_PLAIN = _Family(expert_width=_WIDTH)
_QWEN3 = _Family(window="all")

FAMILIES: Mapping[str, _Family] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m1": _MIXTRAL,
    "minimax_m2": _PLAIN,
    "minimax_text_01": _MIXTRAL,
    "olmoe": _PLAIN,
    "granitemoe": _PLAIN,
    "granitemoeshared": _PLAIN,
    "gpt_oss": _Family(expert_width=_WIDTH, window="even"),
    "qwen2_moe": _Family(required=("shared_expert_intermediate_size",)),
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "llama4": _LLAMA4,
}
"""Known values of `model_type` ("_text" stripped). Others are read by common key names."""

_LIGHTNING = ("minimax", "minimax_m1", "minimax_text_01")
_LAYER_TYPES = (
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "chunked_attention",
    "deepseek_sparse_attention",
)
_OTHER_LAYERS = ("hybrid_override_pattern", "layers_block_type", "attn_layer_period")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
_NESTED = ("text_config", "language_config", "llm_config")


def read_hf_config(path: Path, name: str | None = None) -> ModelSpec:
    """Read the file at `path`. Raises InputError (cannot be read) or FormatError (cannot be used).

    Without `name` the spec is called by `_name_or_path` where that is a repository id, else by the
    file's folder.
    """
    config = _read_json(path)
    beside = path.parent / "hf_quant_config.json"  # where ModelOpt checkpoints say it
    if "quantization_config" not in config and path.name == "config.json" and beside.is_file():
        quantization = _read_json(beside).get("quantization")
        if not isinstance(quantization, dict):
            raise FormatError(f"{beside}: no object 'quantization'", "remove or restore the file")
        config = {**config, "quantization_config": {"quant_method": "modelopt", **quantization}}
    return spec_from_config(config, where=str(path), name=name or _default_name(config, path))


def _default_name(config: Mapping[str, Any], path: Path) -> str:
    saved = config.get("_name_or_path")
    if isinstance(saved, str) and saved.count("/") == 1 and not saved.startswith(("/", ".", "~")):
        return _printable(saved)
    return _printable(path.resolve().parent.name if path.name == "config.json" else path.stem)


def _printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable())[:200]


def _read_json(path: Path) -> Mapping[str, Any]:
    where = str(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file", "name a config.json or the folder it is in")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(
                f"{path}: {path.stat().st_size} bytes is too long for a config.json",
                "name the model's config.json, not its weights or its tokenizer",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "check the path and permissions"
        ) from None
    try:
        config = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text", "name the model's config.json") from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            "the file is truncated or damaged: fetch the model's config.json again",
        ) from None
    except (ValueError, RecursionError):
        raise FormatError(
            f"{where}: JSON with a number too long or nested too deep", "check the file"
        ) from None
    if not isinstance(config, dict):
        raise FormatError(
            f"{where}: holds a {type(config).__name__}, not an object",
            "a config.json is one object of keys and values",
        )
    return config


def spec_from_config(
    config: Mapping[str, Any],
    where: str,
    name: str,
    source: str | None = None,
    note: str = "",
) -> ModelSpec:
    """ModelSpec of a parsed `config.json`; `where` begins every error message.

    Multimodal configurations are read at their `text_config` (or `language_config`, `llm_config`);
    their vision towers are ignored. Raises FormatError that names the key: missing keys all at
    once, wrong types, out of range, no experts, top-k above the number of experts.
    """
    return _Reader(config, where).spec(name, source or f"config.json at {where}", note)


class _Reader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.outer = config
        nested = (config.get(key) for key in _NESTED)
        self.config = next((inner for inner in nested if isinstance(inner, dict)), config)
        self.architecture = self._model_type()
        self.family = FAMILIES.get(self.architecture, _Family())
        self.notes: list[str] = []

    def error(self, cause: str, remedy: str) -> FormatError:
        return FormatError(f"{self.where}: {cause}", remedy)

    def _model_type(self) -> str:
        for config in (self.config, self.outer):
            value = config.get("model_type")
            if isinstance(value, str) and value:
                return _printable(value).removesuffix("_text")[:80]
        return ""

    def number(self, key: str, low: int, high: int = MAX_SIZE) -> int:
        value = self.config.get(key)
        remedy = f"give {key} as an integer from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} is {_show(value)}, not a whole number", remedy)
        if not low <= value <= high:
            raise self.error(f"{key} is {_show(value)}, outside {low} to {high}", remedy)
        return value

    def optional(self, key: str, default: int, low: int = 0, high: int = MAX_SIZE) -> int:
        return default if self.config.get(key) is None else self.number(key, low, high)

    def first_of(self, keys: tuple[str, ...], high: int) -> int | None:
        found = {key: self.number(key, 1, high) for key in keys if self.config.get(key) is not None}
        if len(set(found.values())) > 1:
            raise self.error(
                "keys disagree: " + ", ".join(f"{key} {value}" for key, value in found.items()),
                "keep the key that the model uses",
            )
        return next(iter(found.values()), None)

    def flags(self, key: str, length: int, values: Mapping[Any, int]) -> list[int]:
        """A list with one entry a layer, each mapped through `values`."""
        entries = self.config[key]
        if not isinstance(entries, list) or len(entries) != length:
            raise self.error(f"{key} is not a list of {length} entries", "give one entry a layer")
        mapped = []
        for entry in entries:
            known = isinstance(entry, (str, int)) and not isinstance(entry, bool)
            if not known or entry not in values:
                raise self.error(
                    f"{key} holds {_show(entry)}",
                    "known: " + ", ".join(str(value) for value in values),
                )
            mapped.append(values[entry])
        return mapped

    def spec(self, name: str, source: str, note: str) -> ModelSpec:
        num_experts = self.first_of(EXPERT_COUNT_KEYS, MAX_EXPERTS)
        if num_experts is None:
            raise self.error(
                "not a Mixture-of-Experts model: none of " + ", ".join(EXPERT_COUNT_KEYS),
                "name the config.json of a MoE model",
            )
        top_k = self._require_keys()
        if self.architecture not in FAMILIES:
            self._refuse_hybrids()
            self.notes.append(
                f"architecture {self.architecture or 'without model_type'!r} is not known: "
                "read by common key names, check against the model's own description"
            )
        if top_k > num_experts:
            raise self.error(
                f"num_experts_per_tok {top_k} is more than the {num_experts} experts",
                "a token cannot choose more experts than there are",
            )
        num_layers = self.number("num_hidden_layers", 1, MAX_LAYERS)
        expert_width = self.number(self.family.expert_width, 1)
        moe_layer_ids = self._moe_layer_ids(num_layers)
        if not moe_layer_ids:
            raise self.error(
                "no layer has experts", "check first_k_dense_replace and the layer lists"
            )
        dense_width = 0
        if len(moe_layer_ids) < num_layers:
            if self.config.get(self.family.dense_width) is None:
                raise self._missing([self.family.dense_width])
            dense_width = self.number(self.family.dense_width, 1)
        num_shared, shared_width = self._shared(expert_width)
        n_group, topk_group = self._groups()
        expert_dtype, dense_dtype = stored_dtypes(self.config, self.outer, self.where)
        hidden_size = self.number("hidden_size", 1)
        attention = self._attention(num_layers, hidden_size)
        try:
            return ModelSpec(
                name=name,
                source=source,
                num_hidden_layers=num_layers,
                moe_layer_ids=moe_layer_ids,
                hidden_size=hidden_size,
                moe_intermediate_size=expert_width,
                num_experts=num_experts,
                top_k=top_k,
                vocab_size=self.number("vocab_size", 1),
                attention=attention,
                num_shared_experts=num_shared,
                shared_intermediate_size=shared_width,
                dense_intermediate_size=dense_width,
                n_group=n_group,
                topk_group=topk_group,
                expert_dtype=expert_dtype,
                dense_dtype=dense_dtype,
                tie_word_embeddings=self._tied(),
                architecture=self.architecture,
                note="; ".join([note] * bool(note) + self.notes),
            )
        except FormatError as error:
            raise self.error(error.cause, error.remedy) from None

    def _refuse_hybrids(self) -> None:
        """Unknown architectures whose layers or experts common key names do not describe."""
        keys = [key for key in _OTHER_LAYERS if self.config.get(key) is not None]
        keys += [key for key in _ACTIVATIONS if "relu" in str(self.config.get(key)).lower()]
        if keys:
            raise self.error(
                f"architecture {self.architecture!r} is not known, and {keys[0]} says that its "
                "layers or experts are of another kind",
                f"known architectures: {', '.join(sorted(FAMILIES))}",
            )

    def _require_keys(self) -> int:
        """Fail with all missing keys at once; return the experts per token."""
        needed = ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"]
        needed.append(self.family.expert_width)
        if self.config.get("kv_lora_rank") is not None:
            needed += ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        missing = [key for key in needed if self.config.get(key) is None]
        missing += [key for key in self.family.required if key not in self.config]
        if self.config.get("kv_lora_rank") is not None and "q_lora_rank" not in self.config:
            missing.append("q_lora_rank")
        if self.family is _DEEPSEEK:
            missing += self._one_of("first_k_dense_replace", "mlp_layer_types")
        if self.architecture == "llama4":
            missing += self._one_of("interleave_moe_layer_step", "moe_layers")
        if self.architecture in _LIGHTNING:
            missing += self._one_of("layer_types", "attn_type_list")
        top_k = self.first_of(TOP_K_KEYS, MAX_SIZE)
        if top_k is None:
            missing.append(TOP_K_KEYS[0])
        if missing or top_k is None:
            raise self._missing(missing)
        return top_k

    def _one_of(self, *keys: str) -> list[str]:
        return [] if any(self.config.get(key) is not None for key in keys) else [keys[0]]

    def _missing(self, keys: list[str]) -> FormatError:
        kind = f"architecture {self.architecture!r}" if self.architecture else "no model_type"
        plural = "s" if len(keys) > 1 else ""
        return self.error(
            f"missing key{plural} {', '.join(keys)} ({kind})",
            f"add the key{plural}; known architectures: {', '.join(sorted(FAMILIES))}",
        )

    def _moe_layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Layers with experts, by whichever of the known keys are present (all must agree)."""
        config, layers = self.config, set(range(num_layers))
        if config.get("mlp_layer_types") is not None:
            sparse = self.flags("mlp_layer_types", num_layers, {"sparse": 1, "dense": 0})
            return tuple(layer for layer in sorted(layers) if sparse[layer])
        if config.get("moe_layers") is not None:
            return self._layer_list("moe_layers", num_layers)
        layers -= set(range(self.optional("first_k_dense_replace", 0, high=MAX_LAYERS)))
        if isinstance(config.get("moe_layer_freq"), list):
            sparse = self.flags("moe_layer_freq", num_layers, {0: 0, 1: 1})
            layers = {layer for layer in layers if sparse[layer]}
        else:
            every = self.optional("moe_layer_freq", 1, low=1)
            layers = {layer for layer in layers if layer % every == 0}
        for key in ("decoder_sparse_step", "interleave_moe_layer_step"):
            step = self.optional(key, 1, low=1)
            layers = {layer for layer in layers if (layer + 1) % step == 0}
        if config.get("mlp_only_layers") is not None:
            layers -= set(self._layer_list("mlp_only_layers", num_layers))
        return tuple(sorted(layers))

    def _layer_list(self, key: str, num_layers: int) -> tuple[int, ...]:
        entries = self.config[key]
        good = isinstance(entries, list) and all(
            isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < num_layers
            for layer in entries
        )
        if not good:
            raise self.error(
                f"{key} is not a list of layer numbers below {num_layers}", "give numbers from 0"
            )
        return tuple(sorted(set(entries)))

    def _shared(self, expert_width: int) -> tuple[int, int]:
        """Number and total width of the shared experts of one layer."""
        if self.architecture == "llama4":
            return 1, expert_width
        for key in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"):
            if self.config.get(key) is not None:
                count = self.number(key, 0, MAX_EXPERTS)
                return count, count * expert_width
        # Qwen2-MoE stores its shared experts as one block (Qwen1.5-MoE: 4 of 1408 as 5632).
        width = self.optional("shared_expert_intermediate_size", 0)
        if width:
            return (width // expert_width if width % expert_width == 0 else 1), width
        width = self.optional("shared_intermediate_size", 0)
        return (1, width) if width else (0, 0)

    def _groups(self) -> tuple[int, int]:
        # DeepSeek-V2's "greedy" gate looks at all experts, whatever n_group says.
        if self.config.get("topk_method") == "greedy":
            return 1, 1
        n_group = self.optional("n_group", 1, low=1, high=MAX_EXPERTS)
        return n_group, self.optional("topk_group", n_group, low=1, high=MAX_EXPERTS)

    def _tied(self) -> bool:
        value = self.outer.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        if value is None:
            return False  # every known architecture's class default
        if not isinstance(value, bool):
            raise self.error(f"tie_word_embeddings is {_show(value)}", "give true or false")
        return value

    def _attention(self, num_layers: int, hidden_size: int) -> AttentionSpec:
        num_heads = self.number("num_attention_heads", 1)
        window_tokens, windowed, linear, chunked = self._layer_types(num_layers)
        note = f"chunked attention of {chunked} tokens in part of the layers" if chunked else ""
        if self.config.get("index_topk") is not None:
            note = "sparse attention: the indexer's weights and its key cache are not counted"
        shared: dict[str, Any] = {
            "num_heads": num_heads,
            "window_tokens": window_tokens,
            "window_layer_ids": windowed,
            "linear_layer_ids": linear,
        }
        if self.config.get("kv_lora_rank") is not None:
            nope, rope = self.number("qk_nope_head_dim", 1), self.number("qk_rope_head_dim", 1)
            built: dict[str, Any] = {
                "kind": "mla",
                "num_kv_heads": self.optional("num_key_value_heads", num_heads, low=1),
                "head_dim": nope + rope,
                "q_lora_rank": self.optional("q_lora_rank", 0),
                "kv_lora_rank": self.number("kv_lora_rank", 1),
                "qk_nope_head_dim": nope,
                "qk_rope_head_dim": rope,
                "v_head_dim": self.number("v_head_dim", 1),
            }
        else:
            head_dim = self.optional("head_dim", 0, low=1)
            if not head_dim and hidden_size % num_heads:
                raise self.error(
                    f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}",
                    "give head_dim",
                )
            built = {
                "kind": "gqa",
                "num_kv_heads": self.optional("num_key_value_heads", num_heads, low=1),
                "head_dim": head_dim or hidden_size // num_heads,
            }
        try:
            attention = AttentionSpec(**shared, **built, note=note)
            if not linear:
                return attention
            params = attention.layer_params(hidden_size)
            if self.architecture in _LIGHTNING:
                # qkv, output gate and output projection of MiniMaxLightningAttention
                params = 5 * hidden_size * num_heads * attention.head_dim
            else:
                note = "weights of linear-attention layers are estimated as those of the others"
            return AttentionSpec(**shared, **built, linear_layer_params=params, note=note)
        except FormatError as error:
            raise self.error(error.cause, error.remedy) from None

    def _layer_types(self, num_layers: int) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        """Window length, layers with it, linear layers, chunk length (0: not chunked)."""
        config = self.config
        every = tuple(range(num_layers))
        window = self.optional("sliding_window", 0, low=0, high=1 << 31)
        longest = self.optional("max_position_embeddings", 1 << 31, low=1, high=1 << 31)
        if config.get("use_sliding_window") is False or window >= longest:
            window = 0
        chunk = self.optional("attention_chunk_size", 0) if self.architecture == "llama4" else 0
        if isinstance(config.get("attn_type_list"), list):
            softmax = self.flags("attn_type_list", num_layers, {0: 0, 1: 1})
            kinds = ["full_attention" if kind else "linear_attention" for kind in softmax]
        elif config.get("layer_types") is not None:
            codes = {kind: code for code, kind in enumerate(_LAYER_TYPES)}
            kinds = [_LAYER_TYPES[code] for code in self.flags("layer_types", num_layers, codes)]
        elif not window:
            return 0, (), (), chunk
        elif self.family.window == "even":  # GPT-OSS: layers 0, 2, 4, ... slide
            return window, every[::2], (), chunk
        elif self.family.window == "all":
            return window, every, (), chunk
        else:
            raise self.error(
                f"sliding_window {window} without layer_types: which layers have it is not said",
                "add layer_types, or set sliding_window to null",
            )
        windowed = tuple(layer for layer in every if kinds[layer] == "sliding_attention")
        linear = tuple(layer for layer in every if kinds[layer] == "linear_attention")
        if windowed and not window:
            raise self.error(
                "layer_types has sliding_attention but no sliding_window", "add its length"
            )
        return (window if windowed else 0), windowed, linear, chunk


def _show(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of over 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
