"""Calibration of the grouped SwiGLU, alone and in the company of the layer around it.

A grouped FFN repeated without a pause draws more power than a layer does, which spends half its
time moving rows, and a GPU at its power limit lowers its clock: the bare kernel would be measured
slower than a layer sees it. The cases that the expert model is fitted to are therefore whole
synthetic layers in CUDA graphs, less the same layers without experts. `ffn_alone` has the bare
kernel for comparison, and for what a call costs outside of a graph. Without graphs the host's time
would drown the difference, and the bare kernel is all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from moesim.replay.calibrate_experts import SKEW_MARGIN, draw, ffn_body
from moesim.replay.ops import TORCH_DTYPES, exchange, gather_rows, reduce_rows
from moesim.replay.process import Context
from moesim.replay.routing import company_rows
from moesim.replay.shape import ExpertShape
from moesim.replay.timing import Body, issue_us
from moesim.types import IntArray, stream

if TYPE_CHECKING:
    from moesim.replay.session import Session

MEAN_TOKENS = (0.25, 1, 4, 16, 48, 96, 128, 160, 256, 384, 768, 1536, 3072, 6144)
ALONE_TOKENS = (4, 96, 1536)
LOADS = ((1.0, 0.2), (1.0, 0.8), (0.5, 0.4))
NUM_ROLLS = 8
LAST_STEP = 1.2


def drawn_counts(rows: int, num_slots: int, share: float, skew: float, seed: int = 0) -> IntArray:
    """[num_slots] rows of each expert: `rows` draws from popularities that fall off as rank to the
    power -skew over `share` of the experts, in random order; the others get none."""
    random = stream(rows, num_slots, round(share * 100), round(skew * 100), seed)
    active = max(1, round(share * num_slots))
    popularity = np.zeros(num_slots)
    popularity[:active] = 1.0 / np.arange(1, active + 1) ** skew
    popularity = random.permutation(popularity / popularity.sum())
    return random.multinomial(rows, popularity)


def measure_ffn(session: Session) -> None:
    """Each shape: mean rows a slot x loads in company; a few alone, also in eager mode."""
    for shape in session.options.shapes:
        _measure_shape(session, shape)
        if session.ctx.is_cuda:
            torch.cuda.empty_cache()


class Company:
    """What a layer does around its experts, every rank alike (`moesim.replay.engine`): rows are
    gathered, exchanged and expanded; afterwards summed, exchanged and summed again.

    rows: expert rows of every rank. expanded: [rows, h], what the experts read.
    """

    def __init__(self, ctx: Context, shape: ExpertShape, rows: int, kernel: str) -> None:
        self.ctx, self.kernel = ctx, kernel
        size = ctx.num_ranks
        self.own, self.sent = company_rows(rows, shape.top_k, size)
        each = self.sent // max(size - 1, 1)
        self.splits = [0 if peer == ctx.rank else each for peer in range(size)]
        arrived = self.own + self.sent
        dtype, width = TORCH_DTYPES[shape.dtype], shape.hidden_size
        self.home = draw(ctx, (self.own, width), 1.0, dtype)
        self.travelling = draw(ctx, (self.sent + arrived, width), 1.0, dtype)
        self.returned = draw(ctx, (arrived, width), 1.0, dtype)
        self.expanded = draw(ctx, (rows, width), 1.0, dtype)
        self.pack_idx = torch.arange(arrived, device=ctx.device) % self.own
        self.expand_idx = self._shuffled(rows, arrived)
        self.sums = self._groups(rows, arrived, dtype)
        self.home_sums = self._groups(arrived, self.own, dtype)

    def before(self) -> torch.Tensor:
        """Up to the rows that the experts read."""
        gather_rows(self.home, self.pack_idx, self.travelling[self.sent :])
        self._exchange(self.travelling[: self.sent], self.travelling[self.sent + self.own :])
        gather_rows(self.travelling[: self.sent + self.own], self.expand_idx, self.expanded)
        return self.expanded

    def after(self, results: torch.Tensor) -> torch.Tensor:
        """From the rows that the experts wrote; [tokens, h]."""
        summed = reduce_rows(results, *self.sums, self.kernel)
        self.returned[: self.own].copy_(summed[self.sent :])
        self._exchange(self.returned[self.own :], summed[: self.sent])
        return reduce_rows(self.returned, *self.home_sums, self.kernel)

    def alone(self, _: int) -> torch.Tensor:
        """The layer without experts."""
        return self.after(self.before())

    def around(self, experts: Callable[[int], torch.Tensor]) -> Body:
        """The layer with experts that read `expanded`."""

        def body(i: int) -> torch.Tensor:
            self.before()
            return self.after(experts(i))

        return body

    def _exchange(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if self.sent:
            exchange(to, source, self.splits, self.splits)

    def _shuffled(self, many: int, few: int) -> torch.Tensor:
        """[many] numbers below `few`, as evenly often as can be."""
        order = stream(many).permutation(many) % few
        return torch.from_numpy(order).to(self.ctx.device)

    def _groups(
        self, many: int, few: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of `many` rows into `few`: rows in order of their sum, where each sum starts, ones
        as weights, and the sum of every row."""
        device = self.ctx.device
        idx = self._shuffled(many, few).argsort(stable=True)
        size = torch.bincount(torch.arange(many, device=device) % few, minlength=few)
        ptr = torch.nn.functional.pad(size.cumsum(0), (1, 0))
        groups = torch.arange(few, device=device).repeat_interleave(size)
        return idx, ptr, torch.ones(many, dtype=dtype, device=device), groups


