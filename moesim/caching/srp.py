"""Segment routing best performance (SRP): how locally consistent a layer's routing is.

After arXiv:2505.16056 (section 3) and github.com/ljcleo/moe-lrc. A *segment* is a window of m
consecutive tokens of one request, windows of stride 1. A router that had to choose one fixed set
of experts for the whole segment would do best (in F1 against what was really chosen) by taking
the experts with at least t activations, for one global threshold t:

    SRP(m) = max_t 2 M_t / (P_t + A)

over all windows and experts, with a the activations of an expert in a window, A the sum of all a,
M_t the sum of those a >= t, and P_t = m x the number of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace

SEGMENT_LENGTHS = (4, 16, 64, 256)


@dataclass(frozen=True, slots=True, eq=False)
class Srp:
    """SRP at one segment length.

    model: over all layers together; layers: [L] one a layer. `model_ratio` and `ratio` [L] are the
    cache sizes at the optimum, in units of top-k. All are NaN where no request has `m` tokens.
    """

    m: int
    num_windows: int
    model: float
    model_ratio: float
    layers: npt.NDArray[np.float64]
    ratio: npt.NDArray[np.float64]


def srp(trace: Trace, requests: RequestIndex, m: int) -> Srp:
    """SRP with segments of `m` tokens over the given requests; shorter requests do not count."""
    histogram, num_windows = activation_histogram(trace, requests, m)
    layers = [_best(row, m) for row in histogram]
    model, model_ratio = _best(histogram.sum(axis=0), m)
    return Srp(
        m,
        num_windows,
        model,
        model_ratio,
        np.array([x for x, _ in layers]),
        np.array([x for _, x in layers]),
    )


def activation_histogram(
    trace: Trace, requests: RequestIndex, m: int
) -> tuple[npt.NDArray[np.int64], int]:
    """[L, m + 1]: (window, expert) pairs by the expert's activations in the window; and the
    number of windows of one layer."""
    if m < 1:
        raise InputError(f"segment length {m} is below 1", "give at least 1")
    length = np.diff(requests.indptr)
    num_windows = int(np.maximum(length - m + 1, 0).sum())
    histogram = np.zeros((trace.num_layers, m + 1), np.int64)
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[requests.token_idx].astype(np.int32)
        histogram[layer] = _count_windows(ids, requests.indptr, m, trace.num_experts)
    return histogram, num_windows


def iid_srp(num_experts: int, top_k: int, m: int) -> float:
    """SRP that tokens choosing `top_k` of `num_experts` uniformly and independently would have:
    each expert's activations in a window are binomial(m, top_k / num_experts)."""
    from scipy.stats import binom

    a = np.arange(m + 1)
    return _best(binom.pmf(a, m, top_k / num_experts), m)[0]


def _best(histogram: npt.NDArray[np.generic], m: int) -> tuple[float, float]:
    """(SRP, cache ratio at the optimum) from the histogram [m + 1] of activations."""
    weight = np.asarray(histogram, np.float64)
    a = np.arange(m + 1)
    total = float((weight * a).sum())
    if total == 0:
        return float("nan"), float("nan")
    matched = np.cumsum((weight * a)[::-1])[::-1][1:]
    predicted = m * np.cumsum(weight[::-1])[::-1][1:]
    f1 = 2 * matched / (predicted + total)
    best = int(f1.argmax())
    return float(f1[best]), float(predicted[best] / total)


@kernel
def _count_windows(ids, indptr, m, num_experts):  # type: ignore[no-untyped-def]
    """Histogram [m + 1] over windows and experts. An expert's count changes only when one of its
    tokens enters or leaves, so each change settles how many windows the old count lasted."""
    histogram = np.zeros(m + 1, np.int64)
    count = np.zeros(num_experts, np.int64)
    since = np.zeros(num_experts, np.int64)
    top_k = ids.shape[1]
    for r in range(len(indptr) - 1):
        first, last = indptr[r], indptr[r + 1]
        windows = last - first - m + 1
        if windows < 1:
            continue
        count[:] = 0
        since[:] = 0
        for t in range(first, first + m):
            for k in range(top_k):
                if ids[t, k] >= 0:
                    count[ids[t, k]] += 1
        for w in range(1, windows):
            for k in range(top_k):
                e = ids[first + w - 1, k]
                if e >= 0:
                    histogram[count[e]] += w - since[e]
                    since[e] = w
                    count[e] -= 1
            for k in range(top_k):
                e = ids[first + w + m - 1, k]
                if e >= 0:
                    histogram[count[e]] += w - since[e]
                    since[e] = w
                    count[e] += 1
        for e in range(num_experts):
            histogram[count[e]] += windows - since[e]
    return histogram
