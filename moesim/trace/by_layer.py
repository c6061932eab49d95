"""What changes from layer to layer: domains, balance by how much is looked at, dropped choices, and
another trace beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import MismatchError
from moesim.figures import text_table
from moesim.trace.batches import draw_batches, index_requests
from moesim.trace.counts import count_trace
from moesim.trace.format import Trace
from moesim.trace.measures import jensen_shannon
from moesim.trace.stats import plain, token_load
from moesim.types import FloatArray, IntArray, stream

MICRO_BATCH_TOKENS = 4096
SAMPLES = 256
TENTHS = 10


@dataclass(frozen=True, slots=True, eq=False)
class ByLayer:
    """Arrays [L] unless they say otherwise; None where a trace has no such thing.

    domains, domains_noise: Jensen-Shannon divergence in bits of a domain's load from that of the
    others, mean over domains, and between halves of a domain's own requests. sequence, micro_batch,
    whole: max over mean load of experts, mean over requests (up to 256), over batches of whole
    requests (4,096 tokens), and of the trace: the levels at which a router may be balanced (Qiu et
    al., "Demons in the Detail", arXiv:2501.11873; title from memory). missing: [10] share of
    choices that are none, by tenth of the request. other, kept: divergence of another trace's load,
    and, of the same tokens, the share of choices that are also there.
    """

    layer_ids: tuple[int, ...]
    sequence: FloatArray
    micro_batch: FloatArray
    whole: FloatArray
    domains: FloatArray | None = None
    domains_noise: FloatArray | None = None
    missing: FloatArray | None = None
    other: FloatArray | None = None
    kept: FloatArray | None = None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = plain(self)
        return out

    def lines(self) -> list[str]:
        """The table by layer, and drops by position."""
        columns = {
            "max/mean of a request": (self.sequence, 2),
            "of a batch": (self.micro_batch, 2),
            "of all": (self.whole, 2),
            "domains apart, bits": (self.domains, 4),
            "halves of one": (self.domains_noise, 4),
            "other trace, bits": (self.other, 4),
            "choices kept": (self.kept, 3),
        }
        shown = {name: (v, digits) for name, (v, digits) in columns.items() if v is not None}
        rows = [
            [str(layer), *(f"{v[i]:.{digits}f}" for v, digits in shown.values())]
            for i, layer in enumerate(self.layer_ids)
        ]
        out = text_table(["layer", *shown], rows).splitlines()
        if self.missing is not None:
            tenths = " ".join(f"{x:.1%}" for x in self.missing)
            out.append(f"choices that are none, by tenth of the request: {tenths}")
        return out


def by_layer(trace: Trace, against: Trace | None = None, seed: int = 0) -> ByLayer:
    """Statistics of every layer of `trace`, beside those of `against`.

    Raises MismatchError where the other trace has other layers or another number of experts.
    """
    counts = count_trace(trace)
    load = counts.load
    domains = noise = other = kept = None
    if counts.domain_load is not None:
        domains, noise = _domains(counts.domain_load, counts.domain_tokens)
    if against is not None:
        have = (trace.meta.layer_ids, trace.num_experts)
        if (against.meta.layer_ids, against.num_experts) != have:
            raise MismatchError(
                f"the other trace has {against.num_layers} layers of {against.num_experts} experts,"
                f" this one {trace.num_layers} of {trace.num_experts}, or other layers",
                "compare traces of one model",
            )
        other = jensen_shannon(load, token_load(against, np.arange(against.num_tokens)))
        kept = kept_choices(trace, against) if same_tokens(trace, against) else None
    return ByLayer(
        trace.meta.layer_ids,
        _sequences(trace, seed),
        _batches(trace, seed),
        _max_over_mean(load),
        domains,
        noise,
        missing_by_position(trace),
        other,
        kept,
    )


def same_tokens(a: Trace, b: Trace) -> bool:
    """Whether both traces are of the same tokens in the same order."""
    return a.num_tokens == b.num_tokens and all(
        np.array_equal(x, y)
        for x, y in ((a.request_ids, b.request_ids), (a.positions, b.positions))
    )


def kept_choices(a: Trace, b: Trace) -> FloatArray:
    """[L]: share of the choices of `a` that the same token of `b` makes too (the measure of
    OpenMoE, arXiv:2402.01739, for routers that settle early in training)."""
    out = np.empty(a.num_layers)
    for layer in range(a.num_layers):
        one = np.asarray(a.expert_ids[:, layer]).astype(np.int64)
        two = np.asarray(b.expert_ids[:, layer]).astype(np.int64)
        made = one >= 0
        same = ((one[:, :, None] == two[:, None, :]) & made[:, :, None]).any(axis=2)
        out[layer] = same.sum() / max(1, int(made.sum()))
    return out


def missing_by_position(trace: Trace) -> FloatArray | None:
    """[10]: share of a token's K choices that are none, by tenth of its request; None where no
    token lacks one."""
    ids = np.asarray(trace.expert_ids)
    none = (ids < 0).sum(axis=(1, 2))
    if not none.any():
        return None
    _, where = np.unique(np.asarray(trace.request_ids), return_inverse=True)
    positions = np.asarray(trace.positions, np.int64)
    first = np.full(int(where.max()) + 1, np.iinfo(np.int64).max)
    last = np.zeros(len(first), np.int64)
    np.minimum.at(first, where, positions)
    np.maximum.at(last, where, positions)
    length = last[where] - first[where] + 1
    tenth = (positions - first[where]) * TENTHS // length
    tokens = np.bincount(tenth, minlength=TENTHS)
    lost = np.bincount(tenth, none, TENTHS)
    return np.asarray(lost / np.maximum(1, tokens * ids.shape[1] * ids.shape[2]))


def _domains(load: IntArray, tokens: IntArray) -> tuple[FloatArray, FloatArray]:
    """[L] twice, from counts [D, 2, L, E]: as `measures.domain_loads`, with the layers kept."""
    total = load.sum(axis=0)
    apart, halves = [], []
    for own, count in zip(load, tokens, strict=True):
        if count:
            rest = total - own
            apart.append(np.array([jensen_shannon(own[i], rest[1 - i]) for i in range(2)]))
            halves.append(jensen_shannon(own[0], own[1]))
    return _mean(np.concatenate(apart)), _mean(np.array(halves))


def _sequences(trace: Trace, seed: int) -> FloatArray:
    """Mean over up to 256 requests of max over mean load."""
    index, _ = index_requests(trace)
    picked = stream(seed, 0xB1).permutation(len(index.ids))[:SAMPLES]
    spans = [index.token_idx[index.indptr[i] : index.indptr[i + 1]] for i in picked]
    return _mean(np.array([_max_over_mean(token_load(trace, s)) for s in spans]))


def _batches(trace: Trace, seed: int) -> FloatArray:
    """Mean over batches of max over mean load."""
    phase = "prefill" if (np.asarray(trace.phases) == 0).any() else "decode"
    index, _ = index_requests(trace, phase)  # type: ignore[arg-type]
    batches = draw_batches(index, phase, MICRO_BATCH_TOKENS, 32, seed)  # type: ignore[arg-type]
    found = [_max_over_mean(token_load(trace, batches[b])) for b in range(len(batches))]
    return _mean(np.array(found))


def _mean(values: FloatArray) -> FloatArray:
    """[L] means of [n, L] over what is a number; NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return np.where(count > 0, total / np.maximum(1, count), np.nan)


def _max_over_mean(load: IntArray) -> FloatArray:
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.maximum(mean, 1e-300), np.nan)
