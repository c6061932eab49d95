"""EPLB's three tensors, for tools that take what `eplb.rebalance_experts` returns.

An `.npz` with `physical_to_logical` [L, P], `logical_to_physical` [L, E, R] (slots of each expert,
-1 beyond its replicas) and `replica_count` [L, E], all int64. Slots of an expert are listed in
ascending order; EPLB's own order of replicas is arbitrary and means nothing.

Source: deepseek-ai/EPLB@d52c72d (eplb.py).
"""

from __future__ import annotations

import io
import shlex
import zipfile
from pathlib import Path

import numpy as np

from moesim.errors import FormatError
from moesim.exporters.base import (
    DAMAGED,
    NOTHING_KNOWN,
    ExportOptions,
    ReadOptions,
    make_plan,
    require_full_slots,
)
from moesim.placement import Plan
from moesim.trace.format import read_npy
from moesim.types import Array

NAME = "eplb"
TITLE = "EPLB tensors: physical_to_logical, logical_to_physical, replica_count (.npz)"
SUFFIX = ".npz"
ACCEPTED_BY = "whatever takes the result of eplb.rebalance_experts (EPLB@d52c72d)"
ARRAYS = ("physical_to_logical", "logical_to_physical", "replica_count")


def encode(plan: Plan, options: ExportOptions) -> bytes:
    """Raises MismatchError for uneven slots. The same plan always gives the same bytes."""
    require_full_slots(plan, "EPLB")
    placement = plan.placement
    tables: tuple[Array, ...] = (
        placement.physical_to_logical,
        placement.logical_to_physical(),
        placement.replica_count,
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, table in zip(ARRAYS, tables, strict=True):
            member = io.BytesIO()
            np.save(member, table.astype(np.int64), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())
    return out.getvalue()


def launch(plan: Plan, path: Path, options: ExportOptions = NOTHING_KNOWN) -> list[str]:
    """How to get the tensors in Python; there is no engine to start."""
    code = (
        f"import numpy, torch; t = {{k: torch.from_numpy(v) for k, v in numpy.load({str(path)!r})"
        ".items()}"
    )
    return [f"python -c {shlex.quote(code)}"]


def decode(data: bytes, options: ReadOptions) -> Plan:
    """`physical_to_logical`, after checking the other two against it where they are there."""
    where = options.where
    raw: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in ARRAYS:
                    with archive.open(info) as member:
                        raw[name] = read_npy(member, info.file_size, f"{where}: {name}")
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{where}: not a readable .npz file ({error!s:.80})", DAMAGED) from None
    table = raw.get(ARRAYS[0])
    if table is None or table.ndim != 2 or 0 in table.shape or table.dtype.kind not in "iu":
        raise FormatError(f"{where}: physical_to_logical must be whole numbers [L, P]", DAMAGED)
    if table.min() < 0 or table.max() >= 1 << 15:
        raise FormatError(f"{where}: physical_to_logical has expert ids out of range", DAMAGED)
    plan = make_plan(table, options, "EPLB")
    count = raw.get("replica_count")
    if count is not None and not np.array_equal(count, plan.placement.replica_count):
        raise FormatError(f"{where}: replica_count does not fit physical_to_logical", DAMAGED)
    inverse = raw.get("logical_to_physical")
    if inverse is not None and not _same_slots(inverse, plan):
        raise FormatError(f"{where}: logical_to_physical does not fit physical_to_logical", DAMAGED)
    return plan


def _same_slots(inverse: Array, plan: Plan) -> bool:
    """Whether both say the same slots for each expert, in whatever order."""
    ours = plan.placement.logical_to_physical()
    if inverse.ndim != 3 or inverse.shape[:2] != ours.shape[:2] or inverse.dtype.kind not in "iu":
        return False
    width = max(inverse.shape[2], ours.shape[2])

    def ordered(table: Array) -> Array:
        padding = ((0, 0), (0, 0), (0, width - table.shape[2]))
        return np.sort(np.pad(table.astype(np.int64), padding, constant_values=-1), axis=2)

    return bool(np.array_equal(ordered(inverse), ordered(ours)))
