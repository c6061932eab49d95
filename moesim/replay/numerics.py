"""Is the replayed layer right? Two checks, neither of which shares code with the engine.

`conservation`: with experts replaced by small integer scales and small integer inputs, every sum is
exact, so a choice that is lost, doubled or served by the wrong slot changes the output (INV-1).
`reference_error`: sampled tokens against float64 arithmetic in this process alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from moesim.errors import MoesimError
from moesim.replay.engine import LayerTables, ReplayEngine, draw_expert
from moesim.replay.routing import Assignment, Dedup
from moesim.replay.timing import capture

MAX_EXACT = {"bf16": 256, "fp16": 2048, "fp32": 1 << 24}
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-4}


class NumericsError(MoesimError):
    """The replayed layer computed something else than the plan and the trace demand."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Check:
    """Outcome of the checks of one layer, over all ranks.

    relative_error: ‖out - reference‖ / ‖reference‖ over all sampled tokens of the worst rank.
    """

    relative_error: float
    num_sampled_tokens: int
    num_choices: int


def check_layer(
    engine: ReplayEngine,
    tables: LayerTables,
    assignment: Assignment,
    expert_ids: npt.NDArray[np.integer],
    placement: npt.NDArray[np.integer],
    *,
    dedup: Dedup = "gpu",
    num_samples: int = 16,
    label: str = "",
) -> Check:
    """Check one layer's tables on every rank; collective. Loads weight set 0 by `placement` [P].

    expert_ids: [T, K] of the whole batch. Raises NumericsError on every rank when a choice is
    lost, doubled or misplaced, when an output is NaN, or when the relative error is out of
    tolerance (2e-2 for bf16 operands, 4e-3 for fp16, 1e-4 for fp32).
    """
    ctx = engine.ctx
    chosen = int((np.asarray(expert_ids, np.int64) >= 0).sum())
    served = int(ctx.gather([tables.work.num_gemm_rows]).sum())
    if served != chosen:
        raise NumericsError(
            f"{label}: {chosen} choices, but the ranks serve {served}", "this is a bug: report it"
        )
    exact = conservation_error(engine, tables, assignment, expert_ids, placement, dedup)
    if ctx.max(exact) > 0:
        raise NumericsError(
            f"{label}: choices were lost, doubled or served by the wrong expert"
            f" (largest deviation {ctx.max(exact):g} where 0 is exact)",
            "this is a bug, or a fault of the communication path: report it",
        )
    engine.load_weights(placement, 0)
    error, sampled = reference_error(engine, tables, assignment, expert_ids, num_samples)
    worst = ctx.max(error)
    tolerance = TOLERANCE[engine.shape.dtype]
    if not worst <= tolerance:
        raise NumericsError(
            f"{label}: relative error {worst:.3g} against float64, tolerance {tolerance:g}",
            "this is a bug, or a fault of a kernel: try --ffn loop",
        )
    return Check(worst, int(ctx.gather([sampled]).sum()), chosen)


def conservation_error(
    engine: ReplayEngine,
    tables: LayerTables,
    assignment: Assignment,
    expert_ids: npt.NDArray[np.integer],
    placement: npt.NDArray[np.integer],
    dedup: Dedup,
) -> float:
    """Largest deviation on this rank from the exact integer result; infinite for a NaN.

    Token t of the batch is the constant 1 + t mod 3, expert e multiplies by 1 + e mod m with m so
    small that every partial sum is exact in the element type, and all gate weights are 1.
    """
    ctx, shape = engine.ctx, engine.shape
    ids = np.asarray(expert_ids, np.int64)
    modulus = max(1, MAX_EXACT[shape.dtype] // (3 * ids.shape[1]))
    modulus = min(modulus, 7)
    home_tokens = np.flatnonzero(assignment.home == ctx.rank)
    value = 1 + home_tokens % 3
    scale = np.where(ids >= 0, 1 + ids % modulus, 0)[home_tokens].sum(axis=1)
    want = torch.tensor((value * scale).astype(np.float64))

    num_slots = len(tables.host_offsets)
    mine = placement[ctx.rank * num_slots : (ctx.rank + 1) * num_slots]
    scales = torch.tensor((1 + mine % modulus).astype(np.float32), device=ctx.device)
    source = torch.tensor(value.astype(np.float32), device=ctx.device).to(engine.dtype)
    source = source[:, None].expand(-1, shape.hidden_size).contiguous()
    ones = _with_unit_weights(tables)
    out = engine.layer(ones, 0, source=source, scales=scales, poison=True)
    deviation = (out.double().cpu() - want[:, None]).abs()
    if not bool(torch.isfinite(deviation).all()):
        return float("inf")
    return float(deviation.max()) if deviation.numel() else 0.0


def reference_error(
    engine: ReplayEngine,
    tables: LayerTables,
    assignment: Assignment,
    expert_ids: npt.NDArray[np.integer],
    num_samples: int,
) -> tuple[float, int]:
    """Relative error of up to `num_samples` home tokens, spread evenly, and how many there were.

    The reference draws the experts' weights again and computes in float64; gate weights and inputs
    are taken at the element type's precision. A NaN anywhere in the output gives infinity.
    """
    ctx = engine.ctx
    home_tokens = np.flatnonzero(assignment.home == ctx.rank)
    out = engine.layer(tables, 0, poison=True)
    if not bool(torch.isfinite(out).all()):
        return float("inf"), 0
    if not len(home_tokens):
        return 0.0, 0
    picks = np.unique(np.linspace(0, len(home_tokens) - 1, num_samples).astype(np.int64))
    ids = np.asarray(expert_ids, np.int64)[home_tokens[picks]]
    gates = torch.tensor(assignment.weights[home_tokens[picks]]).to(engine.dtype).double()
    width = engine.shape.moe_intermediate_size
    x = engine.inputs[0][torch.tensor(picks, device=ctx.device)].double()
    want = torch.zeros_like(x)
    for expert in np.unique(ids[ids >= 0]).tolist():
        token, choice = np.nonzero(ids == expert)
        rows = torch.tensor(token, device=ctx.device)
        weight = gates[token, choice].to(ctx.device)
        gate_up, down = draw_expert(engine.shape, expert, 0, engine.seed, ctx.device)
        both = x[rows] @ gate_up.double().T
        active = both[:, :width] * torch.sigmoid(both[:, :width]) * both[:, width:]
        want.index_add_(0, rows, (active @ down.double().T) * weight[:, None])
    got = out[torch.tensor(picks, device=ctx.device)].double()
    size = float(want.norm())
    if size == 0.0:
        return (0.0 if float(got.norm()) == 0.0 else float("inf")), len(picks)
    return float((got - want).norm()) / size, len(picks)


def _with_unit_weights(tables: LayerTables) -> LayerTables:
    ones = None if tables.return_weights is None else torch.ones_like(tables.return_weights)
    return replace(
        tables, reduce_weights=torch.ones_like(tables.reduce_weights), return_weights=ones
    )


def graph_deviation(engine: ReplayEngine, tables: LayerTables) -> float:
    """Relative difference between a layer replayed from a CUDA graph, into outputs poisoned with
    NaN beforehand, and the same layer called eagerly; collective."""
    eager = engine.layer(tables, 0).clone()
    kept: list[torch.Tensor] = []
    graph = capture(engine.ctx, lambda: kept.append(engine.layer(tables, 0, poison=True)))
    kept[0].fill_(float("nan"))
    graph.replay()
    engine.ctx.sync()
    size = float(eager.double().norm())
    difference = float((kept[0].double() - eager.double()).norm())
    return difference / size if size else difference
