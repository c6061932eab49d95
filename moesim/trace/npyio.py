"""Reading single .npy files and streams that may be damaged or hostile. No pickle is loaded."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesim.errors import FormatError
from moesim.types import Array

MAX_MEMBER_BYTES = 1 << 38
REMEDY = "check how the trace was written; docs/trace-format.md describes the format"
_MAX_DIMENSIONS = 16


def memory_bytes() -> int:
    """The machine's memory, or MAX_MEMBER_BYTES where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return MAX_MEMBER_BYTES


def read_npy(member: Any, num_bytes: int, where: str) -> Array:
    """Read one .npy stream after checking its header against the bytes that are really there."""
    shape, fortran, dtype = _read_header(member, where)
    size = math.prod(shape) * dtype.itemsize
    if size > num_bytes:
        raise FormatError(f"{where}: shorter than its shape {shape} demands", REMEDY)
    data = member.read(size)
    if len(data) != size:
        raise FormatError(f"{where}: truncated", REMEDY)
    flat = np.frombuffer(data, dtype=dtype) if size else np.zeros(0, dtype)
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
