"""GGUF headers: sizes exactly as stored, and refusals."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import FormatError, InputError, MoesimError, UnknownNameError
from moesim.model.ggml import GGML_BY_NAME
from moesim.model.gguf import read_gguf
from moesim.model.names import load_model, load_reading
from moesim.model.weights import load_weights
from tests.model.gguf_writer import METADATA, tensors, write_gguf

PUBLISHED_BITS = {
    "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "q8_0": 8.5,
    "q4_0": 4.5, "q5_0": 5.5, "iq1_s": 1.5625, "iq1_m": 1.75, "iq2_xxs": 2.0625, "iq2_xs": 2.3125,
    "iq2_s": 2.5625, "iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq4_xs": 4.25, "iq4_nl": 4.5,
    "mxfp4": 4.25, "nvfp4": 4.5, "tq1_0": 1.6875, "tq2_0": 2.0625,
}  # fmt: skip


def test_bits_per_weight_are_the_published_ones() -> None:
    """ggml-org/llama.cpp, tools/quantize/README.md and gguf-py/gguf/constants.py."""
    assert {name: GGML_BY_NAME[name].bits for name in PUBLISHED_BITS} == PUBLISHED_BITS


def test_the_sizes_of_a_small_file(tmp_path: Path) -> None:
    """A 256 x 256 matrix is 256 blocks: 36,864 bytes in Q4_K (144 a block), 53,760 in Q6_K (210).
    Layer 0: gate and up of 4 experts 2 x 4 x 36,864 = 294,912, down 4 x 53,760 = 215,040, in all
    509,952; layer 1 with Q4_K down 442,368. The embedding, 256 x 512 in Q4_K: 73,728."""
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, tensors())
    weights = load_weights(str(path))
    assert weights.layer_bytes(experts=True).tolist() == [509_952, 442_368]
    attention = 2 * 36_864 + 18_432 + 26_880
    assert weights.layer_bytes(experts=False).tolist() == [attention + 2 * 1024 + 4096] * 2
    assert weights.embedding_bytes == 73_728
    assert weights.output_bytes == 107_520 + 1024
    assert weights.num_bytes == read_gguf(path).num_bytes
    spec = weights.spec
    assert (spec.num_experts, spec.top_k, spec.moe_layer_ids) == (4, 2, (0, 1))
    assert (spec.expert_dtype, spec.dense_dtype, spec.tie_word_embeddings) == (
        "q4_k",
        "q4_k",
        False,
    )
    assert spec.weight_bytes() == weights.num_bytes
    assert spec.kv_bytes_per_token("fp16") == 2 * 2 * 2 * 64 * 2
    assert spec.kv_bytes_per_token("q8_0") == 2 * 2 * 2 * 64 * 34 // 32


def test_the_reading_says_what_was_read(tmp_path: Path) -> None:
    reading = load_reading(str(write_gguf(tmp_path / "tiny.gguf", METADATA, tensors())))
    assert reading.read["qwen3moe.expert_count"] == 4
    assert "tokenizer.ggml.tokens" in reading.harmless
    assert load_model(str(tmp_path / "tiny.gguf")) == reading.spec


def test_parts_are_read_together(tmp_path: Path) -> None:
    every = tensors()
    split = {"split.count": 2, "split.tensors.count": len(every)}
    first = tmp_path / "tiny-00001-of-00002.gguf"
    write_gguf(first, METADATA | split | {"split.no": 0}, every[:9])
    write_gguf(tmp_path / "tiny-00002-of-00002.gguf", split | {"split.no": 1}, every[9:])
    whole = load_weights(str(write_gguf(tmp_path / "whole.gguf", METADATA, every)))
    assert load_weights(str(first)).spec.stored == whole.spec.stored
    with pytest.raises(InputError, match="part 2"):
        read_gguf(tmp_path / "tiny-00002-of-00002.gguf")
    (tmp_path / "tiny-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="cannot read"):
        read_gguf(first)


def broken(tmp_path: Path, **changed: object) -> Path:
    """The small file with other metadata; a value of None leaves the key out."""
    keys = {f"qwen3moe.{name}": found for name, found in changed.items()}
    metadata = {k: v for k, v in (METADATA | keys).items() if v is not None}
    return write_gguf(tmp_path / "broken.gguf", metadata, tensors())


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"expert_count": 8}, "experts of layer 0"),
        ({"expert_used_count": None}, "expert_used_count"),
        ({"block_count": 3}, "not every one of 3 layers"),
        ({"block_count": 2_000_000_000}, "not every one of 2000000000 layers"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count_kv": 4}, "keys of layer 0 are 128 wide"),
        ({"attention.sliding_window": 64}, "window of 64"),
        ({"embedding_length": 128}, "token_embd"),
    ],
)
def test_metadata_that_the_tensors_contradict(
    tmp_path: Path, changed: dict[str, object], cause: str
) -> None:
    with pytest.raises(FormatError, match=cause):
        load_model(str(broken(tmp_path, **changed)))


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA | {"general.architecture": "nobody"}, tensors())
    with pytest.raises(FormatError, match="architecture nobody"):
        load_model(str(tmp_path / "a.gguf"))
    strange = [*tensors(), ("blk.1.ffn_strange.weight", (256, 4), "f32")]
    with pytest.raises(FormatError, match="ffn_strange"):
        load_model(str(write_gguf(tmp_path / "b.gguf", METADATA, strange)))
    dense = [t for t in tensors() if "_exps" not in t[0]]
    with pytest.raises(FormatError, match="no layer has routed experts"):
        load_model(str(write_gguf(tmp_path / "c.gguf", METADATA, dense)))
    with pytest.raises(FormatError, match="version 4"):
        load_model(str(write_gguf(tmp_path / "d.gguf", METADATA, tensors(), version=4)))
    with pytest.raises(InputError, match="no such file"):
        load_model(str(tmp_path / "absent.gguf"))


def test_a_file_that_ends_early_names_the_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, tensors())
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(FormatError, match=r"tensor output\.weight"):
        read_gguf(path)


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, [("output.weight", (256, 2), "q4_k")])
    data = bytearray(path.read_bytes())
    at = data.index(b"output.weight") + 13 + 4 + 16
    data[at] = 77
    path.write_bytes(data)
    with pytest.raises(FormatError, match="type 77"):
        read_gguf(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_reported_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A changed byte or an early end gives a MoesimError or a model, never another error."""
    path = write_gguf(tmp_path_factory.mktemp("g") / "tiny.gguf", METADATA, tensors())
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), 700, 24, 3]))])
    with contextlib.suppress(MoesimError):
        load_weights(str(path))


def test_mixes_have_the_size_of_published_files() -> None:
    """llama-bench prints 17.28 GiB for Qwen3-30B-A3B in Q4_K_M and 30.25 in Q8_0; the files of
    Qwen3-235B-A22B in Q4_K_M have 142 GB, gpt-oss-120b of ggml-org 59.02 GiB (its experts' biases,
    0.25%, are not counted)."""
    size = {
        (model, mix): load_weights(model, mix).num_bytes / 2**30
        for model, mix in (
            ("Qwen3-30B-A3B", "Q4_K_M"),
            ("Qwen3-30B-A3B", "Q8_0"),
            ("Qwen3-235B-A22B", "Q4_K_M"),
            ("GPT-OSS-120B", "MXFP4_MOE"),
        )
    }
    assert list(size.values()) == pytest.approx([17.28, 30.25, 142.15e9 / 2**30, 59.02], rel=3e-3)


def test_mixes_that_follow_no_published_rule_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"\.gguf file"):
        load_weights("Qwen3-30B-A3B", "UD-Q4_K_XL")
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, tensors())
    with pytest.raises(InputError, match="has its own types"):
        load_weights(str(path), "Q4_K_M")
