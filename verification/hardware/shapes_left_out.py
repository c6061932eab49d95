"""How well the expert model predicts a shape that it was not fitted to, from calibration records.

    python verification/hardware/shapes_left_out.py reports/hardware-h200x2/raw/run3 \
        reports/hardware-h200x4/raw/run1

For each shape of a record: one fit to all the others, its errors on this one, and beside them the
errors on every other case of a fit to this shape's own cases between.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.fitting_tiles import TileCases, fit_tiles
from moesim.replay.tables import load_raw


def main() -> None:
    print("| GPUs | shape | cases | left out: median | p90 | own fit: median | p90 |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        raw = load_raw(Path(name) / "calibration.json.gz")
        rows = raw["tables"]["ffn"]
        sms = int(raw["environment"]["num_sms"])
        cases = TileCases.of(
            [r["counts"] for r in rows],
            [r["hidden"] for r in rows],
            [r["intermediate"] for r in rows],
            [r["us"] for r in rows],
        )
        shapes = np.array([r["shape"] for r in rows])
        for shape in dict.fromkeys(shapes.tolist()):
            own = cases.subset(shapes == shape)
            left = errors(cases.subset(shapes != shape), own, sms)
            half = np.arange(len(own)) % 2 == 0
            fitted = errors(own.subset(half), own.subset(~half), sms)
            print(
                f"| {raw['environment']['num_ranks']} | {shape} | {len(own)} |"
                f" {np.median(left):.1%} | {np.percentile(left, 90):.1%} |"
                f" {np.median(fitted):.1%} | {np.percentile(fitted, 90):.1%} |"
            )


def errors(seen: TileCases, unseen: TileCases, num_sms: int) -> np.ndarray:
    """|predicted / measured - 1| of the cases that a fit to the others did not see."""
    like = ExpertGemmModel("bf16", "torch grouped_mm", 2.0, 1.0, 1.0, 1.0)
    model = fit_tiles(seen, like, num_sms)
    return np.abs(unseen.predict_us(model) / unseen.times_us - 1.0)


if __name__ == "__main__":
    main()
