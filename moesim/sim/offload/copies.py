"""Copies of expert weights into one GPU: one at a time, fetches before prefetches."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import simpy

from moesim.caching.timeline_kernel import TIE_S
from moesim.cost.step import OTHER_LINK_EFFICIENCY
from moesim.errors import MismatchError
from moesim.sim.links import LinkTable, asymptotic_gb_per_s
from moesim.sim.network import Flow, Network, on_event
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    from moesim.caching.rates import Rates
    from moesim.cluster import Cluster


@dataclass(frozen=True, slots=True, eq=False)
class HostPaths:
    """How expert weights reach one GPU and its host's CPU, and how long that takes alone.

    load_us, read_us: [L, E] into HBM from where the expert lives, and from NVMe into DRAM (0 where
    it lives in DRAM); size_bytes: [L, E]; on_nvme: [L, E]; nvme_us: before NVMe's first
    byte. dram, nvme, disk: links from DRAM to the GPU, from NVMe through DRAM to the GPU, and from
    NVMe to DRAM. dram_read: the link that the CPU reads an expert over. us_per_byte: [links].
    """

    gpu: int
    load_us: FloatArray
    read_us: FloatArray
    size_bytes: FloatArray
    on_nvme: npt.NDArray[np.bool_]
    nvme_us: float
    dram: IntArray
    nvme: IntArray
    disk: IntArray
    dram_read: IntArray
    us_per_byte: FloatArray

    def load(self, layer: int, expert: int, name: str) -> Flow:
        """The copy of one expert into HBM."""
        far = bool(self.on_nvme[layer, expert])
        path = self.nvme if far else self.dram
        took = float(self.load_us[layer, expert])
        start = self.nvme_us
        if not far:
            start = took - float(self.size_bytes[layer, expert]) * float(self.us_per_byte[path[-1]])
        return self._flow(name, path, layer, expert, took, start)

    def read(self, layer: int, expert: int) -> Flow:
        """Reading one expert from NVMe into DRAM, for the CPU."""
        name = f"layer {layer} expert {expert} NVMe to DRAM"
        took = float(self.read_us[layer, expert])
        return self._flow(name, self.disk, layer, expert, took, self.nvme_us)

    def compute(self, layer: int, expert: int, us: float) -> Flow:
        """One expert on the CPU, which reads its weights from DRAM all the while."""
        name = f"layer {layer} expert {expert} on the CPU"
        return self._flow(name, self.dram_read, layer, expert, us, 0.0)

    def _flow(
        self, name: str, path: IntArray, layer: int, expert: int, us: float, start_us: float
    ) -> Flow:
        size = np.full(len(path), float(self.size_bytes[layer, expert]))
        latency = min(max(start_us, 0.0), us)
        alone = us - latency
        busy = np.minimum(size * self.us_per_byte[path], alone)
        return Flow(name, "other", path, size, busy, latency, alone)


def host_paths(
    cluster: Cluster,
    links: LinkTable,
    rates: Rates,
    gpu: int,
    load_us: FloatArray,
    read_us: FloatArray,
    size_bytes: FloatArray,
    on_nvme: npt.NDArray[np.bool_],
) -> HostPaths:
    """The paths of one GPU.

    A PCIe link takes what a large pinned copy was measured to reach on the GPU's own, other links
    85 % of their line rate, NVMe its rate whole. Raises MismatchError where experts live on NVMe
    and the cluster has none.
    """
    routes = cluster.host_routes()
    if on_nvme.any() and routes.nvme_to_gpu is None:
        raise MismatchError(
            f"the cache plan keeps experts on NVMe, and {cluster.name} has none",
            "give the cluster nvme:, or make the cache plan with more `dram`",
        )
    copy = rates.calibration.host_copy("h2d", rates.num_gpus).curve
    share = min(1.0, asymptotic_gb_per_s(copy) / rates.gpu.pcie_gb_per_s)
    classes = np.array(links.classes)
    rate = links.line_gb_per_s * OTHER_LINK_EFFICIENCY
    rate[classes == "pcie"] = links.line_gb_per_s[classes == "pcie"] * share
    rate[classes == "nvme"] = links.line_gb_per_s[classes == "nvme"]
    dram = routes.dram_to_gpu.links(gpu).astype(np.int64)
    disk = np.zeros(0, np.int64)
    if routes.nvme_to_dram is not None:
        disk = routes.nvme_to_dram.links(gpu).astype(np.int64)
    return HostPaths(
        gpu,
        load_us,
        read_us,
        size_bytes,
        on_nvme,
        float(rates.read_s(0.0)) * 1e6,
        dram,
        np.concatenate([disk, dram]),
        disk,
        dram[:1],
        1.0 / (rate * 1e3),
    )


@dataclass(slots=True, eq=False)
class Copy:
    """One expert on its way, `ahead` of its use or not. start_us is negative until its copy has
    begun; `sent` is what the network told of then."""

    layer: int
    expert: int
    flow: Flow
    arrived: simpy.Event
    ahead: bool = False
    from_nvme: bool = False
    start_us: float = -1.0
    done: bool = False
    sent: simpy.Event | None = None

    @property
    def alone_us(self) -> float:
        return self.flow.latency_us + self.flow.alone_us


@dataclass(slots=True, eq=False)
class CopyStream:
    """The stream that one GPU's copies run on, one after the other.

    What is fetched on demand goes before prefetches that have not begun; a copy that has begun is
    not stopped. busy_us: time in which a copy was under way; bytes_moved: [2] from DRAM and from
    NVMe; spans: (name, start, end) of each copy.
    """

    network: Network
    busy_us: float = 0.0
    bytes_moved: FloatArray = field(default_factory=lambda: np.zeros(2))
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    _urgent: deque[Copy] = field(default_factory=deque)
    _later: deque[Copy] = field(default_factory=deque)
    _current: Copy | None = None
    _kicked: bool = False

    def add(self, copy: Copy) -> None:
        """Queue a copy."""
        (self._later if copy.ahead else self._urgent).append(copy)
        self._kick()

    def drop(self, layer: int) -> None:
        """At the gate of `layer`: take prefetches for it that have not begun out of the queue. One
        that begins at this very instant (`TIE_S`) has not."""
        copy = self._current
        now = self.network.env.now
        if copy is not None and copy.ahead and now - copy.start_us <= TIE_S * 1e6:
            self.network.cancel([copy.sent])
            copy.start_us = -1.0
            self._current = None
            self._later.appendleft(copy)
            self._kick()
        self._later = deque(copy for copy in self._later if copy.layer != layer)

    def free_at(self, now: float) -> float:
        """When the copy under way will end if nothing slows it down; `now` if there is none."""
        if self._current is None:
            return now
        return max(now, self._current.start_us + self._current.alone_us)

    def _kick(self) -> None:
        """Choose the next copy once all that happens at this instant has happened."""
        if not self._kicked and self._current is None:
            self._kicked = True
            on_event(self.network.env.timeout(0), self._begin)

    def _begin(self, _: Any) -> None:
        self._kicked = False
        queue = self._urgent or self._later
        if self._current is not None or not queue:
            return
        self._current = copy = queue.popleft()
        copy.start_us = self.network.env.now
        copy.sent = self.network.send(copy.flow)
        on_event(copy.sent, self._ended)

    def _ended(self, _: Any) -> None:
        copy = self._current
        if copy is None:
            return
        now = self.network.env.now
        self.busy_us += now - copy.start_us
        self.bytes_moved[int(copy.from_nvme)] += copy.flow.size
        self.spans.append((copy.flow.name, copy.start_us, now))
        self._current = None
        copy.done = True
        copy.arrived.succeed()
        self._kick()
