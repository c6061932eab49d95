"""What each rank computes in the next step: decodes, prompt chunks, admissions.

Two policies. Mixed (chunked prefill with a token budget: Sarathi-Serve, arXiv:2403.02310; SplitFuse
of DeepSpeed-FastGen, arXiv:2401.08671): running sequences decode one token each, what is left of
the budget goes to prompts begun earlier and then to waiting ones. Prefill first: a rank with
prompts to compute does only those, and decodes when there are none (or none that fit).

Waiting requests are admitted in order of level and arrival; the first that has no room blocks
those behind it: room for what the step computes of it, or, where the engine reserves answers, for
prompt and answer. Nothing is admitted in a step that preempted.
"""

from __future__ import annotations

from typing import Any

from moesim.kernels import kernel
from moesim.serving.kv_cache import pop_waiting, preempt, release, reserve, victim
from moesim.serving.prefix import count_hits, take
from moesim.serving.state import INTERNAL


@kernel(**INTERNAL)
def plan_rank(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    rank: int,
    tokens: int,
    sequences: int,
    now: float,
    decided: float,
) -> int:
    """Fill `running[1]` and the sums of the rank's step; returns the tokens planned.

    tokens: the budget of the step; sequences: most that may run at once; decided: requests that
    were queued later cannot be admitted (an engine that schedules ahead has made up its mind).
    """
    for s in range(ranks[rank].num_running):
        running[1, rank, s] = 0
    before = ranks[rank].num_running
    if cfg.prefill_first:
        left = _plan_running(req, ids, ranks, queues, running, prefix, cfg, rank, tokens, False)
        if ranks[rank].num_running == before:
            left = _admit(
                req, ids, ranks, queues, running, prefix, cfg, rank, left, sequences, now, decided
            )
        if not _any_prefill(req, ranks, running, rank):
            _plan_running(req, ids, ranks, queues, running, prefix, cfg, rank, left, True)
    else:
        left = _plan_running(req, ids, ranks, queues, running, prefix, cfg, rank, tokens, True)
        left = _plan_running(req, ids, ranks, queues, running, prefix, cfg, rank, left, False)
        if ranks[rank].num_running == before:
            _admit(
                req, ids, ranks, queues, running, prefix, cfg, rank, left, sequences, now, decided
            )
    return _sum_up(req, ranks, running, cfg, rank)


@kernel(**INTERNAL)
def _any_prefill(req: Any, ranks: Any, running: Any, rank: int) -> bool:
    for s in range(ranks[rank].num_running):
        r = running[0, rank, s]
        if running[1, rank, s] > 0 and req[r].computed < req[r].prefill_len:
            return True
    return False


@kernel(**INTERNAL)
def _plan_running(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    rank: int,
    budget: int,
    decodes: bool,
) -> int:
    """Plan the running sequences that decode, or those with prompt left; returns what is left of
    the budget. Makes room by preempting, the sequence itself at the last."""
    s = 0
    while s < ranks[rank].num_running and budget > 0:
        r = running[0, rank, s]
        left = req[r].prefill_len - req[r].computed
        if (left <= 0) != decodes or running[1, rank, s] > 0:
            s += 1
            continue
        if decodes:
            count = 1
            room = min(req[r].computed + 1 + cfg.spec_max, req[r].prompt + req[r].output)
        else:
            count = min(left, budget, cfg.chunk_tokens)
            room = req[r].computed + count
        alive = True
        while alive and not reserve(req, ranks, prefix, cfg, rank, r, room):
            place = victim(req, ranks, running, rank)
            preempt(req, ids, ranks, queues, running, prefix, cfg, rank, place)
            if place == s:
                alive = False
            elif place < s:
                s -= 1
        if alive:
            running[1, rank, s] = count
            budget -= count
            s += 1
    return budget


@kernel(**INTERNAL)
def _admit(
    req: Any,
    ids: Any,
    ranks: Any,
    queues: Any,
    running: Any,
    prefix: Any,
    cfg: Any,
    rank: int,
    budget: int,
    sequences: int,
    now: float,
    decided: float,
) -> int:
    """Start waiting requests while budget, sequences and memory last."""
    level = 0
    while budget > 0 and ranks[rank].num_running < sequences and level < cfg.num_levels:
        r = queues[0, rank, level]
        if r < 0 or req[r].queued_us > decided:
            level += 1
            continue
        whole = req[r].prompt + req[r].output
        if req[r].arrived == 1:
            room = min(req[r].prefill_len + 1 + cfg.spec_max, whole)
            if cfg.reserve_answer:
                room = whole
            if not reserve(req, ranks, prefix, cfg, rank, r, room):
                break
            req[r].arrived = 0
            req[r].computed = req[r].prefill_len
            count = 1
        else:
            hits = count_hits(req, ids, prefix, cfg, rank, r) if cfg.prefix_on else 0
            for j in range(hits):
                take(ranks, prefix, rank, ids[req[r].hash_start + j])
            req[r].shared = hits
            found = hits * cfg.hash_tokens
            count = min(req[r].prefill_len - found, budget, cfg.chunk_tokens)
            room = whole if cfg.reserve_answer == 1 else found + count
            if not reserve(req, ranks, prefix, cfg, rank, r, room):
                release(req, ids, ranks, prefix, rank, r)
                break
            req[r].computed = found
            if req[r].start_us < 0:
                req[r].start_us = now
                req[r].cached = found
        pop_waiting(req, ranks, queues, rank, level)
        place = ranks[rank].num_running
        running[0, rank, place] = r
        running[1, rank, place] = count
        ranks[rank].num_running = place + 1
        budget -= count
    return budget


@kernel(**INTERNAL)
def _sum_up(req: Any, ranks: Any, running: Any, cfg: Any, rank: int) -> int:
    """The rank's part of the step in the terms of `BatchShape`; returns its tokens. Blocks in use
    more than once are taken as spread over decodes and prompts alike."""
    rows, context, prompt, pairs, chunks = 0, 0, 0, 0.0, 0
    for s in range(ranks[rank].num_running):
        n = running[1, rank, s]
        if n == 0:
            continue
        r = running[0, rank, s]
        if req[r].computed >= req[r].prefill_len:
            rows += 1
            context += req[r].computed
        else:
            prompt += n
            chunks += 1
            pairs += n * float(req[r].computed) + n * (n + 1.0) / 2.0
    ranks[rank].decode_rows = rows
    ranks[rank].decode_context = context
    ranks[rank].decode_repeated = 0.0
    if cfg.shared_reads and rows > 0:
        share = rows / ranks[rank].num_running
        repeated = ranks[rank].num_repeats * cfg.hash_tokens * share
        ranks[rank].decode_repeated = min(repeated, float(context))
    ranks[rank].prefill_rows = prompt
    ranks[rank].prefill_pairs = pairs
    ranks[rank].prefill_sequences = chunks
    return rows + prompt
