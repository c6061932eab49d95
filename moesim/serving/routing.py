"""Requests drawn from a routing trace by domain, and what the routing of a domain mix costs.

Each request takes the domain of a request drawn from the trace; the mix may drift over the day.
The routed experts' part of a step then depends on the domains of its tokens: a table of the time of
all MoE layers by tokens, for each domain alone and for equal shares of all, from the popularity of
experts in the trace under the deployment's plan.

Approximated: tokens of a domain are independent of each other; a mix between "one domain" and
"equal shares" is interpolated (`step_table._moe_us`); prompt and output tokens of a request are
routed alike; messages between GPUs are as for even routing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.types import FloatArray, IntArray, stream

if TYPE_CHECKING:
    from moesim.serving.requests import Requests
    from moesim.serving.step_cost import EngineStepCost
    from moesim.trace.format import Trace

MAX_DOMAINS = 12
REST = "(rest)"
EVEN_TOKENS = 4096
DRIFT_SHARPNESS = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class DomainRouting:
    """mix: weight of domains by name; by default as many requests as the trace has of each.
    drift_s: seconds in which the mix moves through all domains once, so that the weight of domain
    d of W at time t has a further factor exp(k cos 2 pi (t / drift_s - d / W)) with k =
    DRIFT_SHARPNESS (assumed: real drift has no such form); infinite for none. seed: of the draws.

    Domains beyond the MAX_DOMAINS - 1 with most tokens count as one, REST.
    """

    trace: Trace
    mix: Mapping[str, float] | None = None
    drift_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.drift_s > 0:
            raise InputError(f"a drift over {self.drift_s} s", "give a time above 0, as 86400")
        named = self.trace.meta.domains
        if self.trace.domain_ids is None and (self.mix is not None or self.drift_s < math.inf):
            raise MismatchError(
                "the trace has no domains to mix or drift through", "leave the mix and drift out"
            )
        for name, weight in (self.mix or {}).items():
            if name not in named:
                raise UnknownNameError("domain", name, named)
            if not (math.isfinite(weight) and weight >= 0):
                raise InputError(f"a weight of {weight} for {name}", "give 0 or more")
        if self.mix is not None and not sum(self.mix.values()) > 0:
            raise InputError("the weights of the mix are all 0", "give at least one above 0")

    @property
    def groups(self) -> tuple[tuple[str, IntArray], ...]:
        """Names of the domains told apart, and the trace's domain numbers in each."""
        if self.trace.domain_ids is None:
            return (("all", np.zeros(1, np.int64)),)
        counts = np.bincount(self._domain_ids, minlength=len(self.trace.meta.domains))
        used = np.flatnonzero(counts)
        if len(used) > MAX_DOMAINS:
            order = used[np.argsort(-counts[used], kind="stable")]
            apart = np.sort(order[: MAX_DOMAINS - 1])
            rest = np.sort(order[MAX_DOMAINS - 1 :])
            named = [(self.trace.meta.domains[d], np.array([d])) for d in apart]
            return (*named, (REST, rest))
        return tuple((self.trace.meta.domains[d], np.array([d])) for d in used)

    def weights(self) -> FloatArray:
        """[W] share of requests of each domain, drift aside."""
        groups = self.groups
        if len(groups) == 1:
            return np.ones(1)
        first = np.unique(np.asarray(self.trace.request_ids), return_index=True)[1]
        counts = np.bincount(self._domain_ids[first], minlength=len(self.trace.meta.domains))
        if self.mix is not None:
            names = self.trace.meta.domains
            counts = np.array([self.mix.get(name, 0.0) for name in names])
        out = np.array([float(counts[ids].sum()) for _, ids in groups])
        return out / out.sum()

    def label(self, requests: Requests) -> Requests:
        """`requests` with a domain each, drawn by the mix at their time of arrival."""
        weights = self.weights()
        num = len(weights)
        names = tuple(name for name, _ in self.groups)
        if num == 1:
            return replace(requests, domain=np.zeros(len(requests), np.int64), domains=names)
        phase = requests.arrival_s[:, None] / self.drift_s - np.arange(num) / num
        drift = np.exp(DRIFT_SHARPNESS * np.cos(2 * np.pi * phase))
        now = weights * (drift if self.drift_s < math.inf else 1.0)
        now = np.broadcast_to(now, (len(requests), num))
        total = np.cumsum(now, axis=1)
        drawn = stream(self.seed).random(len(requests)) * total[:, -1]
        domain = (drawn[:, None] >= total).sum(axis=1)
        return replace(requests, domain=np.minimum(domain, num - 1), domains=names)

    def moe_tables(self, cost: EngineStepCost) -> FloatArray:
        """[W + 1, points] microseconds of all MoE layers on the token counts of `cost`'s own table:
        each domain alone, then equal shares. Raises MismatchError for another model's trace."""
        from moesim.serving.step_cost import EngineStepCost

        deployment = cost.deployment
        model = deployment.model
        have = (self.trace.num_experts, self.trace.top_k)
        same_k = have[1] == model.top_k or bool(self.trace.meta.source.get("reroute"))
        if have[0] != model.num_experts or not same_k:
            raise MismatchError(
                f"the trace has {have[0]} experts, top-{have[1]}; {model.name} has"
                f" {model.num_experts}, top-{model.top_k}",
                "use a trace of this model",
            )
        rng = stream(self.seed)
        rows, evenly = [], []
        for _, ids in self.groups:
            own = np.arange(self.trace.num_tokens)
            if self.trace.domain_ids is not None:
                own = np.flatnonzero(np.isin(self._domain_ids, ids))
            rows.append(own)
            evenly.append(rng.choice(own, EVEN_TOKENS) if len(self.groups) > 1 else own)
        parts = [*rows, np.concatenate(evenly)]
        tables = []
        for part in parts:
            stride = max(1, len(part) // (4 * EVEN_TOKENS))
            of_part = replace(deployment, trace=self.trace.take(part[::stride]))
            tables.append(EngineStepCost(of_part)._moe_total.times_us)
        return np.stack(tables)

    @property
    def _domain_ids(self) -> IntArray:
        return np.asarray(self.trace.domain_ids, np.int64)
