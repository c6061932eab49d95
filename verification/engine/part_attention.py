"""Attention in vLLM's kernels, for parts.py: FlashAttention 3 over prompts and pages, and the
pieces of latent attention."""

from __future__ import annotations

from typing import Any

import torch
from part_pool import BF16, HEADS, Made, Pool, copies_of

PROMPTS = ((1, 512), (1, 2048), (1, 8192), (1, 16384), (4, 512), (16, 1024), (4, 2048), (2, 8192))
DECODES = tuple((b, c) for b in (1, 4, 16, 64, 256, 512) for c in (512, 2048, 8192, 32768))
MOST_CACHED = 1_100_000
LATENT = ((2048, 16, 0), (7168, 128, 1536), (7168, 32, 1536), (5120, 64, 1536), (7168, 16, 1536))
"""[hidden, heads, rank of the queries]; the latent has 512, rotary 64, heads 128 + 64 and 128."""


def _flash(q: Any, k: Any, v: Any, lengths: Any, queries: Any, most: tuple[int, int], **more: Any):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        max_seqlen_q=most[0],
        cu_seqlens_q=queries,
        max_seqlen_k=most[1],
        causal=True,
        fa_version=3,
        softmax_scale=q.shape[-1] ** -0.5,
        **more,
    )


def _starts(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length


def _pages(batch: int, length: int) -> torch.Tensor:
    each = -(-length // 16)
    order = torch.randperm(batch * each, device="cuda", dtype=torch.int32)
    return order.view(batch, each)


def prompts(pool: Pool) -> Made:
    """FlashAttention 3 over prompts just written to the cache."""
    for heads, kv, dim in HEADS:
        for window in (0, 128) if dim == 64 else (0,):
            for batch, length in PROMPTS:

                def make(
                    h: int = heads,
                    g: int = kv,
                    d: int = dim,
                    w: int = window,
                    b: int = batch,
                    n: int = length,
                ) -> list[Any]:
                    pool.start()
                    q = pool.take(b * n, h, d)
                    pages = pool.take(b * -(-n // 16), 2, 16, g, d)
                    k, v = pages.unbind(1)
                    lengths = torch.full((b,), n, device="cuda", dtype=torch.int32)
                    more = {
                        "seqused_k": lengths,
                        "block_table": _pages(b, n),
                        "window_size": [w - 1, 0] if w else None,
                        "out": torch.empty_like(q),
                    }
                    queries = _starts(b, n)
                    return [lambda: _flash(q, k, v, lengths, queries, (n, n), **more)] * 3

                yield "prompt", [batch, length, heads, kv, dim, window], make, True


def decodes(pool: Pool) -> Made:
    """FlashAttention 3 over pages, planned ahead with up to 32 splits as for CUDA graphs."""
    for heads, kv, dim in HEADS:
        for window in (0, 128) if dim == 64 else (0,):
            for batch, length in DECODES:
                if batch * length > MOST_CACHED or 4.0 * batch * length * kv * dim > 12e9:
                    continue
                size = [batch, length, heads, kv, dim, window]

                def make(size: tuple[int, ...] = tuple(size)) -> list[Any]:
                    return _decode_calls(pool, *size)

                yield "decode", size, make, False


def _decode_calls(pool: Pool, b: int, n: int, h: int, g: int, d: int, w: int) -> list[Any]:
    from vllm.vllm_flash_attn import get_scheduler_metadata

    pool.start()
    q = pool.take(b, h, d)
    lengths = torch.full((b,), n, device="cuda", dtype=torch.int32)
    queries, table, out = _starts(b, 1), _pages(b, n), torch.empty_like(q)
    plan = None
    if not w:
        plan = get_scheduler_metadata(
            batch_size=b,
            max_seqlen_q=1,
            max_seqlen_k=n,
            num_heads_q=h,
            num_heads_kv=g,
            headdim=d,
            cache_seqlens=lengths,
            qkv_dtype=BF16,
            cu_seqlens_q=queries,
            page_size=16,
            causal=True,
            window_size=(-1, -1),
            num_splits=32,
        )
    seen = min(n, w) if w else n
    calls = []
    for _ in range(min(copies_of(4.0 * b * seen * g * d), int(24e9 / (4 * b * n * g * d)) + 1)):
        k, v = pool.take(b * -(-n // 16), 2, 16, g, d).unbind(1)
        more = {
            "seqused_k": lengths,
            "block_table": table,
            "scheduler_metadata": plan,
            "num_splits": 32,
            "window_size": [w - 1, 0] if w else None,
            "out": out,
        }
        calls.append(lambda k=k, v=v, more=more: _flash(q, k, v, lengths, queries, (1, n), **more))
    return calls


def latent(pool: Pool) -> Made:
    """A layer of latent attention, piece by piece as vLLM runs it: products are linear layers of
    `products`' kind, measured here for their own sizes."""
    for hidden, heads, rank in LATENT:
        sizes = [(rank + 576, hidden), (heads * 192, rank)] if rank else []
        sizes += [] if rank else [(heads * 192, hidden), (576, hidden)]
        sizes += [(heads * 256, 512), (hidden, heads * 128)]
        for rows in (1, 16, 64, 256, 512, 2048, 8192, 16384):
            for cols, depth in sizes:

                def product(n: int = rows, c: int = cols, d: int = depth) -> list[Any]:
                    pool.start()
                    x = pool.take(n, d)
                    ws = [pool.take(c, d) for _ in range(copies_of(2.0 * c * d))]
                    return [lambda w=w: torch.nn.functional.linear(x, w) for w in ws]

                head = [hidden, heads, rank, rows]
                yield "latent_linear", [*head, cols, depth], product, False
            if rows > 512:
                continue

            def absorb(n: int = rows, h: int = heads) -> list[Any]:
                pool.start()
                q, o = pool.take(h, n, 128), pool.take(h, n, 512)
                pairs = [(pool.take(h, 128, 512), pool.take(h, 512, 128)) for _ in range(24)]

                def both(a: Any, b: Any) -> Any:
                    return torch.bmm(q, a), torch.bmm(o, b)

                return [lambda a=a, b=b: both(a, b) for a, b in pairs]

            yield "latent_absorb", [hidden, heads, rank, rows], absorb, False
    for heads in (16, 32, 64, 128):
        for batch, length in PROMPTS:
            if batch * length * heads * 192 > 2**30:
                continue

            def prompt(h: int = heads, b: int = batch, n: int = length) -> list[Any]:
                pool.start()
                q, k, v = (pool.take(b * n, h, d) for d in (192, 192, 128))
                at = _starts(b, n)
                return [lambda: _flash(q, k, v, None, at, (n, n), cu_seqlens_k=at)] * 3

            yield "latent_prompt", [batch, length, heads], prompt, True
        for batch, length in DECODES:
            if batch * length > MOST_CACHED:
                continue

            def decode(h: int = heads, b: int = batch, n: int = length) -> list[Any]:
                return _latent_decode(pool, b, n, h)

            yield "latent_decode", [batch, length, heads], decode, False


def _latent_decode(pool: Pool, b: int, n: int, h: int) -> list[Any]:
    from vllm.vllm_flash_attn import get_scheduler_metadata

    pool.start()
    rope, nope = pool.take(b, h, 64), pool.take(b, h, 512)
    lengths = torch.full((b,), n, device="cuda", dtype=torch.int32)
    queries, table = _starts(b, 1), _pages(b, n)
    plan = get_scheduler_metadata(
        batch_size=b,
        max_seqlen_q=1,
        max_seqlen_k=n,
        num_heads_q=h,
        num_heads_kv=1,
        headdim=64,
        cache_seqlens=lengths,
        qkv_dtype=BF16,
        headdim_v=512,
        page_size=16,
        cu_seqlens_q=queries,
        causal=True,
        num_splits=32,
    )
    calls = []
    for _ in range(min(copies_of(1152.0 * b * n), int(24e9 / (1152.0 * b * n)) + 1)):
        pages = pool.take(b * -(-n // 16), 16, 1, 576)
        more = {
            "q_v": nope,
            "seqused_k": lengths,
            "block_table": table,
            "scheduler_metadata": plan,
            "num_splits": 32,
        }
        k, v = pages[..., 512:], pages[..., :512]
        calls.append(
            lambda k=k, v=v, more=more: _flash(rope, k, v, lengths, queries, (1, n), **more)
        )
    return calls


PARTS = {"decodes": decodes, "prompts": prompts, "latent": latent}
