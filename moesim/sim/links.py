"""What traffic occupies of each link: effective rates, and flows for collectives and copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.cost.collective import CollectiveCurve
from moesim.cost.curves import BYTES_PER_US_AT_1_GB_PER_S, SizeCurve
from moesim.cost.step import NIC, NVLINK, OTHER, OTHER_LINK_EFFICIENCY, StepModel
from moesim.sim.network import Flow
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster

_FAR_BYTES = 1e13


def asymptotic_gb_per_s(curve: SizeCurve) -> float:
    """Rate of further bytes of a transfer that is already large."""
    near, far = curve.time_us(np.array([_FAR_BYTES, 2 * _FAR_BYTES])).tolist()
    return float(_FAR_BYTES / (far - near) / BYTES_PER_US_AT_1_GB_PER_S)


@dataclass(frozen=True, slots=True, eq=False)
class LinkTable:
    """The links of a cluster as the simulation sees them.

    names, classes: [links]; line_gb_per_s: [links] datasheet rates. group, scale, other_gb_per_s:
    as in `StepModel`, group -1 for links that no GPU-to-GPU route crosses.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    line_gb_per_s: FloatArray
    group: npt.NDArray[np.int8]
    scale: FloatArray
    other_gb_per_s: float

    @property
    def num_links(self) -> int:
        return len(self.names)

    def us_per_byte(self, curve: CollectiveCurve) -> FloatArray:
        """[links] time of a whole link that one byte takes, at the rate that a large collective of
        this kind reaches (C3); for links of other classes 85 % of the line rate."""
        rate = self.line_gb_per_s * OTHER_LINK_EFFICIENCY
        measured = [(NVLINK, asymptotic_gb_per_s(curve.nvlink))]
        if curve.nic is not None:
            measured.append((NIC, asymptotic_gb_per_s(curve.nic)))
        if self.other_gb_per_s > 0:
            measured.append((OTHER, self.other_gb_per_s * OTHER_LINK_EFFICIENCY))
        for group, peak in measured:
            picked = self.group == group
            rate[picked] = peak / self.scale[picked]
        return 1.0 / (rate * BYTES_PER_US_AT_1_GB_PER_S)


def link_table(cluster: Cluster, step: StepModel) -> LinkTable:
    """The links of `cluster`, grouped as `step` groups them."""
    routes = cluster.routes()
    names = routes.link_class_names
    return LinkTable(
        names=routes.link_name,
        classes=tuple(names[code] for code in routes.link_class.tolist()),
        line_gb_per_s=np.asarray(routes.link_gb_per_s, np.float64).copy(),
        group=step.link_group,
        scale=step.link_scale,
        other_gb_per_s=step.other_gb_per_s,
    )


def collective_flow(
    name: str,
    category: str,
    us: float,
    latency_us: float,
    link_bytes: FloatArray,
    us_per_byte: FloatArray,
) -> Flow:
    """The flow of a collective that takes `us` in all when alone (INV-8).

    link_bytes, us_per_byte: [links]. Where the bytes alone would take longer than `us` less the
    latency (a table whose small sizes were measured noisily), the latency gives way.
    """
    used = np.flatnonzero(link_bytes > 0)
    busy = np.minimum(link_bytes[used] * us_per_byte[used], us)
    alone = max(us - latency_us, float(busy.max(initial=0.0)))
    return Flow(name, category, used, link_bytes[used], busy, us - alone, alone)


def transfer_flow(
    name: str,
    category: str,
    num_bytes: float,
    path: npt.NDArray[Any] | Sequence[int],
    latency_us: float,
    us_per_byte: FloatArray,
) -> Flow:
    """`num_bytes` along one path; `us_per_byte` [links]."""
    links = np.asarray(path, np.int64)
    busy = num_bytes * us_per_byte[links]
    sizes = np.full(len(links), float(num_bytes))
    return Flow(name, category, links, sizes, busy, latency_us, float(busy.max(initial=0.0)))
