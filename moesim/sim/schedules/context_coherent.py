"""Context-coherent expert parallelism: tokens stay where their expert was.

ExFlow (Yao et al., IPDPS 2024, arXiv:2401.08383): if every GPU can attend for every
token, a token need not go home after a layer. It moves on from the GPU of its expert to that of
its next one, one all-to-all a layer instead of two, none where the placement keeps the two on one
GPU; an all-gather at the end of the step makes the contexts coherent.

With more than one expert per token, which ExFlow's models did not have, the results of a token's
experts are brought together on the GPU of its first one (the highest gate weight, where the trace
has them), which is where it goes on from. Not priced: that every GPU keeps every token's cache, and
the traffic that would keep caches of all layers coherent; the all-gather is of one hidden state a
token. Decode only.
"""

from __future__ import annotations

from moesim.sim.engine import Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


class ContextCoherent:
    """As the sequential schedule, with `work` from `moesim.sim.coherent`."""

    name = "context-coherent"
    num_chunks = 1
    coherent = True

    def build(self, program: Program, work: StepWork) -> None:
        home, chunk = work.home, work.chunks[0]
        program.kernels("dense", home.dense_us.tolist(), name="dense layers")
        done: list[Task] = []
        for layer in range(work.num_layers):
            ready = attention_and_gate(program, home, layer, done)
            ready = [*ready, *shared_experts(program, home, layer)]
            sent = exchange(program, chunk.dispatch, chunk.batch, layer, "dispatch", ready)
            experts = chunk.expert_us[layer].tolist()
            computed = program.kernels("compute", experts, layer=layer, after=sent) or sent
            done = exchange(program, chunk.combine, chunk.batch, layer, "combine", computed)
        if work.gather is not None:
            done = [program.collective(work.gather, after=done)]
        finish(program, home, done)
