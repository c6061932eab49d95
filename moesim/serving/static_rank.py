"""Requests of a load test on one DP rank: waiting, in chunks of their prompts, and decoding."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import ceil


@dataclass(eq=False)
class Request:
    """`prompt` and `answer` are what is left to compute: a preempted request's prompt holds the
    tokens it had been given."""

    number: int
    prompt: int
    answer: int
    sent_us: float
    done_prompt: int = 0
    ready_us: float = 0.0
    first_us: float | None = None
    admitted: int = 0


@dataclass(eq=False)
class Rank:
    """One DP rank: prompts waiting or in chunks, sequences decoding, tokens reserved for them.

    `clock` counts the tokens that every running sequence has been given; `running` is a heap by the
    clock at which a sequence ends, `context` the cached tokens of all of them. `whole`: prompts and
    answers are reserved on admission, so that nothing is preempted. Tokens are whole numbers but
    where speculation gives so many per step on average.
    """

    capacity: int
    waiting: deque[Request] = field(default_factory=deque)
    prompts: list[Request] = field(default_factory=list)
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    whole: bool = True
    reserved: int = 0
    clock: float = 0
    context: float = 0.0
    admissions: int = 0

    def start(self, request: Request) -> None:
        """A sequence whose prompt is done and whose first token is out."""
        heappush(self.running, (self.clock + request.answer - 1, request.number, request))
        self.context += request.prompt + 1

    def produce(self, tokens: float) -> list[Request]:
        """Give every running sequence `tokens` more; take out and return those that end."""
        self.clock += tokens
        self.context += tokens * len(self.running)
        ended = []
        while self.running and self.running[0][0] <= self.clock:
            end, _, request = heappop(self.running)
            self.context -= request.prompt + request.answer + self.clock - end
            self.reserved -= request.prompt + request.answer
            ended.append(request)
        return ended

    def fits(self, request: Request) -> bool:
        """Room in the KV cache for another one."""
        if self.whole:
            return self.reserved + request.prompt + request.answer <= self.capacity
        return self.used() + request.prompt + len(self.running) + 1 <= self.capacity

    def used(self) -> float:
        """Tokens that running sequences and admitted prompts hold."""
        return self.context + sum(request.prompt for request in self.prompts)

    def admit(self, request: Request) -> None:
        """Start a request's prompt."""
        self.reserved += request.prompt + request.answer
        self.admissions += 1
        request.admitted = self.admissions
        self.prompts.append(request)

    def make_room(self) -> None:
        """Preempt the last ones admitted until every running sequence has room for a token."""
        while not self.whole and self.used() + len(self.running) > self.capacity:
            everyone = [q for _, _, q in self.running] + self.prompts
            self._preempt(max(everyone, key=lambda q: q.admitted))

    def _preempt(self, request: Request) -> None:
        self.reserved -= request.prompt + request.answer
        if request in self.prompts:
            self.prompts.remove(request)
        else:
            place = next(i for i, item in enumerate(self.running) if item[2] is request)
            end = self.running.pop(place)[0]
            heapify(self.running)
            given = request.answer - ceil(end - self.clock)
            self.context -= request.prompt + request.answer - (end - self.clock)
            request.prompt += given
            request.answer -= given
        request.done_prompt = 0
        self.waiting.appendleft(request)
