"""Damaged files of every format: an error that names the file, or a valid trace; nothing else.

Each test makes a whole dump of one format, damages it in a random way (cut, bytes overwritten,
lines reordered, repeated, dropped or swapped with junk, JSON values replaced), and imports it. The
only outcomes allowed are a trace that the trace reader accepts, and a MoesimError whose cause names
the path. No other file may appear.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import MoesimError
from moesim.jobs.import_trace import import_files
from moesim.trace.format import load_trace, save_trace
from moesim.trace.importers.base import ImportOptions

from_disk = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def routing(seed: int, tokens: int = 6, layers: int = 2, top_k: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((tokens, layers, 8)).argsort(axis=2)[:, :, :top_k].astype(np.int32)


def encode(array: np.ndarray, bare: bool) -> str:
    import base64
    import io

    if bare:
        return base64.b64encode(array.astype("<i4").tobytes()).decode()
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.uint8))
    return base64.b64encode(buffer.getvalue()).decode()


def vllm_lines(seed: int) -> list[Any]:
    usage = {"prompt_tokens": 4, "completion_tokens": 3}
    return [
        {"choices": [{"index": 0, "routed_experts": encode(routing(s), False)}], "usage": usage}
        for s in (seed, seed + 1)
    ]


def sglang_lines(seed: int) -> list[Any]:
    return [
        {
            "meta_info": {
                "prompt_tokens": 4,
                "completion_tokens": 3,
                "routed_experts": encode(routing(s), True),
            }
        }
        for s in (seed, seed + 1)
    ]


def eplb_lines(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        {"record_type": "eplb_load_meta", "version": 1},
        *(
            {
                "record_type": "eplb_load_stats",
                "version": 1,
                "step": step,
                "expert_load": rng.integers(0, 50, (2, 6)).tolist(),
                "p2l_map": [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 2, 1]],
            }
            for step in range(3)
        ),
    ]


def megatron_lines(seed: int) -> list[Any]:
    ids = routing(seed)
    return [
        {"step": s, "rank": 0, "block": "decoder", "layer": n, "top_indices": ids[:, n].tolist()}
        for s in range(2)
        for n in range(2)
    ]


def table_lines(seed: int) -> list[Any]:
    ids = routing(seed)
    return [
        {"request": t // 3, "position": t % 3, "layer": n, "experts": ids[t, n].tolist()}
        for t in range(6)
        for n in range(2)
    ]


def nested_lines(seed: int) -> list[Any]:
    return [{"request": t // 3, "experts": row.tolist()} for t, row in enumerate(routing(seed))]


LINES = {
    "vllm": vllm_lines,
    "sglang": sglang_lines,
    "vllm-eplb-stats": eplb_lines,
    "megatron": megatron_lines,
    "table": table_lines,
    "table nested": nested_lines,
}

OPTIONS = {
    "sglang": {"top_k": 2, "num_hidden_layers": 2},
    "vllm-eplb-stats": {"top_k": 2},
    "sglang-recorder": {"top_k": 2},
    "npz": {"top_k": 2},
}

junk = st.sampled_from(
    [
        None,
        True,
        -1,
        1 << 40,
        1e300,
        "",
        "x",
        "\x1b[31m",
        [],
        [[]],
        [None],
        {},
        {"a": 1},
        [[1, "2"]],
    ]
)


def replace_value(data: st.DataObject, value: Any, depth: int = 0) -> Any:
    """`value` with one item, somewhere inside, replaced by junk."""
    if depth > 4 or not isinstance(value, list | dict) or not value or data.draw(st.booleans()):
        return data.draw(junk)
    key = data.draw(
        st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value)))
    )
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replace_value(data, copy[key], depth + 1)
    return copy


def outcome(path: Path, name: str, folder: Path) -> None:
    """Import as the command does, and check what is allowed to happen."""
    before = sorted(folder.rglob("*"))
    options = ImportOptions(num_experts=None, **OPTIONS.get(name, {}))
    refusal = None
    trace = None
    try:
        trace = import_files([path], options, name)
    except MoesimError as error:
        refusal = error
    assert sorted(folder.rglob("*")) == before
    if trace is not None:
        save_trace(trace, folder / "out.npz")
        load_trace(folder / "out.npz")
        return
    assert refusal is not None
    assert path.name in refusal.cause
    assert refusal.cause.isprintable()
    assert refusal.remedy


@pytest.mark.parametrize("kind", sorted(LINES))
@from_disk
@given(seed=st.integers(0, 5), data=st.data())
def test_damaged_lines(kind: str, seed: int, data: st.DataObject) -> None:
    records = LINES[kind](seed)
    how = data.draw(st.sampled_from(["value", "drop", "repeat", "shuffle", "mix", "text"]))
    at = data.draw(st.integers(0, len(records) - 1))
    if how == "value":
        records[at] = replace_value(data, records[at])
    elif how == "drop":
        del records[at]
    elif how == "repeat":
        records.insert(at, records[at])
    elif how == "shuffle":
        records = data.draw(st.permutations(records))
    elif how == "mix":
        records.insert(at, LINES[data.draw(st.sampled_from(sorted(LINES)))](seed)[0])
    lines = [json.dumps(record) for record in records]
    if how == "text":
        lines[at] = data.draw(st.text(max_size=40).filter(lambda t: t.isprintable()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        outcome(path, kind.split()[0], Path(folder))


@pytest.mark.parametrize("kind", sorted(LINES))
@from_disk
@given(seed=st.integers(0, 2), cut=st.floats(0, 1), raw=st.binary(max_size=12))
def test_cut_and_overwritten_text(kind: str, seed: int, cut: float, raw: bytes) -> None:
    whole = "\n".join(json.dumps(record) for record in LINES[kind](seed)).encode()
    at = int(cut * len(whole))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.jsonl"
        for content in (whole[:at], whole[:at] + raw + whole[at + len(raw) :]):
            path.write_bytes(content)
            outcome(path, kind.split()[0], Path(folder))
            (Path(folder) / "out.npz").unlink(missing_ok=True)


CSV = "request,position,layer,experts,weights,phase\n" + "".join(
    f"{t // 3},{t % 3},{n},{' '.join(map(str, row))},0.5 0.25,decode\n"
    for t, layers in enumerate(routing(1).tolist())
    for n, row in enumerate(layers)
)


@from_disk
@given(
    at=st.integers(0, len(CSV) - 1),
    text=st.text(
        alphabet=st.characters(min_codepoint=9, max_codepoint=0x2FF, exclude_categories=["Cs"]),
        max_size=8,
    ),
)
def test_damaged_csv(at: int, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.csv"
        path.write_text(CSV[:at] + text + CSV[at + len(text) :], encoding="utf-8")
        outcome(path, "table", Path(folder))


def binary_dumps(folder: Path) -> dict[str, Path]:
    """One whole dump of each binary format."""
    out: dict[str, Path] = {}
    ids = routing(3)
    np.save(folder / "r.npy", ids.astype(np.int16))
    out["vllm"] = folder / "r.npy"
    np.savez(folder / "r.npz", expert_ids=ids, request_ids=np.zeros(6, np.int32))
    out["npz"] = folder / "r.npz"
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (folder / "iter_1").mkdir()
        for layer in (2, 3):
            pq.write_table(
                pa.table(
                    {
                        "indices": ids[:, layer - 2].astype(np.int16).tolist(),
                        "scores": np.full((6, 2), 0.5).tolist(),
                    }
                ),
                folder / "iter_1" / f"layer_0{layer}.parquet",
            )
        out["flame-moe"] = folder / "iter_1" / "layer_02.parquet"
    except ImportError:
        pass
    try:
        import torch

        count = torch.randint(1, 9, (2, 2, 4), dtype=torch.int32)
        torch.save({"rank": 0, "logical_count": count}, folder / "r.pt")
        out["sglang-recorder"] = folder / "r.pt"
        torch.save([torch.tensor(ids[:, n]) for n in range(2)], folder / "m.pt")
        out["megatron"] = folder / "m.pt"
    except ImportError:
        pass
    return out


@from_disk
@given(
    name=st.sampled_from(["vllm", "npz", "flame-moe", "sglang-recorder", "megatron"]),
    cut=st.floats(0, 1),
    raw=st.binary(min_size=1, max_size=16),
    truncate=st.booleans(),
)
def test_damaged_binaries(name: str, cut: float, raw: bytes, truncate: bool) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        path = binary_dumps(folder).get(name)
        if path is None:
            return
        whole = path.read_bytes()
        at = int(cut * len(whole))
        path.write_bytes(whole[:at] if truncate else whole[:at] + raw + whole[at + len(raw) :])
        outcome(path.parent if name == "flame-moe" else path, name, folder)


@from_disk
@given(cut=st.floats(0, 1), raw=st.binary(max_size=16), rank=st.integers(0, 1))
def test_damaged_expert_statistic(cut: float, raw: bytes, rank: int) -> None:
    from moesim.safetensors_file import TensorInfo, write_header

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text) / "stat"
        folder.mkdir()
        meta = '{"num_experts": 4, "num_experts_per_token": 2}'
        (folder / "meta_info.json").write_text(meta)
        for number in range(2):
            with (folder / f"rank{number}.safetensors").open("wb") as out:
                names = [f"{step}_{layer}" for step in (0, 1) for layer in (1, 2)]
                write_header(out, {n: TensorInfo("I64", (4,), 0, 32) for n in names}, {})
                out.write(np.arange(16, dtype=np.int64).tobytes())
        path = folder / f"rank{rank}.safetensors"
        whole = path.read_bytes()
        at = int(cut * len(whole))
        path.write_bytes(whole[:at] + raw + whole[at + 2 * len(raw) :])
        outcome(folder, "tensorrt-llm", folder)


def test_a_huge_claim_does_not_take_memory(tmp_path: Path) -> None:
    """Headers that promise terabytes are refused by comparing with the bytes that are there."""
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000, 1000, 8), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path = tmp_path / "huge.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(MoesimError, match="shorter than its shape"):
        import_files([path], ImportOptions(), "vllm")
    stat = tmp_path / "stat"
    stat.mkdir()
    (stat / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    (stat / "rank0.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(MoesimError, match="no safetensors header"):
        import_files([stat], ImportOptions(), "tensorrt-llm")


def test_more_choices_than_experts_are_refused(tmp_path: Path) -> None:
    """Tables of 10 experts per token and counts with a top-k of 10, of 8 experts."""
    table = [{"request": 0, "position": 0, "layer": 0, "experts": [*range(8), -1, -1]}]
    counts = {"logical_count": [[[1, 2, 3, 4, 5, 6, 7, 8]]]}
    for name, text, of in (
        ("t.jsonl", "\n".join(map(json.dumps, table)), "table"),
        ("c.json", json.dumps(counts), "sglang-recorder"),
    ):
        (tmp_path / name).write_text(text)
        options = ImportOptions(num_experts=8, top_k=10)
        with pytest.raises(MoesimError, match="10 experts per token, but there are 8"):
            import_files([tmp_path / name], options, of)
