"""The router's answer on the GPU: one Triton kernel, the same in every layer, safe to capture.

Everything that changes from step to step (rows, number of real tokens, whether to count) is read
from device memory when the kernel runs, so that a captured CUDA graph replays it rightly.
"""

from __future__ import annotations

from typing import Any

REAL, COUNTING, FIRST = 0, 1, 2
"""Places in the rows buffer: tokens of this step, whether to count, the first row."""
_BLOCK = 256
_compiled: list[Any] = []


def _kernels() -> Any:
    if _compiled:
        return _compiled[0]
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["n"])
    def route(table, rows, ids, weights, n, share, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n * K
        real = tl.load(rows)
        token = i // K
        token = tl.where(real > 0, tl.minimum(token, real - 1), token)
        row = tl.load(rows + 2 + token, mask=mask, other=0).to(tl.int64)
        expert = tl.load(table + row * K + i % K, mask=mask, other=0)
        tl.store(ids + i, expert.to(ids.dtype.element_ty), mask=mask)
        tl.store(weights + i, tl.zeros([BLOCK], tl.float32) + share, mask=mask)

    @triton.jit(do_not_specialize=["n"])
    def count(ids, rows, counts, n, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        wanted = (i < n * K) & (i // K < tl.load(rows)) & (tl.load(rows + 1) != 0)
        slot = tl.load(ids + i, mask=wanted, other=0)
        tl.atomic_add(counts + slot.to(tl.int64), 1, mask=wanted)

    _compiled.append((triton, route, count))
    return _compiled[0]


def route_on_gpu(table: Any, rows: Any, ids: Any, weights: Any) -> None:
    """Fill `ids` and `weights` [n, K] from `table` [T, K] by `rows`. Padding tokens repeat the last
    real one's experts, so that they wake no other expert."""
    triton, route, _ = _kernels()
    n, top_k = ids.shape
    grid = (triton.cdiv(n * top_k, _BLOCK),)
    route[grid](table, rows, ids, weights, n, 1.0 / top_k, K=top_k, BLOCK=_BLOCK)


def count_on_gpu(ids: Any, rows: Any, counts: Any) -> None:
    """Add the real tokens' `ids` [n, K] to `counts` [P] where counting is on."""
    triton, _, count = _kernels()
    n, top_k = ids.shape
    count[(triton.cdiv(n * top_k, _BLOCK),)](ids, rows, counts, n, K=top_k, BLOCK=_BLOCK)
