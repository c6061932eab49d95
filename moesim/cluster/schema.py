"""The YAML schema of cluster and GPU files, and errors that name the field, the file, the line."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from moesim import numerals
from moesim.cluster.types import BasisBlock, GpuSpec, Kind
from moesim.cluster.yaml_file import line_of, read_yaml
from moesim.errors import FormatError

MAX_GPUS = 65_536
"""Most GPUs that a cluster may have."""


_BARE = "must be a bare number"


def _number(value: Any) -> float:
    """Accept int, float and their text; refuse booleans, text with a unit, inf and NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("must be a number")
    try:
        number = numerals.number(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        raise ValueError(_BARE) from None
    if not math.isfinite(number):
        raise ValueError("must be finite, not NaN or infinity")
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _printable(value: str) -> str:
    """Fold line breaks and drop control characters, so that text cannot act on a terminal."""
    kept = "".join(ch for ch in " ".join(value.split()) if ch.isprintable())
    if not kept:
        raise ValueError("must say something")
    return kept


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1e12)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1e12)]
Count = Annotated[int, BeforeValidator(_count), Field(ge=1, le=MAX_GPUS)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=600), AfterValidator(_printable)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Model):
    """A block of figures that share an origin."""

    source: Text
    kind: Kind

    def block(self, where: str, role: str) -> BasisBlock:
        """The block's numbers with their origin."""
        numbers = [
            (key, float(value))
            for key, value in self.model_dump().items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        return BasisBlock(where, role, self.kind, self.source, tuple(numbers))


class MemorySchema(Figures):
    hbm_gb: Positive
    hbm_gb_per_s: Positive


class GpuCompute(Figures):
    bf16_tflops: Positive
    fp8_tflops: Positive | None = None
    fp4_tflops: Positive | None = None


class GpuLinks(Figures):
    nvlink_gb_per_s: Positive | None = None
    pcie_gb_per_s: Positive


class GpuLaunch(Figures):
    kernel_launch_us: NotNegative


class GpuPrice(Figures):
    price_usd_per_hour: NotNegative


class GpuFile(_Model):
    """A GPU type: a file of its own, or an entry of a cluster's `gpu_specs`."""

    format: Literal["moesim-gpu"] = "moesim-gpu"
    version: Literal[1] = 1
    name: Name
    title: Text
    host: Name | None = None
    memory: MemorySchema
    compute: GpuCompute
    links: GpuLinks
    launch: GpuLaunch
    price: GpuPrice

    def spec(self) -> GpuSpec:
        """The GpuSpec that this file describes."""
        rates = {
            "bf16": self.compute.bf16_tflops,
            "fp8": self.compute.fp8_tflops,
            "fp4": self.compute.fp4_tflops,
        }
        roles = {"links": "fabric", "price": "price"}
        blocks = tuple(
            getattr(self, part).block(f"gpu {self.name}: {part}", roles.get(part, "gpu"))
            for part in ("memory", "compute", "links", "launch", "price")
        )
        return GpuSpec(
            name=self.name,
            title=self.title,
            hbm_gb=self.memory.hbm_gb,
            hbm_gb_per_s=self.memory.hbm_gb_per_s,
            tflops={dtype: rate for dtype, rate in rates.items() if rate is not None},
            nvlink_gb_per_s=self.links.nvlink_gb_per_s or 0.0,
            pcie_gb_per_s=self.links.pcie_gb_per_s,
            kernel_launch_us=self.launch.kernel_launch_us,
            price_usd_per_hour=self.price.price_usd_per_hour,
            blocks=blocks,
            host=self.host or "",
        )


class Pcie(Figures):
    """PCIe (or chip-to-chip) tree of a node: root complexes, each on one host."""

    root_complexes: Count
    host_bridge_gb_per_s: Positive
    socket_gb_per_s: Positive | None = None


class Host(Figures):
    """Host DRAM: `hosts_per_node` NUMA domains, each with these figures."""

    hosts_per_node: Count
    dram_gb: Positive
    dram_gb_per_s: Positive


class Nvme(Figures):
    """NVMe storage of each host (NUMA domain)."""

    nvme_gb: Positive
    nvme_gb_per_s: Positive


class Nics(Figures):
    """Network adapters: one for every `gpus_per_nic` GPUs."""

    type: Literal["infiniband", "roce"]
    gpus_per_nic: Count = 1
    gb_per_s: Positive
    slot_gb_per_s: Positive


class NodeGroup(_Model):
    """`count` equal nodes."""

    count: Count
    gpus_per_node: Annotated[int, BeforeValidator(_count), Field(ge=1, le=1024)]
    gpu: Text | list[Text]
    speed_factors: list[Positive] | None = None
    fabric: Literal["nvswitch", "pcie", "none"]
    pcie: Pcie
    host: Host
    nvme: Nvme | None = None
    nics: Nics | None = None

    @model_validator(mode="after")
    def _divides(self) -> NodeGroup:
        gpus = self.gpus_per_node
        if isinstance(self.gpu, list) and len(self.gpu) != gpus:
            raise ValueError(f"gpu: lists {len(self.gpu)} GPU types for {gpus} GPUs per node")
        if self.speed_factors is not None and len(self.speed_factors) != gpus:
            raise ValueError(
                f"speed_factors: lists {len(self.speed_factors)} factors for {gpus} GPUs per node"
            )
        if gpus % self.pcie.root_complexes:
            raise ValueError(
                f"pcie.root_complexes: {self.pcie.root_complexes} does not divide "
                f"gpus_per_node {gpus}"
            )
        if self.pcie.root_complexes % self.host.hosts_per_node:
            raise ValueError(
                f"host.hosts_per_node: {self.host.hosts_per_node} does not divide "
                f"pcie.root_complexes {self.pcie.root_complexes}"
            )
        if self.nics is not None and gpus % self.nics.gpus_per_nic:
            raise ValueError(
                f"nics.gpus_per_nic: {self.nics.gpus_per_nic} does not divide gpus_per_node {gpus}"
            )
        return self


class NetworkSchema(Figures):
    """Switches between nodes. A leaf has `leaf_down_ports` ports towards NICs and uplinks of
    `leaf_down_ports * port_gb_per_s / oversubscription`, spread evenly over the spines.
    NIC i of a node is on rail `i % num_rails` (default: a rail for every NIC of a node)."""

    type: Literal["rail-optimised", "leaf-spine", "single-switch"]
    leaf_down_ports: Count
    port_gb_per_s: Positive
    num_spines: Annotated[int, BeforeValidator(_count), Field(ge=0, le=1024)] = 0
    oversubscription: Annotated[float, BeforeValidator(_number), Field(ge=1, le=1000)] = 1.0
    num_rails: Count | None = None
    rail_forwarding: Literal["nvlink", "spine"] | None = None
    ecmp_seed: Annotated[int, BeforeValidator(_count), Field(ge=0, le=2**63 - 1)] = 0

    @model_validator(mode="after")
    def _rails(self) -> NetworkSchema:
        if self.type != "rail-optimised":
            for key in ("num_rails", "rail_forwarding"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: only a rail-optimised network has rails")
        return self


class Latency(Figures):
    """Latency of one link of each class, and the software overhead of one message by its kind."""

    nvlink_us: NotNegative
    pcie_us: NotNegative
    nic_us: NotNegative
    leaf_spine_us: NotNegative
    host_us: NotNegative
    nvme_us: NotNegative
    message_intra_node_us: NotNegative
    message_inter_node_us: NotNegative
    message_host_us: NotNegative


class ClusterFile(_Model):
    """A cluster file: node groups, the network between them, and its default size."""

    format: Literal["moesim-cluster"]
    version: Literal[1]
    name: Name
    description: Text = "(no description)"
    calibration: Name | None = None
    gpu_specs: list[GpuFile] = Field(default=[], max_length=64)
    nodes: list[NodeGroup] = Field(min_length=1, max_length=1024)
    network: NetworkSchema | None = None
    latency: Latency

    @model_validator(mode="after")
    def _not_huge(self) -> ClusterFile:
        total = sum(group.count * group.gpus_per_node for group in self.nodes)
        if total > MAX_GPUS:
            raise ValueError(f"nodes: {total:,} GPUs in all, more than {MAX_GPUS:,}")
        return self


_M = TypeVar("_M", bound=BaseModel)


def parse_file(model: type[_M], path: Path, label: str) -> _M:
    """Read `path` as `model`; `label` names the file in errors.

    Raises FormatError with the field, the file and the line, InputError for an unreadable file.
    """
    content, root = read_yaml(path, label)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _format_error(error, model, root, label) from None


def _format_error(
    error: ValidationError, model: type[BaseModel], root: yaml.Node, label: str
) -> FormatError:
    details = error.errors(include_url=False, include_input=False)
    first = _most_telling(details)
    kind = str(first["type"])
    line, loc = line_of(root, tuple(first["loc"]))
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    field = field[:200] or "(top level)"
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if kind == "missing":
        cause, remedy = f"{field} is missing", "add it: docs/topologies.md shows every key"
    elif kind == "extra_forbidden":
        cause, remedy = f"unknown key {field}", _near_key(first["loc"], details, model)
    else:
        cause, remedy = f"{field}: {message[0].lower()}{message[1:]}", _remedy(kind, first)
    return FormatError(f"{label}, line {line}: {cause}{more}", remedy)


def _most_telling(details: list[Any]) -> Any:
    """A wrong format explains everything, an unknown key a missing one; else the first error."""
    wrong_format = [d for d in details if d["loc"] == ("format",)]
    unknown_keys = [d for d in details if d["type"] == "extra_forbidden"]
    return [*wrong_format, *unknown_keys, *details][0]


def _remedy(kind: str, detail: Any) -> str:
    if kind == "value_error":
        if _BARE in detail["msg"]:
            return "write the number alone, in the unit that the key names"
        return "correct the figure or the count it has to agree with"
    if kind in ("greater_than", "greater_than_equal"):
        return "give a positive figure; leave an absent part out instead of writing 0"
    if kind in ("less_than_equal", "too_long"):
        return f"clusters of at most {MAX_GPUS:,} GPUs are modelled; check the unit in the key"
    if kind == "literal_error":
        return f"write one of {detail['ctx']['expected']}"
    if kind == "string_pattern_mismatch":
        return "use lower-case letters, digits, '.', '_' and '-', at most 80"
    return "docs/topologies.md shows the schema by example"


def _near_key(loc: tuple[str | int, ...], details: list[Any], model: type[BaseModel]) -> str:
    """The key of the same block that was probably meant, a missing one first."""
    missing = [
        d["loc"][-1] for d in details if d["type"] == "missing" and d["loc"][:-1] == loc[:-1]
    ]
    for known in (missing, _keys_at(loc[:-1], model)):
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
        if near:
            return f"did you mean {near[0]!r}?"
    return "remove it; docs/topologies.md shows every key"


def _keys_at(loc: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    """Keys of the block at `loc`."""
    models = [model]
    for part in loc:
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
