"""Whatever a config.json holds: a spec that adds up, or an error of ours."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import MoesimError
from moesim.model.attention import Cache
from moesim.model.dtypes import KV_BYTES
from moesim.model.hf.families import FAMILIES
from moesim.model.hf.reader import Reading, read_config
from moesim.model.names import load_model, preset_names

KEYS = sorted(
    {"layer_types", "quantization_config", "expert_dtype", "moe_latent_size"}
    | {"num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"}
    | {"num_key_value_heads", "num_experts", "n_routed_experts", "num_experts_per_tok"}
    | {"moe_intermediate_size", "intermediate_size", "kv_lora_rank", "linear_attn_config"}
    | {"compress_ratios", "hybrid_override_pattern", "hybrid_layer_pattern", "moe_layer_freq"}
    | {"sliding_window", "num_nextn_predict_layers", "zero_expert_num", "text_config"}
)
BASE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.integers()
    | st.floats()
    | st.sampled_from(["gptq", "fp8", "Linear", "mamba", "ME*-", "re:(", "\x1b[1m", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["quant_method", "bits", "weights", "ignore", "a"]), inner
        )
    ),
    max_leaves=6,
)


def outcome(config: dict[str, Any]) -> tuple[Reading | None, MoesimError | None]:
    try:
        return read_config(config, "here", "toy", "by hand"), None
    except MoesimError as error:
        return None, error


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from([*sorted(FAMILIES), "unheard_of"]),
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), JSON, max_size=4),
)
def test_any_file_of_any_family(family: str, changes: dict[str, Any]) -> None:
    config = {**BASE, "model_type": family, **changes}
    reading, error = outcome(config)
    if reading is None:
        assert error is not None
        assert error.cause.isprintable()
        assert error.remedy
        assert "remove" not in error.remedy
        return
    spec = reading.spec
    assert 0 < spec.active_params <= spec.total_params == sum(spec.params_by_class.values())
    assert spec.weight_bytes() > 0
    assert spec.note.isprintable()
    json.dumps(spec.to_dict())
    named = {path.split(".")[-1] for path in reading.read}
    assert not named & {path.split(".")[-1] for path in reading.noted}


@given(
    name=st.sampled_from(preset_names()),
    tokens=st.integers(0, 1 << 21),
    more=st.integers(0, 1 << 14),
    dtype=st.sampled_from(sorted(KV_BYTES)),
)
def test_a_longer_context_never_has_a_smaller_cache(
    name: str, tokens: int, more: int, dtype: str
) -> None:
    spec = load_model(name)
    longer = spec.kv_bytes(tokens + more, dtype)
    assert spec.kv_bytes(tokens, dtype) <= longer
    assert longer <= (tokens + more) * (spec.kv_bytes_per_token(dtype) + 1)


def test_entries_of_a_cache_by_hand() -> None:
    # A window of 8, and an entry for 4 tokens: 9 tokens fill 8 places and 2 entries.
    assert [Cache(1, window=8).entries(n) for n in (0, 8, 9)] == [0, 8, 8]
    assert [Cache(1, tokens_per_entry=4).entries(n) for n in (3, 4, 9)] == [0, 1, 2]
    assert Cache(10).entry_bytes(2.0) == 20
    assert Cache(10, element_bytes=1.5).entry_bytes(2.0) == 15
