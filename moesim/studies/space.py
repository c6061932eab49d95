"""The points of a study: the product of its axes and cases, each with a key of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import InputError, MismatchError, MoesimError
from moesim.studies.evaluator import Evaluator, Scalar
from moesim.studies.inputs import absolute, code_hash

DEFAULT_MAX_POINTS = 2000
FILE_PARAMS = ("trace", "requests", "model", "cluster", "machine", "plan", "calibration")


@dataclass(frozen=True, slots=True)
class Point:
    """One combination. `params` has every parameter, defaults included; `key` is a hash of it, of
    the inputs that it points to (`inputs`) and of the code. `error`: why it cannot be evaluated,
    where that shows without evaluating."""

    params: dict[str, Scalar]
    key: str
    inputs: dict[str, str]
    error: MoesimError | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """fixed: parameters that all points share. axes: values by name. cases: alternatives of
    several parameters at once."""

    fixed: Mapping[str, Scalar]
    axes: Mapping[str, Sequence[Scalar]]
    cases: Sequence[Mapping[str, Scalar]] = ()

    @property
    def num_points(self) -> int:
        """Points before duplicates are taken out."""
        total = max(1, len(self.cases))
        for values in self.axes.values():
            total *= len(values)
        return total

    def check_size(self, max_points: int) -> None:
        """Raise InputError where the grid has more than `max_points` points."""
        if self.num_points > max_points:
            parts = [f"{len(self.cases)} cases"] if self.cases else []
            parts += [f"{name} {len(values)}" for name, values in self.axes.items()]
            raise InputError(
                f"the grid has {self.num_points:,} points ({' x '.join(parts)}), more than"
                f" {max_points:,}",
                f"`max_points` {self.num_points} evaluates them all, `search` 200 some of them;"
                " or shorten an axis",
            )

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Raw parameters of every point, cases outermost, the last axis quickest."""
        for case in self.cases or ({},):
            for values in itertools.product(*self.axes.values()):
                yield {**self.fixed, **case, **dict(zip(self.axes, values, strict=True))}

    def varied(self) -> list[str]:
        """Parameters that differ between points, cases first."""
        named = dict.fromkeys(key for case in self.cases for key in case)
        return [*named, *(name for name, values in self.axes.items() if len(values) > 1)]


def make_point(evaluator: Evaluator, raw: Mapping[str, Any]) -> Point:
    """The point of raw parameters.

    Raises InputError for a parameter that is unknown, missing or out of range, a file that cannot
    be read or a name that is not known. That parameters do not go together, as sizes in a grid or a
    cluster that has no such size, is kept in `error`.
    """
    try:
        params = evaluator.check(raw)
    except MismatchError as found:
        params = evaluator.unchecked(raw)
        return Point(params, point_key(evaluator.name, params, {}), {}, found)
    for name in FILE_PARAMS:
        value = params.get(name)
        if isinstance(value, str):
            params[name] = absolute(value)
    evaluator.check_named(params)
    error = None
    try:
        inputs = evaluator.inputs(params)
    except MoesimError as found:
        inputs, error = {}, found
    return Point(params, point_key(evaluator.name, params, inputs), inputs, error)


def point_key(evaluator: str, params: Mapping[str, Scalar], inputs: Mapping[str, str]) -> str:
    """Hash of all that a point's figures depend on.

    Where a file lies does not count, only what is in it.
    """
    content = {
        "evaluator": evaluator,
        "params": {k: v for k, v in params.items() if not (k in FILE_PARAMS and k in inputs)},
        "inputs": dict(inputs),
        "code": code_hash(),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def distinct(points: Sequence[Point]) -> list[Point]:
    """`points` without repeated keys, in order."""
    return list({point.key: point for point in reversed(points)}.values())[::-1]
