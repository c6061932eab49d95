"""What the parts of a step's time share: the deployment, its kernels, and a record of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Protocol

from moesim.cost.curves import Basis, weakest

if TYPE_CHECKING:
    from moesim.cost.calibration import Calibration
    from moesim.cost.collective import CollectiveCurve
    from moesim.serving.deployment import Deployment

ELEMENT_BYTES = 2.0


class _Sourced(Protocol):
    @property
    def basis(self) -> Basis: ...

    @property
    def source(self) -> str: ...


@dataclass(slots=True)
class Sources:
    """Of every part of a step, the kind and source of its figures, in `rests_on`."""

    bases: list[Basis]
    rests_on: dict[str, None] = field(default_factory=dict)

    def takes(self, part: str, model: _Sourced) -> None:
        self.bases.append(model.basis)
        self.rests_on[f"{part}: {model.basis} ({model.source or 'datasheet'})"] = None

    @property
    def basis(self) -> Basis:
        """The weakest kind."""
        return weakest(*self.bases)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A deployment with the kernels of its slowest GPU, at that GPU's speed."""

    deployment: Deployment
    calibration: Calibration
    sources: Sources

    def curve(
        self, kind: str, group: int, calibration: Calibration | None = None
    ) -> CollectiveCurve:
        """A collective over the first `group` GPUs."""
        cluster = self.deployment.cluster
        curve = (calibration or self.calibration).collective(
            kind,
            group,
            max(1, ceil(group / cluster.gpus_per_node)),
            nic_gb_per_s=cluster.nic_gb_per_s,
        )
        self.sources.takes(kind, curve)
        return curve
