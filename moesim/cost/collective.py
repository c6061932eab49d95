"""Time of one collective over one group, by the bytes on its busiest link.

Byte convention, for every kind but `all_reduce`: the largest, over ranks, of the bytes that a rank
sends to *other* ranks (what stays on the rank does not count). So an even all-to-all of a buffer
of S bytes per rank over n ranks counts S (n - 1) / n, and so does an all-gather whose gathered
result, or a reduce-scatter whose input, is S. An `all_reduce` counts the whole tensor.

Where a group spans nodes two figures matter: the bytes a rank sends to other ranks of its node
(`num_bytes`) and those it sends to other nodes through its NIC (`nic_bytes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import (
    BYTES_PER_US_AT_1_GB_PER_S,
    AffineMin,
    Basis,
    Evaluation,
    SizeCurve,
    weakest,
)
from moesim.errors import InputError, UnknownNameError
from moesim.types import FloatArray

KINDS = (
    "all_to_all",
    "all_to_all_v",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "p2p",
    "deepep_normal_dispatch",
    "deepep_normal_combine",
    "deepep_ll_dispatch",
    "deepep_ll_combine",
    "nvlink_dispatch",
    "nvlink_combine",
    "nvlink_one_sided_dispatch",
    "nvlink_one_sided_combine",
)
# A kind without curves of its own borrows another's, which the docs name as an assumption.
_STANDS_IN = {"all_to_all_v": "all_to_all", "p2p": "all_to_all"}

DEFAULT_NUM_SMS = 20  # DeepEP's own default, `Buffer.num_sms`
ASSUMED_NIC_GB_PER_S = 50.0  # one 400 Gb/s port a GPU
ASSUMED_NIC_EFFICIENCY = 0.85
ASSUMED_INTER_NODE_LATENCY_US = 12.0
# What every further GPU of another node adds to a plain all-to-all. Measured for other exchanges:
# DeepEP's low-latency kernels on H100s, from 8 to 56 such GPUs at the smallest batches, 0.13 (256
# experts) and 0.17 (288) in dispatch, 0.10 and 0.11 in combine; NCCL within a node, from 1 to 7
# peers, 0.16 (data of github.com/ai-dynamo/aiconfigurator @095f58a).
ASSUMED_PEER_US = 0.13
PER_PEER = ("all_to_all", "all_to_all_v")


@dataclass(frozen=True)
class CollectiveCurve:
    """One kind over one group:
    `overhead_us + max(nvlink(num_bytes), nic(nic_bytes), local_bytes / local_gb_per_s)`.

    `bytes_range` and `nic_bytes_range` are what was measured. `overhead_us` is the host's time
    where calls are not replayed from a CUDA graph. `local_gb_per_s`, where not None, is the rate
    at which the rows that stay on their rank are copied.
    """

    kind: str
    group_size: int
    num_nodes: int
    nvlink: SizeCurve
    nic: SizeCurve | None = None
    overhead_us: float = 0.0
    local_gb_per_s: float | None = None
    bytes_range: tuple[float, float] = (0.0, float("inf"))
    nic_bytes_range: tuple[float, float] = (0.0, float("inf"))
    basis: Basis = "measured"
    source: str = ""
    group_measured: bool = True
    num_sms: int | None = None

    @property
    def latency_us(self) -> float:
        """Time with nothing to send."""
        latencies = [self.nvlink.latency_us]
        if self.nic is not None:
            latencies.append(self.nic.latency_us)
        return self.overhead_us + max(latencies)

    def time_us(
        self,
        num_bytes: npt.ArrayLike,
        nic_bytes: npt.ArrayLike = 0.0,
        local_bytes: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """Microseconds, in the broadcast shape of the byte counts; never decreasing in any.

        `num_bytes`: to other ranks of the node, `nic_bytes`: to other nodes, both of the busiest
        rank (module docstring); `local_bytes`: the most that stays on one rank.
        """
        time = self.nvlink.time_us(num_bytes)
        if self.nic is not None:
            time = np.maximum(time, self.nic.time_us(nic_bytes))
        if self.local_gb_per_s is not None:
            local = np.asarray(local_bytes, dtype=np.float64)
            time = np.maximum(time, local / (self.local_gb_per_s * BYTES_PER_US_AT_1_GB_PER_S))
        return np.asarray(time + self.overhead_us, dtype=np.float64)

    def effective_gb_per_s(
        self, num_bytes: npt.ArrayLike, nic_bytes: npt.ArrayLike = 0.0, *, link: str = "nvlink"
    ) -> FloatArray:
        """Rate at which `link` ("nvlink" or "nic") must carry its bytes, after `latency_us`, for
        the collective to take `time_us`: what an event simulation gives the busiest link.
        Infinite where the collective takes no longer than its latency."""
        carried = np.asarray(nic_bytes if link == "nic" else num_bytes, dtype=np.float64)
        busy_us = self.time_us(num_bytes, nic_bytes) - self.latency_us
        return np.divide(
            carried / BYTES_PER_US_AT_1_GB_PER_S,
            busy_us,
            out=np.full(np.broadcast(carried, busy_us).shape, np.inf),
            where=busy_us > 0,
        )

    def evaluate(self, num_bytes: npt.ArrayLike, nic_bytes: npt.ArrayLike = 0.0) -> Evaluation:
        """`time_us` with its basis; `in_range` is False for a group or a size never measured.

        A size below the smallest measured one is within range: the time is the latency there.
        """
        inside = self.group_measured
        inside = inside and bool(np.all(np.asarray(num_bytes) <= self.bytes_range[1]))
        if self.nic is not None:
            inside = inside and bool(np.all(np.asarray(nic_bytes) <= self.nic_bytes_range[1]))
        return Evaluation(self.time_us(num_bytes, nic_bytes), self.basis, inside, self.source)


@dataclass(frozen=True)
class _Blend:
    """Geometric interpolation between two curves, weight `w` on the second."""

    first: SizeCurve
    second: SizeCurve
    w: float

    @property
    def latency_us(self) -> float:
        return float(self.first.latency_us ** (1 - self.w) * self.second.latency_us**self.w)

    def time_us(self, num_bytes: npt.ArrayLike) -> FloatArray:
        first, second = self.first.time_us(num_bytes), self.second.time_us(num_bytes)
        return np.asarray(first ** (1 - self.w) * second**self.w, dtype=np.float64)


def _library(kind: str) -> str:
    """Whose kernels do it, as `--all-to-all` names them."""
    name = kind.removesuffix("_dispatch").removesuffix("_combine").removesuffix("_normal")
    return "nccl" if name == kind else name


class CollectiveModel:
    """All measured collectives of one GPU type; picks, interpolates or refuses by group.

    Between two measured group sizes the times are interpolated geometrically in log2(group size).
    Outside them the nearest measured group answers, flagged as extrapolated. A kind with no curve
    for several nodes takes its one-node curve and the cluster's NIC figure with assumed efficiency
    and latency, flagged as assumed.
    """

    def __init__(self, curves: Sequence[CollectiveCurve]) -> None:
        self.curves = tuple(curves)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({curve.kind for curve in self.curves}))

    def answers(self, kind: str) -> bool:
        """Whether `kind` has a curve of its own or one that stands in for it."""
        return kind in self.kinds or _STANDS_IN.get(kind) in self.kinds

    def curve(
        self,
        kind: str,
        group_size: int,
        num_nodes: int = 1,
        *,
        num_sms: int | None = None,
        nic_gb_per_s: float | None = None,
    ) -> CollectiveCurve:
        """The curve of `kind` over `group_size` ranks spread evenly over `num_nodes` nodes.

        `num_sms`: where the kernel's share of the GPU was varied (DeepEP), the nearest measured
        share; DeepEP's default of 20 where None. `nic_gb_per_s`: line rate of one rank's NIC, used
        only where nothing was measured over nodes.

        Raises UnknownNameError for a kind that is none of `KINDS`, InputError for one that these
        GPUs have no curve of, not even a stand-in.
        """
        named = [c for c in self.curves if c.kind == kind]
        if not named and kind in _STANDS_IN:
            named = [c for c in self.curves if c.kind == _STANDS_IN[kind]]
        if not named and kind not in KINDS:
            raise UnknownNameError("collective kind", kind, KINDS)
        if not named:
            raise InputError(
                f"{_library(kind)} on GPUs for which there are no figures of its {kind}",
                f"choose one with figures: {', '.join(sorted(set(map(_library, self.kinds))))}",
            )
        named = _nearest_sms(named, num_sms)
        over_nodes = [c for c in named if c.num_nodes == num_nodes]
        if over_nodes:
            return _at_group(over_nodes, kind, group_size)
        nodes = sorted({c.num_nodes for c in named})
        if num_nodes == 1 or nodes[0] > 1 or len(nodes) > 1:
            near = min(nodes, key=lambda n: (abs(np.log2(n / num_nodes)), n))
            at_near = [c for c in named if c.num_nodes == near]
            found = _at_group(at_near, kind, max(1, group_size * near // num_nodes))
            source = f"{found.source}; {num_nodes} nodes answered by {near}"
            return replace(
                found,
                group_size=group_size,
                num_nodes=num_nodes,
                group_measured=False,
                source=source,
            )
        one_node = _at_group(named, kind, max(1, group_size // num_nodes))
        return _over_nic(one_node, group_size, num_nodes, nic_gb_per_s)

    def time_us(
        self,
        kind: str,
        group_size: int,
        num_nodes: int,
        num_bytes: npt.ArrayLike,
        nic_bytes: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """`curve(kind, group_size, num_nodes).time_us(num_bytes, nic_bytes)`."""
        return self.curve(kind, group_size, num_nodes).time_us(num_bytes, nic_bytes)


def _nearest_sms(curves: list[CollectiveCurve], num_sms: int | None) -> list[CollectiveCurve]:
    shares = sorted({c.num_sms for c in curves if c.num_sms is not None})
    if not shares:
        return curves
    asked = DEFAULT_NUM_SMS if num_sms is None else num_sms
    wanted = min(shares, key=lambda share: (abs(share - asked), share))
    return [c for c in curves if c.num_sms in (wanted, None)]


def _at_group(curves: list[CollectiveCurve], kind: str, group_size: int) -> CollectiveCurve:
    by_size = {c.group_size: c for c in curves}
    if group_size in by_size:
        return replace(by_size[group_size], kind=kind)
    below = [n for n in by_size if n < group_size]
    above = [n for n in by_size if n > group_size]
    if not below or not above:
        nearest = by_size[max(below) if below else min(above)]
        return replace(
            nearest,
            kind=kind,
            group_size=group_size,
            group_measured=False,
            source=f"{nearest.source}; {group_size} ranks answered by {nearest.group_size}",
        )
    low, high = by_size[max(below)], by_size[min(above)]
    w = float(np.log2(group_size / low.group_size) / np.log2(high.group_size / low.group_size))
    nic = _Blend(low.nic, high.nic, w) if low.nic is not None and high.nic is not None else None
    return replace(
        low,
        kind=kind,
        group_size=group_size,
        nvlink=_Blend(low.nvlink, high.nvlink, w),
        nic=nic,
        bytes_range=(low.bytes_range[0], min(low.bytes_range[1], high.bytes_range[1])),
        basis=weakest(low.basis, high.basis),
    )


def _over_nic(
    one_node: CollectiveCurve, group_size: int, num_nodes: int, nic_gb_per_s: float | None
) -> CollectiveCurve:
    line_rate = ASSUMED_NIC_GB_PER_S if nic_gb_per_s is None else nic_gb_per_s
    rate = line_rate * ASSUMED_NIC_EFFICIENCY
    latency = one_node.latency_us + ASSUMED_INTER_NODE_LATENCY_US
    if one_node.kind in PER_PEER:
        latency += ASSUMED_PEER_US * (group_size - group_size // num_nodes)
    return replace(
        one_node,
        group_size=group_size,
        num_nodes=num_nodes,
        nic=AffineMin(((latency, rate),)),
        nic_bytes_range=(0.0, 0.0),
        basis="assumed",
        group_measured=False,
        source=f"{one_node.source}; between nodes assumed, {rate:.3g} GB/s a NIC",
    )
