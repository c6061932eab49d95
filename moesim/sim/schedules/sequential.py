"""Dispatch, compute, combine, each waiting for the slowest rank (C5): no overlap.

The order of launch in a layer is attention, gate, shared experts, dispatch, routed experts,
combine. With nothing else on the network this is the closed form of the cost model (INV-8).
"""

from __future__ import annotations

from moesim.sim.engine import Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


class Sequential:
    name = "sequential"
    num_chunks = 1
    coherent = False

    def build(self, program: Program, work: StepWork) -> None:
        home, chunk = work.home, work.chunks[0]
        program.kernels("dense", home.dense_us.tolist(), name="dense layers")
        done: list[Task] = []
        for layer in range(work.num_layers):
            ready = attention_and_gate(program, home, layer, done)
            ready = [*ready, *shared_experts(program, home, layer)]
            sent = exchange(program, chunk.dispatch, chunk.batch, layer, "dispatch", ready)
            computed = program.kernels(
                "compute", chunk.expert_us[layer].tolist(), layer=layer, after=sent
            )
            done = exchange(program, chunk.combine, chunk.batch, layer, "combine", computed or sent)
        finish(program, home, done)
