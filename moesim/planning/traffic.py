"""Tuning tokens and link tables for objectives that see messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.routing import DEDUP_CODES, home_ranks
from moesim.cost.step import StepModel
from moesim.solvers.base import Traffic
from moesim.trace.batches import Phase, RequestIndex, draw_batches
from moesim.trace.format import Trace

TRAFFIC_TOKENS = 12_288
MAX_TRAFFIC_CHOICES = 6_000_000
MIN_BATCHES = 2


def sample_traffic(
    trace: Trace,
    requests: RequestIndex,
    phase: Phase,
    batch_tokens: int,
    step: StepModel,
    seed: int,
    attention_gpus: int = 0,
) -> Traffic:
    """Whole batches of tuning tokens, about 12,288 tokens in all (fewer for many layers), and the
    links that can bound a collective. attention_gpus: tokens' homes, the first GPUs; 0 for all."""
    budget = min(TRAFFIC_TOKENS, MAX_TRAFFIC_CHOICES // (trace.num_layers * trace.top_k))
    num_batches = max(MIN_BATCHES, budget // batch_tokens)
    batches = draw_batches(requests, phase, batch_tokens, num_batches, seed + 17)
    lengths = np.diff(batches.indptr)
    copies = trace.top_k if step.dedup == "none" else min(trace.top_k, step.num_gpus)
    most = int(lengths.max()) * copies
    time_us = step.message_tables_us(most)
    keep = binding_links(step, time_us)
    indptr, links = _restrict(step.route_indptr, step.route_links, keep)
    return Traffic(
        expert_ids=np.asarray(trace.expert_ids[batches.token_idx]),
        home=home_ranks(trace, batches, attention_gpus or step.num_gpus),
        batch_idx=np.repeat(np.arange(len(batches), dtype=np.int32), lengths),
        indptr=indptr,
        link_idx=links,
        link_group=step.link_group[keep],
        link_scale=step.link_scale[keep],
        time_us=time_us,
        dedup=DEDUP_CODES[step.dedup],
    )


def binding_links(step: StepModel, time_us: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Indices of the links worth counting: of links that the same pairs cross, as those between a
    GPU and its NIC, only the slowest can bound a collective; links that no pair crosses, none.

    time_us: [2, groups, M + 1] as in `StepModel.message_tables_us`.
    """
    num_links = len(step.link_group)
    pair = np.repeat(np.arange(len(step.route_indptr) - 1), np.diff(step.route_indptr))
    order = np.lexsort((pair, step.route_links))
    crossing = np.split(
        pair[order], np.searchsorted(step.route_links[order], np.arange(1, num_links))
    )
    by_pairs: dict[bytes, list[int]] = {}
    for link, pairs in enumerate(crossing):
        if len(pairs):
            by_pairs.setdefault(pairs.tobytes(), []).append(link)
    last = time_us.shape[2] - 1
    probes = np.unique(np.geomspace(1, last, 16).astype(np.int64))

    def curve(link: int) -> npt.NDArray[np.float64]:
        at = np.minimum(np.round(probes * step.link_scale[link]).astype(np.int64), last)
        return time_us[:, step.link_group[link], :][:, at]

    kept: list[int] = []
    for links in by_pairs.values():
        chosen: list[int] = []
        for link in links:
            if any((curve(other) >= curve(link)).all() for other in chosen):
                continue
            chosen = [o for o in chosen if not (curve(link) >= curve(o)).all()] + [link]
        kept += chosen
    return np.array(sorted(kept), np.int64)


def _restrict(
    indptr: npt.NDArray[Any], links: npt.NDArray[Any], keep: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The routes with only the links of `keep`, renumbered."""
    number = np.full(int(links.max(initial=-1)) + 1, -1, np.int32)
    number[keep] = np.arange(len(keep), dtype=np.int32)
    kept = number[links] >= 0
    upto = np.concatenate(([0], np.cumsum(kept)))
    return upto[indptr].astype(np.int64), number[links][kept]
