"""Wrong files made from whole ones: values, keys, lines, arrays, headers and bytes.

Every choice comes from the generator that is passed in, so that a seed names an input.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from tokenize import TokenError
from typing import Any

import numpy as np
import yaml

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    -float("inf"), 1 << 31, 1 << 63, (1 << 64) + 1, -(1 << 40), 10**400, "", " ", "0", "x", "nan",
    "1e999", "\x1b[31mred\x07", "a\nerror: forged", "\ud800", "\u0661\u0662", "1_0", "/etc/passwd",
    "../../x", "x" * 5000, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": {}},
)  # fmt: skip
KEPT = frozenset(("--out", "--from-raw", "--measured", "--device", "--time-limit", "--steps"))
"""Options without which a command would write elsewhere, take long, or measure this machine."""
OPTION_VALUES = (
    "", "0", "-1", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e999", "x", "1_0", "\u0661",
    "auto", "none", "1,2", "a=b", "0-1", "\x1b[31m", "99999999999999999999",
)  # fmt: skip


def mutate(source: Path, target: Path, rng: Random) -> None:
    """Write a damaged copy of a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target)
        inner = rng.choice(sorted(p for p in target.rglob("*") if p.is_file()))
        if rng.random() < 0.1:
            inner.unlink()
        else:
            inner.write_bytes(_damaged(inner.name, inner.read_bytes(), rng))
        return
    target.write_bytes(_damaged(source.name, source.read_bytes(), rng))


def mutate_options(args: list[str], names: list[str], rng: Random) -> list[str]:
    """One option changed, repeated, left out, or another of the command's added."""
    places = [i for i, a in enumerate(args[:-1]) if a.startswith("--") and a not in KEPT]
    kind = rng.randrange(4)
    if kind == 0 and places:
        args[rng.choice(places) + 1] = rng.choice(OPTION_VALUES)
    elif kind == 1 and places:
        at = rng.choice(places)
        del args[at : at + 2]
    elif names:
        args += [rng.choice(names), rng.choice(OPTION_VALUES)]
    return args


