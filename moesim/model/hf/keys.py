"""A parsed `config.json` that remembers which of its keys were read.

What is left over is one of three things: harmless (listed here: no effect on sizes), structural (a
name that speaks of layers, experts, heads, windows, attention, ranks, types or widths, so that a
model read without it may have wrong sizes), or neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moesim.errors import FormatError
from moesim.model.checks import MAX_SIZE

_HARMLESS_NAMES = frozenset(
    """
    activation_situ_beta activation_situ_linear_beta add_classification_head add_cross_attention
    add_full_attention_sink_bias add_qkv_bias add_swa_attention_sink_bias architectures
    att_impl_type attention_bias attention_dropout attention_multiplier attention_projection_layout
    attention_value_scale attn_bias attn_factor attn_implementation attn_logit_softcap
    attn_logit_softcapping attn_pdrop attn_qkv_bias attn_res_block_size attn_scale
    attn_temperature_len attn_temperature_scale attn_temperature_tuning auto_map batch_size bf16
    bos_token_id cache_dtype chunk_size chunk_size_feed_forward class_num clip_qkv crop_size
    cross_attention_hidden_size d_conv_bias decoder_start_token_id dense_list dtype
    dual_chunk_attention_config emb_pdrop embd_pdrop embedding_multiplier
    embedding_multiplier_scale enable_lm_head_fp32 ep_size expert_dtype expert_swiglu_limit_list
    extrapolation_factor ffn_act_fn final_logit_softcapping finetuning_task floor_scale fp16
    fp32_lm_head fp32_residual fused_qkv gate_lower_bound gradient_checkpointing
    group_limited_greedy group_norm_size hc_eps hc_sinkhorn_iters head_dtype hidden_act
    hidden_activation hidden_dropout hidden_dropout_prob index_share_for_mtp_iteration
    initial_context_length input_jitter_noise is_decoder is_encoder_decoder kv_cache_scheme
    latent_moe_use_norm layer_norm_eps layer_norm_epsilon layernorm_epsilon
    layernorm_full_attention_alpha layernorm_full_attention_beta layernorm_linear_attention_alpha
    layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta linear_silu
    lm_head_dtype load_balance_coeff logits_scaling mamba_chunk_size mamba_conv_bias
    mamba_hidden_act mamba_inner_layernorms mamba_proj_bias max_position_embeddings max_seq_len
    max_sequence_length max_window_layers mla_scale_kv_lora mla_scale_q_lora mla_use_nope mlp_bias
    mlp_gate_bias mlp_hidden_act model_max_length model_type moe_aux_loss_coeff moe_aux_loss_lambda
    moe_capacity moe_drop_tokens moe_dropout_prob moe_gate moe_gate_act moe_group moe_group_experts
    moe_jitter_eps moe_loss_weight moe_normalize_expert_weights moe_orthogonal_loss_lambda
    moe_random_routing_dropped_token moe_renormalize moe_router_activation
    moe_router_activation_func moe_router_bias_update_speed moe_router_dtype
    moe_router_enable_expert_bias moe_router_enable_shared_expert moe_router_norm_min
    moe_router_num_groups moe_router_scaling_factor moe_router_topk_scaling_factor
    moe_shared_expert_overlap moe_use_aux_free moe_use_hard_gate moe_z_loss_coef moe_z_loss_lambda
    mtp_loss_scaling_factor mtp_use_dedicated_embeddings mup_enabled need_fp32_gate
    no_rope_layer_interval no_rope_layers nope_layers norm_expert_weight norm_topk_prob norm_type
    normalization_function num_beam_groups num_beams num_labels num_logits_to_keep num_media_embeds
    num_return_sequences num_reward_heads out_proj_bias output_attentions output_hidden_states
    output_multiplier_scale output_router_logits pool_type position_embedding_type pretraining_tp
    qk_head_dim qk_layernorm qk_norm qk_norm_type query_pre_attn_scalar rescale_prenorm_residual
    resid_pdrop residual_in_fp32 residual_multiplier residual_scaling route_norm route_scale
    routed_scaling_factor router_aux_loss_coef router_aux_loss_factor router_bias router_dtype
    router_jitter_noise router_logit_scaling router_logit_softcapping router_scaling_factor
    router_type router_z_loss_coef score_func score_function scoring_func seq_aux seq_length
    skip_cls_token swiglu_alpha swiglu_limit swiglu_limits swiglu_limits_shared
    task_specific_params tie_encoder_decoder tie_word_embeddings time_step_floor time_step_limit
    time_step_max time_step_min tokenizer_class torch_dtype torchscript transformers_version
    type_vocab_size use_bias use_bidirectional_attention use_cache use_conv_bias use_expert_bias
    use_fp32_lm_head use_gemma_norm use_grouped_mm use_grouped_topk use_kernel use_mamba_kernels
    use_mla_gate_norm use_moe_router_bias use_qk_norm use_qkv_bias use_rmsnorm use_rope_layers
    use_routing_bias yarn_only_types z_loss_coef
    """.split()  # noqa: SIM905
)
"""Names with no effect on the size of weights, caches or states."""

_HARMLESS_PATTERNS = re.compile(
    r"(^|_)(rope|rotary)_?(theta|thetas|scaling|parameters|type|ratio|ratios|interleaved?|local|base"
    r"|freq|pct|emb|dim|percent|factor|factors|fraction|config|style|1d|2d|3d)(_|$)"
    r"|^(rope|rotary|swa_rope|partial_rotary_factors?|local_rope|compress_rope)\b"
    r"|^(rotary_|partial_rotary|rope_)|_rope_theta$|^original_max_position"
    r"|token_(id|ids|index|idx|type)s?$|_token$|_token_|_tokens$|tokens_per_"
    r"|initializer|^init_|_init$|_std$|dropout|_pdrop$|eps$|epsilon$|_loss_|_loss$|_aux_|_coef$|_coeff$"
    r"|^(id2label|label2id|problem_type|return_|output_|use_return_|tf_|remove_invalid|bad_words)"
    r"|^(no_repeat|early_stopping|length_penalty|repetition_penalty|diversity|temperature$|top_p$)"
    r"|^(top_k$|typical_p|do_sample|exponential_decay|forced_|suppress_|begin_suppress|min_length)"
    r"|^(max_length|encoder_no_repeat|ignore_index|prefix$|pruned_heads|sep_token|use_bfloat16)"
    r"|^(_name_or_path|_commit_hash|_attn_implementation|transformers\.|_from_model|unsloth_)"
    r"|^(vision|visual|image|video|audio|speech|mm_|img_|projector|multimodal|im_|patch_|vit_|tts_)"
    r"|(vision|visual|image|video|audio|projector|talker|code2wav)(_|$)"
    r"|(^|_)bias$|_placeholder$|_norm_eps$|_scale_factor$|_logit_softcap"
)

_STRUCTURAL_WORDS = frozenset(
    """
    layer layers expert experts moe head heads window windows attn attention rank lora type types
    latent mamba ssm state states block blocks pattern period interval freq frequency shared share
    mtp nextn mlp ffn intermediate hidden sparse sparsity index indexer kv group groups dense hash
    dim dims width size num n skip skipped cla conv zero mixer hybrid linear global local swa
    sliding topk offset start end step replace interleave compress compression ratios ngram neighbor
    split depth recurrent residual nope gated glu heterogeneous every
    """.split()  # noqa: SIM905
)


def harmless(name: str) -> bool:
    """Whether a key of this name is known to have no effect on sizes."""
    return name in _HARMLESS_NAMES or _HARMLESS_PATTERNS.search(name) is not None


def structural(name: str) -> bool:
    """Whether a key of this name may change the size of weights, caches or states."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_")
    return not harmless(name) and any(word in _STRUCTURAL_WORDS for word in words)


