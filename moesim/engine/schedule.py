"""Which row of a trace every token of an engine's step takes.

Each request of the engine is bound to a request of the trace when it is first seen: its prompt
takes that request's rows in order (and those of the following requests where it is longer), its
answer the rows from a random place on. A prefill step so holds whole prompts, and a decode step one
token each of many requests, as in service. Rows follow a token's position, so chunked prefill and
preemption change nothing. Padding rows of CUDA graphs are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
MOST_BOUND = 1 << 16
"""Requests whose place is remembered; beyond it those that are not in the step are forgotten."""


@dataclass(frozen=True, eq=False)
class PhaseRows:
    """Trace rows of one phase: `order` [T'], request after request by position; request r starts at
    `order[starts[r]]`."""

    order: IntArray
    starts: IntArray


class RowSchedule:
    """Rows for the steps of one data-parallel rank; ranks differ by `seed`."""

    def __init__(self, prefill: PhaseRows, decode: PhaseRows, seed: int) -> None:
        self._prefill, self._decode = prefill, decode
        self._rng = np.random.default_rng(seed)
        self._turn: IntArray = np.zeros(0, np.int64)
        self._taken = 0
        self._places: dict[str, tuple[int, int]] = {}

    def rows(
        self,
        requests: Sequence[str],
        scheduled: IntArray,
        computed: IntArray,
        prompt_tokens: IntArray,
    ) -> npt.NDArray[np.int32]:
        """[n]: trace rows of a step's tokens, request after request as the engine orders them.

        requests: ids of the R requests of the step. scheduled, computed, prompt_tokens [R]: tokens
        of each in this step, tokens before it, and the length of its prompt.
        """
        places = np.array([self._place(name) for name in requests], np.int64).reshape(-1, 2)
        if len(self._places) > MOST_BOUND:
            self._places = {name: self._places[name] for name in requests}
        count = np.asarray(scheduled, np.int64)
        position = np.asarray(computed, np.int64)
        prompt = np.asarray(prompt_tokens, np.int64)
        if (count != 1).any():
            which = np.repeat(np.arange(len(count)), count)
            within = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
            position = position[which] + within
            places, prompt = places[which], prompt[which]
        first, later = self._prefill.order, self._decode.order
        in_prompt = first[(places[:, 0] + position) % len(first)]
        in_answer = later[(places[:, 1] + position - prompt) % len(later)]
        return np.where(position < prompt, in_prompt, in_answer).astype(np.int32)

    def _place(self, request: str) -> tuple[int, int]:
        """Start of the request's prompt in the prefill order, of its answer in the decode order.
        All trace requests are used, in a random order, before one is used again."""
        place = self._places.get(request)
        if place is None:
            starts = self._prefill.starts
            turn = self._taken % len(starts)
            if turn == 0:
                self._turn = self._rng.permutation(len(starts))
            self._taken += 1
            place = (
                int(starts[self._turn[turn]]),
                int(self._rng.integers(len(self._decode.order))),
            )
            self._places[request] = place
        return place
