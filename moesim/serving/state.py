"""What the compiled serving loop works on: plain arrays, grouped by whom they describe.

Times are microseconds from the first arrival. A *rank* is one data-parallel attention rank with
its own queue and KV cache; an *instance* is one engine replica, whose ranks step together. Ranks
are numbered over all instances.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.types import FloatArray, IntArray

INTERNAL = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""How what only compiled code calls is compiled: half the time, since nothing is unpacked."""

UNFINISHED, FINISHED, TOO_LARGE, REFUSED = 0, 1, 2, 3
"""Status of a request."""
BOTH, PREFILL, DECODE = 0, 1, 2
"""Role of an instance."""
ROUND_ROBIN, LEAST_LOADED, LENGTH_AWARE = 0, 1, 2
"""Router policies."""
QUEUE, REFUSE, SHORTEN, DEMOTE = 0, 1, 2, 3
"""What happens to a request of a level that meets a queue longer than the level's limit."""
ALL_DONE, PAUSED, SERIES_FULL, STUCK = 0, 1, 2, 3
"""Why the loop came back."""

SERIES = (
    "decode_tokens",
    "prefill_tokens",
    "steps",
    "busy_us",
    "running_us",
    "waiting_us",
    "kv_us",
    "rank_mean_us",
    "rank_max_us",
)
"""Sums over the time of a bin: tokens and steps when the step ends; busy_us: time in steps;
running_us, waiting_us, kv_us: time weighted with running sequences, waiting requests, and the share
of the KV cache in use (mean over ranks, as the step began); rank_mean_us, rank_max_us: what the
mean and the slowest rank compute on their own."""


SETTINGS = np.dtype(
    [
        ("block_size", "i8"),
        ("prefill_first", "i8"),
        ("reserve_answer", "i8"),
        ("steps_ahead", "i8"),
        ("router", "i8"),
        ("num_levels", "i8"),
        ("chunk_tokens", "i8"),
        ("prefix_on", "i8"),
        ("hash_blocks", "i8"),
        ("hash_tokens", "i8"),
        ("spec_max", "i8"),
        ("spec_fixed", "i8"),
        ("spec_draft_share", "f8"),
        ("spec_context", "f8"),
        ("seed", "i8"),
        ("kv_window", "i8"),
        ("shared_reads", "i8"),
        ("transfer_latency_us", "f8"),
        ("transfer_us_per_token", "f8"),
        ("until_us", "f8"),
    ]
)
"""One record, which never changes during a run; see `ServingConfig` for meanings. reserve_answer:
a request starts when there is room for its answer too (`EngineProfile.admission`), 2: where it is
decoded apart from prompts, 0: nowhere. spec_max: draft
tokens at most, spec_fixed: that many always (-1: by goodput). kv_window: tokens of a sequence that
are kept at most. hash_blocks, hash_tokens: KV blocks and tokens in one block of a prompt's content.
"""

REQUEST = np.dtype(
    [
        ("arrival_us", "f8"),
        ("queued_us", "f8"),
        ("start_us", "f8"),
        ("first_us", "f8"),
        ("finish_us", "f8"),
        ("prompt", "i8"),
        ("output", "i8"),
        ("expected", "f8"),
        ("level", "i8"),
        ("domain", "i8"),
        ("hash_start", "i8"),
        ("hash_count", "i8"),
        ("status", "i8"),
        ("generated", "i8"),
        ("computed", "i8"),
        ("prefill_len", "i8"),
        ("blocks", "i8"),
        ("shared", "i8"),
        ("cached", "i8"),
        ("arrived", "i8"),
        ("rank", "i8"),
        ("decode_rank", "i8"),
        ("preempted", "i8"),
        ("degraded", "i8"),
        ("next_waiting", "i8"),
    ]
)
"""A request. arrival_us: at the scheduler, in order. queued_us: when its queue got it, -1 after a
preemption. expected: what the router takes the output to be. output may shrink (SHORTEN) and level
grow (DEMOTE). Times are -1 where it did not happen. computed: tokens whose keys and values are in
the cache. prefill_len: tokens to compute before the next token comes (prompt, and after a
preemption also what was generated). blocks: KV blocks of its own; shared: blocks of the prompt's
content that it shares through the prefix cache. cached: prompt tokens found in the prefix cache
when first started. arrived: its cache was transferred and waits. next_waiting: the request behind
it in its queue."""