def printable(text: str, length: int = 80) -> str:
    """Text out of a file without control characters, cut to `length`."""
    return "".join(char for char in text if char.isprintable())[:length]


def shown(value: object) -> str:
    """A value as error messages print it: short, without control characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of over 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Keys:
    """One object of a config.json; every key that is asked for counts as read.

    Errors are FormatError and begin with `where`, the file's name.
    """

    def __init__(self, data: Mapping[str, Any], where: str, path: str = "") -> None:
        self.data, self.where, self.path = data, where, path
        self.read: dict[str, Any] = {}
        self.inner_keys: dict[str, Keys] = {}

    def error(self, cause: str, remedy: str) -> FormatError:
        return FormatError(f"{self.where}: {cause}", remedy)

    def has(self, *names: str) -> bool:
        """Whether any of these keys has a value other than null. Does not count as reading."""
        return any(self.data.get(name) is not None for name in names)

    def get(self, name: str) -> Any:
        if name in self.data:
            self.read[self.path + name] = self.data[name]
        return self.data.get(name)

    def number(self, name: str, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.get(name)
        remedy = f"{self.path}{name} must be an integer from {low} to {high}: check the file"
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{self.path}{name} is {shown(value)}, not a whole number", remedy)
        if not low <= value <= high:
            raise self.error(
                f"{self.path}{name} is {shown(value)}, outside {low} to {high}", remedy
            )
        return value

    def optional(self, name: str, default: int, low: int = 0, high: int = MAX_SIZE) -> int:
        if not self.has(name):
            self.get(name)
            return default
        return self.number(name, low, high)

    def first_of(
        self,
        names: Iterable[str],
        low: int = 1,
        high: int = MAX_SIZE,
        *,
        per_layer: bool = False,
    ) -> int | None:
        """The value of whichever of these keys is there; all that are there must agree.

        per_layer: a list of one number a layer will do where all are the same.
        """
        read = self._same_in_all if per_layer else self.number
        found = {name: read(name, low, high) for name in names if self.has(name)}
        if len(set(found.values())) > 1:
            raise self.error(
                "keys disagree: " + ", ".join(f"{key} {value}" for key, value in found.items()),
                "they name one thing: take the file as its maker published it",
            )
        return next(iter(found.values()), None)

    def _same_in_all(self, name: str, low: int, high: int) -> int:
        """A number, or a list of one number a layer that is the same in all."""
        value = self.data.get(name)
        if not isinstance(value, list):
            return self.number(name, low, high)
        first = value[0] if value else None
        if any(entry != first or type(entry) is not type(first) for entry in value):
            raise self.error(
                f"{self.path}{name} differs from layer to layer: {shown(value)}",
                "moesim reads models whose MoE layers are all of one shape",
            )
        self.get(name)
        return Keys({name: first}, self.where, self.path).number(name, low, high)

    def must_be(self, name: str, value: object) -> None:
        """Refuse a file in which this key has another value than the one that is read."""
        if self.get(name) not in (None, value):
            raise self.error(
                f"{self.path}{name} is {shown(self.data[name])}: only {value!r} is read",
                "docs/models.md lists what is read of each architecture",
            )

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{self.path}{name} is {shown(value)}", "it must be true or false")
        return value

    def flags(self, name: str, length: int, values: Mapping[Any, Any], longest: int = 0) -> list:
        """A list with one entry per layer (up to `longest`, cut), each mapped through `values`."""
        entries = self.get(name)
        fits = isinstance(entries, list) and length <= len(entries) <= max(length, longest)
        if not fits:
            count = f"a list of {len(entries)}" if isinstance(entries, list) else shown(entries)
            raise self.error(
                f"{self.path}{name} is not a list of {length} entries but {count}",
                "it must have one entry per layer",
            )
        return [self._mapped(name, entry, values) for entry in entries]

    def _mapped(self, name: str, entry: object, values: Mapping[Any, Any]) -> Any:
        known = isinstance(entry, (str, int)) and not isinstance(entry, bool)
        if not known or entry not in values:
            raise self.error(
                f"{self.path}{name} holds {shown(entry)}",
                "moesim knows: " + ", ".join(str(value) for value in values),
            )
        return values[entry]

    def layer_list(
        self, name: str, num_layers: int, base: int = 0, *, text: bool = False
    ) -> tuple[int, ...]:
        """Layer numbers that count from `base`: a list, or with `text` such as "3,4,5"."""
        entries = self.get(name)
        if text and isinstance(entries, str):
            parts = [part.strip() for part in entries.split(",") if part.strip()]
            entries = [int(part) if re.fullmatch("[0-9]{1,6}", part) else part for part in parts]
        good = isinstance(entries, list) and all(
            isinstance(layer, int)
            and not isinstance(layer, bool)
            and base <= layer < num_layers + base
            for layer in entries
        )
        if not good:
            raise self.error(
                f"{self.path}{name} is not a list of layer numbers from {base} to "
                f"{num_layers + base - 1}: {shown(entries)}",
                "check it against num_hidden_layers",
            )
        return tuple(sorted({layer - base for layer in entries}))

    def inner(self, name: str) -> Keys:
        """The object under this key; an empty one where there is none."""
        if name not in self.inner_keys:
            value = self.get(name)
            if value is not None and not isinstance(value, dict):
                raise self.error(f"{self.path}{name} is not an object", "check the file")
            self.inner_keys[name] = Keys(value or {}, self.where, f"{self.path}{name}.")
        return self.inner_keys[name]

    def all_read(self) -> dict[str, Any]:
        """Every key that was read, with its path."""
        out = {path: value for path, value in self.read.items() if not isinstance(value, dict)}
        for path, value in self.read.items():
            if isinstance(value, dict) and path.endswith("quantization_config"):
                out[path] = value.get("quant_method", value.get("quant_algo"))
        for keys in self.inner_keys.values():
            out |= keys.all_read()
        return out

    def left_over(self) -> Iterator[tuple[str, str, Any]]:
        """(path, name, value) of every key that nobody asked for and that is not switched off."""
        for name, value in self.data.items():
            if self.path + name not in self.read and value not in (None, False, [], {}, ""):
                yield self.path + printable(name), name, value
        for keys in self.inner_keys.values():
            yield from keys.left_over()