def _damaged(name: str, data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.12 or not data:
        return _bytes(data, rng)
    for known, damage in _BINARY:
        if known(name, data):
            return damage(data, rng)
    text = data.decode("utf-8", "replace")
    for read, write in _TREES:
        try:
            tree = read(text)
        except (ValueError, yaml.YAMLError):
            continue
        if isinstance(tree, (dict, list)) and tree:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                tree = _tree(tree, rng)
            try:
                return write(tree).encode("utf-8", "surrogatepass")
            except (ValueError, yaml.YAMLError, RecursionError):
                return _bytes(data, rng)
    return _lines(text, rng).encode("utf-8", "surrogatepass")


_TREES: tuple[tuple[Callable[[str], Any], Callable[[Any], str]], ...] = (
    (json.loads, json.dumps),
    (yaml.safe_load, lambda tree: yaml.safe_dump(tree, allow_unicode=True)),
)


def _tree(tree: Any, rng: Random) -> Any:
    """A copy with one node replaced, dropped, repeated, renamed, nested, or swapped."""
    root = {"": copy.deepcopy(tree)}
    spots: list[tuple[Any, Any]] = []

    def walk(parent: Any, depth: int) -> None:
        items = parent.items() if isinstance(parent, dict) else enumerate(parent)
        for key, value in items:
            spots.append((parent, key))
            if isinstance(value, (dict, list)) and depth < 30:
                walk(value, depth + 1)

    if isinstance(tree, (dict, list)):
        walk(root[""], 0)
    if not spots:
        return rng.choice(ODD)
    # Half of the time near the top, where structure is; else anywhere, mostly among numbers.
    parent, key = rng.choice(spots[:40] if rng.random() < 0.5 else spots)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif kind == 1:
        parent[f"{key}{rng.choice(('_x', '_size', ' '))}"] = parent.pop(key)
    elif kind == 2:
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    elif kind == 3 and isinstance(parent[key], (int, float)):
        parent[key] = parent[key] * rng.choice((-1, 0, 2, 1000)) + rng.choice((0, 0, 1, 0.5))
    elif kind == 4:
        other, place = rng.choice(spots)
        other[place] = copy.deepcopy(parent[key])
    elif kind == 5 and isinstance(parent[key], str):
        parent[key] = parent[key] + rng.choice(("\x1b]0;x\x07", "\x00", "\u202e", " ", "0"))
    else:
        parent[key] = rng.choice(ODD)
    return root[""]


def _lines(text: str, rng: Random) -> str:
    rows = text.split("\n")
    at = rng.randrange(len(rows))
    kind = rng.randrange(6)
    if kind == 0:
        del rows[at]
    elif kind == 1:
        rows.insert(rng.randrange(len(rows) + 1), rows[at])
    elif kind == 2:
        rows[at] = rows[at][: rng.randrange(len(rows[at]) + 1)]
    else:
        try:
            rows[at] = json.dumps(_tree(json.loads(rows[at]), rng))
        except (ValueError, TypeError, RecursionError):
            cells = rows[at].split(",")
            odd = rng.choice(ODD)
            cells[rng.randrange(len(cells))] = odd if isinstance(odd, str) else repr(odd)[:400]
            rows[at] = ",".join(cells)
    return "\n".join(rows)


def _bytes(data: bytes, rng: Random) -> bytes:
    raw = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw) + 1)])
    if kind == 1:
        at = rng.randrange(len(raw) + 1)
        raw[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"\x80\x04."))
        return bytes(raw)
    for _ in range(rng.choice((1, 2, 8))):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def _npz(data: bytes, rng: Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        return _bytes(data, rng)
    name = rng.choice(sorted(members))
    kind = rng.randrange(8)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = members[rng.choice(sorted(members))]
    elif name == "meta.npy":
        text = str(np.load(io.BytesIO(members[name]), allow_pickle=False))
        members[name] = _saved(np.array(json.dumps(_tree(json.loads(text), rng))))
    else:
        members[name] = _npy(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def _npy(data: bytes, rng: Random) -> bytes:
    kind = rng.randrange(7)
    if kind == 0:
        return _bytes(data[:128], rng) + data[128:]
    if kind == 1:
        end = data.index(b"\n")
        digits = [i for i in range(10, end) if data[i : i + 1].isdigit()]
        raw = bytearray(data)
        if digits:
            raw[rng.choice(digits)] = rng.choice(b"0123456789-, ")
        return bytes(raw)
    try:
        array = np.array(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError):
        return _bytes(data, rng)
    if kind == 2:
        types = ("i1", "u1", "<i2", ">i2", "<i4", "<i8", "<u8", "<f2", "<f8", "?", "<c8", "<U3")
        with np.errstate(all="ignore"):
            return _saved(array.astype(rng.choice(types)))
    if kind == 3 and array.ndim:
        return _saved(array[: rng.randrange(len(array) + 1)])
    if kind == 4:
        shapes = (array.ravel(), array[None], array[..., None], array.T, array[..., :0])
        return _saved(np.ascontiguousarray(rng.choice(shapes)) if array.ndim else array[None])
    if array.size and array.dtype.kind in "iuf":
        flat = array.reshape(-1)
        odd = (0, 1, 7, 8, 127, 255, -1, 32767, 2**31 - 1, float("nan"), float("inf"), 1e30)
        with np.errstate(all="ignore"):
            for _ in range(rng.choice((1, 3, 20))):
                value = np.array(rng.choice(odd)).astype(array.dtype)
                flat[rng.randrange(flat.size)] = value
    return _saved(array)


def _saved(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _safetensors(data: bytes, rng: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return data[: 8 + size] + _bytes(data[8 + size :], rng)
    header = json.dumps(_tree(json.loads(data[8 : 8 + size]), rng)).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _torch(data: bytes, rng: Random) -> bytes:
    """Tensors are leaves: replaced, dropped, or changed as arrays are."""
    import torch

    content: Any = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.4:
        content = _changed_tensor(content, rng)
    else:
        content = _tree(content, rng)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _changed_tensor(node: Any, rng: Random) -> Any:
    """A copy of the tree with one tensor, found at random, changed as an array is."""
    import torch

    if isinstance(node, torch.Tensor):
        try:
            array = np.load(io.BytesIO(_npy(_saved(node.numpy()), rng)), allow_pickle=False)
            return torch.from_numpy(np.ascontiguousarray(array))
        except (ValueError, TypeError, EOFError, OSError, TokenError):
            return torch.zeros(0)
    if isinstance(node, (dict, list)) and node:
        found = dict(node) if isinstance(node, dict) else list(node)
        key: Any = rng.choice(list(found) if isinstance(found, dict) else range(len(found)))
        found[key] = _changed_tensor(found[key], rng)
        return found
    return rng.choice(ODD)


def _parquet(data: bytes, rng: Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pq.read_table(io.BytesIO(data)).to_pydict()
    name = rng.choice(sorted(columns))
    rows = columns[name]
    kind = rng.randrange(4)
    if kind == 0:
        columns[f"{name}_x"] = columns.pop(name)
    elif kind == 1:
        columns = {key: values[: len(rows) // 2] for key, values in columns.items()}
    else:
        rows[rng.randrange(len(rows))] = rng.choice((None, [], [1], [-1, 9], [None, 1], [70000, 1]))
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _words(data: bytes, rng: Random) -> bytes:
    """GGUF: a number or a name in the header, which is the first 2 kB, changed in place."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(4, min(2048, len(raw)))
        size = rng.choice((1, 4, 8))
        odd = rng.choice((0, 1, 2, 9, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1))
        raw[at : at + size] = (odd % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(raw)


_BINARY: tuple[tuple[Callable[[str, bytes], bool], Callable[[bytes, Random], bytes]], ...] = (
    (lambda name, data: name.endswith(".pt"), _torch),
    (lambda name, data: data[:2] == b"PK", _npz),
    (lambda name, data: data[:6] == b"\x93NUMPY", _npy),
    (lambda name, data: name.endswith(".safetensors"), _safetensors),
    (lambda name, data: data[:4] == b"PAR1", _parquet),
    (lambda name, data: data[:4] == b"GGUF", _words),
)
