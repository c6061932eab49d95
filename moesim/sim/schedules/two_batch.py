"""Two-batch overlap: two halves of the step, one computing while the other communicates.

DeepSeek's serving (github.com/deepseek-ai/profile-data, README, "Prefilling" and "Decoding": two
micro-batches overlap computation and all-to-all) and SGLang's `--enable-two-batch-overlap`:
micro-batches A and B alternate, so that A's dispatch runs beside B's attention, A's experts beside
B's dispatch, A's combine beside B's experts. Each half has its own attention, gate and experts, at
the rates of half the tokens, and every expert's weights are read twice.
"""

from __future__ import annotations

from moesim.sim.engine import Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


class TwoBatch:
    name = "two-batch"
    num_chunks = 2
    coherent = False

    def build(self, program: Program, work: StepWork) -> None:
        names = (" batch A", " batch B")
        for chunk, name in zip(work.chunks, names, strict=True):
            program.kernels("dense", chunk.home.dense_us.tolist(), name=f"dense layers{name}")
        done: list[list[Task]] = [[], []]
        for layer in range(work.num_layers):
            sent: list[list[Task]] = []
            for chunk, name, before in zip(work.chunks, names, done, strict=True):
                gated = attention_and_gate(program, chunk.home, layer, before, name)
                sent.append(
                    exchange(
                        program, chunk.dispatch, chunk.batch, layer, "dispatch", gated, note=name
                    )
                )
            for i, (chunk, name) in enumerate(zip(work.chunks, names, strict=True)):
                shared = shared_experts(program, chunk.home, layer, name)
                computed = program.kernels(
                    "compute",
                    chunk.expert_us[layer].tolist(),
                    layer=layer,
                    after=sent[i],
                    name=f"layer {layer} compute{name}",
                )
                before = [*computed, *shared] or sent[i]
                done[i] = exchange(
                    program, chunk.combine, chunk.batch, layer, "combine", before, note=name
                )
        for chunk, last in zip(work.chunks, done, strict=True):
            finish(program, chunk.home, last)
