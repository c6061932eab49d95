"""The calibration's collectives on a torch process group of one rank, called and in CUDA graphs.

    torchrun --nproc-per-node 1 verification/hardware/group_of_one.py --out FILE [--device cpu]

One GPU cannot time an exchange, but it can tell whether NCCL takes these calls with a group handle
of its own, with uneven splits, and inside a capture. Exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from moesim.replay.calibrate_links import _COLLECTIVES, SUBGROUP_SHARES, Group, _uneven
from moesim.replay.environment import describe
from moesim.replay.process import joined
from moesim.replay.timing import time_calls

SIZES = (1 << 12, 1 << 20, 1 << 26)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with joined(arguments.device, 60.0) as ctx:
        group = Group(1, dist.new_group([0]))
        bodies = {
            (f"all_to_all_v, share {share:g}", size): _uneven(ctx, group, size, share)
            for share in SUBGROUP_SHARES
            for size in SIZES
        }
        bodies |= {
            (kind, size): make(ctx, group, size)
            for kind, make in _COLLECTIVES.items()
            for size in SIZES
        }
        for (kind, size), body in bodies.items():
            for mode in ("graph", "eager") if ctx.is_cuda else ("eager",):
                row: dict[str, Any] = {"kind": kind, "bytes": size, "mode": mode}
                try:
                    samples = time_calls(ctx, body, mode=mode, budget_s=0.02)
                    row["us"] = round(float(np.median(samples)), 3)
                except RuntimeError as error:
                    row["error"] = str(error).splitlines()[0][:160]
                rows.append(row)
                print(row)
        record = {"environment": describe(ctx), "results": rows}
    arguments.out.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
