"""The serving loop: arrivals, steps of the instances, transfers of KV caches.

At one instant steps end first, in order of instance; then transferred caches arrive; then new
requests; then every idle instance with work begins a step. An instance begins its next step the
moment one ends. Requests that arrive during a step wait for its end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.kernels import kernel
from moesim.serving.kv_cache import push_waiting, release
from moesim.serving.prefix import register
from moesim.serving.router import admit_level, choose_rank
from moesim.serving.scheduler import plan_rank
from moesim.serving.speculative import accepted_drafts, choose_drafts
from moesim.serving.state import (
    ALL_DONE,
    DECODE,
    FINISHED,
    INTERNAL,
    MOST_WAITING,
    NEXT_ARRIVAL,
    NUM_DONE,
    NUM_STEPS,
    NUM_TRANSFERS,
    PAUSED,
    PREFILL,
    REFUSED,
    SERIES_FULL,
    STUCK,
    TOO_LARGE,
)
from moesim.serving.transfer import assign, begin_transfer, end_transfer, unassign


@kernel
def advance(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    inst: Any,
    settings: Any,
    levels: Any,
    expected: Any,
    tables: Any,
    clock: Any,
    max_events: int,
) -> int:
    """Run until all is done, `until_us`, `max_events` instants, or the series is full.

    Everything is in the arguments: call again to go on. Returns ALL_DONE, PAUSED, SERIES_FULL (the
    bins must be made wider first), or STUCK, which is an error of this program.
    """
    cfg = settings[0]
    num_requests = len(req)
    shares = np.zeros(tables.moe_us.shape[1])
    for _ in range(max_events):
        now = np.inf
        if clock.counts[NEXT_ARRIVAL] < num_requests:
            now = req[clock.counts[NEXT_ARRIVAL]].arrival_us
        if clock.counts[NUM_TRANSFERS] > 0:
            now = min(now, clock.heap_us[0])
        for i in range(len(inst)):
            now = min(now, inst[i].busy_until_us)
        if now == np.inf:
            return ALL_DONE if _nothing_left(ranks) else STUCK
        if now > cfg.until_us:
            return ALL_DONE
        if now >= clock.bin_us[0] * clock.series.shape[1]:
            return SERIES_FULL
        _count_waiting(ranks, inst, clock, now)
        clock.now_us[0] = now
        for i in range(len(inst)):
            if inst[i].busy_until_us == now:
                _end_step(
                    req, ids, ranks, queues, running, prefix, cfg, inst, expected, clock, i, now
                )
        while clock.counts[NUM_TRANSFERS] > 0 and clock.heap_us[0] == now:
            end_transfer(req, ids, ranks, queues, prefix, cfg, clock)
        while (
            clock.counts[NEXT_ARRIVAL] < num_requests
            and req[clock.counts[NEXT_ARRIVAL]].arrival_us == now
        ):
            _arrive(req, ids, ranks, queues, prefix, cfg, levels, clock)
        for i in range(len(inst)):
            idle = inst[i].busy_until_us == np.inf and _has_work(ranks, inst, i)
            if idle or inst[i].busy_until_us == now:
                _begin_step(
                    req,
                    ids,
                    ranks,
                    queues,
                    running,
                    prefix,
                    cfg,
                    inst,
                    expected,
                    tables,
                    clock,
                    shares,
                    i,
                    now,
                )
    return PAUSED


@kernel(**INTERNAL)
def _has_work(ranks: Any, inst: Any, i: int) -> bool:
    for rank in range(inst[i].first_rank, inst[i].last_rank):
        if ranks[rank].num_waiting > 0 or ranks[rank].num_running > 0:
            return True
    return False


@kernel(**INTERNAL)
def _nothing_left(ranks: Any) -> bool:
    for rank in range(len(ranks)):
        if ranks[rank].num_waiting > 0 or ranks[rank].num_running > 0:
            return False
    return True


@kernel(**INTERNAL)
def _count_waiting(ranks: Any, inst: Any, clock: Any, now: float) -> None:
    """Add those that waited since the last instant to the series."""
    for i in range(len(inst)):
        waiting = 0
        for rank in range(inst[i].first_rank, inst[i].last_rank):
            waiting += ranks[rank].num_waiting
        if waiting > 0:
            m = 1 if inst[i].role == DECODE else 0
            _spread(clock, m, 5, clock.now_us[0], now, float(waiting))


@kernel(**INTERNAL)
def _spread(clock: Any, m: int, column: int, start: float, end: float, value: float) -> None:
    """Add `value` x time from start to end to a column of the series, bin by bin."""
    width = clock.bin_us[0]
    for place in range(int(start / width), int(end / width) + 1):
        inside = min(end, (place + 1) * width) - max(start, place * width)
        clock.series[m, place, column] += max(inside, 0.0) * value


@kernel(**INTERNAL)
def _arrive(
    req: Any, ids: Any, ranks: Any, queues: Any, prefix: Any, cfg: Any, levels: Any, clock: Any
) -> None:
    r = clock.counts[NEXT_ARRIVAL]
    clock.counts[NEXT_ARRIVAL] += 1
    if req[r].status == TOO_LARGE:
        clock.counts[NUM_DONE] += 1
        return
    rank = choose_rank(req, ids, ranks, prefix, cfg, clock, r, False)
    if not admit_level(req, ranks, cfg, levels, rank, r):
        req[r].status = REFUSED
        clock.counts[NUM_DONE] += 1
        return
    req[r].rank = rank
    req[r].queued_us = req[r].arrival_us
    assign(req, ranks, cfg, rank, r)
    push_waiting(req, ranks, queues, rank, r, False)
    clock.counts[MOST_WAITING] = max(clock.counts[MOST_WAITING], ranks[rank].num_waiting)


@kernel(**INTERNAL)
def _begin_step(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    inst: Any,
    expected: Any,
    tables: Any,
    clock: Any,
    shares: Any,
    i: int,
    now: float,
) -> None:
    first, last = inst[i].first_rank, inst[i].last_rank
    decided = now
    if cfg.steps_ahead > 0 and inst[i].busy_until_us == now:
        decided = inst[i].began_us
    tokens = 0
    while tokens == 0:
        for rank in range(first, last):
            tokens += plan_rank(
                req,
                ids,
                ranks,
                queues,
                running,
                prefix,
                cfg,
                rank,
                inst[i].max_tokens,
                inst[i].max_sequences,
                now,
                decided,
            )
        if decided == now:
            break
        decided = now
    if tokens == 0:
        inst[i].busy_until_us = np.inf
        return
    if len(shares) > 1:
        _domain_shares(req, ranks, running, first, last, tokens, shares)
    m = 1 if inst[i].role == DECODE else 0
    drafts, time, mean, slowest = choose_drafts(
        cfg, expected, tables, m, ranks, first, last, shares
    )
    inst[i].steps += 1
    if inst[i].stall_every > 0 and inst[i].steps % inst[i].stall_every == 0:
        time += inst[i].stall_us
    running, prompt, kv = 0, 0, 0.0
    for rank in range(first, last):
        running += ranks[rank].num_running
        prompt += ranks[rank].prefill_rows
        idle = ranks[rank].free_blocks + ranks[rank].num_evictable * cfg.hash_blocks
        used = 1.0 - idle / ranks[rank].total_blocks
        clock.peak_kv[m] = max(clock.peak_kv[m], used)
        kv += used / (last - first)
    inst[i].began_us = now
    inst[i].busy_until_us = _through_stages(clock, inst, i, now, time)
    inst[i].work_us = time
    inst[i].drafts = drafts
    inst[i].running = running
    inst[i].prompt_tokens = prompt
    inst[i].kv_used = kv
    inst[i].rank_mean_us = mean
    inst[i].rank_max_us = slowest
    clock.counts[NUM_STEPS] += 1
    clock.drafts[drafts] += 1


@kernel(**INTERNAL)
def _through_stages(clock: Any, inst: Any, i: int, now: float, time: float) -> float:
    """When a step that takes `time` leaves the last of its stages, equal ones, each of which serves
    one batch at a time in the order that they come."""
    stages, pipeline = inst[i].stages, inst[i].pipeline
    if stages == 1:
        return now + time
    at = now
    for s in range(stages):
        at = max(at, clock.stage_free_us[pipeline, s]) + time / stages
        clock.stage_free_us[pipeline, s] = at
    return at


@kernel(**INTERNAL)
def _domain_shares(
    req: Any, ranks: Any, running: Any, first: int, last: int, tokens: int, shares: Any
) -> None:
    shares[:] = 0.0
    for rank in range(first, last):
        for s in range(ranks[rank].num_running):
            r = running[0, rank, s]
            shares[req[r].domain] += running[1, rank, s] / tokens


@kernel(**INTERNAL)
def _end_step(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    inst: Any,
    expected: Any,
    clock: Any,
    i: int,
    now: float,
) -> None:
    role, drafts = inst[i].role, inst[i].drafts
    m = 1 if role == DECODE else 0
    produced = 0
    for rank in range(inst[i].first_rank, inst[i].last_rank):
        kept = 0
        for s in range(ranks[rank].num_running):
            r = running[0, rank, s]
            n = running[1, rank, s]
            stays = True
            if n > 0:
                gain = 0
                if req[r].computed < req[r].prefill_len:
                    req[r].computed += n
                    if req[r].computed == req[r].prefill_len:
                        gain = 1
                        if cfg.prefix_on and role != DECODE:
                            register(req, ids, ranks, prefix, cfg, rank, r)
                else:
                    accepted = accepted_drafts(cfg, expected, drafts, r, req[r].generated)
                    clock.accepted[0] += drafts
                    clock.accepted[1] += accepted
                    gain = min(1 + accepted, req[r].output - req[r].generated)
                    req[r].computed += gain
                req[r].generated += gain
                produced += gain
                if gain > 0 and req[r].first_us < 0:
                    req[r].first_us = now
                if req[r].generated >= req[r].output:
                    stays = False
                    _finish(req, ids, ranks, prefix, cfg, clock, rank, r, now)
                elif gain > 0 and role == PREFILL:
                    stays = False
                    begin_transfer(req, ids, ranks, prefix, cfg, clock, rank, r, now)
            if stays:
                running[0, rank, kept] = r
                running[1, rank, kept] = 0
                kept += 1
        ranks[rank].num_running = kept
    row = clock.series[m, int(now / clock.bin_us[0])]
    row[0] += produced
    row[1] += inst[i].prompt_tokens
    row[2] += 1
    row[7] += inst[i].rank_mean_us
    row[8] += inst[i].rank_max_us
    began = inst[i].began_us
    _spread(clock, m, 3, began, now, inst[i].work_us / max(now - began, 1e-9))
    _spread(clock, m, 4, began, now, float(inst[i].running))
    _spread(clock, m, 6, began, now, inst[i].kv_used)


@kernel(**INTERNAL)
def _finish(
    req: Any, ids: Any, ranks: Any, prefix: Any, cfg: Any, clock: Any, rank: int, r: int, now: float
) -> None:
    release(req, ids, ranks, prefix, rank, r)
    unassign(req, ranks, cfg, rank, r)
    req[r].status = FINISHED
    req[r].finish_us = now
    clock.counts[NUM_DONE] += 1
