"""`serve` with several pools: each request goes to one of a few models on GPUs of their own.

What a query router does (Hybrid LLM, Ding et al., arXiv:2404.14618; FrugalGPT; abstracts known):
easy queries to a small model, hard ones to a large one. How it decides is not modelled, and neither
is what it costs in quality: a share of the requests is drawn for each pool, or a column of the log
says where each goes. Pools share nothing, so that each is a service of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import InputError
from moesim.figures import figure, text_table
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.result import Result
from moesim.jobs.serve import serve
from moesim.jobs.serve_result import ServeResult
from moesim.serving.requests import Requests
from moesim.types import IntArray, stream

if TYPE_CHECKING:
    import pandas as pd

WHOLE = ("gpus", "replicas", "tp", "dp", "ep", "decode_gpus", "max_sequences")
TEXT = ("model", "cluster", "engine", "kv_dtype", "expert_dtype")
ARRIVING = ("skip_empty", "time_unit", "block_tokens", "first", "rate_scale")
SHOWN = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "cost_usd_per_hour")
HEADS = ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "$ per hour")


@dataclass(frozen=True, slots=True)
class Pool:
    """name; share of the requests, None where a column says; options of `serve` for it."""

    name: str
    share: float | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PoolsResult(Result):
    """pools: a served run each, by name; divided: how requests came to them."""

    pools: Mapping[str, ServeResult]
    divided: str

    @property
    def notices(self) -> tuple[str, ...]:
        return tuple(f"{name}: {n}" for name, one in self.pools.items() for n in one.notices)

    @property
    def missed(self) -> bool:
        """Whether a pool missed a promise for all its requests."""
        return any(one.missed for one in self.pools.values())

    @property
    def cost_usd_per_hour(self) -> float | None:
        """Of all pools, None where a price is not known."""
        each = [one.record["metrics"]["cost_usd_per_hour"] for one in self.pools.values()]
        return None if any(cost is None for cost in each) else float(sum(each))

    def line(self) -> str:
        count = sum(one.record["requests"]["num_requests"] for one in self.pools.values())
        return f"{count:,} requests over {len(self.pools)} pools, {self.divided}"

    def summary(self) -> str:
        head = ["ms", "requests", "finished", *HEADS]
        rows = []
        for name, one in self.pools.items():
            record, metrics = one.record, one.record["metrics"]
            counts = record["requests"]["num_requests"], record["counts"]["finished"]
            rows.append(
                [name, *(f"{n:,}" for n in counts), *(figure(s).text(metrics[s]) for s in SHOWN)]
            )
        lines = [self.line(), text_table(head, rows)]
        lines += [f"{name}: {one.record['name']}" for name, one in self.pools.items()]
        if self.cost_usd_per_hour is not None:
            lines.append(f"dollars per hour of all pools: {self.cost_usd_per_hour:,.2f}")
        for name, one in self.pools.items():
            slo = one.record["slo"]
            for miss in [] if slo is None else slo["missed"]:
                lines.append(f"missed by {name}: {miss['promise']}")
        lines.append("what a smaller model costs in quality is not claimed")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "moesim-serving-pools",
            "version": 1,
            "divided": self.divided,
            "cost_usd_per_hour": self.cost_usd_per_hour,
            "pools": {name: one.to_json() for name, one in self.pools.items()},
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per pool: every figure of its run."""
        import pandas as pd

        return pd.DataFrame({n: one.record["metrics"] for n, one in self.pools.items()}).T


def serve_pools(
    requests: Requests | str | os.PathLike[str],
    pools: Sequence[str],
    *,
    by: str | None = None,
    seed: int = 0,
    **options: Any,
) -> PoolsResult:
    """Serve requests with one pool or another.

    pools: as "small:model=Qwen3-30B-A3B,gpus=2,share=0.7", with `share` of the requests (drawn,
    they sum to 1) or, with `by`, for those whose column of that name in the log has the pool's
    name. Keys of WHOLE and TEXT are `serve`'s, for that pool; `options` are `serve`'s, for all.
    Raises InputError for pools that cannot be, a label without a pool, a pool without requests.
    """
    made = [_pool(text) for text in pools]
    names = [pool.name for pool in made]
    if len(made) < 2 or len(set(names)) < len(names):
        raise InputError(f"`pool` {', '.join(names):.80}", "give two pools or more, each once")
    arriving = arriving_requests(
        requests, seed=seed, label=by, **{k: options.pop(k) for k in ARRIVING if k in options}
    )
    which = _by_label(arriving, names, by) if by is not None else _drawn(arriving, made, seed)
    found = {}
    for number, pool in enumerate(made):
        index = np.flatnonzero(which == number)
        if not len(index):
            raise InputError(f"no request goes to pool {pool.name}", "leave the pool out")
        own = {**options, **pool.options}
        found[pool.name] = serve(arriving.picked(index), seed=seed, **own)
    text = f"by the column {by}" if by is not None else "drawn by their shares"
    return PoolsResult(found, text)


def _pool(text: str) -> Pool:
    name, colon, rest = text.partition(":")
    remedy = "write NAME:model=MODEL,gpus=8,share=0.3"
    share, options = None, dict[str, Any]()
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in options or key not in ("share", *WHOLE, *TEXT):
            raise InputError(f"`pool` {text!r:.80}: {part!r:.40}", remedy)
        try:
            number = float(value) if key == "share" else int(value) if key in WHOLE else None
        except ValueError:
            raise InputError(f"`pool` {text!r:.80}: {part!r:.40}", remedy) from None
        if key == "share":
            share = number
        else:
            options[key] = value if number is None else number
    if not name or not colon or "model" not in options:
        raise InputError(f"`pool` {text!r:.80} names no model", remedy)
    return Pool(name, share, options)


def _drawn(requests: Requests, pools: Sequence[Pool], seed: int) -> IntArray:
    shares = np.array([np.nan if pool.share is None else pool.share for pool in pools])
    if not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(
            "the pools' shares do not sum to 1", "give each a share above 0, or a column with `by`"
        )
    return stream(seed, 0xB001).choice(len(pools), len(requests), p=shares / shares.sum())


def _by_label(requests: Requests, names: Sequence[str], by: str) -> IntArray:
    if not requests.labels:
        raise InputError(f"requests without the column {by!r:.60}", "read them from a log with it")
    strange = sorted(set(requests.labels) - set(names))
    if strange:
        raise InputError(
            f"the column {by} says {strange[0]!r:.60}, for which there is no pool",
            f"give a pool of that name; there are {', '.join(names):.120}",
        )
    return np.array([names.index(label) for label in requests.labels], np.int64)
