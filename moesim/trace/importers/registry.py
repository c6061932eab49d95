"""The importers by name, and which of them a file is for."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

from moesim.errors import FormatError, InputError
from moesim.known_text import known_text
from moesim.plugins import Registry
from moesim.trace.importers.base import DAMAGED, Importer
from moesim.trace.importers.records import JSON_SUFFIXES, iter_records, read_npy_file

IMPORTERS = Registry(
    "trace format",
    "moesim.importers",
    {
        "vllm": "moesim.trace.importers.vllm",
        "vllm-eplb-stats": "moesim.trace.importers.eplb_stats",
        "sglang": "moesim.trace.importers.sglang",
        "sglang-recorder": "moesim.trace.importers.sglang_recorder",
        "tensorrt-llm": "moesim.trace.importers.trtllm",
        "megatron": "moesim.trace.importers.megatron",
        "flame-moe": "moesim.trace.importers.flame",
        "table": "moesim.trace.importers.table",
        "npz": "moesim.trace.importers.arrays",
    },
)
"""In the order in which `detect_format` asks."""


def importer(name: str) -> Importer:
    """The importer called `name`. Raises UnknownNameError with the nearest name."""
    return cast(Importer, IMPORTERS.get(name))


def detect_format(paths: Sequence[Path], columns: Collection[str] = ()) -> str:
    """The one format that all `paths` look like. With a column map, which is for plain tables and
    archives alone, the suffix decides between the two.

    Raises InputError when a path is missing, none or several formats match, or they differ, and
    FormatError when none matches because the file is damaged.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}", "check the path")
        if columns:
            names = ["npz" if path.suffix == ".npz" else "table"]
        else:
            names = [name for name in IMPORTERS.names() if importer(name).detect(path)]
        if not names:
            _explain(path)
        if len(names) != 1:
            what = f"looks like {' and '.join(names)}" if names else "is of no known format"
            raise InputError(
                f"{path}: {what}", f"name the format with --from: {', '.join(IMPORTERS.names())}"
            )
        found[names[0]] = path
    if len(found) > 1:
        shown = ", ".join(f"{path.name} is {name}" for name, path in found.items())
        raise InputError(f"the files are of different formats: {shown}", "import each apart")
    if not found:
        raise InputError("no files were named", "name the files to import")
    return next(iter(found))


def _explain(path: Path) -> None:
    """Raise the FormatError of a file that is damaged, empty or unsafe, whatever its format."""
    if path.is_dir():
        if any(path.glob("rank*.safetensors")):
            raise FormatError(
                f"{path}: has rank*.safetensors, but no meta_info.json, which rank 0 writes",
                DAMAGED,
            )
        return
    if not path.stat().st_size:
        raise FormatError(f"{path}: is empty", DAMAGED)
    if path.suffix == ".pt":
        from moesim.trace.importers.torch_file import load_pt

        load_pt(path)
    elif path.suffix == ".npy":
        read_npy_file(path)
    elif path.suffix == ".npz":
        try:
            zipfile.ZipFile(path).close()
        except (OSError, zipfile.BadZipFile) as error:
            raise FormatError(f"{path}: not a readable .npz file ({error})", DAMAGED) from None
    elif path.suffix in JSON_SUFFIXES:
        record = next((record for _, record in iter_records(path)), None)
        if isinstance(record, dict) and "physical_to_logical_map" in record:
            raise FormatError(
                f"{path}: is a placement, not a trace", "read it with moesim import-plan"
            )
    else:
        _point_elsewhere(path)


def _point_elsewhere(path: Path) -> None:
    """Raise the FormatError of text that is no trace but something else that we know."""
    try:
        with path.open(encoding="utf-8") as text:
            found = known_text(text.read(1 << 14))
    except (OSError, UnicodeDecodeError):
        return
    if found is not None:
        what, remedy = found
        raise FormatError(f"{path}: is {what}, not a trace", remedy)
