"""A `.pt` file of one integer tensor, which torch.load (weights_only) reads, written without torch.

KTransformers' frequency strategy takes {"logical_count": [1, num_hidden_layers, num_experts]} from
`--init-expert-location` (kvcache-ai/sglang, kt_ep_wrapper.py), as SGLang's recorder writes it.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np

from moesim.types import IntArray

KEY = "logical_count"
_WHEN = (1980, 1, 1, 0, 0, 0)


def torch_counts(counts: IntArray) -> bytes:
    """The file for [num_hidden_layers, num_experts] counts. The same counts give the same bytes."""
    values = np.ascontiguousarray(counts[None], "<i8")
    strides = tuple(stride // 8 for stride in values.strides)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (
            ("data.pkl", _pickled(values.shape, strides)),
            ("byteorder", b"little"),
            ("data/0", values.tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _WHEN), data)
    return out.getvalue()


def _pickled(shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """{KEY: torch._utils._rebuild_tensor_v2(storage 0, offset 0, shape, strides, no gradient)}."""
    storage = _tuple(
        _text("storage"),
        _global("torch", "LongStorage"),
        _text("0"),
        _text("cpu"),
        _int(int(np.prod(shape))),
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    tensor = _global("torch._utils", "_rebuild_tensor_v2") + _tuple(
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    body = pickle.EMPTY_DICT + _text(KEY) + tensor + pickle.REDUCE + pickle.SETITEM
    return pickle.PROTO + b"\x02" + body + pickle.STOP


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    raw = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
