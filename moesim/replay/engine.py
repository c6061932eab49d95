"""One rank's expert layers: weights in slots, and permute, dispatch, compute, combine, unpermute.

What a layer does, given the tables of `routing.RankWork`:

1. permute: home rows are gathered, own rows straight into the received rows, the others into the
   send buffer.
2. dispatch: all_to_all_single of the sent rows, both splits known beforehand.
3. compute: received rows are expanded to one row a (row, slot) in slot order, the grouped SwiGLU
   runs, and the results are summed back to one row a received row, weighted.
4. combine: all_to_all_single the other way.
5. unpermute: each home token sums the rows that came back.

Gate, attention, norms, residuals and shared experts are not replayed. Each layer reads one of a few
weight sets and one of two input sets in turn, so that no layer finds its weights in the L2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moesim.replay.ops import (
    TORCH_DTYPES,
    Kernels,
    exchange,
    gather_rows,
    grouped_ffn,
    reduce_rows,
)
from moesim.replay.process import Context
from moesim.replay.routing import RankWork
from moesim.replay.shape import ExpertShape
from moesim.replay.timing import PhaseClock, capture
from moesim.types import FloatArray, IntArray

PHASES = ("permute", "dispatch", "compute", "combine", "unpermute")
NUM_INPUT_SETS = 2


@dataclass(frozen=True, slots=True, eq=False)
class LayerTables:
    """`RankWork` on the device, with the host's copy of what the launches need."""

    work: RankWork
    pack_idx: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    expand_idx: torch.Tensor
    offsets: torch.Tensor
    host_offsets: list[int]
    reduce_idx: torch.Tensor
    reduce_ptr: torch.Tensor
    reduce_groups: torch.Tensor
    reduce_weights: torch.Tensor
    return_idx: torch.Tensor
    return_ptr: torch.Tensor
    return_groups: torch.Tensor
    return_weights: torch.Tensor | None


