"""Shared experts computed while the dispatch is under way, as serving engines do.

The shared experts need no dispatch, so the dispatch starts right after the gate and they run beside
it (vLLM pull request 26440 and SGLang's dual-stream forward put them on a stream of their own,
Megatron-LM has it for training). They delay the routed experts only by what they take longer than
the dispatch. Left out: that communication
kernels take streaming multiprocessors away from them.
"""

from __future__ import annotations

from moesim.sim.engine import Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


class SharedOverlap:
    name = "shared-overlap"
    num_chunks = 1
    coherent = False

    def build(self, program: Program, work: StepWork) -> None:
        home, chunk = work.home, work.chunks[0]
        program.kernels("dense", home.dense_us.tolist(), name="dense layers")
        done: list[Task] = []
        for layer in range(work.num_layers):
            ready = attention_and_gate(program, home, layer, done)
            sent = exchange(program, chunk.dispatch, chunk.batch, layer, "dispatch", ready)
            shared = shared_experts(program, home, layer)
            experts = chunk.expert_us[layer].tolist()
            computed = program.kernels("compute", experts, layer=layer, after=sent)
            before = [*computed, *shared] or sent
            done = exchange(program, chunk.combine, chunk.batch, layer, "combine", before)
        finish(program, home, done)