RANK = np.dtype(
    [
        ("num_running", "i8"),
        ("num_waiting", "i8"),
        ("free_blocks", "i8"),
        ("total_blocks", "i8"),
        ("num_evictable", "i8"),
        ("num_repeats", "i8"),
        ("outstanding", "i8"),
        ("backlog", "f8"),
        ("link_free_us", "f8"),
        ("decode_rows", "i8"),
        ("decode_context", "i8"),
        ("decode_repeated", "f8"),
        ("prefill_rows", "i8"),
        ("prefill_pairs", "f8"),
        ("prefill_sequences", "i8"),
    ]
)
"""A rank. outstanding: its unfinished requests; backlog: prompt and expected output tokens of
those. num_repeats: uses of cached blocks beyond the first of each. The last six are its part of the
step, as in `BatchShape`; decode_repeated: of decode_context, what another sequence reads as well.
Beside the records: `running` [2, ranks, max sequences], running requests in order of admission, and
their tokens in this step; `queues` [2, ranks, levels], first and last waiting request, -1 for none.
"""

INSTANCE = np.dtype(
    [
        ("first_rank", "i8"),
        ("last_rank", "i8"),
        ("role", "i8"),
        ("pipeline", "i8"),
        ("stages", "i8"),
        ("max_tokens", "i8"),
        ("max_sequences", "i8"),
        ("steps", "i8"),
        ("stall_every", "i8"),
        ("stall_us", "f8"),
        ("drafts", "i8"),
        ("prompt_tokens", "i8"),
        ("running", "i8"),
        ("kv_used", "f8"),
        ("rank_mean_us", "f8"),
        ("rank_max_us", "f8"),
        ("work_us", "f8"),
        ("began_us", "f8"),
        ("busy_until_us", "f8"),
    ]
)
"""An instance: ranks first_rank to last_rank (excluded). pipeline, stages: an engine with pipeline
stages is as many instances, one for each batch that it has under way, which go through the same
stages. Every `stall_every` (0: never) of its `steps` so far takes `stall_us` longer. work_us: of
busy_until_us - began_us, what is not waiting for a stage. busy_until_us is infinite while idle; the
fields before it, from drafts on, are of the step in progress."""

REFS, NEWER, OLDER = 0, 1, 2
"""Planes of `prefix` [3, ranks, hashes + 1] int32, the last column the sentinel of the list of
evictable blocks. REFS: -1 not cached, else running requests that use the block. NEWER, OLDER:
neighbours in the list, from the sentinel's NEWER (next to go) to its OLDER (last used)."""


class Clock(NamedTuple):
    """now_us: [1]. counts: see NEXT_ARRIVAL and so on. heap_us, heap_request: transfers under way,
    by time of arrival. front, back: ranks that take new requests, and transferred ones, in the
    order of turns. stage_free_us: [pipelines, stages], when a stage is done with what was sent
    through it. series: [2 roles, bins, SERIES]; bin_us: [1]. peak_kv: [2]. drafts:
    [spec_max + 1], steps by number of drafts; accepted: [2], drafts made and accepted.
    """

    now_us: FloatArray
    counts: IntArray
    heap_us: FloatArray
    heap_request: IntArray
    front: IntArray
    back: IntArray
    series: FloatArray
    bin_us: FloatArray
    peak_kv: FloatArray
    drafts: IntArray
    accepted: IntArray
    stage_free_us: FloatArray


NEXT_ARRIVAL, NUM_DONE, NUM_TRANSFERS, TURN_FRONT, TURN_BACK, NUM_STEPS, MOST_WAITING = range(7)
"""Places of `Clock.counts`: the turns are those of the router, MOST_WAITING is on one rank."""
