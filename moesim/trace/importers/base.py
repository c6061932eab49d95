"""What every importer is given and gives back.

An importer is a module with `NAME`, `TITLE`, `detect` and `read` (the `Importer` protocol below);
`registry.py` lists them. Importers never execute what they read: JSON, CSV, parquet, safetensors
and `.npy` without pickle, and `.pt` only through `torch_file.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import DECODE, PREFILL, LoadTrace, Trace
from moesim.types import Array


def _silent(_: str) -> None:
    """The default of `ImportOptions.notify`."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user knows and the files may not say.

    model:             written into the trace; free text.
    num_experts:       routed experts per MoE layer; else the largest id seen plus one.
    top_k:             experts per token; needed where a file is a flat list of ids or counts.
    num_hidden_layers: all layers of the model, dense ones included.
    layer_ids:         absolute numbers of the MoE layers.
    columns:           for plain tables: our name -> the name in the file.
    phase:             the phase of tokens whose source does not say.
    domain:            names the domain of every token read.
    short_records:     whether the rows of a record with too few are the request's first or last.
    zero_experts:      experts without computation that follow the routed ones in numbering
                       (LongCat-Flash): choices of them become no choice.
    num_mtp_layers:    multi-token-prediction layers that follow the model's own, None if unknown.
    max_tokens:        stop after this many tokens (steps, for counts).
    notify:            called with one line for everything that was assumed or left out.
    """

    model: str = ""
    num_experts: int | None = None
    top_k: int | None = None
    num_hidden_layers: int | None = None
    layer_ids: tuple[int, ...] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    phase: Literal["prefill", "decode"] = "prefill"
    short_records: Literal["first", "last"] = "first"
    zero_experts: int = 0
    num_mtp_layers: int | None = None
    domain: str = ""
    license: str = ""
    max_tokens: int | None = None
    notify: Callable[[str], None] = _silent


class Importer(Protocol):
    """One source of traces.

    `detect` says whether `path` looks like this source, reading as little as it can and raising
    nothing. `read` merges `paths` in the order given into one trace (or one load trace, for
    sources that only count) and raises InputError or FormatError that names the file, the record
    in it, and the field.
    """

    NAME: str
    TITLE: str

    def detect(self, path: Path) -> bool: ...

    def read(self, paths: Sequence[Path], options: ImportOptions) -> Trace | LoadTrace: ...


def bad_field(where: str, field_name: str, want: str, remedy: str = "") -> FormatError:
    """The error for a field that is missing or not what the source's format says it is."""
    return FormatError(f"{where}: {field_name} must be {want}", remedy or DAMAGED)


def require_top_k(options: ImportOptions, why: str) -> int:
    """`options.top_k`, or the InputError that asks for it."""
    if options.top_k is None:
        raise InputError(
            f"the number of experts per token is not known: {why}",
            "give `top_k`, or `model` with a preset or config.json",
        )
    return options.top_k


def unknown_phases(num_tokens: int, options: ImportOptions) -> Array:
    """[num_tokens] uint8 of the phase that the options name, for sources that do not say."""
    return np.full(num_tokens, DECODE if options.phase == "decode" else PREFILL, np.uint8)


DAMAGED = "check that the file is whole and from the engine and version that docs/engines.md names"
