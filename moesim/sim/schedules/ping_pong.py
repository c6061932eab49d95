"""Attention and experts apart: parts of a step go back and forth between two pools of GPUs.

MegaScale-Infer (arXiv:2504.02263, section 4): while the experts' GPUs compute one part of the
step's rows, attention's GPUs compute another, and a third is on its way; Step-3 has the same
(arXiv:2507.19427, section 4). Shared experts and dense layers are with attention. The network does
one part after another in each direction; the two directions share links where both cross them.
"""

from __future__ import annotations

from moesim.sim.engine import BACK, Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


class PingPong:
    """A step in `num_chunks` parts. Which GPUs hold experts is the placement's to say, which have
    tokens the home ranks'."""

    name = "ping-pong"
    coherent = False

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks

    def build(self, program: Program, work: StepWork) -> None:
        parts = [(chunk, f" part {i}") for i, chunk in enumerate(work.chunks)]
        for chunk, name in parts:
            program.kernels("dense", chunk.home.dense_us.tolist(), name=f"dense layers{name}")
        done: list[list[Task]] = [[] for _ in parts]
        for layer in range(work.num_layers):
            for i, (chunk, name) in enumerate(parts):
                gated = attention_and_gate(program, chunk.home, layer, done[i], name)
                ready = [*gated, *shared_experts(program, chunk.home, layer, name)]
                sent = exchange(
                    program, chunk.dispatch, chunk.batch, layer, "dispatch", ready, note=name
                )
                computed = program.kernels(
                    "compute",
                    chunk.expert_us[layer].tolist(),
                    layer=layer,
                    after=sent,
                    name=f"layer {layer} compute{name}",
                )
                done[i] = exchange(
                    program,
                    chunk.combine,
                    chunk.batch,
                    layer,
                    "combine",
                    computed or sent,
                    note=name,
                    stream=BACK,
                )
        for (chunk, _), last in zip(parts, done, strict=True):
            finish(program, chunk.home, last)
