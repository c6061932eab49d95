"""Closed-loop load tests as benchmark tools run them: a fixed number of requests in flight.

The client sends `concurrency` requests at once and a new one whenever one ends, `num_requests` in
all, lengths drawn uniformly from [range_ratio x length, length]. That is how serving benchmarks
take their TTFT and TPOT by (input length, output length, concurrency). The engine runs step by
step; stretches of steps in which nothing but the contexts changes are taken at once, which is
exact since a decode step's time is linear in the cached tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError
from moesim.serving.batch import BatchShape
from moesim.serving.memory import require_fit
from moesim.serving.static_rank import Rank, Request
from moesim.types import stream

if TYPE_CHECKING:
    from moesim.serving.speculative import Speculation
    from moesim.serving.step_cost import EngineStepCost


@dataclass(frozen=True)
class LoadTest:
    """A closed-loop test: lengths in tokens, `num_requests` 10 x concurrency where None.

    range_ratio: shortest length over the longest, of prompts and of answers; 1 is all equal.
    """

    input_tokens: int
    output_tokens: int
    concurrency: int
    num_requests: int | None = None
    range_ratio: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", "give a number of 1 or more")
        if self.num_requests is not None and self.num_requests < 1:
            raise InputError(f"num_requests is {self.num_requests}", "give 1 or more")
        if not 0 < self.range_ratio <= 1:
            raise InputError(
                f"range_ratio is {self.range_ratio}", "give a ratio above 0, at most 1"
            )


@dataclass(frozen=True)
class StaticResult:
    """Times of the requests of a test, milliseconds; arrays by request in order of sending.

    batches: of `concurrency` requests each, alike, that were under way at a time; the arrays are of
    one of them.
    """

    ttft_ms: np.ndarray
    tpot_ms: np.ndarray
    duration_s: float
    output_tokens: int
    answers: np.ndarray
    concurrency: int
    batches: int = 1

    @property
    def mean_ttft_ms(self) -> float:
        """Mean time to the first token."""
        return float(self.ttft_ms.mean())

    @property
    def mean_tpot_ms(self) -> float:
        """Mean over requests of the time per token after the first."""
        return float(np.nanmean(self.tpot_ms)) if np.isfinite(self.tpot_ms).any() else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens of all requests over the duration of the test, as benchmark tools say."""
        return self.output_tokens / self.duration_s

    @property
    def has_middle(self) -> bool:
        """Whether requests are left between the first ones in flight and the last."""
        return len(self.answers) >= 3 * self.concurrency

    @property
    def steady_output_tokens_per_s(self) -> float:
        """Output tokens per second with `concurrency` requests in flight for ever: their tokens
        over the mean time of one (Little's law), without the first ones, which come at once, and
        the last ones, beside which fewer run (INV-12); of all where there are none between."""
        skip = self.concurrency if self.has_middle else 0
        own = slice(skip, len(self.answers) - skip)
        more = np.where(self.answers > 1, np.nan_to_num(self.tpot_ms) * (self.answers - 1), 0.0)
        mean_s = float((self.ttft_ms + more)[own].mean()) / 1e3
        in_flight = min(self.concurrency, len(self.answers)) * self.batches
        return in_flight * float(self.answers[own].mean()) / mean_s


