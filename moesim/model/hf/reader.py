"""From the keys of a `config.json` to a ModelSpec: one family's row, applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesim.errors import FormatError
from moesim.model.checks import MAX_LAYERS
from moesim.model.hf import experts, shape
from moesim.model.hf.attention import attention_spec
from moesim.model.hf.experts import FeedForward
from moesim.model.hf.families import ALIASES, BY_ARCHITECTURE, FAMILIES, UNKNOWN
from moesim.model.hf.keys import Keys, printable, shown, structural
from moesim.model.hf.layers import Layers
from moesim.model.hf.shape import Shape, missing
from moesim.model.hf.stored import Stored, stored_types
from moesim.model.hf.tensors import layer_tensors
from moesim.model.spec import ModelSpec

NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
MTP_KEYS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
_SAME_ELSEWHERE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
_DOC = "docs/models.md lists the architectures that are read"


@dataclass(frozen=True)
class Reading:
    """What a config.json gave: the spec; keys that were read, with their values; keys without
    effect on sizes; keys whose effect is not known (only where the architecture is)."""

    spec: ModelSpec
    read: Mapping[str, Any]
    harmless: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()


def read_config(
    config: Mapping[str, Any], where: str, name: str, source: str, note: str = ""
) -> Reading:
    """Read a parsed config.json; `where` begins every error.

    Raises FormatError: a key is missing or impossible; the architecture is not known and keys that
    speak of its layers are left over; the stored types are not known.
    """
    return _Reader(config, where).reading(name, source, note)


class _Reader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.outer = Keys(config, where)
        self.path = ""
        inner: Mapping[str, Any] = config
        for _ in range(2):  # thinker_config holds a text_config
            found = next((key for key in NESTED if isinstance(inner.get(key), dict)), None)
            if found is None:
                break
            inner, self.path = inner[found], f"{self.path}{found}."
        self.keys = Keys(inner, where, self.path) if self.path else self.outer
        self.architecture = self._architecture()
        self.family = FAMILIES.get(self.architecture, UNKNOWN)
        if self.architecture == "dbrx":
            self.keys = self.outer = Keys(_flat_dbrx(config), where)
        self.notes: list[str] = []
        if self.path:
            self.notes.append(f"{self.path[:-1]} is read; towers for other inputs are not counted")

    def _architecture(self) -> str:
        """The first model type of the file, from inside out, that moesim knows; else the first."""
        named: list[str] = []
        for keys in (self.keys, self.outer):
            value = keys.get("model_type")
            if isinstance(value, str) and value:
                text = printable(value)
                named.append(ALIASES.get(text, text.removesuffix("_text")))
            given = keys.get("architectures")
            classes = given if isinstance(given, list) else []
            texts = [entry for entry in classes if isinstance(entry, str)]
            named += [BY_ARCHITECTURE[entry] for entry in texts if entry in BY_ARCHITECTURE]
        return next((entry for entry in named if entry in FAMILIES), (named or [""])[0])

    def reading(self, name: str, source: str, note: str) -> Reading:
        keys, family = self.keys, self.family
        num_experts = shape.num_experts(keys)
        if num_experts is None:
            self._no_experts()
        sizes = self._sizes()
        if not family.known:
            self.notes.append(
                f"architecture {self.architecture or 'without model_type'!r} is not known: "
                "read by common key names, check against the model's own description"
            )
        for key in family.refused:
            if keys.has(key):
                raise keys.error(f"{key} is not read: it adds weights", _DOC)
        top_k = shape.top_k(keys)
        width = self._width()
        if num_experts is None or top_k is None or width is None:
            raise missing(keys, [self.family.width], self.architecture)
        try:
            layers = family.layers(keys, sizes, family.window)
            placed = family.moe(keys, sizes)
            self.notes += layers.notes + placed.notes
            fields = self._fields(sizes, layers, placed, num_experts, top_k, width)
            self._leftovers_or_error()
            spec = ModelSpec(
                name=name,
                source=source,
                note="; ".join([note] * bool(note) + self.notes),
                architecture=self.architecture,
                **fields,
            )
        except FormatError as error:
            cause = error.cause
            raise FormatError(
                cause if cause.startswith(self.where) else f"{self.where}: {cause}", error.remedy
            ) from None
        return Reading(spec, self._all_read(), *self._set_aside())

    def _no_experts(self) -> None:
        speaks = [
            path
            for keys in {self.outer.path: self.outer, self.keys.path: self.keys}.values()
            for path, key, _ in keys.left_over()
            if "expert" in key.lower() or "moe" in key.lower()
        ]
        if speaks:
            raise self.keys.error(
                f"no key that moesim knows gives the number of experts, but {speaks[0]} is there "
                f"(architecture {self.architecture!r})",
                _DOC,
            )
        raise self.keys.error(
            "not a Mixture-of-Experts model: none of " + ", ".join(shape.EXPERTS),
            "name the config.json of a MoE model",
        )

    def _sizes(self) -> Shape:
        """Layers and widths; all missing keys at once."""
        keys, family = self.keys, self.family
        groups: list[tuple[str, ...]] = [
            (*shape.LAYERS, *shape.LAYER_LISTS),
            shape.HIDDEN,
            shape.HEADS,
            ("vocab_size",),
            shape.TOP_K,
            (family.width,) if family.width != "intermediate_size" else self._width_keys(),
        ]
        groups += [need if isinstance(need, tuple) else (need,) for need in family.needs]
        absent = [
            names[0]
            for names in groups
            if not keys.has(*names) and not (names[0] in keys.data and names[0] in family.needs)
        ]
        if keys.flag("use_mla", family.latent) and not keys.has("kv_lora_rank"):
            absent.append("kv_lora_rank")
        if shape.is_latent(keys):
            latent = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            absent += [key for key in latent if not keys.has(key)]
            absent += ["q_lora_rank"] if "q_lora_rank" not in keys.data else []
        absent = list(dict.fromkeys(absent))
        if absent and not family.known:
            raise keys.error(
                f"architecture {self.architecture!r} is not known, and by common key names the "
                f"file lacks {', '.join(absent)}",
                _DOC,
            )
        if absent:
            raise missing(keys, absent, self.architecture)
        return Shape.of(keys)

    def _width_keys(self) -> tuple[str, ...]:
        return ("intermediate_size", "moe_intermediate_size")

    def _width(self) -> int | None:
        plain = self.family.width == "intermediate_size"
        names = self._width_keys() if plain else (self.family.width, "expert_hidden_dim")
        return self.keys.first_of(names, per_layer=True)

    def _fields(
        self,
        sizes: Shape,
        layers: Layers,
        placed: FeedForward,
        num_experts: int,
        top_k: int,
        width: int,
    ) -> dict[str, Any]:
        keys, family = self.keys, self.family
        if not placed.moe:
            raise keys.error(
                "no layer has experts by the file's keys",
                "take the config.json that the model's maker published",
            )
        zero = keys.optional("zero_expert_num", 0)
        keys.get("zero_expert_type")
        if top_k > num_experts + zero:
            raise keys.error(
                f"num_experts_per_tok {top_k} is more than the {num_experts} experts",
                "a token cannot choose more experts than there are: check the file",
            )
        num_shared, shared_width = family.shared(keys, width)
        n_group, topk_group = experts.groups(keys)
        latent = keys.first_of(("moe_latent_size", "routed_expert_hidden_size")) or 0
        keys.get("moe_latent_size"), keys.get("routed_expert_hidden_size")
        num_dense = sizes.layers - len(placed.moe) - len(placed.none)
        dense_width = 0
        mtp_layers = self._mtp_layers()
        if num_dense or family.dense_beside or (mtp_layers and family.mtp == "dense"):
            if not keys.has(family.dense_width):
                raise missing(keys, [family.dense_width], self.architecture)
            dense_width = keys.number(family.dense_width)
        keys.get(family.dense_width)
        keys.must_be("residual_moe", True)
        other = self._other_params(sizes)
        self._mlp_gated()
        built: dict[str, Any] = {
            "num_hidden_layers": sizes.layers,
            "moe_layer_ids": placed.moe,
            "hash_layer_ids": placed.hashed,
            "no_ffn_layer_ids": placed.none,
            "hidden_size": sizes.hidden,
            "moe_intermediate_size": width,
            "num_experts": num_experts,
            "num_zero_experts": zero,
            "top_k": top_k,
            "vocab_size": sizes.vocab,
            "num_shared_experts": num_shared,
            "shared_intermediate_size": shared_width,
            "dense_intermediate_size": dense_width,
            "moe_dense_ffns": family.dense_beside,
            "n_group": n_group,
            "topk_group": topk_group,
            "ffn_matrices": family.matrices,
            "expert_hidden_size": latent,
            "tie_word_embeddings": self._tied(),
            "attention": attention_spec(layers, sizes, self.keys),
            "other_params": other,
        }
        draft = ModelSpec(name="draft", source="draft", **built)
        stored = self._stored(draft, layers)
        built |= {
            "expert_dtype": stored.expert_dtype,
            "dense_dtype": stored.dense_dtype,
            "stored": stored.by_class,
        }
        self.notes += stored.notes
        return built | self._mtp(draft, layers, mtp_layers)

    def _mlp_gated(self) -> None:
        """Experts of two matrices, told by their activation, in a family that has three."""
        if self.family.matrices == 2:
            return
        for name in ("hidden_act", "hidden_activation", "mlp_hidden_act"):
            if "relu" in str(self.keys.get(name)).lower():
                raise self.keys.error(
                    f"{name} {shown(self.keys.data[name])} says that experts have two matrices, "
                    f"and those of {self.architecture or 'an unknown architecture'!r} have three",
                    _DOC,
                )

    def _mtp_layers(self) -> int:
        """Multi-token-prediction layers; of several keys the first in MTP_KEYS counts (MiniMax-M3's
        file counts 7 modules of training beside the one layer that it stores)."""
        counts = [self.keys.optional(name, 0, high=MAX_LAYERS) for name in MTP_KEYS]
        self.keys.get("mtp_transformer_layers"), self.keys.get("use_mtp")
        self.keys.get("mtp_layer_types")
        for name, count in zip(MTP_KEYS, counts, strict=True):
            if self.keys.has(name):
                return count
        return 0

    def _mtp(self, draft: ModelSpec, layers: Layers, count: int) -> dict[str, Any]:
        """Weights of the multi-token-prediction layers: a layer like the model's, and a projection
        of two hidden states to one (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""
        for name in ("mtp_hybrid_override_pattern", "mtp_layers_block_type"):
            self.keys.get(name)
        if not count:
            return {}
        softmax = [mixer for mixer in layers.mixers if mixer is not None and mixer.role != "linear"]
        mixer = layers.mtp or softmax[-1]
        has_experts = self.family.mtp == "moe"
        if has_experts:
            ffn = draft.num_experts * draft.expert_params + draft.router_params
            ffn += draft.shared_expert_params + draft.latent_params
        else:
            ffn = draft.dense_ffn_params
        each = mixer.params + ffn + 2 * draft.hidden_size**2
        return {
            "mtp_layers": count,
            "mtp_moe_layers": count if has_experts else 0,
            "mtp_params": count * each,
            "mtp_caches": mixer.caches,
        }

    def _other_params(self, sizes: Shape) -> int:
        """Hyper-connections (DeepSeek-V4: hc_mult residual streams, mixed before and after each of
        two blocks by (2 + m) m x m hidden weights; transformers/deepseek_v4)."""
        streams = self.keys.optional("hc_mult", 0)
        if not streams:
            return 0
        per_layer = 2 * (2 + streams) * streams * streams * sizes.hidden
        return sizes.layers * per_layer

    def _tied(self) -> bool:
        for keys in (self.outer, self.keys):
            value = keys.get("tie_word_embeddings")
            if value is not None:
                return keys.flag("tie_word_embeddings")
        return self.architecture == "gemma4"  # every other known architecture's default is false

    def _stored(self, draft: ModelSpec, layers: Layers) -> Stored:
        tensors = layer_tensors(draft, layers.mixers, self.family)
        return stored_types(self.keys, self.outer, draft, tensors)

    def _leftovers_or_error(self) -> None:
        noted = [text for _, text in self._structural()]
        if noted and not self.family.known:
            raise self.keys.error(
                f"architecture {self.architecture!r} is not known, and keys speak of its layers, "
                f"experts or widths in a way that is not known either: {', '.join(noted[:6])}",
                _DOC,
            )
        if noted:
            self.notes.append(f"not understood, and not counted: {', '.join(noted[:12])}")

    def _structural(self) -> list[tuple[str, str]]:
        found = {}
        for keys in (self.keys, self.outer):
            for path, name, value in keys.left_over():
                same = keys is not self.keys and self.keys.data.get(name) == value
                if structural(name) and name not in _SAME_ELSEWHERE and not same:
                    if name in NESTED:
                        continue
                    found[path] = f"{path} {shown(value)}"
        return sorted(found.items())

    def _set_aside(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        noted = [path for path, _ in self._structural()]
        rest = {
            path
            for keys in (self.keys, self.outer)
            for path, name, _ in keys.left_over()
            if path not in noted and name not in NESTED and not structural(name)
        }
        return tuple(sorted(rest)), tuple(noted)

    def _all_read(self) -> dict[str, Any]:
        return {
            path: value
            for path, value in (self.outer.all_read() | self.keys.all_read()).items()
            if value is not None
        }


def _flat_dbrx(config: Mapping[str, Any]) -> dict[str, Any]:
    """DBRX keeps its sizes in two inner objects (transformers/dbrx)."""
    names: dict[str, str] = {"kv_n_heads": "num_key_value_heads"}
    flat = {key: value for key, value in config.items() if key not in ("attn_config", "ffn_config")}
    for part in ("attn_config", "ffn_config"):
        inner = config.get(part)
        if isinstance(inner, dict):
            flat |= {names.get(str(key), str(key)): value for key, value in inner.items()}
    return flat
