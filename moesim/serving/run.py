"""Requests through a service: `simulate_serving`.

The engine is in `loop`, compiled; `reference` is the same in readable form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cost.collective import ASSUMED_NIC_EFFICIENCY, ASSUMED_NIC_GB_PER_S
from moesim.cost.curves import weakest
from moesim.errors import InfeasibleError, InputError, MismatchError
from moesim.serving.config import ACTIONS, ROUTERS, Level, ServingConfig
from moesim.serving.memory import gpu_memory, require_fit
from moesim.serving.result import ServingResult
from moesim.serving.state import (
    BOTH,
    DECODE,
    INSTANCE,
    NUM_DONE,
    PREFILL,
    RANK,
    REFS,
    REQUEST,
    SERIES,
    SERIES_FULL,
    SETTINGS,
    STUCK,
    TOO_LARGE,
    Clock,
)
from moesim.serving.step_cost import EngineStepCost
from moesim.serving.step_table import StepTables, tables_of
from moesim.types import FloatArray, Progress, stream

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests

EVENTS_A_CALL = 20_000
NUM_BINS = 1024
MAX_PREFIX_ENTRIES = 200_000_000
LENGTHS = 1


def simulate_serving(
    deployment: Deployment,
    requests: Requests,
    config: ServingConfig | None = None,
    *,
    progress: Progress | None = None,
) -> ServingResult:
    """Serve `requests` with replicas of `deployment`, as `config` says.

    Deterministic: the same inputs give the same bytes. `progress(done, total)` counts requests.
    A request whose prompt and output together exceed a rank's KV cache is counted as rejected.
    Each request reaches the scheduler after its time outside the engine (`EngineProfile`).
    Pipeline stages: the engine has as many batches under way, each with its share of the sequences
    and of the KV cache (the engine's cache is one), stages take equal times, and a batch waits
    where the one before it is slower; that is the bubble.
    Ignored: time between the service's machines other than for KV caches, cancelled requests,
    and the host's work but for what the engine's profile holds.
    Raises InfeasibleError where the model does not fit, or no request does; MismatchError for
    blocks of requests that KV blocks do not divide.
    """
    config = ServingConfig() if config is None else config
    parts = [deployment] if config.decode is None else [deployment, config.decode]
    for part in parts:
        require_fit(part)
        _check_drafting(part, config)
    costs = [EngineStepCost(part) for part in parts]
    routing = config.routing
    if routing is not None:
        requests = routing.label(requests)
    tables = tables_of(
        costs,
        None if routing is None else [routing.moe_tables(c) for c in costs],
        config.speculation.max_drafts if config.speculation else 0,
    )
    bases = [*(c.basis for c in costs), requests.basis]
    notes = list(dict.fromkeys(note for c in costs for note in (*c.rests_on, *c.notes)))
    return run_tables(
        deployment,
        requests,
        config,
        tables,
        progress=progress,
        basis=weakest(*bases),
        notes=tuple(notes),
    )


def _check_drafting(part: Deployment, config: ServingConfig) -> None:
    """A layer that drafts and a share of the step for drafting are one or the other."""
    spec = config.speculation
    if part.mtp and (spec is None or spec.draft_share > 0):
        raise InputError(
            "a multi-token-prediction layer that drafts"
            + (", but no speculation" if spec is None else ", and a `draft_share` as well"),
            "give a speculation whose `draft_share` is 0, or leave `mtp` out",
        )


def run_tables(
    deployment: Deployment,
    requests: Requests,
    config: ServingConfig,
    tables: StepTables,
    *,
    progress: Progress | None = None,
    basis: Any = "assumed",
    notes: tuple[str, ...] = (),
    capacity_tokens: tuple[int, ...] | None = None,
) -> ServingResult:
    """`simulate_serving` with given step times; `capacity_tokens`: KV cache of a rank of each
    role, by default what memory leaves."""
    from moesim.serving.loop import advance

    parts = [deployment] if config.decode is None else [deployment, config.decode]
    if capacity_tokens is None:
        capacity_tokens = tuple(gpu_memory(part).kv_token_capacity for part in parts)
    prefix_on = _prefix_on(requests, config, deployment.kv_window)
    settings = _settings(parts, requests, config, prefix_on)
    levels = _levels(requests, config)
    inst = _instances(parts, config)
    ranks = _ranks(config, inst, capacity_tokens)
    req, order = _requests(requests, config, deployment, ranks)
    clock = _clock(requests, inst, int(settings["spec_max"][0]))
    state = (
        req,
        requests.block_ids,
        ranks,
        np.full((2, len(ranks), len(levels)), -1, np.int64),
        np.zeros((2, len(ranks), int(inst["max_sequences"].max())), np.int64),
        _prefix(requests, len(ranks), prefix_on),
        inst,
        settings,
        np.array([(ACTIONS[v.action], v.limit, v.share) for v in levels], np.float64),
        config.speculation.expected() if config.speculation else np.ones(1),
        tables,
        clock,
    )
    total = len(requests)
    code = -1
    while True:
        code = advance(*state, EVENTS_A_CALL)
        if progress is not None:
            progress(int(clock.counts[NUM_DONE]), total)
        if code == SERIES_FULL:
            _coarsen(clock)
        elif code in (0, STUCK):
            break
    if code == STUCK:
        raise RuntimeError("requests wait for a step that never comes")
    own = np.empty_like(req)
    own[order] = req
    return ServingResult.of(deployment, requests, config, own, clock, basis, notes, prefix_on)


def _prefix_on(requests: Requests, config: ServingConfig, kept: int | None) -> bool:
    known = int(requests.block_indptr[-1]) > 0
    if config.prefix_cache and not known:
        raise InputError(
            "a prefix cache was asked for, but the requests do not tell their content",
            "use requests with hash_ids (Mooncake's format), or leave the prefix cache off",
        )
    on = known if config.prefix_cache is None else config.prefix_cache
    if config.shared_reads and not on:
        raise InputError(
            "shared reads of a prefix cache that is off",
            "use requests with hash_ids (Mooncake's format), or leave `shared_reads` out",
        )
    if on and kept:
        raise InputError(
            "a prefix cache with a KV cache of the last tokens alone: it does not keep beginnings",
            "switch the prefix cache off, or leave `kv_window` out",
        )
    if on and requests.block_tokens % config.block_size:
        raise MismatchError(
            f"KV blocks of {config.block_size} tokens do not divide the requests' blocks of "
            f"{requests.block_tokens}",
            "choose a block size that does, as 16",
        )
    return on


def _levels(requests: Requests, config: ServingConfig) -> list[Level]:
    """A level for each priority that occurs, and those given beyond."""
    missing = len(np.unique(requests.priority)) - len(config.levels)
    return [*config.levels, *[Level()] * missing]


def _settings(
    parts: list[Deployment], requests: Requests, config: ServingConfig, prefix_on: bool
) -> Any:
    spec = config.speculation
    latency, per_token = _transfer(parts, config)
    first = config.prefill_first
    if first is None:
        first = parts[0].engine.prefill_policy == "prefill_first"
    out = np.zeros(1, SETTINGS)
    row = {
        "block_size": config.block_size,
        "prefill_first": first,
        "reserve_answer": len(parts) if parts[-1].engine.admission == "whole" else 0,
        "steps_ahead": parts[0].engine.steps_ahead > 0,
        "router": ROUTERS[config.router],
        "num_levels": len(_levels(requests, config)),
        "chunk_tokens": config.chunk_tokens or 1 << 40,
        "prefix_on": prefix_on,
        "hash_blocks": requests.block_tokens // config.block_size,
        "hash_tokens": requests.block_tokens,
        "spec_max": spec.max_drafts if spec else 0,
        "spec_fixed": spec.max_drafts if spec and spec.fixed else -1,
        "spec_draft_share": spec.draft_share if spec else 0.0,
        "spec_context": parts[0].model.attention.kind == "mla",
        "seed": config.seed,
        "kv_window": parts[0].kv_window or 1 << 40,
        "shared_reads": config.shared_reads,
        "transfer_latency_us": latency,
        "transfer_us_per_token": per_token,
        "until_us": config.until_s * 1e6,
    }
    for name, value in row.items():
        out[name] = value
    return out


def _transfer(parts: list[Deployment], config: ServingConfig) -> tuple[float, float]:
    """Latency and microseconds a token of sending a KV cache from one rank to another: over one
    NIC for each TP rank of the narrower side."""
    if len(parts) == 1:
        return 0.0, 0.0
    rate = config.transfer_gb_per_s
    if rate is None:
        nic = min(part.cluster.nic_gb_per_s or ASSUMED_NIC_GB_PER_S for part in parts)
        rate = nic * ASSUMED_NIC_EFFICIENCY * min(part.tp for part in parts)
    model, dtype = parts[0].model, parts[0].kv_dtype
    size = model.kv_bytes_per_token(dtype) * parts[0].kv_scale
    if parts[0].mtp:
        size += model.mtp_kv_bytes_per_token(dtype) * parts[0].kv_scale
    return config.transfer_latency_us, size / (rate * 1e3)


def _instances(parts: list[Deployment], config: ServingConfig) -> Any:
    counts = [config.replicas] if len(parts) == 1 else [config.replicas, config.decode_replicas]
    roles = [BOTH] if len(parts) == 1 else [PREFILL, DECODE]
    engines = [
        (part, role) for part, role, n in zip(parts, roles, counts, strict=True) for _ in range(n)
    ]
    of = [(part, role, e) for e, (part, role) in enumerate(engines) for _ in range(part.pp)]
    last = np.cumsum([part.dp for part, _, _ in of])
    out = np.zeros(len(of), INSTANCE)
    out["first_rank"] = last - [part.dp for part, _, _ in of]
    out["last_rank"] = last
    out["role"] = [role for _, role, _ in of]
    out["pipeline"] = [engine for _, _, engine in of]
    out["stages"] = [part.pp for part, _, _ in of]
    out["max_tokens"] = [part.max_batch_tokens for part, _, _ in of]
    out["max_sequences"] = [max(1, part.max_sequences // part.pp) for part, _, _ in of]
    out["busy_until_us"] = np.inf
    for role, stall in zip(dict.fromkeys(roles), config.stalls, strict=False):
        out["stall_every"][out["role"] == role] = stall.every_steps
        out["stall_us"][out["role"] == role] = stall.us
    return out


def _ranks(config: ServingConfig, inst: Any, capacity_tokens: tuple[int, ...]) -> Any:
    capacity = np.array([capacity_tokens[int(role == DECODE)] for role in inst["role"]])
    blocks = capacity // inst["stages"] // config.block_size
    blocks = np.repeat(blocks, inst["last_rank"] - inst["first_rank"])
    out = np.zeros(len(blocks), RANK)
    out["free_blocks"] = blocks
    out["total_blocks"] = blocks
    return out


def _requests(
    requests: Requests, config: ServingConfig, deployment: Deployment, ranks: Any
) -> tuple[Any, Any]:
    """Requests as they reach the scheduler, and that order."""
    kept = deployment.kv_window
    total = requests.prompt_tokens + requests.output_tokens
    if kept is not None:
        total = np.minimum(total, kept)
    room = int(ranks["total_blocks"].min()) * config.block_size
    too_large = total > room
    if too_large.all():
        raise InfeasibleError(
            f"no request fits: the KV cache of a rank holds {room:,} tokens, the shortest request"
            f" has {int(total.min()):,}",
            "use more GPUs, a narrower KV precision, or a larger tp",
        )
    out = np.zeros(len(requests), REQUEST)
    out["status"] = np.where(too_large, TOO_LARGE, 0)
    tokens = requests.prompt_tokens.astype(np.float64)
    outside = deployment.engine.outside_us(deployment.num_gpus, tokens)
    out["arrival_us"] = requests.arrival_s * 1e6 + outside
    for name in (
        "queued_us",
        "start_us",
        "first_us",
        "finish_us",
        "rank",
        "decode_rank",
        "next_waiting",
    ):
        out[name] = -1
    out["prompt"] = requests.prompt_tokens
    out["prefill_len"] = requests.prompt_tokens
    out["output"] = requests.output_tokens
    out["expected"] = _expected_output(requests, config)
    out["level"] = np.unique(requests.priority, return_inverse=True)[1]
    out["domain"] = requests.domain
    out["hash_start"] = requests.block_indptr[:-1]
    out["hash_count"] = np.diff(requests.block_indptr)
    order = np.argsort(out["arrival_us"], kind="stable")
    return out[order], order


def _expected_output(requests: Requests, config: ServingConfig) -> FloatArray:
    """[R]: the mean output, or the own one off by a log-normal factor of `length_error`."""
    output = requests.output_tokens.astype(np.float64)
    if config.length_error is None:
        return np.full(len(output), output.mean())
    drawn = stream(config.seed, LENGTHS).standard_normal(len(output))
    return np.asarray(output * np.exp(config.length_error * drawn), np.float64)


def _prefix(requests: Requests, num_ranks: int, on: bool) -> Any:
    blocks = int(requests.block_ids.max(initial=-1)) + 1 if on else 0
    if num_ranks * (blocks + 1) > MAX_PREFIX_ENTRIES:
        raise InputError(
            f"a prefix cache of {num_ranks} ranks and {blocks:,} different blocks is too large to"
            " follow",
            "use fewer requests, or switch the prefix cache off",
        )
    out = np.full((3, num_ranks, blocks + 1), blocks, np.int32)
    out[REFS] = -1
    return out


def _clock(requests: Requests, inst: Any, max_drafts: int) -> Clock:
    per_instance = inst["last_rank"] - inst["first_rank"]
    role = np.repeat(inst["role"], per_instance)
    ranks = np.arange(len(role))
    turns = np.lexsort((ranks, ranks - np.repeat(inst["first_rank"], per_instance)))
    decodes = role[turns] == DECODE
    room = len(requests) if decodes.any() else 1
    width_us = max(requests.span_s * 1e6 * 1.25 / NUM_BINS, 1e3)
    return Clock(
        now_us=np.zeros(1),
        counts=np.zeros(8, np.int64),
        heap_us=np.zeros(room),
        heap_request=np.zeros(room, np.int64),
        front=turns[~decodes].astype(np.int64),
        back=turns[decodes].astype(np.int64),
        series=np.zeros((2, NUM_BINS, len(SERIES))),
        bin_us=np.array([width_us]),
        peak_kv=np.zeros(2),
        drafts=np.zeros(max_drafts + 1, np.int64),
        accepted=np.zeros(2, np.int64),
        stage_free_us=np.zeros((int(inst["pipeline"].max()) + 1, int(inst["stages"].max()))),
    )


def _coarsen(clock: Clock) -> None:
    """Make the bins of the series twice as wide."""
    pairs = clock.series.reshape(2, NUM_BINS // 2, 2, len(SERIES)).sum(axis=2)
    clock.series[:] = 0.0
    clock.series[:, : NUM_BINS // 2] = pairs
    clock.bin_us[0] *= 2.0