class ReplayEngine:
    """A rank's experts of one layer in `num_sets` copies, and the step that replays layers.

    Weights are drawn per logical expert from a seed, so that replicas agree on every rank. A plan
    with fewer slots per rank than `slots_per_rank` uses the first of them.
    """

    def __init__(
        self,
        ctx: Context,
        shape: ExpertShape,
        slots_per_rank: int,
        max_home_tokens: int,
        kernels: Kernels,
        *,
        num_sets: int = 2,
        seed: int = 0,
    ) -> None:
        self.ctx, self.shape, self.kernels, self.seed = ctx, shape, kernels, seed
        self.dtype = TORCH_DTYPES[shape.dtype]
        self.num_sets = num_sets
        hidden, width = shape.hidden_size, shape.moe_intermediate_size
        self.gate_up = [
            torch.empty(slots_per_rank, 2 * width, hidden, dtype=self.dtype, device=ctx.device)
            for _ in range(num_sets)
        ]
        self.down = [
            torch.empty(slots_per_rank, hidden, width, dtype=self.dtype, device=ctx.device)
            for _ in range(num_sets)
        ]
        for set_idx in range(num_sets):
            self.load_weights(np.arange(slots_per_rank * ctx.num_ranks), set_idx)
        self.inputs = [
            draw_inputs(shape, max_home_tokens, ctx.rank, j, seed, ctx.device)
            for j in range(NUM_INPUT_SETS)
        ]
        self._ready = torch.zeros(ctx.num_ranks, dtype=torch.float32, device=ctx.device)

    def load_weights(self, placement: npt.NDArray[np.integer], set_idx: int = 0) -> None:
        """Fill one weight set with the experts that `placement` [P] gives this rank's slots;
        empty slots keep what they hold."""
        num_slots = len(placement) // self.ctx.num_ranks
        mine = placement[self.ctx.rank * num_slots : (self.ctx.rank + 1) * num_slots]
        for slot, expert in enumerate(mine.tolist()):
            if expert >= 0:
                gate_up, down = draw_expert(self.shape, expert, set_idx, self.seed, self.ctx.device)
                self.gate_up[set_idx][slot].copy_(gate_up)
                self.down[set_idx][slot].copy_(down)

    def upload(self, work: RankWork) -> LayerTables:
        """Copy a layer's tables to the device."""
        device = self.ctx.device

        def move(array: npt.NDArray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

        def groups(ptr: IntArray) -> torch.Tensor:
            return move(np.repeat(np.arange(len(ptr) - 1), np.diff(ptr)))

        weights = work.return_weights
        return LayerTables(
            work,
            move(work.pack_idx),
            work.send_splits.tolist(),
            work.recv_splits.tolist(),
            move(work.expand_idx),
            move(work.slot_offsets, torch.int32),
            work.slot_offsets.tolist(),
            move(work.reduce_idx),
            move(work.reduce_ptr),
            groups(work.reduce_ptr),
            move(work.reduce_weights, self.dtype),
            move(work.return_idx),
            move(work.return_ptr),
            groups(work.return_ptr),
            None if weights is None else move(weights, self.dtype),
        )

    def layer(
        self,
        tables: LayerTables,
        index: int,
        clock: PhaseClock | None = None,
        *,
        source: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        poison: bool = False,
    ) -> torch.Tensor:
        """Run one layer; [home tokens, h].

        index: position in the step, which picks weight and input sets and the clock's row.
        source: another input. scales [slots_per_rank]: replace every expert by a multiplication
        with its scale, which makes the layer exact on small integers. poison: fill every buffer
        with NaN first, so that a row which nothing wrote is seen.
        """
        work, hidden = tables.work, self.shape.hidden_size

        def mark(i: int) -> None:
            if clock is not None:
                clock.mark(index, i)

        def buffer(rows: int) -> torch.Tensor:
            made = torch.empty(rows, hidden, dtype=self.dtype, device=self.ctx.device)
            return made.fill_(float("nan")) if poison else made

        x = self.inputs[index % NUM_INPUT_SETS] if source is None else source
        remote, own, sent = work.num_received, work.num_own, work.num_sent
        travelling = buffer(remote + own + sent)
        expanded = buffer(work.num_gemm_rows)
        returned = buffer(own + sent)

        mark(0)
        gather_rows(x, tables.pack_idx, travelling[remote:])
        mark(1)
        exchange(
            travelling[:remote],
            travelling[remote + own :],
            tables.recv_splits,
            tables.send_splits,
        )
        mark(2)
        gather_rows(travelling[: remote + own], tables.expand_idx, expanded)
        results = self._experts(expanded, tables, index, scales)
        summed = reduce_rows(
            results,
            tables.reduce_idx,
            tables.reduce_ptr,
            tables.reduce_weights,
            tables.reduce_groups,
            self.kernels.reduce,
        )
        returned[:own].copy_(summed[remote:])
        mark(3)
        exchange(returned[own:], summed[:remote], tables.send_splits, tables.recv_splits)
        mark(4)
        out = reduce_rows(
            returned,
            tables.return_idx,
            tables.return_ptr,
            tables.return_weights,
            tables.return_groups,
            self.kernels.reduce,
        )
        mark(5)
        return out

    def _experts(
        self,
        rows: torch.Tensor,
        tables: LayerTables,
        index: int,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        if scales is not None:
            counts = torch.tensor(tables.work.slot_rows, device=rows.device)
            return rows * torch.repeat_interleave(scales, counts)[:, None].to(rows.dtype)
        which, num_slots = index % self.num_sets, len(tables.host_offsets)
        return grouped_ffn(
            rows,
            self.gate_up[which][:num_slots],
            self.down[which][:num_slots],
            tables.offsets,
            tables.host_offsets,
            self.kernels.ffn,
        )

    def step(self, layers: Sequence[LayerTables], clock: PhaseClock | None = None) -> None:
        """All layers in turn, after a tiny collective that lines the ranks up."""
        if self.ctx.num_ranks > 1:
            dist.all_reduce(self._ready)
        for index, tables in enumerate(layers):
            self.layer(tables, index, clock)

    def measure(
        self, layers: Sequence[LayerTables], mode: str, *, budget_s: float = 0.3, max_reps: int = 20
    ) -> tuple[FloatArray, FloatArray]:
        """Time a step on this rank.

        mode: "graph" captures the whole step in one CUDA graph, "eager" launches it call by call.
        Returns [reps, L, 5] microseconds of each phase, and [reps] microseconds of the step without
        any event between its layers, run back to back.
        """
        ctx = self.ctx
        self.step(layers)
        ctx.barrier()
        start = time.perf_counter()
        self.step(layers)
        ctx.sync()
        step_s = ctx.max(time.perf_counter() - start)
        reps = int(np.clip(budget_s / 2 / max(step_s, 1e-7), 5, max_reps))

        graph_mode = mode == "graph"
        clock = PhaseClock(ctx, len(layers), len(PHASES) + 1, external=graph_mode)

        def marked() -> None:
            self.step(layers, clock)

        def plain() -> None:
            self.step(layers)

        if graph_mode:
            marked_graph, plain_graph = capture(ctx, marked), capture(ctx, plain)
            run_marked, run_plain = marked_graph.replay, plain_graph.replay
        else:
            run_marked, run_plain = marked, plain
        phases = np.zeros((reps, len(layers), len(PHASES)))
        for r in range(-1, reps):
            ctx.barrier()
            run_marked()
            ctx.sync()
            if r >= 0:
                phases[r] = clock.read_us()
        whole = PhaseClock(ctx, reps, 2)
        run_plain()
        ctx.barrier()
        for r in range(reps):
            whole.mark(r, 0)
            run_plain()
            whole.mark(r, 1)
        ctx.sync()
        return phases, whole.read_us()[:, 0]


def draw_inputs(
    shape: ExpertShape, num_tokens: int, rank: int, which: int, seed: int, device: torch.device
) -> torch.Tensor:
    """[num_tokens, h] standard normal hidden states of one rank, seeded."""
    generator = torch.Generator(device).manual_seed(_mix(seed, 1, rank, which))
    noise = torch.randn(num_tokens, shape.hidden_size, device=device, generator=generator)
    return noise.to(TORCH_DTYPES[shape.dtype])


def draw_expert(
    shape: ExpertShape, expert: int, set_idx: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[2 i, h] and [h, i] weights of one logical expert, normal with variance 1 / fan-in."""
    generator = torch.Generator(device).manual_seed(_mix(seed, 2, expert, set_idx))
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    gate_up = torch.randn(2 * width, hidden, device=device, generator=generator)
    down = torch.randn(hidden, width, device=device, generator=generator)
    dtype = TORCH_DTYPES[shape.dtype]
    return gate_up.mul_(hidden**-0.5).to(dtype), down.mul_(width**-0.5).to(dtype)


def _mix(*parts: int) -> int:
    """One 62-bit seed from several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(2))
