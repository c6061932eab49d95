"""Chunked pipelining with traffic within nodes beside traffic between them.

FSMoE (Pan et al., ASPLOS 2025, arXiv:2501.10714): NVLink and the network are different
resources, so the part of one chunk's exchange that stays within nodes runs beside another chunk's
part between nodes. Needs an exchange in stages (`--all-to-all bi-level` or `two-level`). FSMoE's
own stages within a node are the all-gather and reduce-scatter of expert sharding; here they are
the second hop to the experts' GPUs.
"""

from __future__ import annotations

from moesim.sim.schedules.pipelined import Pipelined


class CoScheduled(Pipelined):
    """`Pipelined` with a stream each for the dispatches and the combines within nodes."""

    name = "co-scheduled"

    def __init__(self, num_chunks: int) -> None:
        super().__init__(num_chunks, co_schedule=True)
