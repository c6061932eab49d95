"""The calls that parts.py times: vLLM's own kernels with the sizes of models that none of the
held-out steps has, each call with weights or a cache of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import part_attention
import torch
from part_pool import BF16, HEADS, HELD_ROWS, Made, Pool, copies_of

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
GEMMS = (
    (2560, 2048),
    (5120, 2048),
    (2048, 4096),
    (6144, 2048),
    (2048, 2048),
    (9216, 4096),
    (4096, 8192),
    (5120, 2880),
    (2880, 4096),
    (7168, 7168),
    (128, 2048),
    (64, 2048),
    (5632, 2048),
    (2048, 2816),
    (50304, 2048),
    (151936, 2048),
)
"""[columns, depth]: queries, keys and values; output; routers; shared experts; heads."""
EXPERTS = (
    ("OLMoE-1B-7B", 2048, 1024, 64, 8),
    ("Qwen3-235B-A22B", 4096, 1536, 128, 8),
    ("DeepSeek-V3", 7168, 2048, 256, 8),
    ("MiniMax-M2", 3072, 1536, 256, 8),
    ("Qwen3.5-35B-A3B", 2048, 512, 256, 8),
    ("PhiMoE", 4096, 6400, 16, 2),
    ("GLM-4.5", 5120, 1536, 160, 8),
    ("Qwen3-30B-A3B", 2048, 768, 128, 8),
    ("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    ("GPT-OSS-20B", 2880, 2880, 32, 4),
)
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MOST_WEIGHTS = 26e9


def load() -> None:
    """Import what is timed, before the GPU is asked for."""
    import vllm._custom_ops
    import vllm.model_executor.layers.fused_moe.fused_moe
    import vllm.vllm_flash_attn  # noqa: F401


def products(pool: Pool) -> Made:
    """x W^T as vLLM's unquantised layers do it."""
    for cols, depth in GEMMS:
        for rows in (*ROWS, 2048, 8192):
            if rows * cols > 2**30:
                continue

            def make(cols: int = cols, depth: int = depth, rows: int = rows) -> list[Any]:
                pool.start()
                x = pool.take(rows, depth)
                weights = [pool.take(cols, depth) for _ in range(copies_of(2.0 * cols * depth))]
                return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]

            yield "linear", [rows, cols, depth], make, rows >= HELD_ROWS


