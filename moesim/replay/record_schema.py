"""What the ranks' records may hold: every field that is read is typed, finite and in range.

Fields that nothing reads are let through, so that records of other versions stay readable. Above
the part that runs in an engine's container, which has no pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesim.errors import FormatError
from moesim.replay.shape import parse_shape

Microseconds = Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]
Signed = Annotated[float, Field(gt=-1e12, lt=1e12, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=1 << 40)]
Size = Annotated[int, Field(ge=1, lt=1 << 40)]
Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Text = Annotated[str, Field(max_length=10_000)]
Mode = Literal["graph", "eager"]
Record = TypeVar("Record", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Environment(_Part):
    """Where the ranks ran."""

    device: Text
    backend: Text
    num_ranks: Ranks
    num_nodes: Ranks = 1
    num_sms: Count = 0
    torch: Text = ""
    date: Text = ""
    nccl: Text | None = None
    driver: Text | None = None


class RawEnvironment(Environment):
    """As it is named in the calibration file."""

    torch: Text
    date: Text


class Spread(_Part):
    """Medians, 10th and 90th percentiles."""

    median: list[Positive]
    p10: list[Microseconds]
    p90: list[Microseconds]


class Result(_Part):
    """One plan, batch and mode: L layers, G ranks, P slots."""

    plan: Text
    tokens_per_rank: Annotated[int, Field(ge=1, le=1 << 30)]
    mode: Mode
    batch: Count
    phase_us: list[list[Annotated[list[Microseconds], Field(min_length=5, max_length=5)]]]
    layer_us: Spread
    step_us: Spread
    slot_rows: list[list[Count]]
    messages: list[list[list[Count]]]

    @model_validator(mode="after")
    def _shapes_agree(self) -> Result:
        layers, ranks = len(self.phase_us), len(self.phase_us[0]) if self.phase_us else 0
        slots = len(self.slot_rows[0]) if self.slot_rows else 0
        if not layers or not ranks:
            raise ValueError("phase_us is empty")
        if any(len(row) != ranks for row in self.phase_us):
            raise ValueError("phase_us has layers of different numbers of ranks")
        if len(self.slot_rows) != layers or len(self.messages) != layers:
            raise ValueError(f"slot_rows and messages are not of the {layers} layers of phase_us")
        if not slots or slots % ranks or any(len(row) != slots for row in self.slot_rows):
            raise ValueError(f"slot_rows do not share out among {ranks} ranks")
        square = all(len(m) == ranks and all(len(r) == ranks for r in m) for m in self.messages)
        if not square:
            raise ValueError(f"messages are not {ranks} by {ranks}")
        lengths = {"layer_us": layers, "step_us": 1}
        for name, length in lengths.items():
            spread: Spread = getattr(self, name)
            if any(len(part) != length for part in (spread.median, spread.p10, spread.p90)):
                raise ValueError(f"{name} is not of {length} values")
        return self


class Options(_Part):
    """What was asked for."""

    dedup: Literal["gpu", "none"] = "gpu"
    num_batches: Size = 1
    tokens_per_rank: list[Size] = []


class Measured(_Part):
    """`moesim-measured`. `complete` is set when the ranks have come to their end."""

    environment: Environment
    model: dict[str, Any]
    options: Options
    notes: list[Text]
    phases: list[Text]
    plans: list[dict[str, Any]] = []
    results: Annotated[list[Result], Field(min_length=1)]
    complete: bool | None = None

    @model_validator(mode="after")
    def _of_one_run(self) -> Measured:
        for i, result in enumerate(self.results):
            if len(result.phase_us[0]) != self.environment.num_ranks:
                raise ValueError(f"results[{i}] is not of {self.environment.num_ranks} ranks")
        keys = [(r.plan, r.tokens_per_rank, r.mode, r.batch) for r in self.results]
        if len(set(keys)) < len(keys):
            raise ValueError("results holds one plan, batch and mode twice")
        return self

    def ends_early(self) -> bool:
        """Whether batches that were asked for are missing without a note that says why."""
        if self.complete is not None:
            return not self.complete
        stopped = any(note.startswith("time limit") for note in self.notes)
        found = {(r.tokens_per_rank, r.batch) for r in self.results}
        return not stopped and len(found) < self.options.num_batches * len(
            set(self.options.tokens_per_rank)
        )


class Timed(_Part):
    """Any row of a calibration's tables."""

    us: Signed


