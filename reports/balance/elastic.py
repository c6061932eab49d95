"""A day of load on expert-parallel groups of fixed and of changing width: `elastic.json`.

    python reports/balance/elastic.py ../shared/data/requests/AzureLLMInferenceTrace_conv_2023.csv

Lengths are those of the log; arrivals come at a rate of every hour, from an assumed daily shape
(a cosine between 0.25 and 1.75 of the mean, its peak at 14 h), since the log holds one hour. Each
hour and width is one run of the serving simulation. A change of width costs the transfer of the
least moves on the links, and RESTART_S of forming the group anew (assumed, as `moesim simulate`),
in which the hour's requests miss their promises. Prices are those of the cluster's GPUs.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import moesim
from moesim.cluster import load_cluster
from moesim.cost.step import build_step_model
from moesim.model.names import load_model
from moesim.planning.migration import Movers
from moesim.planning.resize import least_moves, resize
from moesim.placement import Placement
from moesim.sim.links import link_table
from moesim.sim.migrate import build_mover
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import find_solver
from moesim.types import stream

MODEL, CLUSTER, WIDTHS = "DeepSeek-V2-Lite", "h100-sxm-ib", (2, 4, 8)
SLO = "ttft<1s,tpot<30ms"
PEAK_RATE = 150.0
RESTART_S = 1.0
REQUESTS = 1500
GOOD = 0.99


def rates() -> np.ndarray:
    """[24] requests per second."""
    shape = 1.0 + 0.75 * np.cos(2 * np.pi * (np.arange(24) - 14) / 24)
    return PEAK_RATE * shape / shape.max()


def transfer_s(narrow: int, wide: int, out: bool) -> tuple[float, int, int]:
    """Seconds on the links, experts moved and the least possible, of a change of width."""
    spec, cluster = load_model(MODEL), load_cluster(CLUSTER, num_gpus=wide)
    load = stream(0).lognormal(0.0, 0.5, (spec.num_moe_layers, spec.num_experts))
    first, last = (narrow, wide) if out else (wide, narrow)
    problem = Problem(load[None].astype(np.float32), np.full(first, spec.num_experts // first), 1)
    old = run_solver(find_solver("eplb"), problem).placement
    new = resize(old, load, last, 1)
    step = build_step_model(cluster, spec, phase="decode")
    links = link_table(cluster, step)
    mover = build_mover(cluster, links, float(spec.expert_bytes()))
    plan = Movers(_spread(old, wide), mover, links.num_links).plan(_spread(new, wide))
    return plan.us / 1e6, plan.num_moves, least_moves(old, last)


def _spread(placement: Placement, gpus: int) -> Placement:
    """The placement on a group of `gpus`, the further ones empty."""
    own = placement.physical_to_logical.reshape(placement.num_layers, placement.num_gpus, -1)
    table = np.full((placement.num_layers, gpus, own.shape[2]), -1, np.int32)
    table[:, : placement.num_gpus] = own
    return Placement(
        table.reshape(placement.num_layers, -1), gpus, 1, placement.num_experts
    )


def main(log: str) -> None:
    hours = rates()
    base = moesim.serve(log, model=MODEL, cluster=CLUSTER, gpus=8, first=REQUESTS).record
    own_rate = base["requests"]["rate_per_s"]
    good = {}
    for width in WIDTHS:
        for rate in np.unique(np.round(hours, 2)):
            record = moesim.serve(
                log, model=MODEL, cluster=CLUSTER, gpus=width, tp=1, dp=width, first=REQUESTS,
                rate_scale=float(rate) / own_rate, slo=SLO,
            ).record  # fmt: skip
            good[width, float(rate)] = record["slo"]["goodput"]["share"]
    price = load_cluster(CLUSTER, num_gpus=8).gpus[0].price_usd_per_hour
    moves = {
        f"{a} to {b}": transfer_s(min(a, b), max(a, b), b > a)
        for a, b in zip((*WIDTHS[:-1], *WIDTHS[:0:-1]), (*WIDTHS[1:], *WIDTHS[-2::-1]), strict=True)
    }

    def needed(rate: float) -> int:
        return next((w for w in WIDTHS if good[w, float(rate)] >= GOOD), WIDTHS[-1])

    rounded = np.round(hours, 2)
    policies = {f"always {width} GPUs": [width] * 24 for width in WIDTHS}
    now = [needed(rate) for rate in rounded]
    policies["as the hour before needed"] = [now[-1], *now[:-1]]
    policies["as the larger of this and the next hour (known)"] = [
        max(a, b) for a, b in zip(now, [*now[1:], now[0]], strict=True)
    ]
    out = {}
    for name, widths in policies.items():
        missed = sent = 0.0
        changes, stalled = 0, 0.0
        for hour, width in enumerate(widths):
            rate = float(rounded[hour])
            missed += rate * 3600 * (1 - good[width, rate])
            sent += rate * 3600
            before = widths[hour - 1]
            if before != width:
                at = [*WIDTHS]
                path = at[at.index(before) : at.index(width) + 1] or at[
                    at.index(width) : at.index(before) + 1
                ][::-1]
                pause = RESTART_S + sum(
                    moves[f"{a} to {b}"][0] for a, b in zip(path, path[1:], strict=False)
                )
                changes, stalled = changes + 1, stalled + pause
                missed += rate * pause * good[width, rate]
        out[name] = {
            "usd_per_day": sum(widths) * price,
            "slo_missed_share": missed / sent,
            "changes": changes,
            "stalled_s": stalled,
            "widths": widths,
        }
    print(
        json.dumps(
            {
                "model": MODEL, "cluster": CLUSTER, "slo": SLO, "requests_per_s": rounded.tolist(),
                "price_usd_per_gpu_hour": price,
                "good_share": {f"{w} GPUs, {r}/s": s for (w, r), s in good.items()},
                "changes_of_width": {
                    k: {"transfer_s": s, "moved": m, "least": n} for k, (s, m, n) in moves.items()
                },
                "policies": out,
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
