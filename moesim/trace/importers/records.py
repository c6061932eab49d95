"""JSON and JSONL read record by record, with the place of each for errors; arrays inside text."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import read_npy
from moesim.trace.importers.base import DAMAGED
from moesim.types import Array

MAX_JSON_BYTES = 1 << 32
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def iter_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) for each line of a JSONL file, or each item of a JSON list, or its object.

    Raises InputError when the file cannot be read, FormatError (names the line) when it is not
    JSON. Blank lines are skipped.
    """
    if path.suffix != ".json":
        for number, line in iter_lines(path):
            yield f"{path}: line {number}", parse_json(line, f"{path}: line {number}")
        return
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes", "use one record a line")
    whole = parse_json("".join(line for _, line in iter_lines(path)), str(path))
    if not isinstance(whole, list):
        yield str(path), whole
        return
    for index, record in enumerate(whole):
        yield f"{path}: record {index}", record


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) for the lines of a UTF-8 text file that are not blank."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text", DAMAGED) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None


def first_record(path: Path) -> Any:
    """The first record of a JSON or JSONL file, or None when there is none that can be read.

    A `.json` file is read whole if it is under 64 MB, otherwise not at all.
    """
    try:
        if path.suffix == ".json" and path.stat().st_size > 1 << 26:
            return None
        return next((record for _, record in iter_records(path)), None)
    except (FormatError, InputError, OSError):
        return None


def parse_json(text: str, where: str) -> Any:
    """`json.loads` with the library's errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise FormatError(f"{where}: not JSON ({reason:.120})", DAMAGED) from None


def decode_base64(text: str, where: str) -> bytes:
    """The bytes behind base64 text; FormatError when it is not that."""
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: not base64 ({error})", DAMAGED) from None


def npy_from_bytes(data: bytes, where: str) -> Array:
    """The array in the bytes of a `.npy` file; FormatError when there is none. No pickle."""
    return read_npy(io.BytesIO(data), len(data), where)


def read_npy_file(path: Path) -> Array:
    """The array in a `.npy` file. Raises InputError or FormatError. No pickle."""
    try:
        return npy_from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None


def nested_ids(value: Any, where: str) -> Array:
    """Nested JSON lists of whole numbers as an int32 array; FormatError when ragged or not ids."""
    try:
        array = np.array(value)
    except ValueError:
        raise FormatError(f"{where}: rows of different lengths", DAMAGED) from None
    if array.dtype.kind not in "iu" or (
        array.size and (array.min() < -(1 << 31) or array.max() >= 1 << 31)
    ):
        raise FormatError(f"{where}: not nested lists of whole numbers below 2^31", DAMAGED)
    return array.astype(np.int32)


def count_of(record: dict[str, Any], name: str, where: str) -> int | None:
    """A count in a record: None when absent, FormatError when not a whole number of at least 0."""
    value = record.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise FormatError(f"{where}: {name} must be a whole number", DAMAGED)
    return value


def id_list(value: Any, where: str) -> Array | None:
    """A list of token ids as int64, None when absent; FormatError otherwise."""
    if value is None:
        return None
    if not isinstance(value, list) or any(type(x) is not int for x in value):
        raise FormatError(f"{where}: must be a list of token ids", DAMAGED)
    if any(not 0 <= x < 1 << 31 for x in value):
        raise FormatError(f"{where}: token ids out of range", DAMAGED)
    return np.array(value, np.int64)
