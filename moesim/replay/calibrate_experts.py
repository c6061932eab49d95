"""Calibration of what stays on one GPU: the grouped SwiGLU, and gathering and summing rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from moesim.replay.ops import TORCH_DTYPES, gather_rows, grouped_ffn, reduce_rows
from moesim.replay.process import Context
from moesim.replay.shape import ExpertShape
from moesim.replay.timing import Body, issue_us

if TYPE_CHECKING:
    from moesim.replay.calibrate import Session

ROW_COUNTS = (8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 98304)
SKEWS = (0.0, 0.6, 1.2)
SKEW_MARGIN = 1.9
NUM_ROLLS = 8
LAST_STEP = 1.2
EAGER_ROWS = (256, 4096)
PERMUTE_ROWS = (32, 128, 512, 2048, 8192, 32768, 131072)
FAN_INS = (1, 2, 8)
IntArray = npt.NDArray[np.int64]


def expert_counts(rows: int, active: int, num_experts: int, skew: float) -> IntArray:
    """[num_experts] rows of each expert: `active` of them share `rows` by a Zipf law of exponent
    `skew` (0: evenly), each at least one, the rest none; largest remainders round."""
    share = 1.0 / np.arange(1, active + 1) ** skew
    ideal = (rows - active) * share / share.sum()
    counts = np.floor(ideal).astype(np.int64)
    order = np.argsort(-(ideal - counts), kind="stable")
    counts[order[: rows - active - int(counts.sum())]] += 1
    out = np.zeros(num_experts, np.int64)
    out[:active] = counts + 1
    return out


def measure_ffn(session: Session) -> None:
    """Grouped SwiGLU of each shape: rows x active experts x skew, in graphs; a few in eager mode,
    with the host's time to enqueue one."""
    for shape in session.options.shapes:
        _measure_shape(session, shape)
        if session.ctx.is_cuda:
            torch.cuda.empty_cache()