def run_load_test(
    cost: EngineStepCost,
    test: LoadTest,
    speculation: Speculation | None = None,
    balance_steps: int = 0,
) -> StaticResult:
    """Run the test on one deployment.

    A request reaches the scheduler after the engine's `outside_us`, and is admitted to the first
    step decided on thereafter, `steps_ahead` steps before that step runs, when the KV cache
    has room as the engine's `admission` wants it. Where a full cache preempts, the tokens given so
    far are computed again as part of the prompt. Requests go to the DP rank with the fewest.
    Prompts are served in order, in chunks of what the step's token budget leaves ("mixed"), or in
    steps of their own ("prefill_first").

    With pipeline stages as many batches are under way, alike, each with its share of the requests
    and the KV cache; one of them is run, and nothing of it waits for another.

    speculation: every step drafts `max_drafts` tokens and gives each sequence the mean number that
    is accepted; the length is not chosen step by step as `simulate_serving` does.
    balance_steps: prompts wait as many steps for one on every DP rank while all ranks decode
    (TensorRT-LLM's attention_dp_config with enable_balance: its timeout_iters).

    Raises InfeasibleError where one request does not fit into the KV cache.
    """
    deployment = cost.deployment
    batches = min(deployment.pp, test.concurrency)
    memory = require_fit(deployment, batches * (test.input_tokens + test.output_tokens))
    total = ceil((test.num_requests or 10 * test.concurrency) / batches)
    test = replace(test, concurrency=ceil(test.concurrency / batches), num_requests=total)
    rng = stream(test.seed)
    prompts = _lengths(rng, test.input_tokens, test.range_ratio, total)
    answers = _lengths(rng, test.output_tokens, test.range_ratio, total)
    whole = deployment.engine.admission == "whole"
    room = memory.kv_token_capacity // batches
    ranks = [Rank(room, whole=whole) for _ in range(deployment.dp)]
    ttft, tpot = np.zeros(total), np.full(total, np.nan)
    engine = _Engine(cost, ranks, speculation, balance_steps)
    sent = min(test.concurrency, total)
    for i in range(sent):
        engine.send(Request(i, int(prompts[i]), int(answers[i]), 0.0))
    finished = 0
    while finished < total:
        for request in engine.step():
            finished += 1
            first = engine.now_us if request.first_us is None else request.first_us
            ttft[request.number] = first - request.sent_us
            if answers[request.number] > 1:
                tpot[request.number] = (engine.now_us - first) / (answers[request.number] - 1)
            if sent < total:
                new = Request(sent, int(prompts[sent]), int(answers[sent]), engine.now_us)
                engine.send(new)
                sent += 1
    return StaticResult(
        ttft_ms=ttft / 1e3,
        tpot_ms=tpot / 1e3,
        duration_s=engine.now_us / 1e6,
        output_tokens=int(answers.sum()) * batches,
        answers=answers,
        concurrency=test.concurrency,
        batches=batches,
    )


