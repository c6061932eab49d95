"""The cache policies by name: what each keeps, where it comes from, what it needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.caching import stack, state
from moesim.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy.

    keeps: what has priority, in a phrase. source: paper or repository. offline: needs the future,
    so it is a bound and nothing that a server can run. stack: whether one pass gives all cache
    sizes (true of all of them: no priority here depends on the capacity).
    """

    name: str
    code: int
    keeps: str
    source: str
    offline: bool = False


_ALL = (
    Policy(
        "static",
        state.STATIC,
        "the experts that were most frequent in the tuning requests, never replaced",
        "Fiddler (arXiv:2402.07033, section 3.2) places experts by popularity",
    ),
    Policy(
        "lru",
        state.LRU,
        "the most recently used",
        "mixtral-offloading (arXiv:2312.17238, section 3.1)",
    ),
    Policy(
        "lfu",
        state.LFU,
        "the most often used, counted since the start and kept after eviction",
        "arXiv:2511.05814; counts as in github.com/ljcleo/moe-lrc",
    ),
    Policy(
        "lfru",
        state.LFRU,
        "the highest ratio of uses to events since the last use",
        "the frequency-over-age reading of LFRU; others use the name for two partitions"
        " (arXiv:1702.04078) or for LFU with recency as tie-break",
    ),
    Policy(
        "score",
        state.SCORE,
        "the highest running average of gate weights (HybriMoE's Minus Recent Score)",
        "arXiv:2504.05897, section 4.4; PKU-SEC-Lab/HybriMoE, KScoreAwareCache: weight 0.5."
        " There the top 2k router scores count; traces keep the chosen k",
    ),
    Policy(
        "activation",
        state.ACTIVATION,
        "the most used by the requests being served, by share of each request's tokens",
        "MoE-Infinity (arXiv:2401.14361), expert activation matrix of the current request",
    ),
    Policy(
        "lookahead",
        state.LOOKAHEAD,
        "the most used in the next m steps, the current one included",
        "segment cache best hit rate (arXiv:2505.16056, section 3)",
        offline=True,
    ),
    Policy(
        "belady",
        state.BELADY,
        "the soonest used again; every missed expert must be admitted",
        "Belady 1966",
        offline=True,
    ),
    Policy(
        "optimum",
        state.OPTIMUM,
        "the soonest used again, the missed expert among the candidates (bypass): the fewest"
        " misses that any policy can have",
        "Mattson, Gecsei, Slutz, Traiger 1970, OPT; with bypass it is the greedy for interval"
        " packing (tests compare it with dynamic programming)",
        offline=True,
    ),
)

POLICIES: dict[str, Policy] = {p.name: p for p in _ALL}
ONLINE: tuple[str, ...] = tuple(p.name for p in _ALL if not p.offline)
SEMANTICS = {"atomic": stack.ATOMIC, "sequential": stack.SEQUENTIAL}


def get_policy(name: str) -> Policy:
    """The policy called `name`; UnknownNameError otherwise."""
    if name not in POLICIES:
        raise UnknownNameError("cache policy", name, POLICIES)
    return POLICIES[name]
