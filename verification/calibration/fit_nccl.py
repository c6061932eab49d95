"""Fit concave pieces to the NCCL tables: `python verification/calibration/fit_nccl.py
--data ../shared/data/measured --out topologies/calibration/h100.yaml`.

Every other size is fitted, the sizes between are held out and give the stated errors.
"""

from __future__ import annotations

from common import AICONFIGURATOR, HEADERS, arguments, report, update
from tables import nccl_points

from moesim.cost.fitting import fit_affine_min


def main() -> None:
    args = arguments(__doc__ or "")
    source = f"nccl_{args.gpu}"
    entries = []
    for (kind, ranks), points in sorted(nccl_points(args.data, args.gpu).items()):
        curve, _ = fit_affine_min(points.num_bytes[points.train], points.times_us[points.train])
        test = ~points.train
        fit = report(
            curve.time_us(points.num_bytes[test]),
            points.times_us[test],
            dropped=points.dropped,
            held_out="every other size",
        )
        print(f"{kind:15s} {ranks} {curve.segments} {fit['median_error']} {fit['p90_error']}")
        entries.append(
            {
                "kind": kind,
                "group_size": ranks,
                "basis": "measured",
                "source": source,
                "nvlink": [list(pair) for pair in curve.segments],
                "bytes_range": [float(points.num_bytes.min()), float(points.num_bytes.max())],
                "fit": [fit],
            }
        )
    sources = {
        source: f"{AICONFIGURATOR}, {args.gpu} nccl table, NCCL 2.29.2, nccl-tests, one process, "
        "calls back to back"
    }
    update(
        args.out,
        HEADERS[args.gpu],
        "collectives",
        entries,
        sources,
        lambda entry: entry["source"] == source,
    )


if __name__ == "__main__":
    main()
