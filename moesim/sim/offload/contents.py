"""What one GPU's slots hold, step by step, with the priorities and evictions of `moesim.caching`.

The rules of admission are the compiled functions that the cache's own timeline calls; when they are
called is decided here, so that the contents are a second account of what `cache.simulate` says in
one pass (the tests hold the two against each other).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.caching import kernels
from moesim.caching.events import Events, Stream
from moesim.caching.kernels import ACTIVATION, LOOKAHEAD, LRU, OPTIMUM, STATIC
from moesim.caching.policies import get_policy
from moesim.caching.timeline import Setup, starting_order
from moesim.caching.timeline_kernel import admit
from moesim.types import Array


@dataclass(slots=True, eq=False)
class Contents:
    """The slots of one GPU.

    events: S x L events in order of execution, event s x L + l with the experts that the GPU is
    asked for. ids: [N, L, K] choices of the stream's tokens that this GPU serves, -1 elsewhere.
    `resident` [L, E] is what is in HBM at the moment, pinned experts included.
    """

    setup: Setup
    events: Events
    stream: Stream
    ids: npt.NDArray[np.int32]
    num_experts: int
    resident: npt.NDArray[np.bool_] = field(init=False)
    _code: int = field(init=False)
    _held: Array = field(init=False)
    _num_held: Array = field(init=False)
    _prio: Array = field(init=False)
    _last: Array = field(init=False)
    _uses: Array = field(init=False)
    _used: Array = field(init=False)
    _clock: Array = field(init=False)
    _mark: Array = field(init=False)
    _next_use: Array = field(init=False)
    _prior: Array = field(init=False)
    _rows: Array = field(init=False)
    _row_size: Array = field(init=False)
    _tokens: Array = field(init=False)

    def __post_init__(self) -> None:
        setup, num = self.setup, self.num_experts
        shape = (len(setup.slots), num)
        self._code = code = get_policy(setup.policy).code
        self._next_use = np.zeros(0, np.int64)
        first_use = np.zeros(0, np.int64)
        if get_policy(setup.policy).offline and code != LOOKAHEAD:
            layer = np.tile(np.arange(shape[0]), self.stream.num_steps)
            at = np.repeat(layer, np.diff(self.events.indptr)).astype(np.int32)
            flat = self.events.item + at * num
            self._next_use, first_use = kernels.next_uses(flat, shape[0] * num)
        order, self._prio = starting_order(setup, code, first_use, shape)
        self.resident = setup.pinned.copy()
        self._held = np.full(shape, -1, np.int32)
        self._num_held = np.zeros(shape[0], np.int64)
        self._last = np.full(shape, -1 - num, np.int64)
        self._uses, self._used = np.zeros(shape), np.zeros(shape, np.int64)
        self._clock = np.zeros(shape[0], np.int64)
        self._mark = np.full(shape, -1, np.int64)
        self._prior = setup.frequency
        if not self._prior.any():
            self._prior = np.full(shape, self.ids.shape[2] / num)
        lanes = self.stream.num_lanes if code == ACTIVATION else 0
        self._rows = np.zeros((shape[0], lanes, num))
        self._row_size = np.zeros((shape[0], lanes))
        self._tokens = np.diff(self.stream.indptr)
        for row in range(shape[0]):
            self._preload(row, order[row])
        if code == LOOKAHEAD:
            for n in range(min(setup.lookahead, self.stream.num_steps) * shape[0]):
                self._coming(n)

    def asked(self, step: int, layer: int) -> tuple[Array, Array]:
        """(expert ids, tokens of each) that one event asks for."""
        span = self._span(step, layer)
        return self.events.item[span], self.events.count[span]

    def update(self, step: int, layer: int, fetched: list[int]) -> None:
        """Let the policy learn of an event, then admit `fetched`, in that order."""
        span, code, setup = self._span(step, layer), self._code, self.setup
        n = step * len(setup.slots) + layer
        self._mark[layer, self.events.item[span]] = n
        if code == ACTIVATION:
            kernels.observe_requests(
                self.ids[:, layer],
                self.stream.indptr[step],
                self.stream.indptr[step + 1],
                self.stream.lane_idx,
                self.stream.starts,
                self._prior[layer],
                np.ones(self.num_experts),
                self._rows[layer],
                self._row_size[layer],
                self._prio[layer],
            )
        if code != STATIC and span.stop > span.start:
            self._clock[layer] = kernels.observe(
                code,
                step,
                span.start,
                span.stop,
                self.events.item,
                self.events.gate,
                self._tokens[step],
                setup.alpha,
                self._next_use,
                self._prio[layer],
                self._last[layer],
                self._clock[layer],
                self._uses[layer],
                self._used[layer],
            )
            for expert in fetched:
                self._num_held[layer] = admit(
                    expert,
                    int(setup.slots[layer]),
                    code != OPTIMUM,
                    self.resident[layer],
                    self._held[layer],
                    self._num_held[layer],
                    self._mark[layer],
                    n,
                    self._prio[layer],
                    self._last[layer],
                )
        if code == LOOKAHEAD and step + setup.lookahead < self.stream.num_steps:
            self._coming(n + setup.lookahead * len(setup.slots))

    def _span(self, step: int, layer: int) -> slice:
        n = step * len(self.setup.slots) + layer
        return slice(int(self.events.indptr[n]), int(self.events.indptr[n + 1]))

    def _coming(self, n: int) -> None:
        """LOOKAHEAD sees event n."""
        span = slice(int(self.events.indptr[n]), int(self.events.indptr[n + 1]))
        np.add.at(self._prio[n % len(self.setup.slots)], self.events.item[span], 1.0)

    def _preload(self, layer: int, order: Array) -> None:
        for rank, expert in enumerate(order.tolist()):
            if expert < 0:
                break
            self._last[layer, expert] = -1 - rank
            if self._code == LRU:
                self._prio[layer, expert] = -1 - rank
            room = self._num_held[layer] < self.setup.slots[layer]
            if room and not self.setup.pinned[layer, expert]:
                self._held[layer, self._num_held[layer]] = expert
                self._num_held[layer] += 1
                self.resident[layer, expert] = True
