"""Calibrations: what a GPU's collectives, expert GEMMs and copies were measured to take.

`load_calibration("h100")` reads a bundled file, `load_calibration("host.yaml")` one that
`moesim calibrate` wrote; both give a `Calibration`. Where nothing was measured for a GPU,
`datasheet_models` makes one of the same shape from datasheet figures and assumed efficiencies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.cost.calibration_schema import (
    CalibrationFile,
    CollectiveEntry,
    CopyEntry,
    ExpertEntry,
    WavesEntry,
)
from moesim.cost.collective import CollectiveCurve, CollectiveModel
from moesim.cost.copies import CopyModel, WeightMove
from moesim.cost.curves import AffineMin, SizeCurve, SizeTable
from moesim.cost.dense import AttentionKernel, DenseModel, GemmModel, IndexedModule, MlaModule
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.tile_waves import Tile, TileWaves
from moesim.errors import FormatError, InputError, UnknownNameError
from moesim.model.names import WEIGHT_BYTES

MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Calibration:
    """Models of one GPU type, ready to evaluate.

    `collectives`: `CollectiveModel`; `experts`: by (dtype, kernel), the first of a dtype being its
    default; `copies`: by direction, host copies of pinned memory with most GPUs at once;
    `host_copies`: every host copy; `dense`: GEMM and attention. `eager_collective_us`: host time
    that a collective adds where it is not replayed from a CUDA graph. `local_copy_gb_per_s`: rate
    at which an uneven all-to-all copies what stays on its rank, None where not measured.
    `issue_us`: host time to enqueue one call of a kind (collective, ffn, permute, reduce, fetch).
    `in_layer_saves_us`: what a row move or collective takes less in a layer than alone.
    `hand_over_us`: what a host copy takes longer where it waits for a kernel and a kernel for it.
    `rearrangements`: moving expert weights while an engine serves.
    """

    name: str
    gpu: str
    collectives: CollectiveModel
    experts: Mapping[tuple[str, str], ExpertGemmModel]
    copies: Mapping[str, CopyModel]
    eager_collective_us: float = 0.0
    local_copy_gb_per_s: float | None = None
    dense: DenseModel = field(default_factory=DenseModel)
    issue_us: Mapping[str, float] = field(default_factory=dict)
    in_layer_saves_us: float = 0.0
    hand_over_us: float = 0.0
    host_copies: tuple[CopyModel, ...] = ()
    rearrangements: tuple[WeightMove, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def collective(
        self,
        kind: str,
        group_size: int,
        num_nodes: int = 1,
        *,
        num_sms: int | None = None,
        nic_gb_per_s: float | None = None,
        eager: bool = False,
    ) -> CollectiveCurve:
        """The curve of one collective; see `CollectiveModel.curve`.

        `eager`: with the host's time, as when calls are not replayed from a CUDA graph.
        Raises UnknownNameError for a kind that the calibration lacks.
        """
        curve = self.collectives.curve(
            kind, group_size, num_nodes, num_sms=num_sms, nic_gb_per_s=nic_gb_per_s
        )
        return replace(
            curve,
            overhead_us=self.eager_collective_us if eager else 0.0,
            local_gb_per_s=self.local_copy_gb_per_s if kind == "all_to_all_v" else None,
        )

    def expert_ffn(
        self, dtype: str, kernel: str | None = None, shape: tuple[int, int] | None = None
    ) -> ExpertGemmModel:
        """The expert model of a weight dtype ("bf16", "fp8", ...); its first kernel where none is
        named. "fp16" counts as "bf16" where it has no entry of its own.

        `shape`: (hidden, intermediate); an entry of the kernel for that very shape goes first.
        Raises UnknownNameError for a dtype or kernel that the calibration lacks.
        """
        if dtype == "fp16" and not any(key[0] == "fp16" for key in self.experts):
            dtype = "bf16"
        of_dtype = {key[1]: model for key, model in self.experts.items() if key[0] == dtype}
        if not of_dtype:
            raise UnknownNameError(
                f"expert dtype in calibration {self.name!r}", dtype, {k[0] for k in self.experts}
            )
        if kernel is not None and kernel not in of_dtype:
            raise UnknownNameError(f"{dtype} expert kernel", kernel, of_dtype)
        found = next(iter(of_dtype.values())) if kernel is None else of_dtype[kernel]
        own = [m for m in of_dtype.values() if shape is not None and m.shape == shape]
        return next((m for m in own if m.kernel.startswith(f"{found.kernel} ")), found)

    def completed_by(self, other: Calibration) -> Calibration:
        """This calibration, with what it lacks taken from `other` (datasheet models, say).

        Taken over: collective kinds, expert dtypes, copy directions and dense sections of which
        this one has nothing; each keeps its own basis and source.
        """
        borrowed = [c for c in other.collectives.curves if not self.collectives.answers(c.kind)]
        dtypes = {dtype for dtype, _ in self.experts}
        experts = {key: m for key, m in other.experts.items() if key[0] not in dtypes}
        copied = {(c.direction, c.pinned) for c in self.host_copies}
        host = [c for c in other.host_copies if (c.direction, c.pinned) not in copied]
        mine, theirs = self.dense, other.dense
        return replace(
            self,
            collectives=CollectiveModel([*self.collectives.curves, *borrowed]),
            experts={**self.experts, **experts},
            copies={**other.copies, **self.copies},
            host_copies=(*self.host_copies, *host),
            dense=DenseModel(
                mine.gemms or theirs.gemms,
                mine.attention or theirs.attention,
                mine.mla or theirs.mla,
                mine.indexed or theirs.indexed,
            ),
            sources={**other.sources, **self.sources},
        )

    def with_measured_in(self, engine: Calibration) -> Calibration:
        """This calibration with what was measured in the engine: its expert kernels that are for
        one shape alone, and its products and attention."""
        own = {key: m for key, m in engine.experts.items() if m.shape is not None}
        mine, theirs = self.dense, engine.dense
        return replace(
            self,
            experts={**self.experts, **own},
            dense=DenseModel(
                {**mine.gemms, **theirs.gemms},
                {**mine.attention, **theirs.attention},
                {**mine.mla, **theirs.mla},
                {**mine.indexed, **theirs.indexed},
            ),
            sources={**self.sources, **engine.sources},
        )

    def copy(
        self, direction: str, *, pinned: bool = True, num_gpus_at_once: int | None = None
    ) -> CopyModel:
        """Host copy "h2d", "d2h" or "both" (so many bytes each way at once), or "permute" or
        "reduce" of rows.

        `pinned`: of the host's memory. `num_gpus_at_once`: GPUs that copy at a time; the most that
        was measured where None. Raises UnknownNameError where not measured.
        """
        if pinned and num_gpus_at_once is None:
            if direction not in self.copies:
                raise UnknownNameError("copy direction", direction, self.copies)
            return self.copies[direction]
        found = {
            c.num_gpus_at_once: c
            for c in self.host_copies
            if c.direction == direction and c.pinned == pinned
        }
        asked = num_gpus_at_once or max(found, default=1)
        if asked not in found:
            raise UnknownNameError("host copy", _named(direction, pinned, asked), self._host_names)
        return found[asked]

    def host_copy(self, direction: str, num_gpus: int) -> CopyModel:
        """Pinned host copy while `num_gpus` GPUs copy at a time: as measured with so many, else
        with the next more that were measured, else with the most.

        Raises UnknownNameError for a direction that the calibration lacks.
        """
        counts = sorted(
            c.num_gpus_at_once for c in self.host_copies if c.direction == direction and c.pinned
        )
        enough = next((n for n in counts if n >= num_gpus), None)
        return self.copy(direction, num_gpus_at_once=enough)

    @property
    def _host_names(self) -> list[str]:
        return [_named(c.direction, c.pinned, c.num_gpus_at_once) for c in self.host_copies]


def calibration_names() -> list[str]:
    """Names of the bundled calibrations."""
    folder = resources.files("moesim.topologies") / "calibration"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_calibration(name_or_path: str | os.PathLike[str]) -> Calibration:
    """A bundled calibration by name, or a file by path (anything with a separator or suffix).

    Raises UnknownNameError for a name that is not bundled, InputError for a file that cannot be
    read and FormatError for one that is not a calibration of version 1.
    """
    text_name = os.fspath(name_or_path)
    path = Path(text_name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.exists():
        return parse_calibration(_read(path), where=text_name)
    known = calibration_names()
    if text_name not in known:
        raise UnknownNameError("calibration", text_name, known)
    return _bundled(text_name)


@cache
def _bundled(name: str) -> Calibration:
    file = resources.files("moesim.topologies") / "calibration" / f"{name}.yaml"
    return parse_calibration(file.read_text(encoding="utf-8"), where=name)


def parse_calibration(text: str, *, where: str = "calibration") -> Calibration:
    """A calibration from YAML text; `where` names it in errors. Raises FormatError."""
    return build_calibration(parse_calibration_file(text, where=where))


def parse_calibration_file(text: str, *, where: str = "calibration") -> CalibrationFile:
    """The validated file itself, with its fit reports. Raises FormatError."""
    import yaml

    remedy = "see docs/calibration.md for the format; `moesim calibrate` writes it"
    try:
        raw: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{where}: not readable as YAML: {line}", remedy) from None
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: holds no mapping at its top level", remedy)
    return checked_file(raw, where, remedy)


def checked_file(raw: dict[str, Any], where: str, remedy: str) -> CalibrationFile:
    """Plain data as a calibration file. Raises FormatError, which names the field."""
    from pydantic import ValidationError

    try:
        return CalibrationFile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise FormatError(f"{where}: {field}: {first['msg']}{more}", remedy) from None


def build_calibration(parsed: CalibrationFile) -> Calibration:
    """Models from a validated file."""
    return Calibration(
        name=parsed.name,
        gpu=parsed.gpu,
        collectives=CollectiveModel([_collective(e) for e in parsed.collectives if e.share == 1.0]),
        experts={(entry.dtype, entry.kernel): _expert(entry) for entry in parsed.expert_ffn},
        copies=_copies(parsed.copies),
        host_copies=tuple(_copy([e]) for e in parsed.copies if not e.is_row_move and e.fan == 1.0),
        eager_collective_us=parsed.overheads.eager_collective_us,
        local_copy_gb_per_s=parsed.overheads.local_copy_gb_per_s,
        dense=_dense(parsed),
        issue_us={str(k): v for k, v in parsed.overheads.issue_us.items()},
        in_layer_saves_us=parsed.overheads.in_layer_saves_us,
        hand_over_us=parsed.overheads.hand_over_us,
        rearrangements=tuple(
            WeightMove(e.through, e.asynchronous, e.layer_us, e.gb_per_s, e.basis, e.source)
            for e in parsed.rearrangements
        ),
        sources=parsed.sources,
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB",
                "a calibration holds short tables; write it with `moesim calibrate`",
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"cannot read calibration {str(path)!r}: {reason}",
            f"give a file that exists, or one of: {', '.join(calibration_names())}",
        ) from None


def _segments(pairs: list[list[float]]) -> AffineMin:
    return AffineMin(tuple((latency, rate) for latency, rate in pairs))


def _span(given: list[float] | None, table: list[list[float]] | None) -> tuple[float, float]:
    if given is not None:
        return given[0], given[1]
    if table is not None:
        sizes = [row[0] for row in table]
        return min(sizes), max(sizes)
    return 0.0, float("inf")


def _collective(entry: CollectiveEntry) -> CollectiveCurve:
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


def _expert(entry: ExpertEntry) -> ExpertGemmModel:
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


def _copies(entries: Sequence[CopyEntry]) -> dict[str, CopyModel]:
    """By direction: of row moves all fans, of pinned host copies the one by most GPUs at once."""
    out = {}
    for direction in dict.fromkeys(entry.direction for entry in entries if entry.pinned):
        same = [e for e in entries if e.direction == direction and e.pinned]
        if not same[0].is_row_move:
            most = max(e.num_gpus_at_once for e in same)
            same = [e for e in same if e.num_gpus_at_once == most]
        out[str(direction)] = _copy(same)
    return out


def _copy(entries: Sequence[CopyEntry]) -> CopyModel:
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


def _named(direction: str, pinned: bool, num_gpus_at_once: int) -> str:
    return f"{direction} {'pinned' if pinned else 'unpinned'} by {num_gpus_at_once}"


def _copy_curve(entry: CopyEntry) -> SizeCurve:
    if entry.table is not None:
        return SizeTable.from_rows(entry.table)
    return AffineMin(((entry.latency_us or 0.0, entry.gb_per_s or 0.0),))


def _dense(parsed: CalibrationFile) -> DenseModel:
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
