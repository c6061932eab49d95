"""Whole models as experts on one machine, in three tiers of memory: Composition of Experts.

Each request names a model; one that is not in the GPUs' memory is copied there first, from host
memory or from NVMe through host memory, and takes the place of the one used longest ago
(Samba-CoE on the SN40L, Prabhakar et al., arXiv:2405.07518; abstract and introduction read; its
tiers are SRAM, HBM and DDR, ours HBM, host memory and NVMe). Requests are served one after the
other in order of arrival, as batches of one; the next model is not fetched ahead. The router's own
time is not counted.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from moesim.types import FloatArray, IntArray

HBM, DRAM, NVME = 0, 1, 2
TIER_NAMES = ("HBM", "host memory", "NVMe")


@dataclass(frozen=True, slots=True)
class Tiers:
    """Whole models that fit HBM and host memory (what is in HBM counts there as well), and the
    microseconds of copying one to HBM from host memory, and from NVMe to host memory."""

    hbm_models: int
    dram_models: int
    from_dram_us: float
    from_nvme_us: float


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """[R]: tier where each request's model was; when its copy began, when it was done, when the
    first token and the last came, in microseconds."""

    tier: IntArray
    begin_us: FloatArray
    ready_us: FloatArray
    first_us: FloatArray
    finish_us: FloatArray


def serve_in_order(
    arrival_us: FloatArray,
    model: IntArray,
    first_us: FloatArray,
    rest_us: FloatArray,
    tiers: Tiers,
) -> Served:
    """Requests [R] in order of arrival, each of a `model` 0, 1, ...; first_us, rest_us: time to its
    first token and from there to its last. Models are in the tiers by number at the start, the
    lowest in HBM."""
    hbm = OrderedDict.fromkeys(reversed(range(tiers.hbm_models)))
    dram = OrderedDict.fromkeys(reversed(range(tiers.dram_models)))
    out = np.zeros((4, len(model)))
    tier = np.zeros(len(model), np.int64)
    free = 0.0
    for r, wanted in enumerate(model.tolist()):
        tier[r] = HBM if wanted in hbm else DRAM if wanted in dram else NVME
        begin = max(free, float(arrival_us[r]))
        copy = (tier[r] >= DRAM) * tiers.from_dram_us + (tier[r] == NVME) * tiers.from_nvme_us
        for held, room in ((hbm, tiers.hbm_models), (dram, tiers.dram_models)):
            held[wanted] = None
            held.move_to_end(wanted)
            if len(held) > room:
                held.popitem(last=False)
        first = begin + copy + float(first_us[r])
        free = first + float(rest_us[r])
        out[:, r] = begin, begin + copy, first, free
    return Served(tier, *out)
