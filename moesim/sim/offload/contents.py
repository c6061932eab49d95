"""What one GPU's slots hold, step by step: the policy state of `moesim.caching`, advanced at the
moments that the event simulation decides on (the tests hold its misses against those of
`cache.simulate`, which counts them in one pass)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Events, Stream
from moesim.caching.state import ABSENT, Asked, CacheState, Rule, update
from moesim.caching.timeline import Setup, policy_state
from moesim.types import Array


@dataclass(slots=True, eq=False)
class Contents:
    """The slots of one GPU.

    events: S x L events in order of execution, event s x L + l with the experts that the GPU is
    asked for. ids: [N, L, K] choices of the stream's tokens that this GPU serves, -1 elsewhere.
    """

    setup: Setup
    events: Events
    stream: Stream
    ids: npt.NDArray[np.int32]
    num_experts: int
    _rule: Rule = field(init=False)
    _asked: Asked = field(init=False)
    _state: CacheState = field(init=False)

    def __post_init__(self) -> None:
        self._rule, self._asked, self._state = policy_state(
            self.setup, self.events, self.stream, self.ids
        )

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is in HBM at the moment, pinned or in a slot."""
        return bool(self._state.place[layer, expert] != ABSENT)

    def asked(self, step: int, layer: int) -> tuple[Array, Array]:
        """(expert ids, tokens of each) that one event asks for."""
        n = step * len(self.setup.slots) + layer
        span = slice(int(self.events.indptr[n]), int(self.events.indptr[n + 1]))
        return self.events.item[span], self.events.count[span]

    def update(self, step: int, layer: int, fetched: list[int]) -> None:
        """Let the policy learn of an event, then admit `fetched`, in that order."""
        arrived = np.array(fetched, np.int64)
        update(self._rule, self._asked, self._state, layer, step, arrived)
