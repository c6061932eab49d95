"""Messages of one layer as linear terms: fan-out over GPUs and nodes, link loads, collective time.

The messages of `moesim.solvers.kernels.traffic` (dispatch and combine, one each way for every GPU,
node or choice, by the problem's dedup), for placements without replicas. Tokens of one batch and
home with the same set of experts are one pattern. Without rounding a pattern reaches a GPU as much
as the most of its experts there, so that relaxed placements pay for the part of an expert that
they put away from home. Time by link load is replaced by the largest convex function below it from
the fewest messages of a batch on (`moesim.solvers.bounds.messages`), which keeps every bound valid;
where the table is convex there, as past its latency, nothing is lost.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.solvers.base import Traffic
from moesim.solvers.ilp.engine import IlpModel, Terms
from moesim.types import FloatArray

MAX_PIECES = 12


def patterns(traffic: Traffic, layer: int) -> dict[tuple[int, int, tuple[int, ...]], int]:
    """(batch, home, experts in order) -> tokens, for tokens that chose any expert."""
    count: dict[tuple[int, int, tuple[int, ...]], int] = defaultdict(int)
    for ids, home, batch in zip(
        traffic.expert_ids[:, layer].astype(np.int64), traffic.home, traffic.batch_idx, strict=True
    ):
        chosen = tuple(sorted(int(e) for e in ids if e >= 0))
        if chosen:
            count[int(batch), int(home), chosen] += 1
    return dict(count)


def convex_below(table: FloatArray, shift: float, low: int = 0) -> list[tuple[float, float]]:
    """(slope, constant) of lines whose maximum is nowhere above the non-decreasing hull of
    `table` at round(m), m a number of messages; past its end the table goes on in line.

    shift: how far rounding can take m down: 0 for whole numbers, 1/2 otherwise. low: the least
    m; to its left the lines say nothing.
    """
    low = min(low, len(table) - 1)
    values = np.minimum.accumulate(table[::-1])[::-1][low:]
    last = len(values) - 1
    end = values[last] - values[last - 1] if last else 0.0
    hull: list[int] = []
    for i in range(len(values)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    lines = [(0.0, float(values[0]))]
    for a, b in pairwise(hull):
        slope = float((values[b] - values[a]) / (b - a))
        if 0 < slope <= end * (1 + 1e-9):
            lines.append((slope, float(values[a] - slope * (low + a + shift))))
    if len(lines) > MAX_PIECES:
        keep = np.unique(np.linspace(0, len(lines) - 1, MAX_PIECES).astype(int))
        lines = [lines[i] for i in keep]
    return lines


class MessageTerms:
    """Adds the messages of one layer to a model.

    place: [E][G] binary variables, 1 where an expert sits on a GPU. fewest: [2, groups, batches]
    messages that the busiest link of a group has at least. Adds the layer's microseconds of
    messages to the objective: for `time` the mean over sampled batches of dispatch and combine
    time, otherwise summed link time.
    """

    def __init__(
        self,
        model: IlpModel,
        net: Any,
        traffic: Traffic,
        place: list[list[Any]],
        fewest: npt.NDArray[np.int64],
    ) -> None:
        self.model, self.net, self.place, self.fewest = model, net, place, fewest
        self.num_gpus = len(net.node_of)
        self.num_batches = traffic.num_batches
        self._link: dict[tuple[int, int, int], Terms] = defaultdict(list)

    def add(self, layer_patterns: dict[tuple[int, int, tuple[int, ...]], int]) -> None:
        for (batch, home, experts), count in layer_patterns.items():
            if self.net.dedup == 0:
                for expert in experts:
                    for gpu in range(self.num_gpus):
                        self._message(self.place[expert][gpu], count, batch, home, gpu)
            else:
                self._pattern(experts, count, batch, home)
        if self.net.use_time:
            self._times()

    def _pattern(self, experts: tuple[int, ...], count: int, batch: int, home: int) -> None:
        net = self.net
        by_node = defaultdict(list)
        for gpu in range(self.num_gpus):
            if gpu == home:
                continue
            here = self._any([self.place[e][gpu] for e in experts])
            node = int(net.node_of[gpu])
            self._message(here, count, batch, int(net.relay[home, node]), gpu)
            if net.relay[home, node] != home:
                by_node[node].append(here)
        for node, reached in by_node.items():
            self._message(self._any(reached), count, batch, home, int(net.relay[home, node]))

    def _any(self, of: list[Any]) -> Any:
        """1 where any of the given is 1."""
        if len(of) == 1:
            return of[0]
        return self.model.largest([([(v, 1.0)], 0.0) for v in of])

    def _message(self, on: Any, count: int, batch: int, src: int, dst: int) -> None:
        net = self.net
        if src == dst:
            return
        if not net.use_time:
            self.model.cost(on, count * net.pair_us[src, dst] / self.num_batches)
            return
        pair = src * self.num_gpus + dst
        for link in net.link[net.indptr[pair] : net.indptr[pair + 1]]:
            way, number = divmod(int(link), len(net.group))
            self._link[batch, way, number].append((on, float(count)))

    def _times(self) -> None:
        net = self.net
        by_group: dict[tuple[int, int], dict[int, list[tuple[Terms, float]]]] = {}
        for (batch, way, link), terms in self._link.items():
            group = int(net.group[link])
            if group < 0:
                continue
            scale = float(net.scale[link])
            scaled = [(v, c * scale) for v, c in _summed(terms)]
            groups = by_group.setdefault((batch, way), {})
            groups.setdefault(group, []).append((scaled, 0.0))
        whole = bool(np.allclose(net.scale, np.round(net.scale)))
        for batch in range(self.num_batches):
            for way in range(2):
                above: list[tuple[Terms, float]] = []
                low = 0.0
                for group in range(net.time_us.shape[1]):
                    table = net.time_us[way, group]
                    loads = by_group.get((batch, way), {}).get(group)
                    if loads is None:
                        low = max(low, float(table[0]))
                        continue
                    most = self.model.largest(loads)
                    least = int(self.fewest[way, group, batch])
                    lines = convex_below(table, 0.0 if whole else 0.5, least)
                    above += [([(most, slope)], constant) for slope, constant in lines]
                self.model.largest(above, low=low, cost=1.0 / self.num_batches)


def _summed(terms: Terms) -> Terms:
    """`terms` with every variable once."""
    total: dict[int, tuple[Any, float]] = {}
    for variable, value in terms:
        before = total.get(id(variable), (variable, 0.0))[1]
        total[id(variable)] = (variable, before + value)
    return list(total.values())
