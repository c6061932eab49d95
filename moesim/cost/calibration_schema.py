"""What a calibration file may hold: `format: moesim-calibration`, version 1 (docs/calibration.md).

The same schema serves the bundled files, which hold fitted parameters, and files a user measured
with `moesim calibrate`, which hold short tables.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesim.choices import Basis as Basis
from moesim.choices import MoveThrough
from moesim.choices import Phase as Phase
from moesim.cost.collective import KINDS

Positive = Annotated[float, Field(gt=0, lt=1e15, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**40)]
Segment = Annotated[list[Positive], Field(min_length=2, max_length=2)]
SizeRow = Annotated[list[NonNegative], Field(min_length=2, max_length=3)]
Range = Annotated[list[NonNegative], Field(min_length=2, max_length=2)]
MAX_TABLE_ROWS = 4096


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FitReport(_Strict):
    """How well a fit answers for points it did not see.

    `points`: held-out points, to which the relative errors |predicted / measured - 1| refer;
    `dropped`: spikes thrown out of the whole table beforehand.
    """

    regime: str = "all"
    points: int = Field(ge=0)
    dropped: int = Field(default=0, ge=0)
    median_error: NonNegative
    p90_error: NonNegative
    held_out: str = ""


class _Entry(_Strict):
    basis: Basis = "measured"
    source: str = ""
    note: str = ""
    fit: list[FitReport] = []


def _check_table(rows: list[list[float]] | None) -> None:
    if rows is None:
        return
    if not 2 <= len(rows) <= MAX_TABLE_ROWS:
        raise ValueError(f"table: needs 2 to {MAX_TABLE_ROWS} rows, has {len(rows)}")
    sizes = [row[0] for row in rows]
    if min(sizes) <= 0 or len(set(sizes)) != len(sizes):
        raise ValueError("table: sizes must be positive and distinct")
    if min(row[1] for row in rows) <= 0:
        raise ValueError("table: times must be positive")


class CollectiveEntry(_Entry):
    """One kind over one group: concave pieces by link, or a table [bytes, us, spread_us].

    `share`: of an `all_to_all_v`, what every other pair exchanges, of what each rank sends to the
    busiest one, whose received bytes a table has. Entries below 1 are kept for the reader;
    predictions take the even one at the busiest rank's bytes.
    """

    kind: str
    group_size: PositiveInt
    num_nodes: PositiveInt = 1
    num_sms: PositiveInt | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    nvlink: list[Segment] | None = None
    nic: list[Segment] | None = None
    table: list[SizeRow] | None = None
    bytes_range: Range | None = None
    nic_bytes_range: Range | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CollectiveEntry:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if (self.table is None) == (self.nvlink is None):
            raise ValueError("give either 'nvlink' segments or a 'table'")
        for name in ("nvlink", "nic"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: needs at least one [latency_us, gb_per_s] pair")
        if self.share < 1.0 and self.kind != "all_to_all_v":
            raise ValueError("share: only an all_to_all_v can be uneven")
        if self.num_nodes > self.group_size:
            raise ValueError("num_nodes: more nodes than ranks")
        _check_table(self.table)
        return self


Sharpness = Annotated[float, Field(ge=1, le=64)]


class TileEntry(_Strict):
    """Rows and columns of an output that one cluster of thread blocks computes at a time, for
    layers of at most `mean_tokens` tokens per slot (none: of any more)."""

    rows: PositiveInt
    columns: PositiveInt
    mean_tokens: Positive | None = None
    empty_adds: Annotated[float, Field(ge=0, le=4)] = 0.0


class WavesEntry(_Strict):
    """Waves of an expert kernel (`moesim.cost.tile_waves`)."""

    at_once: PositiveInt
    wave_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    tiles: Annotated[list[TileEntry], Field(min_length=1, max_length=8)]

    @model_validator(mode="after")
    def _ascending(self) -> WavesEntry:
        limits = [math.inf if t.mean_tokens is None else t.mean_tokens for t in self.tiles]
        if limits[-1] != math.inf or any(a >= b for a, b in pairwise(limits)):
            raise ValueError("tiles: mean_tokens must ascend, and the last tile has none")
        return self


class ExpertEntry(_Entry):
    """Grouped SwiGLU of one dtype and kernel: parameters, or a table of measured calls.

    `shape`: [hidden, intermediate] where the entry is for that shape alone; the first entry of a
    dtype must be for any.

    Table rows: [hidden, intermediate, active_experts, tokens, max_tokens, us].
    """

    dtype: str
    kernel: str
    weight_bytes_per_param: Annotated[float, Field(gt=0, le=8)]
    launch_us: NonNegative | None = None
    weight_gb_per_s: Positive | None = None
    tflops: Positive | None = None
    half_tokens: NonNegative = 0.0
    tile_tokens: PositiveInt = 1
    sharpness: Sharpness = 2.0
    waves: WavesEntry | None = None
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    row_gb_per_s: Positive | None = None
    token_gb_per_s: Positive | None = None
    eager_launch_us: NonNegative | None = None
    eager: bool = False
    ranges: dict[Literal["tokens_per_expert", "params_per_expert"], Range] = {}
    table: list[Annotated[list[NonNegative], Field(min_length=6, max_length=6)]] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ExpertEntry:
        given = [v is not None for v in (self.launch_us, self.weight_gb_per_s, self.tflops)]
        if self.table is not None:
            if any(given) or self.waves is not None:
                raise ValueError("give either parameters or a 'table'")
            if not 6 <= len(self.table) <= MAX_TABLE_ROWS:
                raise ValueError(f"table: needs 6 to {MAX_TABLE_ROWS} rows, has {len(self.table)}")
            for row in self.table:
                if min(row) <= 0 or row[4] > row[3] or row[2] > row[3]:
                    raise ValueError(
                        "table: a row is [hidden, intermediate, active_experts, tokens, "
                        f"max_tokens, us], all positive, the experts' tokens consistent: {row}"
                    )
        elif not all(given):
            raise ValueError("needs launch_us, weight_gb_per_s and tflops, or a 'table'")
        return self


class CopyEntry(_Entry):
    """Host link or local copy: `max(floor_us, latency_us + bytes / gb_per_s)`, or a table.

    A host copy (`h2d`, `d2h`, or `both`, so many bytes each way at once) is of pinned memory or
    not, by one GPU alone or by several at once.

    `permute` gathers rows, `reduce` sums several rows into one with weights; their bytes are those
    of every distinct row read and every row written. `fan`: gathered rows a distinct row, or rows
    summed into one, of the entry; several entries of a direction that differ in it are
    interpolated (`moesim.cost.copies`).
    """

    direction: Literal["h2d", "d2h", "both", "permute", "reduce"]
    pinned: bool = True
    num_gpus_at_once: PositiveInt = 1
    fan: Annotated[float, Field(ge=1, le=4096)] = 1.0
    floor_us: NonNegative = 0.0
    latency_us: Positive | None = None
    gb_per_s: Positive | None = None
    table: list[SizeRow] | None = None
    bytes_range: Range | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CopyEntry:
        given = self.latency_us is not None and self.gb_per_s is not None
        if given == (self.table is not None):
            raise ValueError("give either latency_us and gb_per_s, or a 'table'")
        if not self.pinned and self.is_row_move:
            raise ValueError("pinned: a row move has no host memory")
        _check_table(self.table)
        return self

    @property
    def is_row_move(self) -> bool:
        """Whether the copy stays on the GPU."""
        return self.direction in ("permute", "reduce")


DtypeName = Literal["fp32", "bf16", "fp16", "fp8", "mxfp4", "nvfp4", "int4"]
KvDtypeName = Literal["bf16", "fp16", "fp8"]


class GemmEntry(_Entry):
    """Dense GEMM of one weight dtype (`moesim.cost.dense.GemmModel`)."""

    dtype: DtypeName
    launch_us: NonNegative
    gb_per_s: Positive
    tflops: Positive
    sharpness: Sharpness = 2.0
    k_per_us: Positive
    k_sharpness: Sharpness = 2.0
    row_gb_per_s: Positive | None = None


class AttentionEntry(_Entry):
    """Grouped-query attention of one head size (`moesim.cost.dense.AttentionKernel`)."""

    phase: Phase
    head_dim: PositiveInt
    kv_dtype: KvDtypeName = "bf16"
    launch_us: NonNegative
    gb_per_s: Positive
    tflops: Positive
    sharpness: Sharpness = 2.0
    extra_tokens: NonNegative = 0.0


class MlaEntry(_Entry):
    """A whole latent-attention layer (`moesim.cost.dense.MlaModule`)."""

    phase: Phase
    dense_dtype: DtypeName = "bf16"
    kv_dtype: KvDtypeName = "bf16"
    launch_us: NonNegative
    weight_gb_per_s: Positive
    dense_tflops: Positive
    kv_gb_per_s: Positive
    attention_tflops: Positive
    sharpness: Sharpness = 2.0
    extra_tokens: NonNegative = 0.0


class IndexedEntry(_Entry):
    """Latent attention over keys that an indexer chooses (`moesim.cost.dense.IndexedModule`)."""

    phase: Phase
    kv_dtype: KvDtypeName = "bf16"
    launch_us: NonNegative
    index_tflops: Positive
    attention_tflops: Positive | None = None
    row_us: NonNegative = 0.0
    min_heads: PositiveInt = 1


class OverheadEntry(_Entry):
    """What a collective of a library call costs beside its kernel's link time.

    `eager_collective_us`: host time that a call adds where it is not replayed from a CUDA graph.
    `local_copy_gb_per_s`: rate at which an `all_to_all_v` copies the rows that stay on their rank.
    `issue_us`: host time to enqueue one call of each kind, which is what an eager step takes where
    the GPU waits for the host; `layer`: of a whole MoE layer with all that it calls.
    `in_layer_saves_us`: what a row move or collective takes less between the other operations of a
    layer, in a CUDA graph, than repeated alone.
    `hand_over_us`: what a host copy on a stream of its own takes longer than the copy itself, where
    it waits for a kernel and the next kernel waits for it; half of it on each side.
    """

    eager_collective_us: NonNegative = 0.0
    local_copy_gb_per_s: Positive | None = None
    in_layer_saves_us: NonNegative = 0.0
    hand_over_us: NonNegative = 0.0
    issue_us: dict[
        Literal["collective", "ffn", "permute", "reduce", "fetch", "layer"], NonNegative
    ] = {}


class RearrangementEntry(_Entry):
    """Moving expert weights while an engine serves: `layer_us` of host time for each layer, and the
    rate at which a GPU receives weights, where they do not go over the links at their own.

    `through`: the library that carries them. `asynchronous`: beside the steps.
    """

    through: MoveThrough
    asynchronous: bool = False
    layer_us: NonNegative
    gb_per_s: Positive | None = None


class CalibrationFile(_Strict):
    """A whole file. `sources` maps the ids used in `source:` to what they are."""

    format: Literal["moesim-calibration"]
    version: Literal[1]
    name: str = Field(min_length=1, max_length=200)
    gpu: str = Field(min_length=1, max_length=200)
    description: str = ""
    sources: dict[str, str] = {}
    overheads: OverheadEntry = OverheadEntry()
    collectives: list[CollectiveEntry] = []
    expert_ffn: list[ExpertEntry] = []
    copies: list[CopyEntry] = []
    gemm: list[GemmEntry] = []
    attention: list[AttentionEntry] = []
    mla: list[MlaEntry] = []
    indexed: list[IndexedEntry] = []
    rearrangements: list[RearrangementEntry] = []

    @model_validator(mode="after")
    def _defaults_and_fans(self) -> CalibrationFile:
        seen: set[str] = set()
        for expert in self.expert_ffn:
            if expert.dtype not in seen and expert.shape is not None:
                raise ValueError(
                    f"expert_ffn: the first {expert.dtype} entry must be for any shape"
                )
            seen.add(expert.dtype)
        fans: dict[str, list[float]] = {}
        for copy in self.copies:
            name: str = copy.direction
            if not copy.is_row_move:
                kind = "pinned" if copy.pinned else "unpinned"
                name = f"{kind} {name} by {copy.num_gpus_at_once}"
            fans.setdefault(name, []).append(copy.fan)
        for name, of in fans.items():
            if len(set(of)) < len(of) or min(of) != 1.0:
                raise ValueError(
                    f"copies: {name} needs one entry a fan, and one of fan 1; has {of}"
                )
        return self
