"""Chunked pipelining: the tokens of a layer in r chunks, one chunk computed while others travel.

Tutel (arXiv:2206.03382) pipelines adaptively, PipeMoE (Shi, Pan, Chu, Li, INFOCOM 2023) finds the
number of chunks from a performance model. All dispatches are launched first, then all combines, on
one communication stream. With t_d for a chunk's dispatch and for its combine and t_e for its
experts, a layer takes

    T(r) = max(2 r t_d, (r + 1) t_d + t_e, 2 t_d + r t_e).

More chunks overlap better, but each pays the latency of its collectives and reads the weights of
its experts again; the best r is found by trying (`--chunks`). Attention and gate are not cut.
"""

from __future__ import annotations

from moesim.sim.engine import COMM, INTRA_BACK, INTRA_OUT, Program, Task
from moesim.sim.schedules.base import attention_and_gate, exchange, finish, shared_experts
from moesim.sim.work import StepWork


def pipeline_us(num_chunks: int, comm_us: float, compute_us: float) -> float:
    """T(r) above: comm_us for one chunk's dispatch or combine, compute_us for its experts."""
    r = num_chunks
    return max(2 * r * comm_us, (r + 1) * comm_us + compute_us, 2 * comm_us + r * compute_us)


class Pipelined:
    """`num_chunks` chunks; collectives within a node on streams of their own if `co_schedule`."""

    name = "pipelined"
    coherent = False

    def __init__(self, num_chunks: int, *, co_schedule: bool = False) -> None:
        self.num_chunks = num_chunks
        self.intra_out = INTRA_OUT if co_schedule else COMM
        self.intra_back = INTRA_BACK if co_schedule else COMM

    def build(self, program: Program, work: StepWork) -> None:
        home = work.home
        program.kernels("dense", home.dense_us.tolist(), name="dense layers")
        done: list[Task] = []
        for layer in range(work.num_layers):
            ready = attention_and_gate(program, home, layer, done)
            sent = [
                exchange(
                    program, chunk.dispatch, chunk.batch, layer, "dispatch", ready,
                    note=f" chunk {i}", intra_stream=self.intra_out,
                )
                for i, chunk in enumerate(work.chunks)
            ]  # fmt: skip
            shared = shared_experts(program, home, layer)
            done = [*shared]
            for i, chunk in enumerate(work.chunks):
                computed = program.kernels(
                    "compute",
                    chunk.expert_us[layer].tolist(),
                    layer=layer,
                    after=sent[i],
                    name=f"layer {layer} compute chunk {i}",
                )
                done += exchange(
                    program, chunk.combine, chunk.batch, layer, "combine", computed or sent[i],
                    note=f" chunk {i}", intra_stream=self.intra_back,
                )  # fmt: skip
        finish(program, home, done)
