"""The serving loop once more, slow and readable, on SimPy: what the compiled one is held to.

Same rules as `scheduler`, `kv_cache`, `prefix`, `router` and `loop`, written independently with
objects and lists. Left out: quality levels and speculative decoding. At one instant the order of
events may differ where a step ends exactly when a request arrives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, inf, nan
from typing import TYPE_CHECKING, Any

import simpy

if TYPE_CHECKING:
    from moesim.serving.requests import Requests

RankLoad = tuple[int, int, int, float, int]
"""Of one rank in one step: decoding sequences, their cached tokens, prompt tokens, their
query-key pairs, prompts."""
StepTime = Callable[[Sequence[RankLoad]], float]
"""Microseconds of a step by the loads of its ranks."""


@dataclass(eq=False)
class _Request:
    number: int
    prompt: int
    output: int
    priority: int
    blocks: list[int]
    computed: int = 0
    generated: int = 0
    to_compute: int = 0
    own_blocks: int = 0
    shared: list[int] = field(default_factory=list)
    transferred: bool = False
    preempted: int = 0
    cached: int = 0
    start_us: float = nan
    queued_us: float = -inf
    first_us: float = nan
    finish_us: float = nan
    rank: int = -1


@dataclass(eq=False)
class Rank:
    """A data-parallel rank: `capacity` KV blocks of `block_size`, prompt blocks of `hash_tokens`
    (0: no prefix cache). users: cached blocks in use and by how many, unused: the others, the last
    used at the end. sending: own blocks of requests whose cache is being sent away."""

    capacity: int
    block_size: int
    hash_tokens: int
    max_sequences: int
    max_tokens: int
    prefill_first: bool
    number: int = 0
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    plan: dict[_Request, int] = field(default_factory=dict)
    users: dict[int, int] = field(default_factory=dict)
    unused: OrderedDict[int, None] = field(default_factory=OrderedDict)
    outstanding: int = 0
    backlog: float = 0.0
    link_free_us: float = 0.0
    sending: int = 0
    decided: float = 0.0

    def free(self) -> int:
        """Blocks that nothing holds."""
        held = sum(r.own_blocks for r in self.running) + self.sending
        return self.capacity - held - self.per_hash * (len(self.users) + len(self.unused))

    @property
    def per_hash(self) -> int:
        return self.hash_tokens // self.block_size

    def hits(self, r: _Request) -> int:
        """Leading blocks of the prompt that are cached."""
        if not self.hash_tokens:
            return 0
        count = 0
        for block in r.blocks[: (r.prompt - 1) // self.hash_tokens]:
            if block not in self.users and block not in self.unused:
                break
            count += 1
        return count

    def reserve(self, r: _Request, tokens: int) -> bool:
        """Own blocks for `tokens` cached tokens, evicting unused cached blocks."""
        need = ceil(tokens / self.block_size) - r.own_blocks - len(r.shared) * self.per_hash
        free = self.free()
        if need > free + len(self.unused) * self.per_hash:
            return False
        while need > free:
            self.unused.popitem(last=False)
            free += self.per_hash
        r.own_blocks += max(0, need)
        return True

    def release(self, r: _Request) -> None:
        """All blocks of `r`."""
        r.own_blocks = 0
        for block in reversed(r.shared):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.unused[block] = None
        r.shared = []

    def share(self, r: _Request, block: int) -> None:
        """One more user of a block."""
        self.unused.pop(block, None)
        self.users[block] = self.users.get(block, 0) + 1
        r.shared.append(block)

    def register(self, r: _Request) -> None:
        """The prompt is computed: its whole blocks can be found from now on."""
        if self.hash_tokens:
            for block in r.blocks[len(r.shared) : r.prompt // self.hash_tokens]:
                self.share(r, block)
                r.own_blocks -= self.per_hash

    def preempt(self) -> _Request:
        """Stop the least urgent request that was admitted last."""
        worst = max(r.priority for r in self.running)
        victim = [r for r in self.running if r.priority == worst][-1]
        self.release(victim)
        self.running.remove(victim)
        self.plan.pop(victim, None)
        victim.computed, victim.to_compute = 0, victim.prompt + victim.generated
        victim.preempted += 1
        victim.queued_us = -inf
        self.waiting.insert(0, victim)
        return victim

    def make_plan(self, now: float, decided: float) -> RankLoad:
        """Tokens of every request in the next step, of those queued by the time `decided`."""
        self.decided = decided
        self.plan = {}
        before = len(self.running)
        budget = self.max_tokens
        if self.prefill_first:
            budget = self.plan_running(budget, decodes=False)
            if len(self.running) == before:
                budget = self.admit(budget, now)
            if not any(r.computed < r.to_compute for r in self.plan):
                self.plan_running(budget, decodes=True)
        else:
            budget = self.plan_running(budget, decodes=True)
            budget = self.plan_running(budget, decodes=False)
            if len(self.running) == before:
                self.admit(budget, now)
        decodes = [r for r in self.plan if r.computed >= r.to_compute]
        prompts = [r for r in self.plan if r.computed < r.to_compute]
        pairs = sum(
            self.plan[r] * r.computed + self.plan[r] * (self.plan[r] + 1) / 2 for r in prompts
        )
        context = sum(r.computed for r in decodes)
        return len(decodes), context, sum(self.plan[r] for r in prompts), pairs, len(prompts)

    def plan_running(self, budget: int, decodes: bool) -> int:
        """Of running requests those that decode, or those with prompt left."""
        for r in list(self.running):
            left = r.to_compute - r.computed
            if r not in self.running or r in self.plan or (left <= 0) != decodes or budget <= 0:
                continue
            count = 1 if decodes else min(left, budget)
            while r in self.running and not self.reserve(r, r.computed + count):
                self.preempt()
            if r in self.running:
                self.plan[r] = count
                budget -= count
        return budget

    def admit(self, budget: int, now: float) -> int:
        """Waiting requests by priority and arrival, until one has no room."""
        while budget > 0 and self.waiting and len(self.running) < self.max_sequences:
            known = [w for w in self.waiting if w.queued_us <= self.decided]
            if not known:
                break
            r = min(known, key=lambda w: w.priority)
            if r.transferred:
                count = 1
                if not self.reserve(r, r.to_compute + 1):
                    break
                r.transferred, r.computed = False, r.to_compute
            else:
                hits = self.hits(r)
                for block in r.blocks[:hits]:
                    self.share(r, block)
                found = hits * self.hash_tokens
                count = min(r.to_compute - found, budget)
                if not self.reserve(r, found + count):
                    self.release(r)
                    break
                r.computed = found
                if r.start_us != r.start_us:
                    r.start_us, r.cached = now, found
            self.waiting.remove(r)
            self.running.append(r)
            self.plan[r] = count
            budget -= count
        return budget


@dataclass(eq=False)
class Service:
    """front: instances (lists of ranks) that take requests; back: instances that decode what the
    front sends them, empty for none. front_us, back_us: times of their steps. router as in
    `ServingConfig`; transfer: latency and microseconds per token; steps_ahead: whether a step's
    requests are decided on when the step before begins. stalls: (steps between, microseconds) of
    the front's steps, then of the back's."""

    front: list[list[Rank]]
    front_us: StepTime
    back: list[list[Rank]] = field(default_factory=list)
    back_us: StepTime | None = None
    router: str = "least_loaded"
    transfer: tuple[float, float] = (0.0, 0.0)
    steps_ahead: int = 0
    stalls: tuple[tuple[int, float], ...] = ()

    def run(self, requests: Requests) -> list[_Request]:
        """Serve everything; requests in their order."""
        self.env = simpy.Environment()
        self.mean_output = float(requests.output_tokens.mean())
        self.turns = {id(self.front): 0, id(self.back): 0}
        self.wake: dict[int, Any] = {}
        ranks = [rank for instance in (*self.front, *self.back) for rank in instance]
        for number, rank in enumerate(ranks):
            rank.number = number
        todo = []
        for i in range(len(requests)):
            blocks = requests.block_ids[requests.block_indptr[i] : requests.block_indptr[i + 1]]
            prompt = int(requests.prompt_tokens[i])
            todo.append(
                _Request(
                    i, prompt, int(requests.output_tokens[i]), int(requests.priority[i]),
                    blocks.tolist(), to_compute=prompt,
                )
            )  # fmt: skip
        for instance in self.front:
            self.env.process(self.engine(instance, self.front_us, sends=bool(self.back)))
        for instance in self.back:
            self.env.process(self.engine(instance, self.back_us or self.front_us, sends=False))
        self.env.process(self.source(todo, requests.arrival_s * 1e6))
        self.env.run()
        return todo

    def source(self, todo: list[_Request], arrival_us: Any) -> Iterator[Any]:
        """Arrivals, those of one instant together."""
        for time, group in groupby(todo, key=lambda r: float(arrival_us[r.number])):
            yield self.env.timeout(time - self.env.now)
            for r in group:
                rank = self.choose(self.front, r)
                r.rank = rank.number
                self.assign(rank, r, 1)
                r.queued_us = self.env.now
                rank.waiting.append(r)
            self.wake_all()

    def choose(self, instances: list[list[Rank]], r: _Request) -> Rank:
        """The rank for `r`: ties go to the next in turn, replicas before ranks."""
        depth = max(len(instance) for instance in instances)
        order = [i[k] for k in range(depth) for i in instances if k < len(i)]
        turn = self.turns[id(instances)]
        best, best_score = 0, inf
        for step in range(len(order)):
            place = (turn + step) % len(order)
            rank, score = order[place], 0.0
            if self.router == "least_loaded":
                score = rank.outstanding
            elif self.router == "length_aware":
                score = rank.backlog
                score -= rank.hits(r) * rank.hash_tokens if instances is self.front else 0
            if score < best_score:
                best, best_score = place, score
        self.turns[id(instances)] = (best + 1) % len(order)
        return order[best]

    def assign(self, rank: Rank, r: _Request, sign: int) -> None:
        """Count `r` as work of a rank, or no longer."""
        rank.outstanding += sign
        rank.backlog += sign * (r.prompt + self.mean_output)

    def wake_all(self) -> None:
        """Let idle engines look at their queues."""
        for event in list(self.wake.values()):
            event.succeed()
        self.wake = {}

    def engine(self, instance: list[Rank], step_us: StepTime, sends: bool) -> Iterator[Any]:
        """Steps of one instance, one after the other."""
        decided = inf
        every, stall_us = (*self.stalls, (0, 0.0), (0, 0.0))[0 if instance in self.front else 1]
        steps = 0
        while True:
            loads = [rank.make_plan(self.env.now, decided) for rank in instance]
            if not any(load[0] + load[2] for load in loads) and decided < self.env.now:
                loads = [rank.make_plan(self.env.now, self.env.now) for rank in instance]
            decided = inf
            if not any(load[0] + load[2] for load in loads):
                self.wake[id(instance)] = self.env.event()
                yield self.wake[id(instance)]
                continue
            if self.steps_ahead:
                decided = self.env.now
            steps += 1
            stall = stall_us if every and steps % every == 0 else 0.0
            yield self.env.timeout(step_us(loads) + stall)
            for rank in instance:
                for r, count in list(rank.plan.items()):
                    self.progress(rank, r, count, sends)
            self.wake_all()

    def progress(self, rank: Rank, r: _Request, count: int, sends: bool) -> None:
        """What a step did for one request."""
        was_prompt = r.computed < r.to_compute
        r.computed += count
        if r.computed < r.to_compute:
            return
        if was_prompt and (sends or not self.back):
            rank.register(r)
        r.generated += 1
        if r.first_us != r.first_us:
            r.first_us = self.env.now
        if r.generated >= r.output:
            r.finish_us = self.env.now
            rank.running.remove(r)
            rank.release(r)
            self.assign(rank, r, -1)
        elif sends:
            rank.running.remove(r)
            self.send(rank, r, self.choose(self.back, r))

    def send(self, rank: Rank, r: _Request, to: Rank) -> None:
        """Begin to move a cache; each rank's link carries one at a time."""
        rank.sending += r.own_blocks
        self.assign(to, r, 1)
        latency, per_token = self.transfer
        end = max(self.env.now, rank.link_free_us, to.link_free_us)
        end += latency + per_token * r.computed
        rank.link_free_us = to.link_free_us = end
        self.env.process(self.arrive(rank, r, to, end - self.env.now))

    def arrive(self, rank: Rank, r: _Request, to: Rank, delay: float) -> Iterator[Any]:
        """The cache leaves the sender and waits at the decode rank."""
        yield self.env.timeout(delay)
        rank.sending -= r.own_blocks
        rank.release(r)
        self.assign(rank, r, -1)
        r.transferred = True
        r.queued_us = self.env.now
        to.waiting.append(r)
        self.wake_all()