class _Engine:
    def __init__(
        self,
        cost: EngineStepCost,
        ranks: list[Rank],
        speculation: Speculation | None,
        balance_steps: int,
    ) -> None:
        self.cost, self.ranks, self.now_us = cost, ranks, 0.0
        self.balance_steps, self.waited = balance_steps, 0
        self.drafts, self.gain, self.drafting = 0, 1.0, 0.0
        if speculation is not None:
            self.drafts = speculation.max_drafts
            self.gain = float(speculation.expected()[-1])
            self.drafting = self.drafts * speculation.draft_share
        deployment = cost.deployment
        self.budget = deployment.max_batch_tokens
        self.max_sequences = max(1, deployment.max_sequences // deployment.pp)
        self.profile = deployment.engine
        self.mixed = self.profile.prefill_policy == "mixed"
        # Starts of the last steps: a step was decided on when the oldest of them started.
        self.starts_us = deque([0.0], maxlen=1 + self.profile.steps_ahead)

    def send(self, request: Request) -> None:
        num_gpus = self.cost.deployment.num_gpus
        delay = self.profile.outside_us(num_gpus, float(request.prompt))
        request.ready_us = request.sent_us + delay
        rank = min(self.ranks, key=lambda r: len(r.waiting) + len(r.prompts) + len(r.running))
        rank.waiting.append(request)

    def step(self) -> list[Request]:
        """One step with prompts in it, or as many decode steps as nothing else happens in."""
        if not any(rank.prompts or rank.running for rank in self.ranks):
            first = min(rank.waiting[0].ready_us for rank in self.ranks if rank.waiting)
            self.now_us = max(self.now_us, first)
            self.starts_us.clear()
        self.starts_us.append(self.now_us)
        for rank in self.ranks:
            before = len(rank.waiting)
            rank.make_room()
            if len(rank.waiting) == before:
                self._admit(rank)
        if not any(rank.prompts for rank in self.ranks):
            return self._decode()
        if self._holds():
            return self._decode(self.balance_steps - self.waited)
        self.waited = 0
        chunks = [self._chunks(rank) for rank in self.ranks]
        decode = [len(r.running) if self.mixed else 0 for r in self.ranks]
        context = [rank.context if self.mixed else 0.0 for rank in self.ranks]
        rows = [float(sum(n for _, n in rank)) for rank in chunks]
        pairs = [sum(n * q.done_prompt + n * (n + 1) / 2.0 for q, n in rank) for rank in chunks]
        self.now_us += self._step_us(decode, context, rows, pairs, [len(c) for c in chunks])
        ended: list[Request] = []
        for rank, taken in zip(self.ranks, chunks, strict=True):
            if self.mixed:
                ended += rank.produce(self.gain)
            for request, tokens in taken:
                request.done_prompt += tokens
                if request.done_prompt == request.prompt:
                    rank.prompts.remove(request)
                    request.first_us = request.first_us or self.now_us
                    rank.start(request)
            ended += rank.produce(0)
        return ended

    def _step_us(
        self,
        decode: list[int],
        context: list[float],
        rows: list[float],
        pairs: list[float],
        chunks: list[float],
    ) -> float:
        """One step, with the rows and the drafting of speculation where there is decoding."""
        base = self.cost.one_us(decode, context, rows, pairs, chunks)
        if not self.drafts:
            return base
        latent = self.cost.deployment.model.attention.kind == "mla"
        again = 1 + self.drafts if latent else 1
        verified = self.cost.one_us(
            [n * (1 + self.drafts) for n in decode],
            [tokens * again for tokens in context],
            rows,
            pairs,
            chunks,
        )
        time = verified + self.drafting * base * any(decode)
        if self.cost.deployment.mtp:
            batch = BatchShape.of(decode, context, rows, pairs, chunks)
            time += float(self.cost.drafting_us(batch, self.drafts * any(decode), float(latent)))
        return time

    def _holds(self) -> bool:
        """Whether prompts are to wait for ranks that have none."""
        some_lack = not all(rank.prompts for rank in self.ranks)
        all_decode = all(rank.running for rank in self.ranks)
        return some_lack and all_decode and self.waited < self.balance_steps

    def _decode(self, most: int | None = None) -> list[Request]:
        """`most` steps while prompts are held."""
        busy = [rank for rank in self.ranks if rank.running]
        left = ceil(min(rank.running[0][0] - rank.clock for rank in busy) / self.gain)
        for rank in busy:
            if not rank.whole:
                room = (rank.capacity - rank.used()) // (len(rank.running) * self.gain)
                left = min(left, max(1, int(room)))
        decode = [len(rank.running) for rank in self.ranks]
        none = [0.0] * len(self.ranks)

        def step_us(ahead: float) -> float:
            more = ahead * self.gain
            context = [rank.context + more * len(rank.running) for rank in self.ranks]
            return self._step_us(decode, context, none, none, none)

        coming = [r.waiting[0].ready_us for r in self.ranks if r.waiting and self._fits(r)]
        if coming:
            until = max(0.0, min(coming) - self.now_us)
            left = min(left, ceil(until / step_us(0.0)) + 1)
        if most is not None:
            left = min(left, most)
            self.waited += left
        time = step_us((left - 1) / 2.0)
        for k in range(max(1, left - self.profile.steps_ahead), left):
            self.starts_us.append(self.now_us + k * time)
        self.now_us += left * time
        return [q for rank in self.ranks for q in rank.produce(left * self.gain)]

    def _admit(self, rank: Rank) -> None:
        while rank.waiting and self._fits(rank):
            if rank.waiting[0].ready_us > self.starts_us[0]:
                return
            rank.admit(rank.waiting.popleft())

    def _fits(self, rank: Rank) -> bool:
        if len(rank.running) + len(rank.prompts) >= self.max_sequences:
            return False
        return rank.fits(rank.waiting[0])

    def _chunks(self, rank: Rank) -> list[tuple[Request, int]]:
        left = self.budget - (len(rank.running) if self.mixed else 0)
        taken = []
        for request in rank.prompts:
            tokens = min(left, request.prompt - request.done_prompt)
            if tokens <= 0:
                break
            taken.append((request, tokens))
            left -= tokens
        return taken


def _lengths(rng: np.random.Generator, longest: int, ratio: float, count: int) -> np.ndarray:
    shortest = max(1, int(longest * ratio))
    return rng.integers(shortest, longest + 1, size=count)
