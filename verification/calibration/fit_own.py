"""Fit what the project measured itself on two H100s, eagerly launched: `python
verification/calibration/fit_own.py --data ../shared/data/measured
--out topologies/calibration/h100.yaml`.

`overheads`: the host time that an eager collective adds to the kernel's fitted time (fit_nccl.py
runs first), and the rate at which an uneven all-to-all copies what stays local. `copies`: pinned
host copies, both GPUs at once. Every other size is fitted, those between are held out. With
`--gpu h200` both are taken over as assumed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import HEADERS, arguments, report, update
from tables import OWN_SOURCE, alternate, own_all_to_all

from moesim.cost.calibration import load_calibration
from moesim.cost.fitting import robust_fit, round_significant

MIN_LOCAL_BYTES = 100e6  # below, the local copy hides behind the launch


def fit_overheads(data: Path, calibration: Path) -> dict[str, Any]:
    curve = load_calibration(calibration).collectives.curve("all_to_all", 2)
    remote, local, us, train = own_all_to_all(data)
    kernel = curve.time_us(remote)
    overhead = round_significant(float(np.median((us - kernel)[train & (local <= remote)])))
    bound = train & (local > 3 * remote) & (local > MIN_LOCAL_BYTES)
    rate = round_significant(float(np.median(local[bound] / (us[bound] - overhead))) / 1e3)
    predicted = overhead + np.maximum(kernel, local / (rate * 1e3))
    return {
        "eager_collective_us": overhead,
        "local_copy_gb_per_s": rate,
        "source": "own_h100x2",
        "fit": [
            report(
                predicted[~train],
                us[~train],
                regime="eager all-to-all on two GPUs, even and uneven",
                held_out="every other size",
            )
        ],
    }


def fit_copies(data: Path) -> list[dict[str, Any]]:
    rows = np.array(json.loads((data / "h100x2_own.json").read_text())["data"]["h2d_d2h_pinned_us"])
    size = rows[:, 0]
    train = alternate(size)
    entries = []
    for column, direction in ((1, "h2d"), (2, "d2h")):
        us = rows[:, column]

        def time(log_params: np.ndarray, at: np.ndarray) -> np.ndarray:
            floor, latency, rate = np.exp(log_params)
            return np.maximum(floor, latency + at / (rate * 1e3))

        params, _ = robust_fit(
            lambda p, us=us, time=time: np.log(time(p, size[train]) / us[train]),
            [np.log([25.0, 12.0, 50.0]), np.log([25.0, 20.0, 55.0])],
        )
        floor, latency, rate = (round_significant(v) for v in np.exp(params))
        entries.append(
            {
                "direction": direction,
                "num_gpus_at_once": 2,
                "basis": "measured",
                "source": "own_h100x2",
                "floor_us": floor,
                "latency_us": latency,
                "gb_per_s": rate,
                "bytes_range": [float(size.min()), float(size.max())],
                "fit": [
                    report(
                        time(np.log([floor, latency, rate]), size[~train]),
                        us[~train],
                        held_out="every other size",
                    )
                ],
            }
        )
    return entries


def main() -> None:
    args = arguments(__doc__ or "")
    if args.gpu == "h200":
        h100 = yaml.safe_load((args.out.parent / "h100.yaml").read_text())
        note = "taken over from the H100"
        strip = {"basis": "assumed", "note": note}
        overheads = {k: v for k, v in h100["overheads"].items() if k != "fit"} | strip
        copies = [{k: v for k, v in c.items() if k != "fit"} | strip for c in h100["copies"]]
    else:
        overheads = fit_overheads(args.data, args.out)
        copies = fit_copies(args.data)
    print(overheads)
    print(*copies, sep="\n")
    source = {"own_h100x2": OWN_SOURCE}
    update(args.out, HEADERS[args.gpu], "overheads", overheads, source)
    update(args.out, HEADERS[args.gpu], "copies", copies, source)


if __name__ == "__main__":
    main()
