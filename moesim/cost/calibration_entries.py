"""Entries of a calibration file as the curves and kernels that they describe."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cost.calibration_schema import (
    CalibrationFile,
    CollectiveEntry,
    CopyEntry,
    ExpertEntry,
    WavesEntry,
)
from moesim.cost.collective import CollectiveCurve
from moesim.cost.copies import CopyModel
from moesim.cost.curves import AffineMin, SizeCurve, SizeTable
from moesim.cost.dense import AttentionKernel, DenseModel, GemmModel, IndexedModule, MlaModule
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.tile_waves import Tile, TileWaves
from moesim.model.names import WEIGHT_BYTES


def _segments(pairs: list[list[float]]) -> AffineMin:
    return AffineMin(tuple((latency, rate) for latency, rate in pairs))


def _span(given: list[float] | None, table: list[list[float]] | None) -> tuple[float, float]:
    if given is not None:
        return given[0], given[1]
    if table is not None:
        sizes = [row[0] for row in table]
        return min(sizes), max(sizes)
    return 0.0, float("inf")


def collective_of(entry: CollectiveEntry) -> CollectiveCurve:
    nvlink: SizeCurve
    if entry.table is not None:
        nvlink = SizeTable.from_rows(entry.table)
    else:
        nvlink = _segments(entry.nvlink or [])
    return CollectiveCurve(
        kind=entry.kind,
        group_size=entry.group_size,
        num_nodes=entry.num_nodes,
        nvlink=nvlink,
        nic=None if entry.nic is None else _segments(entry.nic),
        bytes_range=_span(entry.bytes_range, entry.table),
        nic_bytes_range=_span(entry.nic_bytes_range, None),
        basis=entry.basis,
        source=entry.source,
        num_sms=entry.num_sms,
    )


def expert_of(entry: ExpertEntry) -> ExpertGemmModel:
    if entry.table is not None:
        from moesim.cost.fitting import fit_expert_table

        return fit_expert_table(entry)
    return ExpertGemmModel(
        dtype=entry.dtype,
        kernel=entry.kernel,
        weight_bytes_per_param=entry.weight_bytes_per_param,
        launch_us=entry.launch_us or 0.0,
        weight_gb_per_s=entry.weight_gb_per_s or 0.0,
        tflops=entry.tflops or 0.0,
        half_tokens=entry.half_tokens,
        tile_tokens=entry.tile_tokens,
        sharpness=entry.sharpness,
        waves=None if entry.waves is None else _waves(entry.waves),
        row_gb_per_s=entry.row_gb_per_s,
        token_gb_per_s=entry.token_gb_per_s,
        eager_launch_us=entry.eager_launch_us,
        shape=None if entry.shape is None else (entry.shape[0], entry.shape[1]),
        basis=entry.basis,
        source=entry.source,
        ranges={name: (low, high) for name, (low, high) in entry.ranges.items()},
    )


def _waves(entry: WavesEntry) -> TileWaves:
    tiles = tuple(Tile(t.rows, t.columns, t.mean_tokens, t.empty_adds) for t in entry.tiles)
    return TileWaves(entry.at_once, tiles, entry.wave_share)


def copies_of(entries: Sequence[CopyEntry]) -> dict[str, CopyModel]:
    """By direction: of row moves all fans, of pinned host copies the one by most GPUs at once."""
    out = {}
    for direction in dict.fromkeys(entry.direction for entry in entries if entry.pinned):
        same = [e for e in entries if e.direction == direction and e.pinned]
        if not same[0].is_row_move:
            most = max(e.num_gpus_at_once for e in same)
            same = [e for e in same if e.num_gpus_at_once == most]
        out[str(direction)] = copy_of(same)
    return out


def copy_of(entries: Sequence[CopyEntry]) -> CopyModel:
    """Of entries that differ in their fan the smallest, with the others' curves."""
    first, *others = sorted(entries, key=lambda e: e.fan)
    return CopyModel(
        direction=first.direction,
        curve=_copy_curve(first),
        floor_us=first.floor_us,
        bytes_range=_span(first.bytes_range, first.table),
        fans=tuple((entry.fan, _copy_curve(entry)) for entry in others),
        pinned=first.pinned,
        num_gpus_at_once=first.num_gpus_at_once,
        basis=first.basis,
        source=first.source,
    )


def named_of(direction: str, pinned: bool, num_gpus_at_once: int) -> str:
    return f"{direction} {'pinned' if pinned else 'unpinned'} by {num_gpus_at_once}"


def _copy_curve(entry: CopyEntry) -> SizeCurve:
    if entry.table is not None:
        return SizeTable.from_rows(entry.table)
    return AffineMin(((entry.latency_us or 0.0, entry.gb_per_s or 0.0),))


def dense_of(parsed: CalibrationFile) -> DenseModel:
    skip = {"note", "fit"}
    return DenseModel(
        gemms={
            e.dtype: GemmModel(
                weight_bytes_per_param=WEIGHT_BYTES[e.dtype], **e.model_dump(exclude=skip)
            )
            for e in parsed.gemm
        },
        attention={
            (e.phase, e.head_dim, e.kv_dtype): AttentionKernel(**e.model_dump(exclude=skip))
            for e in parsed.attention
        },
        mla={
            (e.phase, e.dense_dtype, e.kv_dtype): MlaModule(
                weight_bytes_per_param=WEIGHT_BYTES[e.dense_dtype], **e.model_dump(exclude=skip)
            )
            for e in parsed.mla
        },
        indexed={
            (e.phase, e.kv_dtype): IndexedModule(**e.model_dump(exclude=skip))
            for e in parsed.indexed
        },
    )
