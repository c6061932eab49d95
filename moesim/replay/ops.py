"""The few device operations of an expert layer, with the implementation chosen and named.

Each has a fast form and a plain one. `choose` tries the fast one on the device, in a CUDA graph
too, against the plain one, and falls back with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from moesim.replay.process import Context
from moesim.replay.shape import ExpertShape
from moesim.replay.timing import capture

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Kernels:
    """Which implementation runs; `notes` says why a faster one does not.

    ffn: "grouped_mm" (torch._grouped_mm, one launch a matrix for all experts) or "loop" (one
    matmul an expert). reduce: "embedding_bag" (one fused weighted gather-sum) or "index_add".
    graphs: whether collectives and kernels can be captured in CUDA graphs.
    """

    ffn: str = "loop"
    reduce: str = "embedding_bag"
    graphs: bool = False
    notes: tuple[str, ...] = field(default=())


def gather_rows(source: torch.Tensor, idx: torch.Tensor, out: torch.Tensor) -> None:
    """out[r] = source[idx[r]]; [R, H] from [S, H]."""
    torch.index_select(source, 0, idx, out=out)


def reduce_rows(
    source: torch.Tensor,
    idx: torch.Tensor,
    ptr: torch.Tensor,
    weights: torch.Tensor | None,
    groups: torch.Tensor,
    kernel: str,
) -> torch.Tensor:
    """[N, H]: out[n] = sum of weights[j] * source[idx[j]] for j in ptr[n] .. ptr[n + 1].

    `groups` [len(idx)] is the n of every j, which "index_add" needs.
    """
    if idx.numel() == 0:
        return source.new_zeros((ptr.numel() - 1, source.shape[1]))
    if kernel == "embedding_bag":
        return F.embedding_bag(
            idx, source, ptr, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
    rows = source[idx]
    if weights is not None:
        rows = rows * weights[:, None]
    out = source.new_zeros((ptr.numel() - 1, source.shape[1]))
    return out.index_add_(0, groups, rows)


def grouped_ffn(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    host_offsets: list[int],
    kernel: str,
) -> torch.Tensor:
    """SwiGLU of every slot on its own rows, [M, h] -> [M, h].

    gate_up: [S, 2 i, h], gate rows first; down: [S, h, i]; offsets: [S] int32, cumulative rows,
    on the device; host_offsets: the same on the host.
    """
    width = down.shape[2]
    if rows.shape[0] == 0:
        return torch.empty_like(rows)
    if kernel == "grouped_mm":
        both = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)
        active = F.silu(both[:, :width]).mul_(both[:, width:])
        return torch._grouped_mm(active, down.transpose(1, 2), offs=offsets)
    out = torch.empty_like(rows)
    start = 0
    for slot, end in enumerate(host_offsets):
        if end > start:
            both = rows[start:end] @ gate_up[slot].T
            active = F.silu(both[:, :width]).mul_(both[:, width:])
            torch.mm(active, down[slot].T, out=out[start:end])
        start = end
    return out


def exchange(
    received: torch.Tensor, sent: torch.Tensor, recv_splits: list[int], send_splits: list[int]
) -> None:
    """all_to_all_single with splits known on the host; nothing at all with a single rank."""
    if len(recv_splits) > 1:
        dist.all_to_all_single(received, sent, recv_splits, send_splits)


def choose(ctx: Context, shape: ExpertShape, *, ffn: str = "auto", graphs: bool = True) -> Kernels:
    """Pick the implementations for this device and shape; collective.

    ffn: "auto" tries "grouped_mm" on CUDA; "grouped_mm" and "loop" insist.
    """
    notes: list[str] = []
    if not ctx.is_cuda:
        return Kernels(ffn="loop" if ffn == "auto" else ffn, notes=("CPU: eager only",))
    picked = "loop"
    if ffn != "loop":
        problem = _try_grouped_mm(ctx, shape)
        if ctx.agree(problem == ""):
            picked = "grouped_mm"
        else:
            notes.append(f"grouped_mm not used: {problem or 'failed on another rank'}")
    reduce = "embedding_bag"
    problem = _try_bag(ctx, shape)
    if not ctx.agree(problem == ""):
        reduce = "index_add"
        notes.append(f"embedding_bag not used: {problem or 'failed on another rank'}")
    if graphs and ctx.num_ranks > 1:
        problem = _try_captured_exchange(ctx)
        graphs = ctx.agree(problem == "")
        if not graphs:
            notes.append(f"no CUDA graphs: {problem or 'failed on another rank'}")
    return Kernels(picked, reduce, graphs, tuple(notes))


def _close(got: torch.Tensor, want: torch.Tensor) -> str:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return "" if error < 0.02 else f"relative error {error:.2g} against the plain form"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _try_grouped_mm(ctx: Context, shape: ExpertShape) -> str:
    dtype = TORCH_DTYPES[shape.dtype]
    width = min(shape.moe_intermediate_size, 256)
    if width % 16 or shape.hidden_size % 16:
        return "sizes are not multiples of 16"
    generator = torch.Generator(ctx.device).manual_seed(1)

    def draw(*size: int) -> torch.Tensor:
        noise = torch.randn(*size, device=ctx.device, generator=generator)
        return (noise * size[-1] ** -0.5).to(dtype)

    rows, gate_up = draw(40, shape.hidden_size), draw(4, 2 * width, shape.hidden_size)
    down, host = draw(4, shape.hidden_size, width), [7, 7, 39, 40]
    offsets = torch.tensor(host, dtype=torch.int32, device=ctx.device)
    rows = rows * shape.hidden_size**0.5
    want = grouped_ffn(rows, gate_up, down, offsets, host, "loop")
    try:
        got = grouped_ffn(rows, gate_up, down, offsets, host, "grouped_mm")
        problem = _close(got, want)
        if problem:
            return problem
        kept: list[torch.Tensor] = []
        graph = capture(
            ctx,
            lambda: kept.append(grouped_ffn(rows, gate_up, down, offsets, host, "grouped_mm")),
        )
        kept[0].fill_(float("nan"))
        graph.replay()
        ctx.sync()
        return _close(kept[0], want)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return _first_line(error)


def _try_bag(ctx: Context, shape: ExpertShape) -> str:
    dtype = TORCH_DTYPES[shape.dtype]
    source = torch.randn(50, shape.hidden_size, device=ctx.device).to(dtype)
    idx = torch.arange(49, -1, -1, device=ctx.device)
    ptr = torch.tensor([0, 3, 3, 20, 50], device=ctx.device)
    groups = torch.repeat_interleave(torch.arange(4, device=ctx.device), ptr.diff())
    weights = torch.rand(50, device=ctx.device).to(dtype)
    want = reduce_rows(source, idx, ptr, weights, groups, "index_add")
    try:
        problem = _close(reduce_rows(source, idx, ptr, weights, groups, "embedding_bag"), want)
        if problem:
            return problem
        kept: list[torch.Tensor] = []
        graph = capture(
            ctx,
            lambda: kept.append(reduce_rows(source, idx, ptr, weights, groups, "embedding_bag")),
        )
        kept[0].fill_(float("nan"))
        graph.replay()
        ctx.sync()
        return _close(kept[0], want)
    except RuntimeError as error:
        return _first_line(error)


def _try_captured_exchange(ctx: Context) -> str:
    """A captured all-to-all with unequal splits, replayed twice on changed data."""
    size = ctx.num_ranks
    send = [1 + (ctx.rank + d) % 2 for d in range(size)]
    recv = [1 + (s + ctx.rank) % 2 for s in range(size)]
    data = torch.zeros(sum(send), 8, device=ctx.device)
    got = torch.zeros(sum(recv), 8, device=ctx.device)
    want = torch.cat([torch.full((n, 8), float(s)) for s, n in enumerate(recv)])
    try:
        exchange(got, data, recv, send)
        graph = capture(ctx, lambda: exchange(got, data, recv, send))
        for shift in (0.0, 100.0):
            data.fill_(ctx.rank + shift)
            got.fill_(float("nan"))
            graph.replay()
            ctx.sync()
            if not torch.equal(got.cpu(), want + shift):
                return "a captured all-to-all gave wrong rows"
        return ""
    except RuntimeError as error:
        return _first_line(error)
