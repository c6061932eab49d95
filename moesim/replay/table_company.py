"""What the operations of a layer take less together than alone, from a raw record.

Every operation's table was measured by repeating that operation. The record also holds whole
synthetic layers without experts (`less_us`), which no table was made from. Above the cost model, so
never imported by the part that runs in an engine's container.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.cost.calibration import Calibration
from moesim.cost.fitting import robust_fit
from moesim.replay.routing import company_rows

NUM_OPERATIONS = 7
MIN_CASES = 6


def operation_saves_us(raw: Mapping[str, Any], calibration: Calibration) -> float:
    """Microseconds that a row move or collective takes less in a layer than in its table.

    One number for all operations and sizes: the one that brings the sums of tables closest to the
    layers without experts that were measured, by the same robust measure as every fit. 0 where a
    record holds too few such layers.
    """
    alone, together = layers_without_experts(raw, calibration)
    if len(together) < MIN_CASES:
        return 0.0
    floor = 0.1 * together.min()
    best, _ = robust_fit(
        lambda x: np.log(np.maximum(alone - NUM_OPERATIONS * x[0], floor) / together), [[0.5]]
    )
    return round(max(0.0, float(best[0])), 3)


def layers_without_experts(
    raw: Mapping[str, Any], calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the tables' times, and time measured, of every synthetic layer without experts.

    What such a layer does is `moesim.replay.calibrate_ffn.Company`.
    """
    num_ranks = int(raw["environment"]["num_ranks"])
    top_k = {s["name"]: int(s["top_k"]) for s in raw.get("options", {}).get("shapes", [])}
    cases: dict[tuple[str, int], tuple[float, float]] = {}
    for row in raw["tables"].get("ffn", []):
        key = (str(row["shape"]), int(row["tokens"]))
        if key in cases or key[0] not in top_k or row.get("less_us", 0.0) <= 0.0:
            continue
        own, sent = company_rows(key[1], top_k[key[0]], num_ranks)
        if sent > 0:
            row_bytes = float(row["hidden"]) * 2.0
            cases[key] = (
                _alone_us(calibration, num_ranks, (key[1], own, sent), row_bytes),
                float(row["less_us"]),
            )
    both = np.array(list(cases.values()), np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _alone_us(
    calibration: Calibration, num_ranks: int, sizes: tuple[int, int, int], row_bytes: float
) -> float:
    rows, own, sent = sizes
    arrived = own + sent
    gather, reduce = calibration.copy("permute"), calibration.copy("reduce")
    exchange = calibration.collective("all_to_all_v", num_ranks)
    moves = [(arrived, own), (rows, arrived), (own, own)]
    sums = [(rows, arrived), (arrived, own)]
    return float(
        sum(gather.rows_us(many, few, row_bytes) for many, few in moves)
        + sum(reduce.rows_us(many, few, row_bytes) for many, few in sums)
        + 2 * exchange.time_us(sent * row_bytes)
    )
