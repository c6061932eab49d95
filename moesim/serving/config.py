"""How a service runs its deployments: replicas, routing of requests, scheduling, speculation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moesim.choices import Router as Router
from moesim.errors import InputError, UnknownNameError
from moesim.serving.speculative import Speculation
from moesim.serving.state import (
    DEMOTE,
    LEAST_LOADED,
    LENGTH_AWARE,
    QUEUE,
    REFUSE,
    ROUND_ROBIN,
    SHORTEN,
)

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment
    from moesim.serving.routing import DomainRouting

Action = Literal["queue", "refuse", "shorten", "demote"]
ROUTERS: Mapping[str, int] = {
    "round_robin": ROUND_ROBIN,
    "least_loaded": LEAST_LOADED,
    "length_aware": LENGTH_AWARE,
}
ACTIONS: Mapping[str, int] = {
    "queue": QUEUE,
    "refuse": REFUSE,
    "shorten": SHORTEN,
    "demote": DEMOTE,
}


@dataclass(frozen=True, slots=True)
class Level:
    """A quality level, one for each priority of the requests, in their order.

    action: what happens to a request that finds `limit` requests or more waiting on the rank it
    would go to: it waits as well (queue), is refused, has its output cut to `share` of its length
    (shorten), or moves to the last level (demote). Raises for values that are none.
    """

    action: Action = "queue"
    limit: int = 0
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UnknownNameError("action of a level", self.action, ACTIONS)
        if self.limit < 0:
            raise InputError(f"a queue limit of {self.limit}", "give 0 or more requests")
        if not 0 < self.share <= 1:
            raise InputError(f"a share of {self.share} of the output", "give a share, as 0.5")


@dataclass(frozen=True, slots=True)
class Stall:
    """Every `every_steps` steps of an engine it stands still for `us` microseconds: placements made
    anew, synchronously. source: what `us` rests on (`serving.stall` says how long it takes)."""

    every_steps: int
    us: float
    source: str = "given"

    def __post_init__(self) -> None:
        if not 1 <= self.every_steps <= 1 << 30:
            raise InputError(f"a stall every {self.every_steps} steps", "give at least 1")
        if not 0 <= self.us < math.inf:
            raise InputError(f"a stall of {self.us} us", "give 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class ServingConfig:
    """A service around a deployment. Every replica is the deployment once.

    decode, decode_replicas: with these the service is disaggregated: replicas of the deployment
    compute prompts and first tokens, replicas of `decode` the rest, after a transfer of the KV
    cache over the NICs of the two ranks (transfer_gb_per_s for one rank, and a latency).
    block_size: tokens of a KV block. prefix_cache: reuse of equal prompt beginnings; by default
    where the requests tell their content. shared_reads: a decode step reads a beginning that
    several sequences of a rank share once for all of them (Hydragen, arXiv:2402.05099; cascade
    attention), not once for each; its arithmetic stays. chunk_tokens: most prompt tokens of one
    request in a step. prefill_first: None as the engine does. length_error: the router length_aware
    knows each output's length off by a log-normal factor with this standard deviation of its
    logarithm (0: exactly); None: it takes all to be the mean. until_s: stop there, whatever is
    unfinished. routing: the domains of the requests and what their routing costs
    (`moesim.serving.routing`). stalls: of the engines that take requests, then of those that
    decode; none where left out.
    """

    replicas: int = 1
    router: Router = "least_loaded"
    decode: Deployment | None = None
    decode_replicas: int = 1
    transfer_gb_per_s: float | None = None
    transfer_latency_us: float = 50.0
    block_size: int = 16
    prefix_cache: bool | None = None
    shared_reads: bool = False
    chunk_tokens: int | None = None
    prefill_first: bool | None = None
    length_error: float | None = None
    speculation: Speculation | None = None
    levels: tuple[Level, ...] = ()
    routing: DomainRouting | None = None
    stalls: tuple[Stall, ...] = ()
    until_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise UnknownNameError("router", self.router, ROUTERS)
        counts = {
            "replicas": self.replicas,
            "decode_replicas": self.decode_replicas,
            "block_size": self.block_size,
            "chunk_tokens": 1 if self.chunk_tokens is None else self.chunk_tokens,
        }
        for name, value in counts.items():
            if not 1 <= value <= 1 << 20:
                raise InputError(f"{name} is {value}", f"give {name} as 1 to {1 << 20:,}")
        if not self.until_s > 0:
            raise InputError(f"an end at {self.until_s} s", "give a time above 0")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}", "give 0 or more")
        error = self.length_error
        if error is not None and not (math.isfinite(error) and error >= 0):
            raise InputError(f"`length_error` is {error}", "give 0 or more, as 0.5")
        if error is not None and self.router != "length_aware":
            raise InputError(
                f"`length_error` with router {self.router}, which does not look at lengths",
                "use the router length_aware, or leave `length_error` out",
            )
        rate = self.transfer_gb_per_s
        if (rate is not None and not rate > 0) or not self.transfer_latency_us >= 0:
            raise InputError(
                f"transfers at {rate} GB/s after {self.transfer_latency_us} us",
                "give a rate above 0 and a latency of 0 or more",
            )

    def num_gpus(self, deployment: Deployment) -> int:
        """GPUs of the whole service."""
        own = self.replicas * deployment.num_gpus
        return own + (self.decode_replicas * self.decode.num_gpus if self.decode else 0)
