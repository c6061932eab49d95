"""FLAME-MoE's parquet traces."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.trace.importers import flame

pa = pytest.importorskip("pyarrow", reason="writing parquet needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TOKENS, LAYERS = 2050, (2, 3)


@pytest.fixture
def capture(tmp_path, draw):
    """iter_0540 with layers 2 and 3, and 2,050 token ids in two sample files."""
    ids = draw(TOKENS, layers=2, top_k=6, experts=64)
    scores = np.linspace(0.01, 0.1, ids.size).reshape(ids.shape).astype(np.float16)
    folder = tmp_path / "flame-moe-290m" / "actives" / "iter_0540"
    folder.mkdir(parents=True)
    for row, layer in enumerate(LAYERS):
        table = pa.table(
            {
                "scores": pa.array(list(scores[:, row]), pa.list_(pa.float16())),
                "indices": pa.array(list(ids[:, row].astype(np.int16)), pa.list_(pa.int16())),
            }
        )
        pq.write_table(table, folder / f"layer_{layer:02}.parquet")
    samples = tmp_path / "flame-moe-290m" / "samples"
    samples.mkdir()
    tokens = np.arange(TOKENS, dtype=np.int32)
    for index, part in enumerate((tokens[:1000], tokens[1000:])):
        pq.write_table(pa.table({"token_id": part}), samples / f"{index:03}.parquet")
    return folder, ids, scores


def test_folder_with_tokens(capture, options):
    """Requests are sequences of 2,048; Megatron's layers 2, 3 are layers 1, 2 from zero."""
    folder, ids, scores = capture
    assert flame.detect(folder)
    trace = flame.read([folder], options(num_experts=64))
    np.testing.assert_array_equal(trace.expert_ids, ids)
    np.testing.assert_array_equal(trace.gate_weights, scores)
    assert trace.meta.layer_ids == (1, 2)
    assert trace.request_ids[[0, 2047, 2048]].tolist() == [0, 0, 1]
    assert trace.positions[[0, 2047, 2048, 2049]].tolist() == [0, 2047, 0, 1]
    np.testing.assert_array_equal(trace.token_ids, np.arange(TOKENS))


def test_layer_files_and_max_tokens(capture, options):
    folder, ids, _ = capture
    files = sorted(folder.glob("*.parquet"), reverse=True)
    trace = flame.read(files, options(num_experts=64, max_tokens=100))
    np.testing.assert_array_equal(trace.expert_ids, ids[:100])
    assert trace.token_ids is not None
    with pytest.raises(InputError, match="layer 2 is there twice"):
        flame.read([files[1], files[1]], options())


def write_layer(folder, layer, **columns):
    pq.write_table(pa.table(columns), folder / f"layer_{layer:02}.parquet")


def test_errors_name_file_and_column(capture, options):
    folder, _, scores = capture
    good = pa.array(list(scores[:3, 0]), pa.list_(pa.float16()))
    cases = [
        ({"scores": good}, "has no column indices"),
        ({"scores": good, "indices": [[1, 2], [3], [4, 5]]}, "indices has lists of different|row"),
        ({"scores": good, "indices": [[1, 2], None, [4, 5]]}, "column indices has empty values"),
        ({"scores": good, "indices": [["a"], ["b"], ["c"]]}, "column indices has type string"),
        ({"scores": good, "indices": [[1], [2], [3]]}, "3 rows of indices"),
    ]
    for columns, message in cases:
        write_layer(folder, 2, **columns)
        with pytest.raises(FormatError, match=message) as error:
            flame.read([folder], options(num_experts=64))
        assert "layer_02.parquet" in error.value.cause
    (folder / "layer_02.parquet").write_bytes(b"PAR1 junk PAR1")
    with pytest.raises((FormatError, InputError), match=r"layer_02\.parquet"):
        flame.read([folder], options(num_experts=64))
