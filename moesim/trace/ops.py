"""Cutting traces and joining them, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.trace.batches import Phase
from moesim.trace.candidates import LAYER_ARRAYS, NAMES
from moesim.trace.counts import chunk_tokens
from moesim.trace.format import DECODE, PREFILL, Trace, TraceMeta, drop_pages, iter_chunks
from moesim.trace.writer import TraceWriter
from moesim.types import Array, IntArray, Progress, stream

Mask = npt.NDArray[np.bool_]

MAX_DOMAINS = 1 << 15
UNLABELLED = "unlabelled"


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """What to keep of a trace; None keeps all. The conditions hold together.

    tokens:      (first, stop) rows of the file.
    request_ids: these requests.
    num_requests: a random sample of so many of the requests that the other conditions leave.
    per_request: the first so many tokens of each request, by position.
    layer_ids:   absolute numbers of the layers, in the order of the trace.
    domains:     names.
    phase:       prefill or decode.
    """

    tokens: tuple[int, int] | None = None
    request_ids: tuple[int, ...] | None = None
    num_requests: int | None = None
    per_request: int | None = None
    layer_ids: tuple[int, ...] | None = None
    domains: tuple[str, ...] | None = None
    phase: Phase | None = None
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """The conditions that were set, for `meta.source`."""
        out: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None or (name == "seed" and self.num_requests is None):
                continue
            out[name] = list(value) if isinstance(value, tuple) else value
        if self.request_ids is not None and len(self.request_ids) > 20:
            out["request_ids"] = f"{len(self.request_ids)} requests"
        return out


def select_tokens(trace: Trace, spec: SliceSpec) -> Mask:
    """[T] which tokens `spec` keeps. Raises InputError when it keeps none, or names what is not
    there."""
    keep = np.ones(trace.num_tokens, bool)
    if spec.tokens is not None:
        first, stop = spec.tokens
        if not 0 <= first < stop:
            raise InputError(f"tokens {first}:{stop}", "give FIRST:STOP with FIRST below STOP")
        keep[:first] = False
        keep[stop:] = False
    if spec.phase is not None:
        keep &= np.asarray(trace.phases) == (PREFILL if spec.phase == "prefill" else DECODE)
    if spec.domains is not None:
        keep &= np.isin(_domain_ids(trace), _domain_numbers(trace, spec.domains))
    requests = np.asarray(trace.request_ids)
    if spec.request_ids is not None:
        missing = np.setdiff1d(spec.request_ids, requests)
        if len(missing):
            raise InputError(
                f"no request {missing[0]} in {trace.path or 'the trace'}",
                f"ids go from {requests.min(initial=0)} to {requests.max(initial=0)}",
            )
        keep &= np.isin(requests, spec.request_ids)
    if spec.num_requests is not None:
        keep &= np.isin(requests, _request_sample(requests[keep], spec.num_requests, spec.seed))
    if spec.per_request is not None:
        if spec.per_request < 1:
            raise InputError(f"{spec.per_request} tokens per request", "keep at least one")
        keep &= _first_tokens(trace, keep, spec.per_request)
    if not keep.any():
        raise InputError("the slice keeps no tokens", "loosen its conditions")
    return keep


def slice_trace(trace: Trace, spec: SliceSpec) -> Trace:
    """The slice of a trace, in memory."""
    keep = select_tokens(trace, spec)
    layers = _layer_index(trace, spec.layer_ids)
    arrays: dict[str, Any] = _part(trace, np.flatnonzero(keep), layers)
    return Trace(meta=_sliced_meta(trace, spec, layers), path=trace.path, **arrays)


def write_slice(
    trace: Trace, spec: SliceSpec, path: str | os.PathLike[str], progress: Progress | None = None
) -> int:
    """Write the slice of a trace to `path` chunk by chunk; returns its number of tokens.

    Besides a chunk, memory holds the request ids and one byte per token (and 24 bytes per token for
    `per_request`).
    """
    keep = select_tokens(trace, spec)
    layers = _layer_index(trace, spec.layer_ids)
    with TraceWriter.like(path, trace, _sliced_meta(trace, spec, layers)) as out:
        for part in iter_chunks(trace.num_tokens, chunk_tokens(trace.num_layers, trace.top_k)):
            rows = part.start + np.flatnonzero(keep[part])
            if len(rows):
                out.append(**_part(trace, rows, layers))
            drop_pages(*trace.arrays().values())
            if progress is not None:
                progress(part.stop, trace.num_tokens)
        return out.num_tokens


def merge_traces(
    traces: Sequence[Trace], path: str | os.PathLike[str], progress: Progress | None = None
) -> list[str]:
    """Write the tokens of all traces, one after the other, to `path`; returns notices.

    The traces must be of one model, with the same layers, experts and top-k: MismatchError names
    what differs. Requests are numbered from 0, steps after those of the traces before;
    domains of the same name become one, and tokens without any become `unlabelled` if others have
    one. Optional arrays that some of the traces lack are left out, and
    candidates cut to as many as all have, with a notice.
    """
    if len(traces) < 2:
        raise InputError("a merge needs at least two traces", "name two or more")
    for other in traces[1:]:
        _check_alike(traces[0], other)
    names = set.intersection(*(set(trace.arrays()) for trace in traces))
    dropped = set.union(*(set(trace.arrays()) for trace in traces)) - names - {"domain_ids"}
    notices = [f"{name} left out: not all of the traces have them" for name in sorted(dropped)]
    domains = _united_domains(traces)
    if domains:
        names.add("domain_ids")
    listed = min(trace.num_candidates for trace in traces)
    if listed and max(trace.num_candidates for trace in traces) > listed:
        notices.append(f"candidates cut to the first {listed}, which all of the traces have")
    dtypes = {n: _common_dtype([t.arrays()[n] for t in traces]) for n in names - {"domain_ids"}}
    if domains:
        dtypes["domain_ids"] = "int16"
    meta = replace(
        traces[0].meta,
        domains=domains,
        license="; ".join(dict.fromkeys(t.meta.license for t in traces if t.meta.license)),
        source={
            "kind": "merged",
            "parts": [
                {"content_hash": t.content_hash(), "num_tokens": t.num_tokens, **t.meta.source}
                for t in traces
            ],
        },
    )
    total, done = sum(trace.num_tokens for trace in traces), 0
    with TraceWriter(path, meta, dtypes, num_candidates=listed) as out:
        for rows in _renumbered(traces, sorted(names), domains):
            rows.update({name: rows[name][..., :listed] for name in names.intersection(NAMES)})
            out.append(**rows)
            done += len(rows["phases"])
            if progress is not None:
                progress(done, total)
    return notices


def _renumbered(
    traces: Sequence[Trace], names: Sequence[str], domains: tuple[str, ...]
) -> Iterator[dict[str, Array]]:
    first_request = first_step = 0
    for trace in traces:
        ids = np.unique(np.asarray(trace.request_ids))
        renamed = np.array([domains.index(n) if domains else 0 for n in _domain_names(trace)])
        for part in iter_chunks(trace.num_tokens, chunk_tokens(trace.num_layers, trace.top_k)):
            rows: dict[str, Array] = {}
            for name in names:
                if name == "domain_ids":
                    rows[name] = renamed[_domain_ids(trace, part)].astype(np.int16)
                    continue
                values = np.asarray(getattr(trace, name)[part])
                if name == "request_ids":
                    values = first_request + np.searchsorted(ids, values)
                elif name == "step_ids":
                    values = values.astype(np.int64) + first_step
                rows[name] = values
            yield rows
            drop_pages(*trace.arrays().values())
        first_request += len(ids)
        if trace.step_ids is not None and trace.num_tokens:
            first_step += int(trace.step_ids.max()) + 1


def _check_alike(first: Trace, other: Trace) -> None:
    mine, theirs = first.meta, other.meta
    for name, label in (
        ("model", "models"),
        ("num_experts", "numbers of experts"),
        ("top_k", "top-k"),
        ("layer_ids", "layers"),
        ("layers_per_pool", "layers in a pool of experts"),
    ):
        a, b = getattr(mine, name), getattr(theirs, name)
        if a != b:
            raise MismatchError(
                f"different {label}: {_short(a)} in {first.path or 'one trace'},"
                f" {_short(b)} in {other.path or 'another'}",
                "merge traces of one model; moesim trace slice --layers can make layers equal"
                if name == "layer_ids"
                else "merge traces of one model",
            )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} from {min(value)} to {max(value)}"
    return repr(value) if isinstance(value, str) else str(value)


def _united_domains(traces: Sequence[Trace]) -> tuple[str, ...]:
    names = dict.fromkeys(name for trace in traces for name in _domain_names(trace))
    if set(names) <= {UNLABELLED}:
        return ()
    if len(names) > MAX_DOMAINS:
        raise InputError(f"{len(names)} domains together", f"at most {MAX_DOMAINS} fit a trace")
    return tuple(names)


def _common_dtype(arrays: Sequence[Array]) -> str:
    """The widest of the types; uint8 and uint16 ids fit int16 where one trace needs -1, since
    expert ids stay below 32,768."""
    names = {array.dtype.name for array in arrays}
    for name in ("int16", "uint16", "float32"):
        if name in names:
            return name
    return names.pop()


def _domain_ids(trace: Trace, part: slice = slice(None)) -> IntArray:
    if trace.domain_ids is None:
        return np.zeros(len(trace.phases[part]), np.int64)
    return np.asarray(trace.domain_ids[part], np.int64)


def _domain_names(trace: Trace) -> tuple[str, ...]:
    """The names of the values of `_domain_ids`."""
    if trace.domain_ids is None or not trace.meta.domains:
        return (UNLABELLED,)
    return trace.meta.domains


def _domain_numbers(trace: Trace, names: Sequence[str]) -> list[int]:
    if trace.domain_ids is None:
        raise InputError(
            f"{trace.path or 'the trace'} has no domains", "leave the condition on domains out"
        )
    for name in names:
        if name not in trace.meta.domains:
            raise UnknownNameError("domain", name, trace.meta.domains)
    return [i for i, name in enumerate(trace.meta.domains) if name in names]


def _request_sample(request_ids: Array, num_requests: int, seed: int) -> Array:
    ids = np.unique(request_ids)
    if num_requests < 1 or seed < 0:
        raise InputError(
            f"a sample of {num_requests} requests with seed {seed}", "give numbers above 0"
        )
    if num_requests > len(ids):
        raise InputError(
            f"a sample of {num_requests} requests, but there are {len(ids)}", "ask for fewer"
        )
    rng = stream(seed, 0x511CE)
    return np.asarray(rng.permutation(ids)[:num_requests])


def _first_tokens(trace: Trace, keep: Mask, num_tokens: int) -> Mask:
    rows = np.flatnonzero(keep)
    requests = np.asarray(trace.request_ids)[rows]
    order = np.lexsort((np.asarray(trace.positions)[rows], requests))
    sorted_requests = requests[order]
    new = np.concatenate(([True], sorted_requests[1:] != sorted_requests[:-1]))
    starts = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
    out = np.zeros(len(keep), bool)
    out[rows[order[np.arange(len(rows)) - starts < num_tokens]]] = True
    return out


def _layer_index(trace: Trace, layer_ids: tuple[int, ...] | None) -> IntArray | None:
    if layer_ids is None:
        return None
    known = trace.meta.layer_ids
    for layer in layer_ids:
        if layer not in known:
            raise InputError(
                f"layer {layer} is not in {trace.path or 'the trace'}",
                f"its {len(known)} MoE layers are numbered {min(known)} to {max(known)}",
            )
    return np.array([i for i, layer in enumerate(known) if layer in layer_ids], np.int64)


def _part(trace: Trace, rows: IntArray, layers: IntArray | None) -> dict[str, Array]:
    out = {}
    for name, array in trace.arrays().items():
        values = np.asarray(array[rows])
        if layers is not None and name in LAYER_ARRAYS:
            values = values[:, layers]
        out[name] = values
    return out


def _sliced_meta(trace: Trace, spec: SliceSpec, layers: IntArray | None) -> TraceMeta:
    source = dict(trace.meta.source)
    source["slice"] = [*_as_list(source.get("slice")), spec.describe()]
    source["slice_of"] = trace.content_hash()
    size = trace.meta.layers_per_pool
    if layers is not None and size > 1:
        pools = layers.reshape(-1, size) if len(layers) % size == 0 else layers[:, None]
        if pools.shape[1] != size or (pools != pools[:, :1] // size * size + np.arange(size)).any():
            raise InputError(
                f"these layers cut through pools of {size} layers, which share their experts",
                "keep all layers of a pool, or none",
            )
    kept = trace.meta.layer_ids if layers is None else [trace.meta.layer_ids[i] for i in layers]
    return replace(trace.meta, layer_ids=tuple(kept), source=source)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
