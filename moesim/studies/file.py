"""The study file: what is fixed, what is varied, and what is asked."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moesim.cluster.yaml_file import line_of, read_yaml
from moesim.errors import FormatError
from moesim.studies.evaluator import Number, Whole, Word

MAX_AXIS = 10_000
_REMEDY = "docs/whatif.md shows the file by example"


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError("must be one value, not a list or a mapping")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite, not NaN or infinity")
    if isinstance(value, str) and len(value) > 400:
        raise ValueError("is longer than 400 characters")
    return value


Value = Annotated[Any, BeforeValidator(_scalar)]
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """An axis by its ends: `step` apart, or each `times` the one before. Both ends included."""

    start: Number = Field(alias="from")
    stop: Number = Field(alias="to")
    step: Number | None = None
    times: Number | None = None

    @model_validator(mode="after")
    def _grows(self) -> Range:
        if (self.step is None) == (self.times is None):
            raise ValueError("give either step or times")
        if self.stop < self.start:
            raise ValueError(f"to {self.stop:g} is below from {self.start:g}")
        if self.step is not None and self.step <= 0:
            raise ValueError("step must be above 0")
        if self.times is not None and (self.times <= 1 or self.start <= 0):
            raise ValueError("times must be above 1, and from above 0")
        if len(self.values()) > MAX_AXIS:
            raise ValueError(f"stands for more than {MAX_AXIS:,} values")
        return self

    def values(self) -> list[int | float]:
        """The values, whole ones as integers; at most one more than MAX_AXIS."""
        out: list[int | float] = []
        value, i = self.start, 0
        while value <= self.stop * (1 + 1e-12) and len(out) <= MAX_AXIS:
            out.append(int(value) if float(value).is_integer() else value)
            i += 1
            if self.step is not None:
                value = self.start + i * self.step
            else:
                value = self.start * (self.times or 0.0) ** i
        return out


def _axis(value: Any) -> Any:
    """A range, or a list of single values."""
    if isinstance(value, (Range, dict)):
        return Range.model_validate(value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_AXIS:
        raise ValueError(f"must be a list of 1 to {MAX_AXIS:,} values, or from, to, and step")
    return [_scalar(item) for item in value]


Axis = Annotated[Any, BeforeValidator(_axis)]


class Search(_Model):
    """Evaluate some of the grid: `random` points, or `coordinate`: one axis after the other from
    random starts, each time to its best value. `points`: how many at most."""

    method: Literal["random", "coordinate"] = "coordinate"
    points: Annotated[int, BeforeValidator(lambda v: v), Field(ge=1, le=1_000_000)] = 200
    seed: Annotated[Whole, Field(ge=0)] = 0


class StudyFile(_Model):
    """All keys of a study file; see docs/whatif.md."""

    name: Annotated[str, Field(max_length=200)] = ""
    evaluator: Name = "static"
    fixed: dict[Name, Value] = {}
    grid: dict[Name, Axis] = {}
    cases: Annotated[list[dict[Name, Value]], Field(max_length=MAX_AXIS)] = []
    slo: Annotated[str, Field(max_length=1000)] = ""
    minimize: Word | None = None
    maximize: Word | None = None
    per: Name | None = None
    prices: dict[Annotated[str, Field(max_length=100)], Annotated[Number, Field(gt=0, le=1e6)]] = {}
    sensitivity: Literal[False] | Annotated[Number, Field(gt=0, lt=1)] = 0.2
    front: Annotated[list[Word], Field(min_length=2, max_length=2)] | None = None
    search: Search | None = None
    stop_early: bool = False
    seed: Annotated[Whole, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_goal(self) -> StudyFile:
        if self.minimize is not None and self.maximize is not None:
            raise ValueError("minimize and maximize: ask one of the two")
        for key in self.grid:
            if key in self.fixed:
                raise ValueError(f"grid.{key}: is fixed as well")
        named = {key for case in self.cases for key in case}
        for key in sorted(named):
            if key in self.grid:
                raise ValueError(f"cases: {key} is an axis of the grid as well")
            if key in self.fixed:
                raise ValueError(f"cases: {key} is fixed as well")
        for key, axis in self.grid.items():
            values = axis.values() if isinstance(axis, Range) else axis
            for i, value in enumerate(values):
                if any(value == v and type(value) is type(v) for v in values[:i]):
                    raise ValueError(f"grid.{key}: {value} appears twice")
                if i > 2000:
                    break
        return self

    def axes(self) -> dict[str, list[Any]]:
        """Values of every axis of the grid, by name."""
        return {k: a.values() if isinstance(a, Range) else list(a) for k, a in self.grid.items()}


def read_study(path: Path) -> dict[str, Any]:
    """The mapping of a study file, checked against the schema.

    Raises InputError where it cannot be read, FormatError naming file, line and key otherwise;
    tags, repeated keys, huge aliases and files over 1 MB are refused.
    """
    label = path.name[:120]
    content, root = read_yaml(path, label)
    check_study(content, label, root)
    return content


def check_study(content: dict[str, Any], label: str, root: Any = None) -> StudyFile:
    """`content` as a study. Raises FormatError naming the key and, with `root`, the line."""
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
        where, loc = label, list(first["loc"])
        if root is not None:
            line, loc = line_of(root, tuple(first["loc"]))
            where = f"{label}, line {line}"
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")[:120]
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(first["loc"][-1]), list(StudyFile.model_fields), n=1, cutoff=0.5
            )
            remedy = f"did you mean {near[0]!r}?" if near else _REMEDY
            raise FormatError(f"{where}: unknown key {key}", remedy) from None
        cause = f"{key}: {message[0].lower()}{message[1:]}" if key else message
        raise FormatError(f"{where}: {cause}", _REMEDY) from None
