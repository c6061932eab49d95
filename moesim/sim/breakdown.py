"""Where the time of a step went, GPU by GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.kernels import kernel
from moesim.sim.engine import CATEGORIES, COMM_CATEGORIES, COMPUTE_CATEGORIES, StepRun
from moesim.types import Array, FloatArray

NUM_COMPUTE = len(COMPUTE_CATEGORIES)


@dataclass(frozen=True, slots=True, eq=False)
class Breakdown:
    """Microseconds of one step.

    us: [G, categories] in the order of CATEGORIES; of communication only what no kernel of that
    GPU ran beside. waiting_us: [G] the rest: neither a kernel nor a collective under way. A GPU's
    parts add up to step_us. overlapped_us: [G] communication hidden behind kernels.
    """

    step_us: float
    us: FloatArray
    waiting_us: FloatArray
    overlapped_us: FloatArray

    @property
    def busy(self) -> FloatArray:
        """[G] share of the step in which a kernel ran."""
        return self.us[:, :NUM_COMPUTE].sum(axis=1) / max(self.step_us, 1e-300)


def breakdown(run: StepRun) -> Breakdown:
    """Split the time of every GPU from the tasks of a finished step."""
    code = {name: i for i, name in enumerate(CATEGORIES)}
    num_gpus = run.program.num_gpus
    kernels = [
        (t.gpu, code[t.category], start, end)
        for t in run.program.tasks
        if t.flow is None
        for _, start, end in t.spans
    ]
    comms = sorted(
        (t.start_us, t.end_us, code[t.category]) for t in run.program.tasks if t.flow is not None
    )
    gpu = np.array([k[0] for k in kernels], np.int64)
    order = np.argsort(gpu, kind="stable")
    indptr = np.searchsorted(gpu[order], np.arange(num_gpus + 1))
    spans = np.array([k[2:] for k in kernels]).reshape(-1, 2)[order]
    kind = np.array([k[1] for k in kernels], np.int64)[order]
    segment, segment_kind = _segments(comms)
    us, hidden = _split(num_gpus, indptr, spans, kind, segment, segment_kind)
    waiting = np.maximum(run.us - us.sum(axis=1), 0.0)
    return Breakdown(run.us, us, waiting, hidden)


def _segments(comms: list[tuple[float, float, int]]) -> tuple[FloatArray, Array]:
    """Disjoint spans [n, 2] and kinds of communication; where two overlap, the earlier counts."""
    spans: list[tuple[float, float]] = []
    kinds: list[int] = []
    upto = -np.inf
    for start, end, kind in comms:
        begin = max(start, upto)
        if end > begin:
            spans.append((begin, end))
            kinds.append(kind)
            upto = end
    return np.array(spans).reshape(-1, 2), np.array(kinds, np.int64)


@kernel
def _split(
    num_gpus: int,
    indptr: Array,
    spans: Array,
    kind: Array,
    segment: Array,
    segment_kind: Array,
) -> tuple[FloatArray, FloatArray]:
    us = np.zeros((num_gpus, NUM_CATEGORIES))
    hidden = np.zeros(num_gpus)
    for g in range(num_gpus):
        for i in range(indptr[g], indptr[g + 1]):
            us[g, kind[i]] += spans[i, 1] - spans[i, 0]
        i = indptr[g]
        for c in range(len(segment)):
            start, end = segment[c, 0], segment[c, 1]
            while i < indptr[g + 1] and spans[i, 1] <= start:
                i += 1
            covered = 0.0
            j = i
            while j < indptr[g + 1] and spans[j, 0] < end:
                covered += min(end, spans[j, 1]) - max(start, spans[j, 0])
                j += 1
            us[g, segment_kind[c]] += end - start - covered
            hidden[g] += covered
    return us, hidden


NUM_CATEGORIES = len(CATEGORIES)
assert len(COMM_CATEGORIES) + NUM_COMPUTE == NUM_CATEGORIES
