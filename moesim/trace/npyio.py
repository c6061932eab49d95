"""Reading single .npy files and streams that may be damaged or hostile. No pickle is loaded."""

from __future__ import annotations

import lzma
import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesim.errors import FormatError
from moesim.types import Array

Members = dict[str, Array]
MAX_MEMBER_BYTES = 1 << 38
MAX_META_BYTES = 1 << 28
CHUNK_TOKENS = 65_536
REMEDY = "check how the trace was written; docs/trace-format.md describes the format"
_MAX_DIMENSIONS = 16
_READ_BYTES = 1 << 24
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def iter_chunks(num_tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Slices that cover `num_tokens` tokens, so that a pass over a memory map stays bounded."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def memory_bytes() -> int:
    """Memory that this process may have: the machine's or its container's, whichever is less;
    MAX_MEMBER_BYTES where it cannot be told."""
    try:
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        own = MAX_MEMBER_BYTES
    for limit in _CONTAINER_LIMITS:
        try:
            own = min(own, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return own


def read_archive(
    path: Path,
    names: Collection[str] | None = None,
    check: Callable[[Members], None] = lambda announced: None,
) -> Members:
    """The arrays of an `.npz` file that are in `names`; all where None.

    Nothing large is unpacked before the whole file is known to make sense: first every header is
    read, and the text `meta`; then `check` gets arrays of the shapes and types announced, which
    hold nothing (all values are one zero) and take no memory, and raises where they contradict each
    other; then the data are read. Raises FormatError for a file that is damaged, or that announces
    more than half of the memory there is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {
                name: info
                for info in archive.infolist()
                for name in (info.filename.removesuffix(".npy"),)
                if names is None or name in names
            }
            announced: Members = {}
            for name, info in infos.items():
                where = f"{path}: array {name}"
                with archive.open(info) as member:
                    shape, _, dtype = _read_header(member, where)
                size = math.prod(shape) * dtype.itemsize
                if size > info.file_size:
                    raise FormatError(f"{where}: shorter than its shape {shape} demands", REMEDY)
                announced[name] = np.broadcast_to(np.zeros((), dtype), shape)
            _check_room(path, announced)
            if "meta" in infos:
                announced["meta"] = _read_member(archive, path, "meta", infos["meta"])
            check(announced)
            return {
                name: announced[name] if name == "meta" else _read_member(archive, path, name, info)
                for name, info in infos.items()
            }
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise FormatError(f"{path}: not a readable .npz file ({error})", REMEDY) from None
    except (zlib.error, lzma.LZMAError) as error:
        raise FormatError(f"{path}: damaged .npz file ({error})", REMEDY) from None


def _check_room(path: Path, announced: Members) -> None:
    room = min(MAX_MEMBER_BYTES, memory_bytes() // 2)
    size = sum(array.size * array.itemsize for array in announced.values())
    meta = announced.get("meta")
    if meta is not None and meta.size * meta.itemsize > MAX_META_BYTES:
        raise FormatError(f"{path}: meta claims more than {MAX_META_BYTES >> 20} MiB", REMEDY)
    if size > room:
        raise FormatError(
            f"{path}: its arrays claim {size} bytes, more than half of the memory here",
            "use the directory form for traces larger than memory",
        )


def _read_member(archive: zipfile.ZipFile, path: Path, name: str, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        return read_npy(member, info.file_size, f"{path}: array {name}")


def read_npy(member: Any, num_bytes: int, where: str) -> Array:
    """Read one .npy stream after checking its header against the bytes that are really there."""
    shape, fortran, dtype = _read_header(member, where)
    size = math.prod(shape) * dtype.itemsize
    if size > num_bytes:
        raise FormatError(f"{where}: shorter than its shape {shape} demands", REMEDY)
    data = np.empty(size, np.uint8)
    room = memoryview(data.data)
    while len(room):
        count = member.readinto(room[:_READ_BYTES])
        if not count:
            raise FormatError(f"{where}: truncated", REMEDY)
        room = room[count:]
    flat = data.view(dtype) if size else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: Any, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type that a .npy header announces, with nothing in them that could hurt."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    except Exception as error:  # numpy's parser lets several kinds through
        raise FormatError(f"{where}: bad header ({error})", REMEDY) from None
    if dtype.hasobject:
        raise FormatError(f"{where}: holds pickled objects, which are never loaded", REMEDY)
    if min(shape, default=0) < 0 or len(shape) > _MAX_DIMENSIONS or dtype.itemsize == 0:
        raise FormatError(f"{where}: bad header (shape {shape}, type {dtype})", REMEDY)
    return tuple(int(n) for n in shape), fortran, dtype


def map_npy(file: Path) -> Array:
    """Memory-map one .npy file after checking its header against its size."""
    try:
        with file.open("rb") as stream:
            shape, fortran, dtype = _read_header(stream, str(file))
            start = stream.tell()
            count = math.prod(shape)
            if start + count * dtype.itemsize > os.fstat(stream.fileno()).st_size:
                raise FormatError(f"{file}: shorter than its shape {shape} demands", REMEDY)
            if count == 0:
                return np.zeros(shape, dtype)
            order: Literal["C", "F"] = "F" if fortran else "C"
            return np.memmap(stream, dtype, "r", start, shape, order)
    except OSError as error:
        raise FormatError(f"{file}: not readable ({error})", REMEDY) from None


def drop_pages(*arrays: Array | None) -> None:
    """Give back the memory of memory-mapped arrays, which are read again when needed.

    A pass over a memory map would otherwise leave all of it resident.
    """
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)
