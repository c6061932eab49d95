"""TensorRT-LLM's expert_statistic folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.safetensors_file import TensorInfo, write_header
from moesim.trace.format import LoadTrace, Trace
from moesim.trace.importers import trtllm
from moesim.trace.importers.registry import detect_format

NAMES = {"int64": "I64", "int32": "I32", "float32": "F32"}


def save_tensors(path, tensors: dict[str, np.ndarray]) -> None:
    infos = {n: TensorInfo(NAMES[a.dtype.name], a.shape, 0, a.nbytes) for n, a in tensors.items()}
    with path.open("wb") as out:
        write_header(out, infos, {})
        for array in tensors.values():
            out.write(array.tobytes())


@pytest.fixture
def folder(tmp_path):
    """Two ranks, iterations 100 and 101, layers 3 and 4, 4 experts, top-2."""
    path = tmp_path / "expert_statistic"
    path.mkdir()
    (path / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 2}))
    for rank in range(2):
        save_tensors(
            path / f"rank{rank}.safetensors",
            {
                f"{iteration}_{layer}": np.array([1, 2, 3, layer], np.int64) * (rank + 1)
                for iteration in (100, 101)
                for layer in (3, 4)
            },
        )
    return path


def test_counts_are_summed_over_ranks(folder, options):
    """Rank 0 has x1, rank 1 x2: three times the base in every iteration."""
    assert trtllm.detect(folder)
    load = trtllm.read([folder], options())
    assert isinstance(load, LoadTrace)
    assert load.expert_load.tolist() == [[[3, 6, 9, 9], [3, 6, 9, 12]]] * 2
    assert load.meta.layer_ids == (3, 4)
    assert (load.meta.num_experts, load.meta.top_k) == (4, 2)


def test_a_missing_rank_is_said(folder, options, notes):
    (folder / "rank1.safetensors").rename(folder / "rank3.safetensors")
    trtllm.read([folder], options())
    assert any("no file of rank 1, 2: their tokens are not counted" in note for note in notes)


def test_folders_follow_one_another(folder, options):
    load = trtllm.read([folder, folder], options())
    assert isinstance(load, LoadTrace)
    assert load.expert_load.shape == (4, 2, 4)


def test_raw_files_give_tokens(folder, options, notes):
    ids = np.array([[0, 1], [2, 3], [1, 0]])
    for rank in range(2):
        save_tensors(
            folder / f"rank{rank}_raw.safetensors",
            {
                f"{iteration}_{layer}": ((ids + layer + rank) % 4).astype(np.int32)
                for iteration in (100, 101)
                for layer in (3, 4)
            },
        )
    trace = trtllm.read([folder], options(phase="decode"))
    assert isinstance(trace, Trace)
    assert trace.num_tokens == 12
    assert trace.request_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert trace.step_ids is not None
    assert trace.step_ids[:6].tolist() == [100] * 3 + [101] * 3
    assert trace.rank_ids is not None
    assert trace.rank_ids.tolist() == [0] * 6 + [1] * 6
    assert trace.expert_ids[6].tolist() == [[0, 1], [1, 2]]  # rank 1: (0 + 3 + 1) % 4, ...
    assert trace.phases.tolist() == [1] * 12
    assert any("does not name requests" in note for note in notes)


def test_errors_name_file_and_tensor(folder, options):
    file = folder / "rank1.safetensors"
    save_tensors(file, {"100_3": np.zeros(5, np.int64)})
    with pytest.raises(FormatError, match=r"rank1.*tensor 100_3: has shape \(5,\), wanted \(4,\)"):
        trtllm.read([folder], options())
    save_tensors(file, {"layer3": np.zeros(4, np.int64)})
    with pytest.raises(FormatError, match="tensor layer3: is not named ITERATION_LAYER"):
        trtllm.read([folder], options())
    save_tensors(file, {"100_3": np.zeros(4, np.float32)})
    with pytest.raises(FormatError, match="tensor 100_3 has type F32"):
        trtllm.read([folder], options())
    save_tensors(file, {"100_3": np.array([1, 2, -3, 4])})
    with pytest.raises(FormatError, match=r"rank1.*tensor 100_3: expert 2: negative count"):
        trtllm.read([folder], options())
    save_tensors(file, {"102_3": np.ones(4, np.int64)})
    with pytest.raises(FormatError, match="iteration 102 has no layer 4"):
        trtllm.read([folder], options())
    data = (folder / "rank0.safetensors").read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(FormatError, match="data_offsets go beyond the file"):
        trtllm.read([folder], options())
    file.write_bytes(data[:5])
    with pytest.raises(FormatError, match="no safetensors header"):
        trtllm.read([folder], options())


def test_meta_info_is_checked(folder, options, tmp_path):
    meta = folder / "meta_info.json"
    meta.write_text('{"num_experts": "four", "num_experts_per_token": 2}')
    with pytest.raises(FormatError, match=r"meta_info\.json: num_experts must be"):
        trtllm.read([folder], options())
    meta.write_text('{"num_experts": 4, "num_experts_per_token": 2')
    with pytest.raises(FormatError, match=r"meta_info\.json: not JSON"):
        trtllm.read([folder], options())
    meta.unlink()
    assert not trtllm.detect(folder)
    with pytest.raises(FormatError, match=r"but no meta_info\.json"):
        detect_format([folder])
    with pytest.raises(InputError, match=r"cannot read .*meta_info\.json"):
        trtllm.read([folder], options())
