"""Which rank a request goes to, and what happens to it when all queues are long.

Policies: the next rank in turn; the rank with fewest unfinished requests; the rank with fewest
outstanding tokens, its own uncached prompt included (so that, with a prefix cache, requests tend to
where their beginning is). Ties go to the rank after the last one chosen. Ranks take turns over
replicas first.

Quality levels (best effort): each level may have a limit on the queue of the rank its requests
would go to. A request that meets a longer queue is refused, shortened to a share of its output, or
demoted to the last level, where it is served when nothing else waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.kernels import kernel
from moesim.serving.prefix import count_hits
from moesim.serving.state import (
    DEMOTE,
    INTERNAL,
    LEAST_LOADED,
    LENGTH_AWARE,
    QUEUE,
    REFUSE,
    SHORTEN,
    TURN_BACK,
    TURN_FRONT,
)


@kernel(**INTERNAL)
def choose_rank(
    req: Any, ids: Any, ranks: Any, prefix: Any, cfg: Any, clock: Any, r: int, decode: bool
) -> int:
    """The rank that takes `r`: of the front ranks, or of those that only decode."""
    group = clock.back if decode else clock.front
    turn = TURN_BACK if decode else TURN_FRONT
    start = clock.counts[turn]
    best, best_score = -1, np.inf
    for step in range(len(group)):
        place = (start + step) % len(group)
        rank = group[place]
        score = 0.0
        if cfg.router == LEAST_LOADED:
            score = float(ranks[rank].outstanding)
        elif cfg.router == LENGTH_AWARE:
            score = ranks[rank].backlog
            if cfg.prefix_on and not decode:
                score -= count_hits(req, ids, prefix, cfg, rank, r) * cfg.hash_tokens
        if score < best_score:
            best, best_score = place, score
    clock.counts[turn] = (best + 1) % len(group)
    return group[best]


@kernel(**INTERNAL)
def admit_level(req: Any, ranks: Any, cfg: Any, levels: Any, rank: int, r: int) -> bool:
    """Apply the level's rule at arrival; False where the request is refused."""
    level = req[r].level
    action = int(levels[level, 0])
    if action == QUEUE or ranks[rank].num_waiting < levels[level, 1]:
        return True
    req[r].degraded = action
    if action == REFUSE:
        return False
    if action == SHORTEN:
        req[r].output = max(1, int(req[r].output * levels[level, 2]))
    elif action == DEMOTE:
        req[r].level = cfg.num_levels - 1
    return True