def _measure_shape(session: Session, shape: ExpertShape) -> None:
    ctx, recorder, kernel = session.ctx, session.recorder, session.kernels.ffn
    num_local = max(1, -(-shape.num_experts // ctx.num_ranks))
    dtype = TORCH_DTYPES[shape.dtype]
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    weights = [
        (
            _draw(ctx, (num_local, 2 * width, hidden), hidden**-0.5, dtype),
            _draw(ctx, (num_local, hidden, width), width**-0.5, dtype),
        )
        for _ in range(2)
    ]
    most = session.options.max_tokens_per_rank * shape.top_k * SKEW_MARGIN
    if ctx.num_ranks == 1:
        most = session.options.max_tokens_per_rank * shape.top_k
    row_counts = [n for n in ROW_COUNTS if n <= most] or [ROW_COUNTS[0]]
    if most > row_counts[-1] * LAST_STEP:
        row_counts.append(int(most))
    inputs = [_draw(ctx, (row_counts[-1], hidden), 1.0, dtype) for _ in range(2)]
    eager_rows = [n for n in EAGER_ROWS if n in row_counts] or row_counts[:1]
    for rows in row_counts:
        for active, skew in _spreads(num_local, rows):
            counts = expert_counts(rows, active, num_local, skew)
            rolled = [
                np.cumsum(np.roll(counts, j * max(1, num_local // NUM_ROLLS))).astype(np.int32)
                for j in range(NUM_ROLLS)
            ]
            offsets = [torch.from_numpy(r).to(ctx.device) for r in rolled]
            hosts = [r.tolist() for r in rolled]

            x = [full[:rows] for full in inputs]
            body = _ffn_body(weights, x, offsets, hosts, kernel)
            row = {
                "shape": shape.name,
                "hidden": hidden,
                "intermediate": width,
                "dtype": shape.dtype,
                "kernel": kernel,
                "local_experts": num_local,
                "active": active,
                "tokens": rows,
                "max_tokens": int(counts.max()),
                "skew": skew,
                "counts": counts.tolist(),
            }
            plain = active == min(num_local, rows) and skew == 0.0 and rows in eager_rows
            modes = recorder.modes if plain else recorder.modes[:1]
            recorder.time("ffn", row, body, per_round=2 * NUM_ROLLS, modes=modes)
            if plain and rows == eager_rows[0]:
                recorder.value(
                    "launch",
                    {"what": "expert FFN, host time to enqueue", "shape": shape.name},
                    issue_us(ctx, body),
                )


def _spreads(num_local: int, rows: int) -> list[tuple[int, float]]:
    """(active experts, skew) cases for so many rows."""
    everyone = min(num_local, rows)
    cases = [(everyone, skew) for skew in SKEWS]
    fewer = {max(1, num_local // 4), max(1, num_local // 2), 1} - {everyone}
    return cases + [(n, 0.0) for n in sorted(fewer) if n < everyone]


def measure_single(session: Session) -> None:
    """One expert by plain matmuls, for each shape, as a check on the grouped kernel."""
    ctx, recorder = session.ctx, session.recorder
    for shape in session.options.shapes:
        dtype = TORCH_DTYPES[shape.dtype]
        hidden, width = shape.hidden_size, shape.moe_intermediate_size
        copies = int(np.clip((256 << 20) // shape.expert_bytes, 2, 16))
        gate_up = _draw(ctx, (copies, 2 * width, hidden), hidden**-0.5, dtype)
        down = _draw(ctx, (copies, hidden, width), width**-0.5, dtype)
        most = min(8192, session.options.max_tokens_per_rank * shape.top_k)
        x = _draw(ctx, (most, hidden), 1.0, dtype)
        offsets = torch.zeros(1, dtype=torch.int32, device=ctx.device)
        for rows in (1, 4, 16, 64, 256, 1024, 4096, 8192):
            if rows > most:
                break

            experts = [(gate_up[k : k + 1], down[k : k + 1]) for k in range(copies)]
            body = _ffn_body(experts, [x[:rows]], [offsets], [[rows]], "loop")
            row = {"shape": shape.name, "hidden": hidden, "intermediate": width, "tokens": rows}
            modes = recorder.modes[:1]
            recorder.time("single_expert", row, body, per_round=16, modes=modes)


def measure_permute(session: Session) -> None:
    """Row gathers (`gather`: distinct rows, or each row several times) and weighted sums of rows
    (`reduce`: `fan_in` rows into one). `bytes` counts every distinct row read and row written."""
    ctx, recorder = session.ctx, session.recorder
    kernel = session.kernels.reduce
    generator = np.random.default_rng(0)
    for hidden, dtype_name in sorted({(s.hidden_size, s.dtype) for s in session.options.shapes}):
        dtype = TORCH_DTYPES[dtype_name]
        row_bytes = hidden * dtype.itemsize
        top = max(s.top_k for s in session.options.shapes if s.hidden_size == hidden)
        most = session.options.max_tokens_per_rank * top * SKEW_MARGIN
        row_counts = [n for n in PERMUTE_ROWS if n <= most] or [PERMUTE_ROWS[0]]
        sources = [_draw(ctx, (row_counts[-1], hidden), 1.0, dtype) for _ in range(2)]
        target = torch.empty(row_counts[-1], hidden, dtype=dtype, device=ctx.device)
        for rows in row_counts:
            for fan in FAN_INS:
                few = max(1, rows // fan)
                idx = torch.from_numpy(generator.permutation(rows) % few).to(ctx.device)

                gather = _gather_body(sources, idx, target[:rows])
                case = {"hidden": hidden, "rows": rows, "fan": fan, "row_bytes": row_bytes}
                moved = (rows + few) * row_bytes
                recorder.time("permute", {"op": "gather", **case, "bytes": moved}, gather)

                order = torch.from_numpy(generator.permutation(rows)).to(ctx.device)
                reduce = _reduce_body(sources, order, fan, kernel)
                recorder.time("permute", {"op": "reduce", **case, "bytes": moved}, reduce)
                if rows == row_counts[0] and fan == 1:
                    for what, body in (("gather", gather), ("reduce", reduce)):
                        recorder.value(
                            "launch",
                            {"what": f"{what}, host time to enqueue", "hidden": hidden},
                            issue_us(ctx, body),
                        )


def _ffn_body(
    weights: list[tuple[torch.Tensor, torch.Tensor]],
    inputs: list[torch.Tensor],
    offsets: list[torch.Tensor],
    host_offsets: list[list[int]],
    kernel: str,
) -> Body:
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


def _draw(ctx: Context, size: tuple[int, ...], scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Seeded normal values, drawn in the element type itself to spare memory."""
    generator = torch.Generator(ctx.device).manual_seed(sum(size) + ctx.rank)
    out = torch.empty(size, dtype=dtype, device=ctx.device)
    return out.normal_(0.0, scale, generator=generator)