def _measure_shape(session: Session, shape: ExpertShape) -> None:
    ctx, recorder, kernel = session.ctx, session.recorder, session.kernels.ffn
    num_local = max(1, -(-shape.num_experts // ctx.num_ranks))
    dtype = TORCH_DTYPES[shape.dtype]
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    weights = [
        (
            draw(ctx, (num_local, 2 * width, hidden), hidden**-0.5, dtype),
            draw(ctx, (num_local, hidden, width), width**-0.5, dtype),
        )
        for _ in range(2)
    ]
    for mean in _means(session, shape, num_local):
        rows = max(1, int(mean * num_local))
        company = Company(ctx, shape, rows, session.kernels.reduce)
        graphs = session.kernels.graphs
        without = recorder.median_us(company.alone) if graphs else 0.0
        for share, skew in LOADS:
            counts = drawn_counts(rows, num_local, share, skew)
            row = {
                "shape": shape.name,
                "hidden": hidden,
                "intermediate": width,
                "dtype": shape.dtype,
                "kernel": kernel,
                "local_experts": num_local,
                "active": int((counts > 0).sum()),
                "tokens": rows,
                "max_tokens": int(counts.max()),
                "skew": skew,
                "counts": counts.tolist(),
            }
            offsets = _rolled(ctx, counts)
            hosts = [o.tolist() for o in offsets]
            bare = ffn_body(weights, [company.expanded], offsets, hosts, kernel)
            recorder.time(
                "ffn",
                row,
                company.around(bare) if graphs else bare,
                per_round=2 * NUM_ROLLS,
                modes=recorder.modes[:1],
                less_us=without,
            )
            if mean in ALONE_TOKENS and (share, skew) == LOADS[0]:
                recorder.time("ffn_alone", row, bare, per_round=2 * NUM_ROLLS)
            if mean == ALONE_TOKENS[0] and (share, skew) == LOADS[0]:
                what = {"what": "expert FFN, host time to enqueue", "shape": shape.name}
                recorder.value("launch", what, issue_us(ctx, bare))


def _means(session: Session, shape: ExpertShape, num_local: int) -> list[float]:
    """Mean rows a slot, up to what the largest batch brings to the busiest GPU."""
    most = session.options.max_tokens_per_rank * shape.top_k
    largest = most * (SKEW_MARGIN if session.ctx.num_ranks > 1 else 1.0) / num_local
    asked = session.options.ffn_rows
    means = [float(n) for n in asked or MEAN_TOKENS if n <= largest] or [largest]
    if asked:
        return means
    if largest > means[-1] * LAST_STEP:
        means.append(largest)
    return means


def _rolled(ctx: Context, counts: IntArray) -> list[torch.Tensor]:
    """Offsets of the counts, shifted so that repeated calls read other experts' weights."""
    step = max(1, len(counts) // NUM_ROLLS)
    rolled = [np.cumsum(np.roll(counts, j * step)).astype(np.int32) for j in range(NUM_ROLLS)]
    return [torch.from_numpy(offsets).to(ctx.device) for offsets in rolled]