def small(pool: Pool) -> Made:
    """Norms, rotary embedding, cache writes, activations, choosing experts, adding."""
    ops, moe, cache = torch.ops._C, torch.ops._moe_C, torch.ops._C_cache_ops
    one = torch.ones(1, device="cuda")
    for rows in (*ROWS, 2048, 8192):
        for hidden in (2048, 2880, 4096, 7168):

            def norm(h: int = hidden, n: int = rows) -> list[Any]:
                pool.start()
                x, r, w = pool.take(n, h), pool.take(n, h), pool.take(h)
                return [lambda: ops.fused_add_rms_norm(x, r, w, 1e-6)] * 8

            yield "fused_add_rms_norm", [rows, hidden], norm, False

            def add(h: int = hidden, n: int = rows) -> list[Any]:
                pool.start()
                x, r = pool.take(n, h), pool.take(n, h)
                return [lambda: torch.add(x, r)] * 8

            yield "add", [rows, hidden], add, False
        for heads, kv, dim in (*HEADS[:4], (48, 8, 128)):

            def rotary(h: int = heads, g: int = kv, d: int = dim, n: int = rows) -> list[Any]:
                pool.start()
                q, k, table = pool.take(n, h * d), pool.take(n, g * d), pool.take(32768, d)
                at = torch.arange(n, device="cuda")
                return [lambda: ops.rotary_embedding(at, q, k, d, table, True)] * 8

            yield "rotary", [rows, heads, kv, dim], rotary, False

            def write(g: int = kv, d: int = dim, n: int = rows) -> list[Any]:
                pool.start()
                k, v = pool.take(n, g, d), pool.take(n, g, d)
                pages = pool.take(n // 16 + 1, 2, 16, g, d)
                kc, vc = pages.unbind(1)
                at = torch.arange(n, device="cuda")
                return [
                    lambda: cache.reshape_and_cache_flash(k, v, kc, vc, at, "auto", one, one)
                ] * 8

            yield "cache_write", [rows, kv, dim], write, False

            def own(h: int = heads, d: int = dim, n: int = rows) -> list[Any]:
                pool.start()
                x, w = pool.take(n * h, d), pool.take(d)
                out = torch.empty_like(x)
                return [lambda: ops.rms_norm(out, x, w, 1e-6)] * 8

            yield "head_norm", [rows, heads, dim], own, False
        for width in (1408, 2816, 6400):

            def act(i: int = width, n: int = rows) -> list[Any]:
                pool.start()
                x = pool.take(n, 2 * i)
                out = torch.empty(n, i, device="cuda", dtype=BF16)
                return [lambda: ops.silu_and_mul(out, x)] * 8

            yield "silu_and_mul", [rows, width], act, False
        for experts, k in ((32, 4), (64, 6), (128, 8), (256, 8)):

            def choose(e: int = experts, k: int = k, n: int = rows) -> list[Any]:
                pool.start()
                logits = pool.take(n, e).float()
                w = torch.empty(n, k, device="cuda")
                ids, t = (torch.empty(n, k, device="cuda", dtype=torch.int32) for _ in range(2))
                return [lambda: moe.topk_softmax(w, ids, t, logits, True, None)] * 8

            yield "topk_softmax", [rows, experts, k], choose, False

        def latent(n: int = rows) -> list[Any]:
            pool.start()
            c, r = pool.take(n, 512), pool.take(n, 64)
            pages = pool.take(n // 16 + 1, 16, 576)
            at = torch.arange(n, device="cuda")
            return [lambda: cache.concat_and_cache_mla(c, r, pages, at, "auto", one)] * 8

        yield "latent_cache_write", [rows], latent, False


def experts(pool: Pool) -> Made:
    """`fused_experts` on the local experts of a rank, over the tokens that it receives."""
    rng = np.random.default_rng(0)
    cases = [
        (model, tokens, group, load)
        for model in EXPERTS
        for tokens in EXPERT_TOKENS
        for group in (1, 2, 4, 8, 16)
        for load in ("uniform", "skewed", "same")
        if load != "same" or group == 1
    ]
    for number in rng.permutation(len(cases)):
        (name, hidden, width, total, k), tokens, group, load = cases[number]
        local = max(1, total // group)
        if local < min(k, 2) or local * 6.0 * hidden * width > MOST_WEIGHTS:
            continue
        ids, rows = chosen(int(number), tokens, total, k, local, load)
        if not rows:
            continue
        count = torch.bincount(ids[ids >= 0], minlength=local)
        sizes = [name, hidden, width, tokens, group, load, rows, k, count.tolist()]

        def make(
            ids: Any = ids, hidden: int = hidden, width: int = width, local: int = local
        ) -> list[Any]:
            return _expert_calls(pool, ids, hidden, width, local)

        yield "experts", sizes, make, rows >= HELD_ROWS


def chosen(
    seed: int, tokens: int, total: int, k: int, local: int, load: str
) -> tuple[torch.Tensor, int]:
    """[rows, K] local experts of the tokens that a rank receives, -1 elsewhere; and the rows."""
    if load == "same":
        ids = torch.arange(k, device="cuda").expand(tokens, k)
    else:
        share = torch.ones(total, device="cuda")
        if load == "skewed":
            own = np.random.default_rng(seed).gamma(1.5, size=total) + 0.05
            share = torch.tensor(own, device="cuda", dtype=torch.float32)
        noise = torch.empty(tokens, total, device="cuda").exponential_()
        ids = torch.topk(share / noise, k, dim=1).indices
    ids = torch.where(ids < local, ids, -1)
    ids = ids[(ids >= 0).any(dim=1)]
    return ids, len(ids)


def _expert_calls(pool: Pool, ids: Any, hidden: int, width: int, local: int) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    pool.start()
    rows, k = ids.shape
    masked = bool((ids < 0).any())
    where = torch.arange(local + 1, device="cuda", dtype=torch.int32)
    where[local] = -1
    picked = torch.where(ids < 0, local, ids).int()
    x = pool.take(rows, hidden)
    share = torch.full((rows, k), 1.0 / k, device="cuda")
    each = 6.0 * hidden * width * len(torch.unique(ids[ids >= 0]))
    copies = max(1, min(copies_of(each, 6), int(MOST_WEIGHTS / (6.0 * hidden * width * local))))
    weights = [
        (pool.take(local, 2 * width, hidden), pool.take(local, hidden, width))
        for _ in range(copies)
    ]

    def run(w1: Any, w2: Any) -> Any:
        return fused_experts(
            x,
            w1,
            w2,
            share,
            picked,
            global_num_experts=local + 1 if masked else local,
            expert_map=where if masked else None,
        )

    return [lambda a=a, b=b: run(a, b) for a, b in weights]


PARTS = {
    "products": products,
    "small": small,
    "experts": experts,
    **part_attention.PARTS,
}
