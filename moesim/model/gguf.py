"""The header of GGUF files: metadata, and every tensor's name, shape, type, offset and size.

Format: ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian. Nothing of the weights is
read. Files in parts (`-00001-of-00003.gguf`) are read together.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError, plain
from moesim.model.ggml import GGML_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 20
MAX_PARTS = 1 << 10
MAX_TEXT_BYTES = 1 << 26
MAX_DIMENSIONS = 4
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_DAMAGED = "fetch the file again; it is damaged or not whole"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `shape` as GGUF has it, the contiguous dimension first; `type` by its name in
    lower case; `num_bytes` without the padding to the next tensor."""

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int

    @property
    def num_weights(self) -> int:
        """Product of the shape."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata (of the first part) and all tensors, in order. Arrays of more than 1,024 values are
    kept as their length. `parts`: the files read."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    parts: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path` and of the other parts of its model.

    Raises InputError where a part cannot be read, FormatError for another format, version or
    tensor type, for tensors beyond the file's end, and for parts that do not belong together.
    """
    found = _PART.fullmatch(path.name)
    if found is not None and int(found[2]) != 1:
        raise InputError(
            f"{path.name} is part {int(found[2])} of a model",
            f"name {found[1]}-00001-of-{found[3]}",
        )
    first = _read_part(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 1 <= count <= MAX_PARTS:
        raise FormatError(f"{path}: split.count is {count!r:.40}", _DAMAGED)
    if found is None and count > 1:
        raise FormatError(
            f"{path}: is the first of {count} parts, but not named so",
            f"name the parts NAME-00001-of-{count:05d}.gguf and on",
        )
    if found is not None and count != int(found[3]):
        raise FormatError(f"{path}: says it has {count} parts, its name {int(found[3])}", _DAMAGED)
    parts, tensors = [path], list(first.tensors)
    for number in range(2, count + 1):
        part = path.with_name(f"{found[1] if found else ''}-{number:05d}-of-{count:05d}.gguf")
        read = _read_part(part)
        if read.metadata.get("split.no") != number - 1:
            raise FormatError(f"{part}: is not part {number} of {count}", _DAMAGED)
        parts.append(part)
        tensors += read.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise FormatError(
            f"{path}: its parts hold {len(tensors)} tensors, not {expected!r:.40}", _DAMAGED
        )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise FormatError(f"{path}: a tensor stands there twice", _DAMAGED)
    return GgufFile(path, first.metadata, tuple(tensors), tuple(parts))


def _read_part(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, path).read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None
    except ValueError:
        raise FormatError(f"{path}: is empty", _DAMAGED) from None


@dataclass(slots=True)
class _Header:
    data: mmap.mmap
    path: Path
    at: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def read(self) -> GgufFile:
        if self._take(4) != MAGIC:
            raise FormatError(f"{self.path}: is no GGUF file", "give a .gguf file")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise FormatError(
                f"{self.path}: GGUF version {version}, read are 2 and 3 (little-endian)",
                "convert the model with a current llama.cpp",
            )
        num_tensors, num_entries = self._count("tensors"), self._count("metadata entries")
        for _ in range(num_entries):
            key = self._text()
            self.metadata[key] = self._value(self._scalar("I"))
        entries = [self._tensor() for _ in range(num_tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20:
            raise FormatError(f"{self.path}: general.alignment is {align!r:.40}", _DAMAGED)
        begin = -(-self.at // align) * align
        for tensor, offset in entries:
            end = begin + offset + tensor.num_bytes
            if offset % align or end > len(self.data):
                raise FormatError(
                    f"{self.path}: ends at {len(self.data):,} bytes, within or before tensor"
                    f" {plain(tensor.name)}, which ends at {end:,}",
                    _DAMAGED,
                )
        return GgufFile(self.path, self.metadata, tuple(t for t, _ in entries), (self.path,))

    def _tensor(self) -> tuple[Tensor, int]:
        name = self._text()
        rank = self._scalar("I")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise FormatError(f"{self.path}: tensor {plain(name)} has {rank} dimensions", _DAMAGED)
        shape = tuple(self._scalar("Q") for _ in range(rank))
        number, offset = self._scalar("I"), self._scalar("Q")
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise FormatError(
                f"{self.path}: tensor {plain(name)} has type {number}, whose size is not known",
                "give a file of another quantisation, or a newer moesim",
            )
        if min(shape) < 1 or max(shape) > 1 << 40 or shape[0] % kind.weights:
            raise FormatError(
                f"{self.path}: tensor {plain(name)} of shape {shape} cannot be of {kind.name}",
                _DAMAGED,
            )
        size = prod(shape) // kind.weights * kind.num_bytes
        return Tensor(name, shape, kind.name, size), offset

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise FormatError(f"{self.path}: a metadata value has type {kind}", _DAMAGED)
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            layout = f"<{count}{_SCALARS[inner]}" if count <= 1024 else ""
            raw = self._take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return list(struct.unpack(layout, raw)) if layout else count
        if inner != _STRING:
            raise FormatError(f"{self.path}: an array in the metadata has type {inner}", _DAMAGED)
        if count > MAX_ENTRIES:
            raise FormatError(f"{self.path}: an array has {count} strings", _DAMAGED)
        texts = [self._text() for _ in range(count)]
        return texts if count <= 1024 else count

    def _count(self, what: str) -> int:
        value = int(self._scalar("Q"))
        if value > MAX_ENTRIES:
            raise FormatError(f"{self.path}: says it has {value} {what}", _DAMAGED)
        return value

    def _text(self) -> str:
        size = self._scalar("Q")
        if size > MAX_TEXT_BYTES:
            raise FormatError(f"{self.path}: a text of {size} bytes", _DAMAGED)
        return self._take(size).decode("utf-8", "replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise FormatError(f"{self.path}: ends within its header", _DAMAGED)
        self.at += size
        return self.data[self.at - size : self.at]
