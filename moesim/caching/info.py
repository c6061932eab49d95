"""How suited a trace's routing is to offloading: `moesim trace info --offload`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.caching.sch import model_hit_rates, segment_hit_rates
from moesim.caching.sparsity import CHUNK_LENGTHS, sparsity
from moesim.caching.srp import SEGMENT_LENGTHS, Srp, iid_srp, srp
from moesim.trace.batches import RequestIndex, index_requests
from moesim.trace.format import LoadTrace, Trace, require_tokens
from moesim.types import FloatArray, stream

RATIOS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Cache sizes, in units of top-k."""
LAYER_ACCESSES = 1_000_000
MODEL_STEPS = 100_000_000
"""Work limits of SCH: accesses, and accesses x items of the shared pool; beyond them whole requests
in seeded random order are used, and the result says how many tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class OffloadInfo:
    """SRP {m: Srp}; uniform {m: SRP of uniform routing}; sch_layers {m: [L, E + 1]} hit rate of
    each layer's own cache by slots; sch_model {m: [L x E + 1]} of one shared pool; tls [L] and cls
    {chunk: [L]} sparsity. The token counts say how much of the trace each used."""

    trace: Trace
    srp: dict[int, Srp]
    uniform: dict[int, float]
    sch_layers: dict[int, FloatArray]
    sch_model: dict[int, FloatArray]
    tls: FloatArray
    cls: dict[int, FloatArray]
    num_tokens: int
    sch_tokens: int
    sch_model_tokens: int

    def at_ratio(self, m: int, ratio: float) -> tuple[float, float]:
        """(mean over layers' own caches, shared pool) of SCH with a cache of `ratio` x top-k."""
        slots = min(self.trace.num_experts, int(ratio * self.trace.top_k))
        pool = min(
            self.trace.num_layers * self.trace.num_experts,
            int(ratio * self.trace.top_k * self.trace.num_layers),
        )
        return float(self.sch_layers[m][:, slots].mean()), float(self.sch_model[m][pool])

    def to_dict(self) -> dict[str, Any]:
        """JSON data; NaN (no request is that long) becomes null."""
        return {
            "tokens": self.num_tokens,
            "sch_tokens": self.sch_tokens,
            "sch_model_tokens": self.sch_model_tokens,
            "srp": {
                str(m): {
                    "model": _number(s.model),
                    "cache_ratio": _number(s.model_ratio),
                    "uniform": self.uniform[m],
                    "layers": [_number(x) for x in s.layers],
                }
                for m, s in self.srp.items()
            },
            "sch": {
                str(m): {
                    str(r): dict(zip(("layers", "model"), self.at_ratio(m, r), strict=True))
                    for r in RATIOS
                }
                for m in self.sch_layers
            },
            "sch_by_layer": {
                str(m): {str(r): rate[:, self._slots(r)].tolist() for r in RATIOS}
                for m, rate in self.sch_layers.items()
            },
            "token_sparsity": self.tls.tolist(),
            "chunk_sparsity": {str(c): [_number(x) for x in row] for c, row in self.cls.items()},
        }

    def _slots(self, ratio: float) -> int:
        return min(self.trace.num_experts, int(ratio * self.trace.top_k))

    def lines(self) -> list[str]:
        """A text summary: one table over segment lengths, one over layers."""
        ks = self.trace.top_k
        out = [
            f"local routing consistency over {self.num_tokens} tokens (arXiv:2505.16056);"
            f" cache sizes are multiples of top-{ks}",
            f"{'m':>5} {'SRP':>7} {'uniform':>8} {'at cache':>9}   SCH at cache "
            + " ".join(f"{r:>6g}" for r in RATIOS),
        ]
        for m, s in self.srp.items():
            rates = " ".join(f"{self.at_ratio(m, r)[0]:6.3f}" for r in RATIOS)
            out.append(
                f"{m:>5} {s.model:7.3f} {self.uniform[m]:8.3f} {s.model_ratio:9.2f}"
                f"   each layer   {rates}"
            )
            rates = " ".join(f"{self.at_ratio(m, r)[1]:6.3f}" for r in RATIOS)
            out.append(f"{'':>5} {'':>7} {'':>8} {'':>9}   one pool     {rates}")
        chunks = ", ".join(
            f"{c} tokens {np.nanmean(row):.3f}" for c, row in self.cls.items() if _known(row)
        )
        if self.sch_model_tokens < self.num_tokens:
            out.append(
                f"SCH from {self.sch_tokens} tokens (each layer) and {self.sch_model_tokens} (pool)"
            )
        out.append(
            f"idle experts (BlockFFN, arXiv:2507.08771): 1 token {self.tls.mean():.3f}, {chunks}"
        )
        lengths = list(self.srp)
        head = " ".join(f"{'SRP ' + str(m):>8}" for m in lengths)
        tail = " ".join(f"{'SCH ' + str(m):>8}" for m in lengths)
        chunk = max((c for c in self.cls if c <= 8), default=0)
        out.append(f"by layer; SCH with a cache of 2 x top-k, idle experts in {chunk} tokens:")
        out.append(f"layer {head} {tail} {'idle':>8}")
        two = self._slots(2.0)
        for layer, number in enumerate(self.trace.meta.layer_ids):
            a = " ".join(f"{s.layers[layer]:8.3f}" for s in self.srp.values())
            b = " ".join(f"{rate[layer, two]:8.3f}" for rate in self.sch_layers.values())
            idle = self.cls[chunk][layer] if chunk else np.nan
            out.append(f"{number:>5} {a} {b} {idle:8.3f}")
        return out


def offload_info(
    trace: Trace | LoadTrace,
    segment_lengths: tuple[int, ...] = SEGMENT_LENGTHS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> OffloadInfo:
    """Metrics of local routing consistency and sparsity of a whole trace.

    Raises MismatchError for a load trace: counts have no order of tokens.
    """
    tokens = require_tokens(trace, "moesim trace info --offload")
    requests, _ = index_requests(tokens)
    per_token = tokens.num_layers * tokens.top_k
    own = limit_tokens(requests, LAYER_ACCESSES // per_token, seed)
    pool_size = tokens.num_layers * tokens.num_experts
    pool = limit_tokens(requests, MODEL_STEPS // (per_token * pool_size), seed)
    total, done = 2 * len(segment_lengths) + 2, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    values = {m: srp(tokens, requests, m) for m in segment_lengths}
    step()
    idle = sparsity(tokens, requests, CHUNK_LENGTHS)
    step()
    layers, model = {}, {}
    for m in segment_lengths:
        layers[m] = segment_hit_rates(tokens, own, m)
        step()
        model[m] = model_hit_rates(tokens, pool, m)
        step()
    return OffloadInfo(
        tokens,
        values,
        {m: iid_srp(tokens.num_experts, tokens.top_k, m) for m in segment_lengths},
        layers,
        model,
        idle.tls,
        idle.cls,
        tokens.num_tokens,
        len(own.token_idx),
        len(pool.token_idx),
    )


def limit_tokens(requests: RequestIndex, num_tokens: int, seed: int) -> RequestIndex:
    """Whole requests, in seeded random order, until `num_tokens` tokens; at least one."""
    length = np.diff(requests.indptr)
    order = stream(seed, 11).permutation(len(length))
    keep = np.zeros(len(length), bool)
    keep[order[np.cumsum(length[order]) <= num_tokens]] = True
    if not keep.any():
        keep[order[0]] = True
    return requests.select(keep)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _known(row: FloatArray) -> bool:
    return bool(np.isfinite(row).any())
