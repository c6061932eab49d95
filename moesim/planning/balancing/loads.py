"""The comparison from expert counts alone, step by step or of whole workloads.

Counts tell the balance of GPUs and, scaled to the batch, what experts take; not who sends to whom.
So dispatch and combine are not counted, nor can schemes be judged that choose by token: those are
refused by name. The log is what was recorded, in its order: a scheme sees the steps before the one
at hand, static plans the first half of the steps, and all are judged on the second. Rows may be
sums over many steps; what is averaged out in them is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.metrics import gpu_loads, imbalance
from moesim.planning.balancing.bench import Bench, Priced
from moesim.planning.balancing.course import MAX_SEEN_BATCHES
from moesim.planning.evaluate import Z_95, Interval
from moesim.planning.loads import split_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moesim.choices import ReplicaPolicy
    from moesim.placement import Placement
    from moesim.trace.format import LoadTrace
    from moesim.types import FloatArray, IntArray

MIN_ROWS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What schemes ask of a trace."""

    num_layers: int
    num_experts: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadCourse:
    """A `Course` of recorded loads. rows: [S, L, E] tokens of each expert, scaled to the batch;
    row_of, step_of: [J] the judged rows and their first steps."""

    rows: npt.NDArray[np.float32]
    num_steps: int
    batch_tokens: int
    seed: int
    first: int
    names: tuple[str, ...] = ("the recorded steps",)
    num_requests: int = 0
    group_of: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def trace(self) -> Shape:
        return Shape(*self.rows.shape[1:])

    @property
    def row_of(self) -> IntArray:
        return np.arange(self.first, len(self.rows))

    @property
    def step_of(self) -> IntArray:
        return self.row_of * self.num_steps // len(self.rows)

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self.rows[self.first :]

    def seen(self, step: int, window: int) -> npt.NDArray[np.float32]:
        """[W, L, E] the rows of the `window` steps before `step`, at least one, evenly spread; of
        those before the judged half for `num_steps`, from which a service starts."""
        last = max(1, step * len(self.rows) // self.num_steps)
        if step >= self.num_steps:
            last = self.first
        rows = max(1, round(window * len(self.rows) / self.num_steps))
        first = max(0, last - rows)
        num = min(last - first, MAX_SEEN_BATCHES)
        return self.rows[first + (np.arange(num) * 2 + 1) * (last - first) // (2 * num)]

    def runs(self, first_steps: IntArray) -> Iterator[tuple[int, slice]]:
        """As `Course.runs`."""
        edges = np.searchsorted(self.step_of, np.append(first_steps, self.num_steps))
        for run in range(len(first_steps)):
            if edges[run] < edges[run + 1]:
                yield run, slice(int(edges[run]), int(edges[run + 1]))

    def interval(self, values: FloatArray) -> Interval:
        """Mean with its 95 % interval over rows, as if they were independent."""
        mean = float(values.mean())
        half = Z_95 * float(values.std(ddof=1)) / len(values) ** 0.5
        return Interval(mean, mean - half, mean + half)


def load_course(loads: LoadTrace, batch_tokens: int, top_k: int, steps: int, seed: int) -> Any:
    """The recorded steps gone through once in `steps` steps. Raises InputError for fewer than
    MIN_ROWS with load, or fewer steps than rows."""
    rows = np.asarray(loads.expert_load, np.float64)
    rows = rows[rows.any(axis=(1, 2))]
    if len(rows) < MIN_ROWS:
        raise InputError(
            f"{len(rows)} recorded steps with load: too few to plan from one half and judge the"
            " other",
            f"record at least {MIN_ROWS}, or capture tokens (moesim trace capture)",
        )
    if not len(rows) <= steps <= 1 << 30:
        raise InputError(
            f"`steps` {steps} for {len(rows)} recorded ones", f"give at least {len(rows)}"
        )
    size = rows.sum(axis=2, keepdims=True)
    scaled = rows * (batch_tokens * top_k / np.where(size > 0, size, 1.0))
    first = len(split_steps(loads.expert_load).tune)
    return LoadCourse(scaled.astype(np.float32), steps, batch_tokens, seed, first)


class LoadBench(Bench):
    """Prices by expert times alone."""

    def prepare(self) -> None:
        """Nothing: no token has a home rank."""

    def price(
        self, track: Sequence[tuple[int, Placement]], policy: ReplicaPolicy | None = None
    ) -> Priced:
        """As `Bench.price`; replicas share equally."""
        first, counts = np.array([step for step, _ in track]), self.course.counts
        tables = self.step.expert_tables_us(int(np.ceil(counts.max(initial=0.0))) + 1)
        tables = tables[self.step.gpu_type] / self.step.speed[:, None]
        compute, even = np.zeros(len(counts)), np.zeros(len(counts))
        for run, rows in self.course.runs(first):
            placement = track[run][1]
            load = counts[rows].astype(np.float64)
            even[rows] = np.nanmean(imbalance(gpu_loads(load, placement), self.step.speed), axis=1)
            for layer, slots in enumerate(placement.physical_to_logical):
                gpu, held = placement.gpu_of_slot[slots >= 0], slots[slots >= 0]
                tokens = load[:, layer, held] / placement.replica_count[layer, held]
                low = tokens.astype(np.int64)
                part = tokens - low
                us = (1 - part) * tables[gpu, low] + part * tables[gpu, low + 1]
                work = np.zeros((len(load), self.num_gpus))
                np.add.at(work.T, gpu, us.T)
                compute[rows] += work.max(axis=1)
        zero = np.zeros(len(counts))
        return Priced(
            {"dispatch": zero, "compute": compute, "combine": zero, "weights": zero}, even
        )
