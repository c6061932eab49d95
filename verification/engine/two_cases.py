"""The models, placements and steps measured on two GPUs.

Plain Python, so that the script on the GPU machine reads it too.
"""

from __future__ import annotations

from cases import Case

MAX_BATCH_TOKENS = 16384
MAX_SEQUENCES = 512
MAX_MODEL_LEN = 4096
MEMORY_FRACTION = 0.85
ROUNDS = 10
STEPS = 8
WARM_STEPS = 2
PLACEMENTS = ("linear", "eplb", "time", "balance", "bad")
"""vLLM's own order, EPLB, ours by time, ours by balance, the busiest experts together. With
redundant slots each is named with "+"."""
MODELS = ("dsv2-lite", "gpt-oss-20b", "qwen3-30b")
REDUNDANT = {"dsv2-lite": 8, "qwen3-30b": 16}
"""Slots of a layer beyond one for each expert: an eighth. vLLM 0.23 has no balancer for GPT-OSS."""
MODES = {
    "dp": {"tp": 1, "dp": 2, "moe_comm": "all_gather"},
    "tp": {"tp": 2, "dp": 1, "moe_comm": "all_reduce"},
}
"""DP2 + EP2: each rank has requests of its own; TP2 + EP2: both ranks have all tokens."""
PREFILL = tuple(Case("prefill", n, 1024) for n in (4, 8, 16))
DECODE = tuple(Case("decode", n, 512) for n in (8, 32, 128, 512))
"""Requests per rank under DP, of both ranks together under TP."""
CASES = (*DECODE, *PREFILL)
PROFILED = (PREFILL[2], DECODE[2])


def names(redundant: bool) -> tuple[str, ...]:
    """Names of the placements."""
    return tuple(n + "+" for n in PLACEMENTS) if redundant else PLACEMENTS


def context_of(case: Case) -> int:
    """Cached tokens per sequence in the middle of a decode case's timed steps."""
    return case.prompt + ROUNDS * STEPS * len(PLACEMENTS) // 2
