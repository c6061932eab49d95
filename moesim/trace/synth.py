"""Synthetic traces: the seeded generator.

docs/trace-tools.md describes the model and how well it reproduces real traces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.trace.format import Trace, TraceMeta
from moesim.trace.synth_spec import SynthSpec
from moesim.trace.writer import TraceWriter, id_dtype
from moesim.types import Array, IntArray, Progress, stream

_CHUNK_IDS = 1 << 22


def generate(spec: SynthSpec, num_tokens: int, seed: int = 0) -> Trace:
    """A synthetic trace of `num_tokens` tokens, in memory."""
    pieces = list(_pieces(spec, num_tokens, seed))
    arrays: dict[str, Any] = {n: np.concatenate([p[n] for p in pieces]) for n in pieces[0]}
    return Trace(meta=_meta(spec, seed), **arrays)


def write_synthetic(
    spec: SynthSpec,
    path: str | os.PathLike[str],
    num_tokens: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write a synthetic trace of any size, in bounded memory; the same tokens as `generate`."""
    dtypes = {"expert_ids": id_dtype(spec.num_experts)}
    if spec.domains:
        dtypes["domain_ids"] = "int16"
    done = 0
    with TraceWriter(path, _meta(spec, seed), dtypes) as out:
        for piece in _pieces(spec, num_tokens, seed):
            out.append(**piece)
            done += len(piece["phases"])
            if progress is not None:
                progress(done, num_tokens)


def run_model(
    spec: SynthSpec, starts: IntArray, domain_idx: IntArray, seeds: npt.NDArray[np.uint64]
) -> Array:
    """Expert ids [T, L, K] of requests with tokens `starts[r]:starts[r+1]` in domain
    `domain_idx[r]`; `seeds` [R] decide everything that is random about a request."""
    from moesim.trace.synth_kernels import choose_experts, draw_types, noise_tables

    gumbel, normal = noise_tables()
    num_tokens = int(starts[-1])
    types = np.zeros(num_tokens, np.int64)
    type_cum = np.cumsum(spec.type_share, axis=1)
    draw_types(
        types,
        starts,
        domain_idx,
        seeds,
        type_cum,
        float(spec.type_concentration),
        float(spec.type_persistence),
    )
    ids = np.zeros((num_tokens, spec.num_layers, spec.top_k), id_dtype(spec.num_experts))
    workers = min(os.cpu_count() or 1, len(seeds))
    # Cut where the tokens are, so that every thread has about as many; requests stay whole, and
    # each has a seed of its own, so that the number of threads changes nothing.
    cuts = np.searchsorted(starts, np.arange(1, workers) * num_tokens / max(1, workers))
    edges = np.unique(np.concatenate(([0], cuts, [len(seeds)])))

    def part(first: int, stop: int) -> None:
        choose_experts(
            ids,
            types,
            starts[first : stop + 1],
            domain_idx[first:stop],
            seeds[first:stop],
            spec.base,
            spec.type_logits,
            spec.chain,
            spec.request_spread,
            spec.noise_persistence,
            gumbel,
            normal,
        )

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(part, edges[:-1].tolist(), edges[1:].tolist()))
    return ids


def request_seeds(seed: int, first: int, stop: int) -> npt.NDArray[np.uint64]:
    """The seeds of requests number `first` to `stop`, independent of how they are grouped."""
    root = np.random.SeedSequence([seed, 0x5EED]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        numbers = np.arange(first, stop, dtype=np.uint64) * np.uint64(0xA076_1D64_78BD_642F)
        return np.asarray(numbers + root, np.uint64)


def draw_requests(spec: SynthSpec, num_tokens: int, seed: int) -> Iterator[IntArray]:
    """Requests [n, 4] that sum up to `num_tokens`: the list of the specification in a new random
    order each time round, the last request cut."""
    rng = stream(seed, 0xD12A)
    left = num_tokens
    while left > 0:
        order = spec.requests[rng.permutation(len(spec.requests))]
        ends = np.cumsum(order[:, 2] + order[:, 3])
        if ends[-1] >= left:
            order = order[: int(np.searchsorted(ends, left)) + 1].copy()
            over = int(ends[len(order) - 1]) - left
            cut = min(over, int(order[-1, 3]))
            order[-1, 3] -= cut
            order[-1, 2] -= over - cut
        left -= int((order[:, 2] + order[:, 3]).sum())
        yield order


def _meta(spec: SynthSpec, seed: int) -> TraceMeta:
    meta = spec.meta()
    meta.source["seed"] = seed
    return meta


def _pieces(spec: SynthSpec, num_tokens: int, seed: int) -> Iterator[dict[str, Array]]:
    if not 1 <= num_tokens < 1 << 48:
        raise InputError(f"cannot make {num_tokens} tokens", "ask for at least one")
    if seed < 0:
        raise InputError(f"seed {seed} is negative", "give a seed of 0 or more")
    budget = max(1, _CHUNK_IDS // (spec.num_layers * spec.top_k))
    number = 0
    for order in draw_requests(spec, num_tokens, seed):
        lengths = order[:, 2] + order[:, 3]
        group = np.cumsum(lengths) // budget
        edges = np.concatenate(([0], np.flatnonzero(np.diff(group)) + 1, [len(order)]))
        for first, stop in pairwise(edges):
            yield _piece(spec, order[first:stop], number, seed)
            number += int(stop - first)


def _piece(spec: SynthSpec, order: IntArray, number: int, seed: int) -> dict[str, Array]:
    lengths = order[:, 2] + order[:, 3]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    out: dict[str, Array] = {
        "expert_ids": run_model(
            spec, starts, order[:, 0].copy(), request_seeds(seed, number, number + len(order))
        ),
        "request_ids": np.repeat(np.arange(number, number + len(order)), lengths).astype(np.int32),
        "positions": (within + np.repeat(order[:, 1], lengths)).astype(np.int32),
        "phases": (within >= np.repeat(order[:, 2], lengths)).astype(np.uint8),
    }
    if spec.domains:
        out["domain_ids"] = np.repeat(order[:, 0], lengths).astype(np.int16)
    return out
