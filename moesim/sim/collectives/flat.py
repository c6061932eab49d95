"""One collective over the whole group, as the all-to-all library does it.

Covers a plain all-to-all(v) (nccl: one message a destination GPU), DeepEP's normal mode (deepep:
one message a destination *node*, over the NICs of equal local rank, forwarded there over NVLink
while the rest is still arriving, hence one collective whose busiest link decides), and its
low-latency mode (deepep_ll: one message a chosen expert, straight to it). github.com/deepseek-ai/
DeepEP, docs/legacy.md (its first version), "Normal kernels with NVLink and RDMA forwarding" and
"Low-latency kernels with pure RDMA"; DeepSeek-V3, arXiv:2412.19437, for the node limit, which is
the model's own routing (a trace shows it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.cost.routing import Dedup, Routed
from moesim.cost.step import StepModel
from moesim.sim.collectives.base import Stage, make_stage
from moesim.sim.links import LinkTable


class Flat:
    """`StepModel`'s own collectives."""

    name = "flat"

    def __init__(self, step: StepModel, links: LinkTable) -> None:
        self.step = step
        self.links = links
        self.dedup: Dedup = step.dedup

    def dispatch(self, routed: Routed) -> Sequence[Stage]:
        step = self.step
        return [make_stage(step, self.links, step.dispatch, routed.messages, step.dispatch_bytes)]

    def combine(self, routed: Routed) -> Sequence[Stage]:
        step, back = self.step, np.swapaxes(routed.messages, -1, -2)
        return [make_stage(step, self.links, step.combine, back, step.combine_bytes)]
