"""What an evaluator of a study's points is: parameters, figures, and a function between them."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moesim.cluster import load_cluster
from moesim.errors import InputError, MismatchError
from moesim.figures import Figure
from moesim.studies.inputs import cluster_of, kept

MAX_GPUS = 65_536
Scalar = bool | int | float | str | None


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite, not NaN or infinity")
    if abs(value) > sys.float_info.max:
        raise ValueError("is too large")
    return float(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_finite)]
Factor = Annotated[float, BeforeValidator(_finite), Field(ge=0.01, le=100)]
Gpus = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MAX_GPUS)]
Tokens = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1 << 24)]
Word = Annotated[str, Field(min_length=1, max_length=400)]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a point came to: figures by name (None where there is none), the weakest basis of what
    they rest on, remarks, and for a service its engines, as "4 x tp1 dp8 ep8"."""

    figures: Mapping[str, float | None]
    basis: str | None = None
    notes: tuple[str, ...] = ()
    engines: str = ""


class Params(BaseModel):
    """Parameters that every evaluator has. Scales multiply what is otherwise known of an input."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    cluster: Word = "h100-sxm-ib"
    gpus: Gpus
    network_scale: Factor = 1.0
    compute_scale: Factor = 1.0


@dataclass(frozen=True)
class Evaluator:
    """One way to evaluate a point; subclasses say how.

    params: schema of its parameters. figures: what it gives. goal: figure that is best where no
    question is asked. throughput: figure of `maximize: throughput`. front: axes of the Pareto
    front, names of figures, `gpus` or `cost`. scales: inputs for the sensitivity, by the parameter
    that scales them.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    params: ClassVar[type[Params]]
    figures: ClassVar[tuple[Figure, ...]]
    goal: ClassVar[str]
    throughput: ClassVar[str]
    front: ClassVar[tuple[str, str]]
    scales: ClassVar[Mapping[str, str]] = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
    }

    def check(self, raw: Mapping[str, Any]) -> dict[str, Scalar]:
        """`raw` with every default filled in. Raises InputError naming the parameter, MismatchError
        where each is valid but they do not go together."""
        try:
            return dict(self.params.model_validate(dict(raw)).model_dump())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"][:1])[:80] or "a parameter"
            kind = str(first["type"])
            if kind == "extra_forbidden":
                raise InputError(
                    f"evaluator {self.name} has no parameter {key!r}", self._near(key)
                ) from None
            if kind == "missing":
                raise InputError(
                    f"parameter {key} is missing",
                    f"fix it (fixed: in the file, --set {key}=...) or vary it (--vary {key}=...)",
                ) from None
            message = str(first["msg"]).removeprefix("Value error, ")
            remedy = "docs/whatif.md lists the parameters of every evaluator"
            if not first["loc"]:
                raise MismatchError(message, remedy) from None
            where = f"{key} {str(raw.get(key))[:60]}: "
            raise InputError(f"{where}{message[0].lower()}{message[1:]}", remedy) from None

    def unchecked(self, raw: Mapping[str, Any]) -> dict[str, Scalar]:
        """`raw` with every default filled in, whether it goes together or not."""
        fields = self.params.model_fields.items()
        return {
            name: raw.get(name, f.get_default())
            for name, f in fields
            if name in raw or not f.is_required()
        }

    def check_named(self, params: Mapping[str, Any]) -> None:
        """Raise MoesimError for a file that cannot be read or a name that is not known: an error of
        the study, and no verdict on the point."""
        name = str(params["cluster"])
        kept("cluster", name, lambda: load_cluster(name))

    def inputs(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Hashes of the files and named things that `params` point to, by parameter."""
        return {"cluster": self.cluster(params).cluster_hash()}

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        """The figures of one point. Raises MoesimError where it cannot be."""
        raise NotImplementedError

    def figure(self, name: str) -> Figure | None:
        """The figure of this name, or of this name without its unit."""
        for figure in self.figures:
            if name in (figure.name, figure.name.removesuffix(f"_{figure.base}")):
                return figure
        return None

    def cluster(self, params: Mapping[str, Any]) -> Any:
        """The cluster of a point, its GPUs' speeds multiplied by `compute_scale`."""
        cluster = cluster_of(params["cluster"], params["gpus"])
        factor = params["compute_scale"]
        if factor != 1.0:
            cluster = replace(cluster, speed_factor=cluster.speed_factor * factor)
        return cluster

    def _near(self, key: str) -> str:
        known = list(self.params.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{hint}known: {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A point as it stands in the journal and the result.

    status: ok; infeasible (a well-posed point with the answer no, as memory that does not suffice);
    refused (parameters that do not go together). cause, remedy: why, where not ok.
    """

    key: str
    params: dict[str, Scalar]
    status: Literal["ok", "infeasible", "refused"]
    figures: dict[str, float | None] = field(default_factory=dict)
    basis: str | None = None
    notes: tuple[str, ...] = ()
    engines: str = ""
    cause: str = ""
    remedy: str = ""
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"
