"""Reading and writing `.safetensors` files with numpy alone, tensor data as bytes.

The format is eight bytes of header length (little endian), a JSON header that gives type, shape
and byte range of each tensor, and the data. Types that numpy does not have (bfloat16, fp8) stay
bytes, which is enough to count, rename and reorder. Source: huggingface/safetensors, README,
"Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError

MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 1 << 24
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_INTEGERS = {
    "U8": "<u1", "I8": "<i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
}  # fmt: skip
_REMEDY = "check that the file is whole and that safetensors wrote it"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes are: `start` and `stop` from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The header of one file; `tensors` in file order, `metadata` free text by name."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces of bounded size."""
        info = self.tensors[name]
        with self.path.open("rb") as file:
            yield from _range(file, info.start, info.stop, self.path)

    def rows(self, name: str, order: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """The bytes of a tensor with its first axis reordered: new row j is old row order[j]."""
        info = self.tensors[name]
        stride = info.num_bytes // len(order)
        with self.path.open("rb") as file:
            for row in order:
                start = info.start + int(row) * stride
                yield from _range(file, start, start + stride, self.path)

    def integers(self, name: str) -> npt.NDArray[np.int64]:
        """An integer tensor as int64. Raises FormatError when it is of another type."""
        info = self.tensors[name]
        if info.dtype not in _INTEGERS:
            raise FormatError(
                f"{self.path}: tensor {name:.80} has type {info.dtype}, wanted whole numbers",
                _REMEDY,
            )
        flat = np.frombuffer(b"".join(self.chunks(name)), _INTEGERS[info.dtype])
        return flat.reshape(info.shape).astype(np.int64)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and check the header.

    Raises InputError when the file cannot be read, FormatError (names the tensor) when damaged.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise FormatError(f"{file}: no safetensors header", _REMEDY)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{file}: the safetensors header is not JSON", _REMEDY) from None
    if not isinstance(header, dict):
        raise FormatError(f"{file}: the safetensors header is no object", _REMEDY)
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    tensors = {name: _info(file, name, raw, base, size) for name, raw in header.items()}
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise FormatError(f"{file}: tensor {name:.80} overlaps another", _REMEDY)
        end = info.stop
    text = metadata if isinstance(metadata, dict) else {}
    return SafetensorsFile(file, tensors, {str(k): str(v) for k, v in text.items()})


def write_header(
    out: BinaryIO, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> None:
    """Write the header for tensors whose data follow in the order of `tensors`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _info(file: Path, name: str, raw: Any, base: int, size: int) -> TensorInfo:
    where = f"{file}: tensor {name:.80}"
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: no object in the header", _REMEDY)
    dtype = raw.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise FormatError(f"{where}: unknown type {dtype!r:.20}", _REMEDY)
    shape = _sizes(raw.get("shape"), f"{where}: shape")
    offsets = _sizes(raw.get("data_offsets"), f"{where}: data_offsets")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - base:
        raise FormatError(f"{where}: data_offsets go beyond the file (truncated?)", _REMEDY)
    bits = ITEM_BITS[dtype]
    for length in shape:
        bits *= length
    if bits != 8 * (offsets[1] - offsets[0]):
        raise FormatError(f"{where}: shape {shape} does not fit its bytes", _REMEDY)
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or any(type(x) is not int or x < 0 for x in value):
        raise FormatError(f"{where} must be whole numbers", _REMEDY)
    return value


def _range(file: BinaryIO, start: int, stop: int, path: Path) -> Iterator[bytes]:
    file.seek(start)
    while start < stop:
        data = file.read(min(CHUNK_BYTES, stop - start))
        if not data:
            raise FormatError(f"{path}: truncated", _REMEDY)
        start += len(data)
        yield data