class Spreading(Timed):
    mode: Mode
    bytes: Count
    p10_us: Signed
    p90_us: Signed


class Collective(Spreading):
    kind: Text


class Uneven(Spreading):
    share: Share


class Subgroup(Collective):
    group_size: Ranks
    num_nodes: Ranks
    share: Share


class RowMove(Spreading):
    op: Literal["gather", "reduce"]
    fan: Annotated[float, Field(gt=0, le=1e6)]


class HostCopy(Spreading):
    direction: Literal["h2d", "d2h", "both"]
    pinned: bool
    num_gpus_at_once: Ranks


class Experts(Timed):
    mode: Mode
    hidden: Width
    intermediate: Width
    dtype: Literal["bf16", "fp16", "fp32"]
    kernel: Text
    active: Count
    tokens: Count
    max_tokens: Count
    counts: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
    shape: Text
    less_us: Signed = 0.0

    @model_validator(mode="after")
    def _has_rows(self) -> Experts:
        if not sum(self.counts):
            raise ValueError("counts are all 0")
        return self


class Launch(Timed):
    what: Text


class Tables(_Part):
    """Rows by section; sections of other names are let through."""

    launch: list[Launch] = []
    permute: list[RowMove] = []
    ffn: list[Experts] = []
    ffn_alone: list[Experts] = []
    copies: list[HostCopy] = []
    fetch: list[Timed] = []
    all_to_all_v: list[Uneven] = []
    collectives: list[Collective] = []
    subgroups: list[Subgroup] = []


class Kernels(_Part):
    ffn: Text
    reduce: Text
    graphs: bool


class NamedShape(_Part):
    name: Text


class RawOptions(_Part):
    shapes: list[NamedShape] = []


class Raw(_Part):
    """`moesim-calibration-raw`."""

    environment: RawEnvironment
    kernels: Kernels
    options: RawOptions = RawOptions()
    notes: list[Text] = []
    tables: Tables

    @model_validator(mode="after")
    def _rows_are_lists(self) -> Raw:
        for name, rows in (self.tables.model_extra or {}).items():
            if not isinstance(rows, list):
                raise ValueError(f"tables.{name} is not a list of rows")
        return self


def check_measured(raw: dict[str, Any], where: str, remedy: str) -> None:
    """Raise FormatError, naming the field, unless `raw` is a complete record of a replay."""
    record = _check(Measured, raw, where, remedy)
    parse_shape(record.model)
    if record.ends_early():
        raise FormatError(
            f"{where}: the run that wrote it did not come to its end"
            f" ({len(record.results)} results)",
            "run moesim validate again",
        )


def check_raw(raw: dict[str, Any], where: str, remedy: str) -> None:
    """Raise FormatError, naming the field, unless `raw` is a record of a calibration."""
    record = _check(Raw, raw, where, remedy)
    for shape in record.options.shapes:
        parse_shape(shape.model_dump())


def _check(kind: type[Record], raw: dict[str, Any], where: str, remedy: str) -> Record:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path, count = "", error.error_count()
        for part in first["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        said = "is missing" if first["type"] == "missing" else first["msg"][:200]
        said = said.removeprefix("Value error, ")
        more = f" (and {count - 1} more)" if count > 1 else ""
        what = f"{path}: {said}" if path and said != "is missing" else f"{path} {said}".strip()
        raise FormatError(f"{where}: {what}{more}", remedy) from None
