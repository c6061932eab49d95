"""Reading what the ranks wrote: JSON, also compressed with gzip."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError

MAX_BYTES = 1 << 28


def read_record(
    path: str | os.PathLike[str], format_name: str, remedy: str, version: int = 1
) -> dict[str, Any]:
    """The record of a file whose `format` and `version` are as given.

    Raises InputError for a file that cannot be read or is larger than 256 MiB, FormatError for one
    that is something else.
    """
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise FormatError(f"{path}: not readable as gzip", remedy) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", remedy) from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB", remedy)
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: not JSON", remedy) from None
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (
        format_name,
        version,
    ):
        raise FormatError(f'{path}: format is not "{format_name}", version {version}', remedy)
    return raw
