"""Renumbering a checkpoint's experts leaves the model's output as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MismatchError
from moesim.exporters.base import ExportOptions
from moesim.exporters.checkpoint import INDEX, permute_checkpoint
from moesim.placement import Placement, Plan
from moesim.safetensors_file import TensorInfo, open_safetensors, write_header

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS = 6, 5, 8, 3, (1, 2)
NAMES = {"float32": "F32", "int64": "I64", "uint16": "BF16"}


def permutation(layers=LAYERS, experts=EXPERTS, gpus=4, seed=0) -> Plan:
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(experts) for _ in layers]).astype(np.int32)
    return Plan("", tuple(layers), Placement(table, gpus, 1, experts))


def save(path, tensors: dict[str, np.ndarray]) -> None:
    infos = {n: TensorInfo(NAMES[a.dtype.name], a.shape, 0, a.nbytes) for n, a in tensors.items()}
    with path.open("wb") as out:
        write_header(out, infos, {"format": "pt"})
        for array in tensors.values():
            out.write(np.ascontiguousarray(array).tobytes())


def load(folder) -> dict[str, np.ndarray]:
    types = {v: k for k, v in NAMES.items()}
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = open_safetensors(file)
        for name, info in shard.tensors.items():
            flat = np.frombuffer(b"".join(shard.chunks(name)), types[info.dtype])
            out[name] = flat.reshape(info.shape)
    return out


def weights(layer: int) -> dict[str, np.ndarray]:
    """One layer: router [E, H] with bias [E], up [E, W, H], down [E, H, W]."""
    rng = np.random.default_rng(layer)
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "bias": (EXPERTS,),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# Every naming: how one layer's weights are stored, and how they are read back.


def mixtral(layer: int, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"model.layers.{layer}.block_sparse_moe."
    out = {f"{p}gate.weight": w["router"], f"{p}gate.bias": w["bias"]}
    for e in range(EXPERTS):
        out[f"{p}experts.{e}.w1.weight"] = w["up"][e]
        out[f"{p}experts.{e}.w2.weight"] = w["down"][e]
    return out


def read_mixtral(layer: int, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"model.layers.{layer}.block_sparse_moe."
    return {
        "router": t[f"{p}gate.weight"],
        "bias": t[f"{p}gate.bias"],
        "up": np.stack([t[f"{p}experts.{e}.w1.weight"] for e in range(EXPERTS)]),
        "down": np.stack([t[f"{p}experts.{e}.w2.weight"] for e in range(EXPERTS)]),
    }


def fused(layer: int, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"language_model.model.layers.{layer}.mlp."
    return {
        f"{p}gate.weight": w["router"],
        f"{p}gate.e_score_correction_bias": w["bias"],
        f"{p}experts.up_proj": w["up"],
        f"{p}experts.down_proj": w["down"],
    }


def read_fused(layer: int, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"language_model.model.layers.{layer}.mlp."
    names = ("gate.weight", "gate.e_score_correction_bias", "experts.up_proj", "experts.down_proj")
    return dict(zip(("router", "bias", "up", "down"), (t[p + n] for n in names), strict=True))


def megatron_te(layer: int, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"decoder.layers.{layer}.mlp."
    out = {f"{p}router.weight": w["router"], f"{p}router.expert_bias": w["bias"]}
    for e in range(EXPERTS):
        out[f"{p}experts.linear_fc1.weight{e}"] = w["up"][e]
        out[f"{p}experts.linear_fc2.weight{e}"] = w["down"][e]
    return out


def read_megatron_te(layer: int, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"decoder.layers.{layer}.mlp."
    return {
        "router": t[f"{p}router.weight"],
        "bias": t[f"{p}router.expert_bias"],
        "up": np.stack([t[f"{p}experts.linear_fc1.weight{e}"] for e in range(EXPERTS)]),
        "down": np.stack([t[f"{p}experts.linear_fc2.weight{e}"] for e in range(EXPERTS)]),
    }


def megatron_sequential(layer: int, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in megatron_te(layer, w).items():
        for part in ("linear_fc1", "linear_fc2"):
            if f"{part}.weight" in name:
                head, number = name.split(f"{part}.weight")
                name = f"{head}local_experts.{number}.{part}.weight"
        renamed[name] = array
    return renamed


def read_megatron_sequential(layer: int, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"decoder.layers.{layer}.mlp."
    names = [f"{p}experts.local_experts.{e}.linear_fc" for e in range(EXPERTS)]
    return {
        "router": t[f"{p}router.weight"],
        "bias": t[f"{p}router.expert_bias"],
        "up": np.stack([t[f"{n}1.weight"] for n in names]),
        "down": np.stack([t[f"{n}2.weight"] for n in names]),
    }


def megatron_grouped(layer: int, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """weight1 [H, E*W] and weight2 [E*W, H], each a run of experts in memory."""
    p = f"decoder.layers.{layer}.mlp."
    return {
        f"{p}router.weight": w["router"],
        f"{p}router.bias": w["bias"],
        f"{p}experts.weight1": w["up"].reshape(HIDDEN, EXPERTS * WIDTH),
        f"{p}experts.weight2": w["down"].reshape(EXPERTS * WIDTH, HIDDEN),
    }


def read_megatron_grouped(layer: int, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    p = f"decoder.layers.{layer}.mlp."
    return {
        "router": t[f"{p}router.weight"],
        "bias": t[f"{p}router.bias"],
        "up": t[f"{p}experts.weight1"].reshape(EXPERTS, WIDTH, HIDDEN),
        "down": t[f"{p}experts.weight2"].reshape(EXPERTS, HIDDEN, WIDTH),
    }


LAYOUTS = {
    "mixtral": (mixtral, read_mixtral),
    "fused": (fused, read_fused),
    "megatron te": (megatron_te, read_megatron_te),
    "megatron sequential": (megatron_sequential, read_megatron_sequential),
    "megatron grouped": (megatron_grouped, read_megatron_grouped),
}


def forward(x: np.ndarray, layers: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Softmax router, top-k by score plus bias, experts summed from the best score down."""
    for w in layers:
        logits = x @ w["router"].T
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        chosen = np.argsort(-(scores + w["bias"]), axis=1, kind="stable")[:, :TOP_K]
        out = np.zeros_like(x)
        for t in range(len(x)):
            for e in chosen[t]:
                out[t] += scores[t, e] * (w["down"][e] @ np.tanh(w["up"][e] @ x[t]))
        x = x + out
    return x


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(layout) -> folder with two shards, an index, and other files."""

    def make(layout: str, **extra: np.ndarray):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        write = LAYOUTS[layout][0]
        dense = {"model.layers.0.mlp.gate_proj.weight": np.ones((3, 3), np.float32)}
        shards = [{**dense, **write(1, weights(1))}, {**write(2, weights(2)), **extra}]
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name, tensors in zip(names, shards, strict=True):
            save(folder / name, tensors)
        weight_map = {t: name for name, ts in zip(names, shards, strict=True) for t in ts}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "config.json").write_text('{"model_type": "tiny"}')
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a\n")
        return folder

    return make


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_output_is_unchanged_and_placement_is_the_plan(checkpoint, tmp_path, layout):
    source, target = checkpoint(layout), tmp_path / "new"
    plan = permutation()
    changed = permute_checkpoint(plan, source, target, ExportOptions())
    assert changed > 0
    read = LAYOUTS[layout][1]
    old, new = load(source), load(target)
    before = [read(layer, old) for layer in LAYERS]
    after = [read(layer, new) for layer in LAYERS]
    x = np.random.default_rng(9).normal(size=(64, HIDDEN)).astype(np.float32)
    np.testing.assert_allclose(forward(x, after), forward(x, before), rtol=0, atol=1e-5)
    for row, a, b in zip(plan.placement.physical_to_logical, after, before, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name][row])
    assert not np.array_equal(after[0]["up"], before[0]["up"])
    name = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(old[name], new[name])
    index = json.loads((target / INDEX).read_text())["weight_map"]
    for tensor, shard in index.items():
        assert tensor in open_safetensors(target / shard).tensors
    assert set(index) == set(new)
    assert (target / "tokenizer" / "vocab.txt").read_text() == "a\n"


def test_the_inverse_gives_the_checkpoint_back(checkpoint, tmp_path):
    source, plan = checkpoint("mixtral"), permutation()
    permute_checkpoint(plan, source, tmp_path / "new", ExportOptions())
    table = np.argsort(plan.placement.physical_to_logical, axis=1).astype(np.int32)
    back = Plan("", plan.layer_ids, Placement(table, 4, 1, EXPERTS))
    permute_checkpoint(back, tmp_path / "new", tmp_path / "back", ExportOptions())
    old, new = load(source), load(tmp_path / "back")
    assert set(old) == set(new)
    for name, array in old.items():
        np.testing.assert_array_equal(array, new[name])


def test_types_that_numpy_lacks_and_scalars_pass_as_bytes(checkpoint, tmp_path):
    prefix = "model.layers.2.mlp.experts."
    packed = np.arange(EXPERTS * 4, dtype=np.uint16).reshape(EXPERTS, 4)
    source = checkpoint(
        "mixtral",
        **{f"{prefix}up_scales": packed, f"{prefix}scale": np.ones((1,), np.float32)},
    )
    plan = permutation()
    permute_checkpoint(plan, source, tmp_path / "new", ExportOptions())
    new = load(tmp_path / "new")
    np.testing.assert_array_equal(
        new[f"{prefix}up_scales"], packed[plan.placement.physical_to_logical[1]]
    )
    assert new[f"{prefix}scale"].tolist() == [1.0]


def test_multi_token_prediction_layers_are_left_alone(checkpoint, tmp_path):
    extra = {f"mtp.layers.1.mlp.experts.{e}.w1.weight": np.full(2, e, np.int64) for e in range(2)}
    source = checkpoint("mixtral", **extra)
    permute_checkpoint(permutation(), source, tmp_path / "new", ExportOptions())
    new = load(tmp_path / "new")
    for name, array in extra.items():
        np.testing.assert_array_equal(new[name], array)


def test_group_limited_routing(checkpoint, tmp_path):
    """2 groups of 4: moving whole groups, and within them, is fine; tearing them is not."""
    source = checkpoint("mixtral")
    (source / "config.json").write_text('{"n_group": 2, "topk_group": 1}')
    with pytest.raises(
        MismatchError, match=r"2 groups of 4 experts, and layer 1 of the plan tears"
    ):
        permute_checkpoint(permutation(), source, tmp_path / "new", ExportOptions())
    assert not (tmp_path / "new").exists()
    whole = np.tile(np.array([6, 4, 7, 5, 2, 3, 0, 1], np.int32), (2, 1))
    plan = Plan("", LAYERS, Placement(whole, 4, 1, EXPERTS))
    assert permute_checkpoint(plan, source, tmp_path / "new", ExportOptions()) > 0


def test_refusals_leave_nothing_behind(checkpoint, tmp_path):
    source = checkpoint("mixtral")
    target = tmp_path / "new"
    cases = [
        (permutation(layers=(1, 5)), MismatchError, "layer 5 of the plan has no experts"),
        (permutation(experts=4), MismatchError, "the plan has 4 experts"),
        (permutation(experts=16), MismatchError, "the plan has 16 experts"),
    ]
    for plan, kind, message in cases:
        with pytest.raises(kind, match=message):
            permute_checkpoint(plan, source, target, ExportOptions())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    with pytest.raises(InputError, match="is not a folder"):
        permute_checkpoint(permutation(), tmp_path / "none", target, ExportOptions())
    with pytest.raises(InputError, match="exists already"):
        permute_checkpoint(permutation(), source, source, ExportOptions())
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(FormatError, match="data_offsets go beyond the file"):
        permute_checkpoint(permutation(), source, target, ExportOptions())
    shard.unlink()
    with pytest.raises(MismatchError, match="layer 2 of the plan has no experts"):
        permute_checkpoint(permutation(), source, target, ExportOptions())


def test_a_rank_of_expert_parallel_training_is_no_checkpoint(tmp_path):
    folder = tmp_path / "rank0"
    folder.mkdir()
    tensors = {k: v for k, v in mixtral(1, weights(1)).items() if "experts.5" not in k}
    save(folder / "model.safetensors", tensors)
    with pytest.raises(MismatchError, match="layer 1 has 7 of 8 tensors"):
        permute_checkpoint(permutation(layers=(1,)), folder, tmp_path / "new", ExportOptions())


def test_hash_routing_is_refused(checkpoint, tmp_path):
    source = checkpoint("mixtral", **{"model.layers.2.mlp.gate.tid2eid": np.ones(4, np.int64)})
    with pytest.raises(MismatchError, match="holds expert ids"):
        permute_checkpoint(permutation(), source, tmp_path / "new", ExportOptions())


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS = {
    "MixtralConfig": {"num_local_experts": 8, "intermediate_size": 16, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
    },
    "Qwen2MoeConfig": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "OlmoeConfig": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "GptOssConfig": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8,
        "layer_types": ["full_attention"] * 3,
    },
    "DeepseekV3Config": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "intermediate_size": 32, "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("config", sorted(MODELS))
def test_transformers_models_keep_their_logits(tmp_path, config):
    """Save a tiny random model, renumber its checkpoint, load it again, compare the logits."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**TINY, **MODELS[config]})
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "router" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "old")
    layers = (1, 2) if config == "DeepseekV3Config" else (0, 1, 2)
    plan = permutation(layers=layers)
    changed = permute_checkpoint(plan, tmp_path / "old", tmp_path / "new", ExportOptions())
    assert changed > 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        before, after = model(ids).logits, again(ids).logits
    assert torch.isfinite(before).all()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
