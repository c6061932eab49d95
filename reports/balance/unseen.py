"""What plans are worth on domains that tuning lacks: plain, robust and EPLB's, by replica choice.

    python reports/balance/unseen.py TRACE GPUS REDUNDANT BATCH_TOKENS >> unseen.json

Groups of domains are left out in turn (5 of debian-moe and gpt-oss-20b, both of deepseek-v2-lite),
plans for balance made from the tuning requests of the others, and judged on batches of one domain
each from the held-out requests of the left-out ones. Excess imbalance, max/mean - 1.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import moesim
from moesim.cluster import load_cluster
from moesim.planning.case import token_case
from moesim.planning.request import PlanRequest
from moesim.planning.robust import MIN_DOMAIN_SHARE, domain_requests
from moesim.planning.tuning import batch_counts
from moesim.planning.unseen import MIN_DOMAINS, solve_unseen
from moesim.planning.worth import excess_by_layer, folds_of
from moesim.solvers.base import run_solver
from moesim.solvers.registry import find_solver
from moesim.trace.batches import draw_batches
from moesim.trace.format import require_tokens

TUNING, JUDGING = 256, 12


def main(path: str, gpus: int, redundant: int, batch_tokens: int) -> None:
    trace = require_tokens(moesim.load_trace(path), "this report")
    request = PlanRequest.of(
        trace,
        load_cluster("h100-sxm-ib", num_gpus=gpus),
        None,
        objective="balance",
        redundant_experts=redundant,
        batch_tokens=batch_tokens,
        check_memory=False,
        time_limit_s=1e5,
    )
    case = token_case(request)
    data, problem = case.data, case.problem
    assert data is not None
    least = MIN_DOMAIN_SHARE * batch_tokens
    tuned = domain_requests(trace, data.tune, least)
    judged = domain_requests(trace, data.held_out, least)
    names = [name for name in tuned if name in judged]
    found: dict[str, list[float]] = {}

    def draw(index, batches, seed=0):
        return batch_counts(trace, draw_batches(index, data.phase, batch_tokens, batches, seed))

    def note(name, placement, counts):
        for policy in ("split", "lp"):
            layers = excess_by_layer(placement, counts, policy, problem.speed)
            found.setdefault(f"{name}, {policy}", []).append(float(np.nanmean(layers)))

    from dataclasses import replace

    for fold in folds_of({name: len(tuned[name].token_idx) for name in names}):
        away = np.concatenate([tuned[name].ids for name in fold])
        tune = data.tune.select(~np.isin(data.tune.ids, away))
        counts = np.concatenate([draw(judged[name], JUDGING, 1) for name in fold])
        own = replace(problem, counts=draw(tune, TUNING))
        plain = run_solver(find_solver("local_search"), own)
        note("plain", plain.placement, counts)
        note("eplb", run_solver(find_solver("eplb"), own).placement, counts)
        if len(names) - len(fold) >= MIN_DOMAINS:
            for policy in ("split", "lp"):
                robust = solve_unseen(
                    find_solver("local_search"), own, plain, trace, tune, data.phase,
                    batch_tokens, policy,
                )  # fmt: skip
                layers = excess_by_layer(robust.solution.placement, counts, policy, problem.speed)
                found.setdefault(f"robust, {policy}", []).append(float(np.nanmean(layers)))
        seen = replace(problem, counts=draw(data.tune, TUNING))
        note("seen", run_solver(find_solver("local_search"), seen).placement, counts)
        oracle = np.concatenate([draw(judged[name], TUNING // len(fold)) for name in fold])
        note(
            "oracle",
            run_solver(find_solver("local_search"), replace(problem, counts=oracle)).placement,
            counts,
        )
    print(
        json.dumps(
            {
                "trace": trace.meta.model,
                "gpus": gpus,
                "redundant_experts": redundant,
                "batch_tokens": batch_tokens,
                "domains": len(names),
                "excess": {name: round(float(np.mean(v)), 4) for name, v in found.items()},
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
