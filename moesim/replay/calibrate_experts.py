"""Calibration of what stays on one GPU: one expert by itself, gathering and summing rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from moesim.replay.ops import TORCH_DTYPES, gather_rows, grouped_ffn, reduce_rows
from moesim.replay.process import Context
from moesim.replay.timing import Body, issue_us
from moesim.types import stream

if TYPE_CHECKING:
    from moesim.replay.session import Session

SKEW_MARGIN = 1.9
PERMUTE_ROWS = (24, 96, 384, 1536, 6144, 24576, 98304)
FAN_INS = (1, 2, 8)
SINGLE_ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


def measure_single(session: Session) -> None:
    """One expert by plain matmuls, for each shape, as a check on the grouped kernel."""
    ctx, recorder = session.ctx, session.recorder
    for shape in session.options.shapes:
        dtype = TORCH_DTYPES[shape.dtype]
        hidden, width = shape.hidden_size, shape.moe_intermediate_size
        copies = int(np.clip((256 << 20) // shape.expert_bytes, 2, 16))
        gate_up = draw(ctx, (copies, 2 * width, hidden), hidden**-0.5, dtype)
        down = draw(ctx, (copies, hidden, width), width**-0.5, dtype)
        most = min(8192, session.options.max_tokens_per_rank * shape.top_k)
        x = draw(ctx, (most, hidden), 1.0, dtype)
        offsets = torch.zeros(1, dtype=torch.int32, device=ctx.device)
        for rows in SINGLE_ROWS:
            if rows > most:
                break

            experts = [(gate_up[k : k + 1], down[k : k + 1]) for k in range(copies)]
            body = ffn_body(experts, [x[:rows]], [offsets], [[rows]], "loop")
            row = {"shape": shape.name, "hidden": hidden, "intermediate": width, "tokens": rows}
            modes = recorder.modes[:1]
            recorder.time("single_expert", row, body, per_round=16, modes=modes)


def measure_permute(session: Session) -> None:
    """Row gathers (`gather`: distinct rows, or each row several times) and weighted sums of rows
    (`reduce`: `fan_in` rows into one). `bytes` counts every distinct row read and row written."""
    ctx, recorder = session.ctx, session.recorder
    kernel = session.kernels.reduce
    generator = stream(0)
    for hidden, dtype_name in sorted({(s.hidden_size, s.dtype) for s in session.options.shapes}):
        dtype = TORCH_DTYPES[dtype_name]
        row_bytes = hidden * dtype.itemsize
        top = max(s.top_k for s in session.options.shapes if s.hidden_size == hidden)
        most = session.options.max_tokens_per_rank * top * SKEW_MARGIN
        row_counts = [n for n in PERMUTE_ROWS if n <= most] or [PERMUTE_ROWS[0]]
        sources = [draw(ctx, (row_counts[-1], hidden), 1.0, dtype) for _ in range(2)]
        target = torch.empty(row_counts[-1], hidden, dtype=dtype, device=ctx.device)
        for rows in row_counts:
            for fan in FAN_INS:
                few = max(1, rows // fan)
                idx = torch.from_numpy(generator.permutation(rows) % few).to(ctx.device)

                gather = _gather_body(sources, idx, target[:rows])
                case = {"hidden": hidden, "rows": rows, "fan": fan, "row_bytes": row_bytes}
                moved = (rows + few) * row_bytes
                modes = recorder.modes[:1]
                row = {"op": "gather", **case, "bytes": moved}
                recorder.time("permute", row, gather, modes=modes)

                order = torch.from_numpy(generator.permutation(rows)).to(ctx.device)
                reduce = _reduce_body(sources, order, fan, kernel)
                row = {"op": "reduce", **case, "bytes": moved}
                recorder.time("permute", row, reduce, modes=modes)
                if rows == row_counts[0] and fan == 1:
                    for what, body in (("gather", gather), ("reduce", reduce)):
                        recorder.value(
                            "launch",
                            {"what": f"{what}, host time to enqueue", "hidden": hidden},
                            issue_us(ctx, body),
                        )


def ffn_body(
    weights: list[tuple[torch.Tensor, torch.Tensor]],
    inputs: list[torch.Tensor],
    offsets: list[torch.Tensor],
    host_offsets: list[list[int]],
    kernel: str,
) -> Callable[[int], torch.Tensor]:
    """Calls that take weight set, input and active experts in turn."""

    def body(i: int) -> torch.Tensor:
        gate_up, down = weights[i % len(weights)]
        roll = i // 2 % len(offsets)
        x = inputs[i % len(inputs)]
        return grouped_ffn(x, gate_up, down, offsets[roll], host_offsets[roll], kernel)

    return body


def _gather_body(sources: list[torch.Tensor], idx: torch.Tensor, target: torch.Tensor) -> Body:
    return lambda i: gather_rows(sources[i % len(sources)], idx, target)


def _reduce_body(sources: list[torch.Tensor], order: torch.Tensor, fan: int, kernel: str) -> Body:
    """Sums of `fan` rows each, in the given order of rows, with random weights."""
    device = order.device
    ptr = torch.arange(0, len(order) + 1, fan, device=device)
    used = order[: int(ptr[-1])]
    weights = torch.rand(len(used), device=device).to(sources[0].dtype)
    groups = torch.arange(len(ptr) - 1, device=device).repeat_interleave(fan)
    return lambda i: reduce_rows(sources[i % len(sources)], used, ptr, weights, groups, kernel)


def draw(ctx: Context, size: tuple[int, ...], scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Seeded normal values, drawn in the element type itself to spare memory."""
    generator = torch.Generator(ctx.device).manual_seed(sum(size) + ctx.rank)
    out = torch.empty(size, dtype=dtype, device=ctx.device)
    return out.normal_(0.0, scale, generator=generator)
